"""What a chat template marks with {% generation %} is what is learned, or the row is refused.

TRL ships the published templates with marks set by its authors: an independent word on what to learn.
"""

from pathlib import Path

import chat_marks
import chat_turns
import pytest
import trl
from conftest import ROOT, load_script, make_tokenizer, write_jsonl

TRAIN = load_script(ROOT / "finetune_full" / "finetune_full.py")
MARKED = sorted(Path(trl.__file__).parent.glob("chat_templates/*_training.jinja"))
THOUGHT = "<think>\nlong thought\n</think>\n\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


ROWS = {
    "one answer": [user("hi"), assistant("Hello you")],
    "two answers": [user("hi"), assistant("Hello you"), user("more"), assistant("Again yes")],
    "a system turn": [{"role": "system", "content": "be"}, user("hi"), assistant("Hello you")],
    "a thought": [user("hi"), assistant(THOUGHT + "Hello you")],
    "a thought aside": [user("hi"), assistant("Hello you", reasoning_content="long thought")],
    "an answer first": [assistant("Welcome"), user("hi"), assistant("Hello you")],
}


def tokenizer_of(template):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = template
    chat_turns.find_template("", None, tokenizer, print)
    return tokenizer


def test_what_is_learned_is_what_others_marked():
    """In six kinds of rows; not every template takes every kind."""
    agreed, refused = set(), {}
    for file in MARKED:
        tokenizer = tokenizer_of(file.read_text("utf-8"))
        if file.stem.startswith("nemotron"):  # else what asks for an answer is no beginning of it
            TRAIN.choose_chat_template(None, tokenizer, '{"enable_thinking": false}')
        for kind, turns in ROWS.items():
            try:
                TRAIN.format_row(*chat_turns.plain({"messages": turns}, tokenizer))
            except Exception:  # refused already, marks or none
                continue
            try:
                chat_marks.plain({"messages": turns}, tokenizer)
                agreed.add((file.stem, kind))
            except ValueError as error:
                refused[file.stem, kind] = str(error)
    assert len(MARKED) > 25 and not refused, refused
    assert len({stem for stem, _ in agreed}) >= len(MARKED) - 2 and len(agreed) > 90, agreed


WHOLE = """{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' -%}{% generation %}{{- m.content + eos_token -}}{% endgeneration %}
{%- else -%}{{- m.content -}}{%- endif -%}{{- '\\n' -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
SPLIT = """{% set parts = m.content.split('</think>') %}{{- parts[0] + '</think>' -}}
{% generation %}{{- parts[1] + eos_token -}}{% endgeneration %}"""
ANSWER = "{% generation %}{{- m.content + eos_token -}}{% endgeneration %}"
USER = "{%- else -%}{{- m.content -}}"
CASES = {
    "the thought is not marked": (WHOLE.replace(ANSWER, SPLIT), "a thought", "leaves out '<think>"),
    "the end is not marked": (
        WHOLE.replace(ANSWER, ANSWER.replace(" + eos_token", "") + "{{- eos_token -}}"),
        "one answer",
        "leaves out '<|endoftext|>'",
    ),
    "the question is marked": (
        WHOLE.replace(USER, "{%- else -%}{% generation %}{{- m.content -}}{% endgeneration %}"),
        "one answer",
        "marks what is no answer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_marks_are_refused(case, tmp_path, capsys):
    template, kind, words = CASES[case]
    tokenizer = tokenizer_of(template)
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": ROWS[kind]}])
    with pytest.raises(SystemExit):
        [*TRAIN.make_examples((str(file),), tokenizer, 100)]
    message = capsys.readouterr().err
    assert f"{file}, row 1: " in message and words in message, message
    again = tokenizer_of(WHOLE)
    assert [*TRAIN.make_examples((str(file),), again, 100)]  # marked as it is learned


def test_marks_in_other_rows():
    """Instructions and both answers of a pair are looked at, too."""
    bad, good = tokenizer_of(CASES["the end is not marked"][0]), tokenizer_of(WHOLE)
    pair = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    whole = {"prompt": "hi", **{n: [user("hi"), *pair[n]] for n in ("chosen", "rejected")}}
    for row in ({"instruction": "hi", "output": "yes"}, pair, whole):
        chat_marks.plain(row, good)
        with pytest.raises(ValueError, match=r"leaves out '<.endoftext.>'"):
            chat_marks.plain(row, bad)
    chat_marks.plain({"prompt": "hi", "completion": "yes"}, bad)  # goes through no template


def test_of_several_templates_the_one_in_use_counts():
    """The other one's marks say nothing of a row without tools."""
    tokenizer = make_tokenizer(bos=True)
    plain = WHOLE.replace(ANSWER, "{{- m.content + eos_token -}}")
    tokenizer.chat_template = {"default": plain, "tool_use": WHOLE}
    row = {"messages": ROWS["one answer"]}
    assert chat_marks.plain(row, tokenizer) == (row, tokenizer)
    tokenizer.chat_template = {"default": CASES["the end is not marked"][0], "tool_use": plain}
    with pytest.raises(ValueError, match="leaves out"):
        chat_marks.plain(row, tokenizer)
