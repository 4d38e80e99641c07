"""Conversations that hold more than a text a turn: parts of text, tools, and calls of tools.

The scripts import this file where `jobs` lies beside their directory; alone they refuse such rows.
Parts are joined; tools and calls go to the chat template. What comes back is looked at: a call, an
argument or a tool that the template leaves out is refused, not silently left unlearned.
"""

import json
import os
from collections import Counter
from pathlib import Path

from model_text import CHAT_TEMPLATE
from run_common import check
from template_day import find_day
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
CALLS = "tool_calls"
PYTHON = {"true": "True", "false": "False", "null": "None"}  # as some templates write these
FORMS = {}  # of a template: how it takes a call's arguments


# ---- The template ----


def find_template(name, asked, tokenizer, say, given=CHAT_TEMPLATE):
    """Where none was `asked` for and ours was set, take one that stands in a processor's file.

    A template that takes parts alone gets the text of each turn as one. `given` is the script's
    own, which may have been edited.
    """
    command = f"python ../generate_text/convert_tokenizer.py --model_name_or_path {name}"
    remedy = f"Convert it once: {command} --output_dir NEW, and use NEW."
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(inner, "fix_mistral_regex", None) is False:  # transformers suspects it
        text = "It's WE'LL 1234567  Émile, ｱＡＢ2026年鬱😀\n\n\n"
        mended = type(tokenizer).from_pretrained(name, fix_mistral_regex=True)
        is_right = mended(text)["input_ids"] == tokenizer(text)["input_ids"]
        check(is_right, f"{name}'s tokenizer splits numbers otherwise than its makers do. {remedy}")
    quiet = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    quiet, is_ours = dict.fromkeys(quiet, False), str(tokenizer.chat_template)
    is_ours = not asked and is_ours.endswith(given)
    if not asked and not is_ours and given != CHAT_TEMPLATE:
        say("template", "the model's own; the edited one is used with --chat_template alpaca")
    if is_ours and (file := cached_file(name, "chat_template.json", **quiet)):
        found = json.loads(Path(file).read_text("utf-8")).get("chat_template")
        if isinstance(found, str):
            tokenizer.chat_template = found
            say("template", file)
    parts = [{"type": "text", "text": "\0"}]
    if shows(tokenizer, "\0") is False and shows(tokenizer, parts):
        template = tokenizer.chat_template
        templates = template if isinstance(template, dict) else {"": template}
        given = {key: AS_PARTS + text for key, text in templates.items()}
        tokenizer.chat_template = given if isinstance(template, dict) else given[""]
    find_day(tokenizer, say)


def shows(tokenizer, content):
    """Whether the template shows a user's turn; None where it takes no such turn."""
    try:
        turns = [{"role": "user", "content": content}]
        return "\0" in tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # it may ask for more
        return None


# ---- Rows ----


def plain(row, tokenizer):
    """Return the row with a text a turn, and the tokenizer whose template gets the rest as well.

    Raises ValueError for parts that are no text, and for what cannot be read.
    """
    names = ("prompt", "chosen", "rejected") if "chosen" in row else ("messages",)
    chats = {name: row[name] for name in names if is_chat(row.get(name))}
    row = row | {name: [joined(turn) for turn in chat] for name, chat in chats.items()}
    if "messages" not in chats:
        return row, tokenizer
    tools, turns = read_list("tools", row.pop("tools", None)), row["messages"]
    turns = [with_calls(turn) for turn in turns]
    row["messages"] = [as_text(turn) for turn in turns]
    if not tools and row["messages"] == turns:
        return row, tokenizer
    if any(turn.get(CALLS) for turn in turns):
        form = form_of_arguments(tokenizer)
        turns = [in_form(turn, form) for turn in turns]
    return row, WithTools(tokenizer, row["messages"], turns, tools)


def is_chat(turns):
    return isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)


def joined(turn):
    """The turn with a text as content where that was a list of texts."""
    parts = turn.get("content")
    if not isinstance(parts, list):
        return turn
    for part in parts:
        is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
        other = {} if not is_text else {n: v for n, v in part.items() if n not in ("type", "text")}
        if not is_text or part.get("type", "text") != "text" or any(other.values()):
            raise ValueError(f"a turn's parts must be text, found {str(part)[:60]}.")
    return {**turn, "content": "".join(part["text"] for part in parts)}


def read_list(name, value):
    """A list of objects that may stand there as JSON, whole or one by one."""
    is_json = isinstance(value, str)
    try:
        value = json.loads(value) if is_json else value
        items = [json.loads(v) if isinstance(v, str) else v for v in value or []]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must be a list of objects, or that as JSON: {error}.") from None
    if not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{name} must be a list of objects, found {str(value)[:60]}.")
    if any(not isinstance(inner(item).get("name"), str) for item in items):
        raise ValueError(f"{name}: one has no name, found {str(value)[:60]}.")
    return items if is_json or name == CALLS else [without_nulls(item) for item in items]


