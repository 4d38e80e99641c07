"""Conversations that hold more than a text a turn: parts of text, tools, and calls of tools.

The scripts import this file where `jobs` lies beside their directory; alone they refuse such rows.
The chat template gets the conversation as it stands in the file. What comes back is looked at: a
call, a tool or a part that the template leaves out is refused, not silently left unlearned.
"""

import json
from collections import Counter
from itertools import product
from pathlib import Path

from transformers.utils import cached_file

# For templates that know parts alone: a turn's text becomes one.
AS_PARTS = """{%- set ours = namespace(turns=[]) -%}
{%- for turn in messages -%}
{%- set is_text = turn.content is string -%}
{%- set parts = [{'type': 'text', 'text': turn.content}] if is_text else turn.content -%}
{%- set ours.turns = ours.turns + [dict(turn, content=parts)] -%}
{%- endfor -%}
{%- set messages = ours.turns -%}
"""
PYTHON = {"true": "True", "false": "False", "null": "None"}  # as some templates write these
CALLS, LINKS = "tool_calls", ("tool_calls", "tool_call_id")


def find_template(name, tokenizer, say):
    """Take the template from where it may lie besides; one that takes parts alone gets parts."""
    quiet = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    # Of models that see, it may stand in their processor's file alone.
    quiet, has_none = dict.fromkeys(quiet, False), tokenizer.chat_template is None
    if has_none and (file := cached_file(name, "chat_template.json", **quiet)):
        tokenizer.chat_template = json.loads(Path(file).read_text("utf-8"))["chat_template"]
        say("template", file)
    if shown(tokenizer, "\0") is False and shown(tokenizer, [part("\0")]):
        tokenizer.chat_template = AS_PARTS + tokenizer.chat_template


def shown(tokenizer, content):
    """Whether the template shows a user's turn; None where it takes no such turn."""
    try:
        turns = [{"role": "user", "content": content}]
        return "\0" in tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # there may be no template, or one that asks for more
        return None


def part(text):
    return {"type": "text", "text": text}


def plain(row, tokenizer):
    """Return the row with a text a turn, and the tokenizer whose template gets the rest as well.

    Raises ValueError for parts that are no text, and for what the template leaves out.
    """
    tools = without_nulls(read(row.get("tools") or None))
    chats = {name: row.get(name) for name in ("messages", "prompt", "chosen", "rejected")}
    turned = {name: [*map(one_text, chat)] for name, chat in chats.items() if is_chat(chat)}
    if "messages" not in turned:
        return row | turned, tokenizer
    turns = turned["messages"]
    is_more = [turn.get(CALLS) or texts(turn) or turn.get("role") == "tool" for turn in turns]
    if not tools and not any(is_more):
        return row | turned, tokenizer
    plain_turns = [as_text(turn) for turn in turns]
    row = {name: value for name, value in row.items() if name != "tools"}
    row["messages"] = plain_turns
    problems = []
    for join, form in product((lambda turn: turn, as_joined), (read, write)):
        given = [with_arguments(join(turn), form) for turn in turns]
        renderer = WithTools(tokenizer, plain_turns, given, tools)
        try:
            renderer.apply_chat_template(plain_turns, tokenize=False)
        except Exception as error:  # a template can raise anything
            problems.append(error)
        else:
            return row, renderer
    raise problems[0]


class WithTools:
    """A tokenizer whose chat template gets the turns as they stand in the file, and the tools."""

    def __init__(self, tokenizer, texts, turns, tools):
        self.tokenizer, self.texts, self.turns, self.tools = tokenizer, texts, turns, tools

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **options):
        return self.tokenizer(*args, **options)

    def apply_chat_template(self, messages, **options):
        turns, render = [*messages], self.tokenizer.apply_chat_template
        for number, text in enumerate(self.texts[: len(turns)]):
            if turns[number] == text:
                turns[number] = self.turns[number]
        result = render(turns, tools=self.tools, **options)
        for text in (text for turn in turns for text in texts(turn)):
            if text.strip() not in result or "[{'type'" in result:
                raise ValueError(f"the chat template leaves out {text[:60]!r} of a turn's parts.")
        said = [turn.get("content") for turn in turns if turn.get("role") == "tool"]
        for text in (text for text in said if isinstance(text, str)):
            if not any(form in result for form in forms_of(text)):
                raise ValueError(f"the chat template leaves out {text[:60]!r}, which a tool said.")
        try:  # what stands there without them may hold a short name or a number by chance
            without = render([{**turn, CALLS: None} for turn in turns], **options)
        except Exception:  # it may refuse a turn without any content
            without = ""
        for word, count in Counter(words_of(turns, self.tools)).items():
            if max(result.count(form) - without.count(form) for form in forms_of(word)) < count:
                raise ValueError(f"the chat template leaves out {word[:60]!r} of tools or calls.")
        return result


def forms_of(word):
    """A word as templates may write it: as it is, in JSON, in Python."""
    forms = {word.strip(), PYTHON.get(word, word), json.dumps(word)[1:-1]}
    return forms | {json.dumps(word, ensure_ascii=False)[1:-1]}


def words_of(turns, tools):
    """What must be found where these turns and tools are written: names, values as JSON."""
    words = [tool.get("function", tool)["name"] for tool in tools or ()]
    for call in (call for turn in turns for call in turn.get(CALLS) or ()):
        call = call.get("function", call)
        words += [call["name"], *leaves(read(call.get("arguments")))]
    return [word if isinstance(word, str) else json.dumps(word) for word in words]


def is_chat(turns):
    return isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)


def texts(turn):
    """The texts of a turn whose content is a list of parts, which must be texts; else none."""
    if not isinstance(turn.get("content"), list):
        return []
    for piece in turn["content"]:
        if not isinstance(piece, dict) or not isinstance(piece.get("text"), str):
            raise ValueError(f"a turn's parts must be text, found {str(piece)[:60]}.")
    return [piece["text"] for piece in turn["content"]]


def one_text(turn):
    """The turn, with its text where its content is a list of one part."""
    return {**turn, "content": texts(turn)[0]} if len(texts(turn)) == 1 else turn


def as_joined(turn):
    return {**turn, "content": "".join(texts(turn))} if texts(turn) else turn


def as_text(turn):
    """The turn as the scripts look at it: role, and a text that is empty only where it is."""
    rest = {name: value for name, value in as_joined(turn).items() if name not in LINKS}
    if turn.get("role") == "tool":
        rest.pop("name", None)
    return rest if rest.get("content") or not turn.get(CALLS) else {**rest, "content": CALLS}


def with_arguments(turn, form):
    """The turn, the arguments of its calls in this form, and an empty text instead of none."""
    if not turn.get(CALLS):
        return turn
    calls = []
    for call in read(turn[CALLS]):
        inner = call.get("function", call)
        problem = "an argument is null, as Parquet fills up: write the arguments as a JSON text."
        if None in leaves(inner.get("arguments") or {}):
            raise ValueError(problem)
        inner = {**inner, "arguments": form(inner.get("arguments") or {})}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return {**turn, CALLS: calls, "content": turn.get("content") or ""}


def read(value):
    """What a JSON text says: tools, calls and arguments are often stored as such."""
    return json.loads(value) if isinstance(value, str) else value


def write(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def without_nulls(value):
    """What Parquet fills up, so that all rows have the same names, says nothing about a tool."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def leaves(value):
    """The names and values in arguments, as a flat list."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for item in pair for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]
