"""What a chat template marks with {% generation %}, beside what is learned here.

Such marks say which text of a conversation is to carry the loss. The scripts do not need them:
they learn what stands behind the prompt that generation gives, to its end. This file compares, so
that nobody who has marked less, or more, trains on something else in silence.
"""

import re

import chat_turns
from model_text import chat_pieces
from transformers.utils.chat_template_utils import render_jinja_template

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def plain(row, tokenizer):
    """As chat_turns.plain; raises ValueError where a template marks other text than is learned."""
    row, asked = chat_turns.plain(row, tokenizer)
    if MARK.search(str(tokenizer.chat_template)):
        template = asked.get_chat_template(tools=tools_of(asked))  # of several, the one in use
        for turns in conversations(row) if MARK.search(template) else ():
            compare(turns, asked, template)
    return row, asked


def tools_of(tokenizer):
    return getattr(tokenizer, "tools", None) or None


def conversations(row):
    """The conversations of a row that have answers to learn."""
    if isinstance(row.get("messages"), list):
        return [row["messages"]]
    if "instruction" in row and "output" in row:
        texts = {"user": row["instruction"], "assistant": row["output"]}
        return [[{"role": role, "content": text} for role, text in texts.items()]]
    prompt, answers = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if not all(isinstance(answer, list) for answer in answers):
        return []
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    return [turns if turns[: len(asked)] == asked else [*asked, *turns] for turns in answers]


def compare(turns, tokenizer, template):
    """Look at each answer: all of it must stand in marks, and before the first one nothing else."""
    pieces = [piece for example in chat_pieces(turns, tokenizer) for piece in example]
    stops = [n for n, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
    for stop, (answer, learned) in zip(stops, pieces[1::2], strict=True):
        text, marked = marked_text(turns[:stop], tokenizer, template)
        start = len(text) - len(answer)
        ends = [end for _, end in marked if end <= start]
        if stop == stops[0] and ends:
            raise ValueError(
                f"{{% generation %}} marks what is no answer: {text[: ends[-1]]!r:.80}."
            )
        inside = {i for begin, end in marked for i in range(max(begin, start), end)}
        lost = "".join(text[i] for i in range(start, len(text)) if i not in inside).strip()
        if learned and lost:
            raise ValueError(f"{{% generation %}} leaves out {lost!r:.80}, which is learned here.")


def marked_text(turns, tokenizer, template):
    """Return (text, [(start, end) of each marked part]) of a conversation."""
    turns = tokenizer.in_full(turns) if hasattr(tokenizer, "in_full") else turns
    given = {"tools": tools_of(tokenizer), **tokenizer.special_tokens_map}
    texts, marked = render_jinja_template(
        [turns], chat_template=template, return_assistant_tokens_mask=True, **given
    )
    return texts[0], marked[0]