def without_nulls(value):
    """What Parquet fills up, so that all rows have the same names, says nothing about a tool."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def with_calls(turn):
    """The turn with its calls as objects, and their arguments, too."""
    if not (calls := read_list(CALLS, turn.get(CALLS))):
        return turn
    done = []
    for call in calls:
        given, name = inner(call).get("arguments") or {}, inner(call)["name"]
        is_json = isinstance(given, str) or isinstance(turn[CALLS], str)
        if not is_json and None in leaves(given):
            problem = "null, as Parquet fills up. Write the arguments as a JSON text"
            raise ValueError(f"an argument of {name} is {problem}.")
        try:
            given = json.loads(given) if isinstance(given, str) else given
        except ValueError:
            raise ValueError(f"the arguments of {name} are no JSON: {given[:60]}.") from None
        done.append(with_arguments(call, given))
    return {**turn, CALLS: done, "content": turn.get("content") or ""}


def as_text(turn):
    """The turn as the scripts look at it: role, and a text that is empty only where it is."""
    if not turn.get(CALLS) and turn.get("role") != "tool":
        return turn
    links = (CALLS, "tool_call_id", "name" if turn["role"] == "tool" else "")
    rest = {name: value for name, value in turn.items() if name not in links}
    return rest if rest.get("content") or not turn.get(CALLS) else {**rest, "content": CALLS}


def form_of_arguments(tokenizer):
    """How this template takes a call's arguments: as an object, or as a JSON text."""
    template = str(tokenizer.chat_template)  # several may have names
    if template not in FORMS:
        tool = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}
        call = {"name": "f", "arguments": {"k": "value", "b": True}}
        call = {"id": "abcdefghi", "type": "function", "function": call}
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
        found = None
        for form in ("text", "object"):  # the last one that can be
            turns[1] = in_form({**turns[1], CALLS: [call]}, form)
            try:
                tools = [{"type": "function", "function": tool}]
                text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
            except Exception:  # it may not take arguments of this kind
                continue
            is_twice, is_python = '"{' in text, "{'k'" in text
            if "value" in text and not (is_twice or is_python):
                found = form
        FORMS[template] = found
    if not FORMS[template]:
        raise ValueError("the chat template leaves out calls of tools, or their arguments.")
    return FORMS[template]


def in_form(turn, form):
    if not turn.get(CALLS) or form == "object":
        return turn
    texts = [json.dumps(inner(call)["arguments"], ensure_ascii=False) for call in turn[CALLS]]
    return {**turn, CALLS: [*map(with_arguments, turn[CALLS], texts)]}


def inner(call):
    """What names a tool or a call: it may stand in a field of its own."""
    return call.get("function", call)


def with_arguments(call, given):
    own = {**inner(call), "arguments": given}
    return {**call, "function": own} if "function" in call else own


# ---- What the template makes of them ----


class WithTools:
    """A tokenizer whose chat template gets the calls of the turns, and the tools."""

    def __init__(self, tokenizer, shown, turns, tools):
        self.tokenizer, self.shown, self.turns, self.tools = tokenizer, shown, turns, tools

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **options):
        return self.tokenizer(*args, **options)

    def in_full(self, messages):
        """The turns of a conversation with their calls."""
        pairs = zip(messages, self.shown, self.turns, strict=False)
        turns = [full if turn == shown else turn for turn, shown, full in pairs]
        return turns + messages[len(turns) :]

    def apply_chat_template(self, messages, **options):
        turns = self.in_full(messages)
        result, tools = self.render(turns, options, must=True), self.tools
        bare = [{name: value for name, value in turn.items() if name != CALLS} for turn in turns]
        without = self.render(bare, options)
        self.compare(result, without, [w for turn in turns for w in words_of(turn)], "calls")
        names = [inner(tool)["name"] for tool in tools]
        none = self.render(bare, {**options, "tools": None})
        self.compare(without or result, none, names, "tools")
        said = [turn.get("content") for turn in turns if turn.get("role") == "tool"]
        said = [text for text in said if isinstance(text, str)]
        self.compare(result, "", said, "what tools said")
        if turns and turns[-1].get(CALLS):  # what is said beside a call
            before = self.render(turns[:-1], options)
            start = len(os.path.commonprefix([before, result]))  # noqa: RUF071 -- of texts
            self.compare(result[start:], "", [turns[-1]["content"]], "what is said beside calls")
        return result

    def render(self, turns, options, must=False):
        try:
            given = {"tools": self.tools or None, **options}
            return self.tokenizer.apply_chat_template(turns, **given)
        except Exception:  # without a call, it may refuse a turn
            if must:
                raise
            return ""

    def compare(self, text, without, words, what):
        """Refuse a text that has these words less often than the turns, beside what it had."""
        for word, count in Counter(words).items():
            if max(text.count(form) - without.count(form) for form in forms_of(word)) < count:
                raise ValueError(f"the chat template leaves out {word[:60]!r} of {what}.")


def words_of(turn):
    """What must be found where a turn's calls are written: names, and values as JSON."""
    words = []
    for call in map(inner, turn.get(CALLS) or ()):
        given = call["arguments"]
        given = json.loads(given) if isinstance(given, str) else given
        words += [call["name"], *leaves(given)]
    return [word if isinstance(word, str) else json.dumps(word) for word in words]


def forms_of(word):
    """A word as templates may write it: as it is, in JSON, in Python."""
    forms = {word.strip(), PYTHON.get(word, word), json.dumps(word)[1:-1], repr(word)[1:-1]}
    return forms | {json.dumps(word, ensure_ascii=False)[1:-1]}


def leaves(value):
    """The names and values in arguments, as a flat list."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for item in pair for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]
