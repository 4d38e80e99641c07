"""Every row and file that a user may bring: learned or asked as it stands, or refused in one line that says where."""

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import pickle
import random
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, ROWS, load_script, make_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken

script = load_script(ROOT / "finetune_full" / "finetune_full.py")
generate = load_script(ROOT / "generate_text" / "generate_text.py")
EOS = "<|endoftext|>"
COUNT = int(os.environ.get("FUZZ", "2000"))  # files drawn, the same ones on each run
DRAW = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}  # fmt: skip


def attempt(function):
    """(what it returns, None), or (None, its one line on stderr) where it ends with exit code 2."""
    stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as Python's own
    with contextlib.redirect_stderr(stderr):
        try:
            return function(), None
        except SystemExit as stop:
            assert stop.code == 2
    stderr.flush()
    (line,) = stderr.buffer.getvalue().decode().splitlines()
    assert line.startswith("error: ")
    return None, line


def learn(path, tokenizer, max_length=10**9):
    return attempt(lambda: [*script.make_examples([str(path)], tokenizer, max_length)])


def ask(path, tokenizer):
    args = SimpleNamespace(prompt_file=str(path), positions=10**9)
    return attempt(lambda: generate.read_prompts(args, tokenizer))


def parts(ids, labels, tokenizer):
    """[(text, learned)] of an example; neighbours that are alike are one."""
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    groups = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100)
    return [(tokenizer.decode([token for token, _ in group]), learned) for learned, group in groups]


def shown(example, tokenizer):
    """An example as text, what is learned of it between [[ ]]."""
    found = parts(example["input_ids"], example["labels"], tokenizer)
    return "".join(f"[[{text}]]" if learned else text for text, learned in found)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    script.choose_chat_template(None, tokenizer)
    return tokenizer


def role(name):
    return lambda content, **more: {"role": name, "content": content, **more}


SYSTEM, USER, BOT = role("system"), role("user"), role("assistant")
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
PARTS = [{"type": "text", "text": "u"}]
U, B = "### 指示:\nu\n\n", "### 応答:\n"
# A row -> what of it is learned, what is asked; None where there is no question.
USED = {
    "begins with the assistant": (
        {"messages": [BOT("a"), USER("u"), BOT("b")]},
        f"{B}[[a{EOS}\n]]{U}{B}[[b{EOS}\n]]",
        f"{B}a{EOS}\n{U}{B}",
    ),
    "is the assistant's alone": ({"messages": [BOT("a")]}, f"{B}[[a{EOS}\n]]", None),
    "begins with an empty answer": (
        {"messages": [BOT(""), USER("u"), BOT("b")]},
        f"{B}{EOS}\n{U}{B}[[b{EOS}\n]]",
        f"{B}{EOS}\n{U}{B}",
    ),
    "two answers in a row": (
        {"messages": [USER("u"), BOT("a"), BOT("b")]},
        f"{U}{B}[[a{EOS}\n]]{B}[[b{EOS}\n]]",
        f"{U}{B}",
    ),
    "an empty answer among others": (
        {"messages": [USER("u"), BOT(""), USER("u"), BOT("b")]},
        f"{U}{B}{EOS}\n{U}{B}[[b{EOS}\n]]",
        f"{U}{B}{EOS}\n{U}{B}",
    ),
    "system": (
        {"messages": [SYSTEM("s"), USER("u"), BOT("a")]},
        f"### system:\ns\n\n{U}{B}[[a{EOS}\n]]",
        f"### system:\ns\n\n{U}{B}",
    ),
    "a part of text": ({"messages": [USER(PARTS), BOT("a")]}, f"{U}{B}[[a{EOS}\n]]", f"{U}{B}"),
    "parts of text": ({"messages": [USER("u"), BOT(PARTS * 2)]}, f"{U}{B}[[uu{EOS}\n]]", f"{U}{B}"),
    "what is empty has not to be used": (
        {"messages": [USER("u", tool_calls=None, name=""), BOT("a", tool_calls=[])], "tools": None, "system": ""},
        f"{U}{B}[[a{EOS}\n]]",
        f"{U}{B}",
    ),
    "Alpaca's with empty columns": (
        {"instruction": "u", "input": "", "output": "a", "system": "", "history": []},
        f"{U}{B}[[a{EOS}\n]]",
        f"{U}{B}",
    ),
    "other columns": ({"prompt": "p", "completion": "c", "id": 1, "source": "x", "label": 0}, f"p[[c{EOS}]]", "p"),
    "NUL": ({"prompt": "p\0", "completion": "c\0d"}, f"p\0[[c\0d{EOS}]]", "p\0"),
    "a whole surrogate pair": ({"prompt": "\ud83d\ude00", "completion": "c"}, None, "😀"),
}  # fmt: skip
# A row -> what the line says, in training and in generation.
REFUSED = {
    "half a surrogate pair": ({"prompt": "\ud83d", "completion": "c"}, r"'\ud83d' in position 0: surrogates"),
    "half a pair in a turn": ({"messages": [USER("\ud83d"), BOT("a")]}, "surrogates not allowed"),
    "half a pair in an instruction": ({"instruction": "i\udc00", "output": "o"}, "surrogates not allowed"),
    "tool_calls": ({"messages": [USER("u"), BOT(None, tool_calls=CALL), BOT("a")]}, "leaves out calls of tools"),
    "tool_calls, empty": ({"messages": [USER("u"), BOT("", tool_calls=CALL), BOT("a")]}, "leaves out calls of tools"),
    "function_call": ({"messages": [USER("u"), BOT("", function_call={"name": "f"})]}, "its function_call would be"),
    "tools": ({"messages": [USER("u"), BOT("a")], "tools": CALL}, "leaves out 'f' of tools"),
    "reasoning": ({"messages": [USER("u"), BOT("a", reasoning_content="r")]}, "its reasoning_content would be left"),
    "weight": ({"messages": [USER("u"), BOT("a", weight=0)]}, "its weight would be left out"),
    "train": ({"messages": [USER("u"), BOT("a", train=False), USER("u")]}, "its train would be left out"),
    "an image": ({"messages": [USER([*PARTS, {"type": "image"}]), BOT("a")]}, "parts must be text, found {'type': 'ima"),
    "null": ({"messages": [USER(None), BOT("a")]}, "must hold text, found {'role': 'user', 'content': None"),
    "no content": ({"messages": [{"role": "user"}, BOT("a")]}, "must hold text, found {'role': 'user'}"),
    "a number for a role": ({"messages": [{"role": 1, "content": "u"}]}, "must hold text, found {'role': 1"),
    "a turn that is text": ({"messages": ["u", "a"]}, "must hold text, found u"),
    "a turn that is a list": ({"messages": [["user", "u"]]}, "must hold text, found ['user', 'u']"),
    "system column": ({"instruction": "i", "output": "o", "system": "s"}, "system would be left out"),
    "history": ({"instruction": "i", "output": "o", "history": [["q", "a"]]}, "history would be left out"),
    "both": ({"instruction": "i", "output": "o", "history": [["q", "a"]], "system": "s"}, "system, history would"),
    "preferences": ({"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"}, "chosen, rejected would be"),
    "preferences in turns": ({"messages": [USER("u"), BOT("a")], "rejected": "b"}, "rejected would be left out"),
    "thinking": ({"prompt": "p", "completion": "c", "thinking": "t"}, "thinking would be left out"),
    "reasoning column": ({"instruction": "i", "output": "o", "reasoning_content": "t"}, "reasoning_content would be"),
    "conversations": ({"conversations": [{"from": "human", "value": "u"}]}, "columns conversations"),
    "messages as JSON text": ({"messages": json.dumps([USER("u")])}, "messages"),
    "nothing": ({}, "columns"),
}  # fmt: skip


@pytest.mark.parametrize("case", USED)
def test_rows_that_are_used(case, tokenizer, tmp_path):
    row, learned, asked = USED[case]
    path = write_jsonl(tmp_path / "row.jsonl", [])
    (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
    ((example,), error) = learn(path, tokenizer)
    assert error is None and example["outcome"] == "kept"
    assert learned is None or shown(example, tokenizer) == learned
    found, error = ask(path, tokenizer)
    if asked is None:
        assert "the conversation has no turn to answer" in error
        return
    ids = found[2][0]
    assert tokenizer.decode(ids) == asked
    assert example["input_ids"][: len(ids)] == ids and example["labels"][len(ids)] != -100


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_refused(case, tokenizer, tmp_path):
    row, message = REFUSED[case]
    first = {"messages": [USER("u"), BOT("a")]} if "messages" in row else ROWS[0]
    first = {"instruction": "i", "output": "o"} if "instruction" in row else first
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(first)}\n\n{json.dumps(row)}\n")
    for _, error in (learn(path, tokenizer), ask(path, tokenizer)):
        assert error.startswith(f"error: {path}, row 3: ") and message in error


def test_an_edit_in_generate_text_is_an_edit_in_training():
    assert generate.UNUSED == script.UNUSED


# Templates as models bring them, in short: what each makes of a conversation that begins with the assistant.
CHATML = (
    "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}"
# 答え is one token: whoever takes the beginning and the answer for one text gets other ids.
JOINED = "{% for m in messages %}{{ '答' + m.content + eos_token }}{% endfor %}{{ '答' if add_generation_prompt }}"
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '[INST] ' + m.content if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)
STARTS = {
    "chatml": (CHATML, "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>assistant\n[[え<|im_end|>\n]]"),
    "no header": (PLAIN, f"<s>[[え{EOS}]]"),
    "no line end": (JOINED, f"答[[え{EOS}]]"),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("bos", [False, True])
def test_conversations_that_begin_with_the_assistant(name, bos, tmp_path):
    """Whatever the template puts before an answer, is not learned; generation has the same ids."""
    template, start = STARTS[name]
    tokenizer = make_tokenizer(bos)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = template
    assert len(tokenizer("答え", add_special_tokens=False)["input_ids"]) == 1
    (tmp_path / "row.jsonl").write_text(json.dumps({"messages": [BOT("え"), USER("u"), BOT("b")]}))
    ((example,), _) = learn(tmp_path / "row.jsonl", tokenizer)
    assert shown(example, tokenizer).startswith(("<s>" * (bos and name != "no header")) + start)
    assert shown(example, tokenizer).count("[[b") == 1
    ids = ask(tmp_path / "row.jsonl", tokenizer)[0][2][0]
    assert example["input_ids"][: len(ids)] == ids and example["labels"][len(ids)] != -100


BAD_TEMPLATES = {
    "syntax": ("{% if %}", "Expected an expression"),
    "refuses": (STRICT, "roles must alternate user/assistant"),
    "always refuses": ("{{ raise_exception('no') }}", "TemplateError('no')"),
    "divides by zero": ("{{ messages[0].content }}{{ 1 / 0 }}", "division by zero"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    "asks for what is not there": ("{{ messages.foo.bar }}", "has no attribute 'foo'"),
    "adds what is no text": ("{{ messages[0].content + none }}", "can only concatenate"),
    "writes nothing": ("", "no token to stop at"),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_templates_that_fail(case, tokenizer, tmp_path):
    """Of a tokenizer: the line says in which row; of a file: which one. Rows of other forms do not need it."""
    template, message = BAD_TEMPLATES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER("u"), USER("u"), BOT("a")]}))
    own = make_tokenizer()
    own.chat_template = template
    _, error = learn(path, own)
    assert message in error and (f"{path}, row 1: " in error or case == "writes nothing")
    _, error = ask(path, own)
    assert (message if template else "the prompt is empty") in error and f"{path}, row 1: " in error
    (tmp_path / "own.jinja").write_text(template)
    for module in (script, generate):
        _, error = attempt(
            lambda m=module: m.choose_chat_template(str(tmp_path / "own.jinja"), make_tokenizer())
        )
        # one user's turn is no problem for what minds the order
        assert case in ("refuses", "writes nothing") or (
            message in error and "own.jinja: " in error
        )
    rows = write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    assert len(learn(rows, own)[0]) == len(ask(rows, own)[0][1]) == len(ROWS)
    assert script.turn_end_id(own) is None or case == "refuses"


def test_template_files_that_are_none(tmp_path):
    (tmp_path / "sjis.jinja").write_bytes("空".encode("cp932"))
    (tmp_path / "bom.jinja").write_bytes("\ufeff{{ messages[0].content }}".encode())
    for module in (script, generate):
        for name in ("sjis.jinja", "none.jinja", "."):
            _, error = attempt(
                lambda m=module, n=name: m.choose_chat_template(str(tmp_path / n), make_tokenizer())
            )
            assert (
                f"--chat_template {tmp_path / name}: " in error
                and "Two ready templates lie in ../chat_templates." in error
            )
        tokenizer = make_tokenizer()
        module.choose_chat_template(str(tmp_path / "bom.jinja"), tokenizer)
        assert tokenizer.apply_chat_template([USER("u")], tokenize=False) == "u"


GOOD = '{"prompt": "p", "completion": "c"}\n'
WIDE = '{"prompt": "空", "completion": "c"}\n'
# Content -> number of rows, or what the line says in training. Generation reads the same, as .jsonl.
FILES = {
    "empty": (b"", "has no rows"),
    "blanks": (b" \n\t\n\r\n", "has no rows"),
    "empty list": (b" [] ", "has no rows"),
    "BOM": (b"\xef\xbb\xbf" + GOOD.encode(), 1),
    "CRLF": (GOOD.replace("\n", "\r\n").encode() * 3, 3),
    "CR": (GOOD.replace("\n", "\r").encode() * 3, 3),
    "no line end": (GOOD.strip().encode(), 1),
    "line separator in a text": ('{"prompt": "p\u2028\x85", "completion": "c"}\n'.encode() * 2, 2),
    "UTF-16": (WIDE.encode("utf-16"), "'utf-8' codec can't decode byte 0xff in position 0"),
    "UTF-16 without BOM": (GOOD.encode("utf-16-le"), "row 1: Expecting property name"),
    "UTF-32": (GOOD.encode("utf-32"), "'utf-8' codec can't decode"),
    "Shift-JIS": (GOOD.encode() * 9 + WIDE.encode("cp932"), "'utf-8' codec can't decode byte 0x8b"),
    "EUC-JP": (WIDE.encode("euc-jp"), "'utf-8' codec can't decode"),
    "NULs at the end": (GOOD.encode() + b"\0" * 50, "row 2: Expecting value"),
    "NULs in a line": (GOOD.encode() + b"\0\n" + GOOD.encode(), "row 2: Expecting value"),
    "cut off": ((GOOD * 2)[:-8].encode(), "row 2: Unterminated string"),
    "one object": (json.dumps({"prompt": "p", "completion": "c"}, indent=1).encode(), "row 1: Expecting property"),
    "object of lists": (b'{"data": [{"prompt": "p", "completion": "c"}]}', "columns data"),
    "nested list": (b'[[{"prompt": "p", "completion": "c"}]]', "row 1: a row must be an object"),
    "list of text": (json.dumps([GOOD]).encode(), "row 1: a row must be an object"),
    "list with blank text": (f'[{GOOD}, ""]'.encode(), "row 2: a row must be an object"),
    "list with null": (f"[{GOOD}, null]".encode(), "row 2: a row must be an object"),
    "two lists": (f"[{GOOD}]\n[{GOOD}]".encode(), "Extra data: line 3"),
    "commas": (f"{GOOD[:-1]},\n{GOOD}".encode(), "row 1: Extra data"),
    "two objects in a line": (f"{GOOD[:-1]}{GOOD}".encode(), "row 1: Extra data"),
    "single quotes": (b"{'prompt': 'p', 'completion': 'c'}", "row 1: Expecting property name"),
    "CSV": (b"prompt,completion\np,c\n", "row 1: Expecting value"),
    "null": (b"null\n", "row 1: a row must be an object"),
    "text": (b'"p"\n', "row 1: a row must be an object"),
    "NaN": (b'{"prompt": "p", "completion": "c", "x": NaN, "y": -Infinity}', 1),
    "a name twice: the last counts, as in any JSON": (b'{"prompt": "p", "completion": "b", "completion": "c"}', 1),
    "great number": (b'{"prompt": "p", "completion": "c", "x": 1e999}', 1),
    "digits": (b'{"prompt": "p", "completion": "c", "x": ' + b"9" * 5000 + b"}", "row 1: Exceeds the limit"),
    "deep": (b'{"prompt": "p", "completion": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "row 1: maximum recursion depth"),
    "deep list": (b"[" * 10**5, "maximum recursion depth"),
    "gzip": (gzip.compress(GOOD.encode(), mtime=0), "'utf-8' codec can't decode byte 0x8b in position 1"),
    "pickle": (pickle.dumps([{"prompt": "p", "completion": "c"}]), "'utf-8' codec can't decode byte 0x80"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(case, tokenizer, tmp_path):
    content, wanted = FILES[case]
    for name in ("file.jsonl", "file.json", "FILE"):  # the contents say what it is
        path = tmp_path / name
        path.write_bytes(content)
        examples, error = learn(path, tokenizer)
        if isinstance(wanted, int):
            assert [shown(e, tokenizer).count(f"[[c{EOS}]]") for e in examples] == [1] * wanted
            assert len(ask(path, tokenizer)[0][1]) == wanted
            continue
        assert wanted in error and str(path) in error
        assert "row" not in wanted or f"{path}, row " in error or "no rows" in error
        if name != "FILE":  # without an ending, generation may take it for a prompt a line
            found, error = ask(path, tokenizer)
            assert found is None and str(path) in error


def test_a_line_of_10_mb(tokenizer, tmp_path):
    rows = [
        {**ROWS[0], "source": "あ" * 3_500_000},
        {"prompt": "あい うえ " * 50_000, "completion": "c"},
    ]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    examples, error = learn(path, tokenizer, 64)
    assert error is None and [e["outcome"] for e in examples] == ["kept", "dropped"]
    assert len(ask(path, tokenizer)[0][1]) == 2


TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
TABLES = {
    "text": ({"prompt": ["p"] * 3, "completion": ["c"] * 3}, 3),
    "no rows": ({"prompt": pa.array([], pa.string())}, "has no rows"),
    "bytes": ({"prompt": [b"p\xff"], "completion": ["c"]}, "row 1: prompt+completion must hold text"),
    "null": ({"prompt": ["p", None], "completion": ["c", "c"]}, "row 2: prompt+completion must hold text"),
    "null columns": ({"prompt": ["p"], "completion": ["c"], "history": [None], "system": [None]}, 1),
    "turns": ({"messages": [TURNS, TURNS]}, 2),
    "turns with names of others": ({"messages": [[TURNS[0] | {"name": None}, TURNS[1] | {"tool_calls": None}]]}, 1),
    "turns with calls": ({"messages": [[TURNS[0], TURNS[1] | {"tool_calls": CALL}]]}, "leaves out calls of tools"),
    "turns as maps": (
        {"messages": pa.array([[[("role", "user"), ("content", "u")]]], pa.list_(pa.map_(pa.string(), pa.string())))},
        "row 1: role+content must hold text",
    ),
    "great strings": ({"prompt": pa.array(["p"], pa.large_string()), "completion": ["c"]}, 1),
    "dictionary": ({"prompt": pa.array(["p"] * 9).dictionary_encode(), "completion": ["c"] * 9}, 9),
    "dates": ({"prompt": ["p"], "completion": ["c"], "at": pa.array([2**62], pa.timestamp("ms"))}, "row"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_parquet(case, tokenizer, tmp_path):
    columns, wanted = TABLES[case]
    path = tmp_path / "table.PARQUET"
    pq.write_table(pa.table(columns), path)
    examples, error = learn(path, tokenizer)
    if isinstance(wanted, int):
        assert len(examples) == len(ask(path, tokenizer)[0][1]) == wanted
    elif case == "dates":  # beyond what Python's dates can hold
        assert str(path) in error
        assert str(path) in ask(path, tokenizer)[1]
    else:
        assert wanted in error and str(path) in error
        assert str(path) in ask(path, tokenizer)[1]


def test_damaged_parquet(tokenizer, tmp_path):
    """Cut off or with other bytes at any place: the rows that were written, or one line."""
    path, refused = tmp_path / "p.parquet", 0
    pq.write_table(
        pa.table({"prompt": [f"p{i}" for i in range(50)], "completion": ["c"] * 50}), path
    )
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        for damaged in (whole[:place], whole[:place] + b"\xff" * 20 + whole[place + 20 :]):
            path.write_bytes(damaged)
            for _, error in (learn(path, tokenizer), ask(path, tokenizer)):
                assert (error is None) != (f"error: {path}" in (error or ""))
                refused += error is not None
    assert refused > 20
    path = tmp_path / "directory.parquet"
    path.mkdir()
    for _, error in (learn(path, tokenizer), ask(path, tokenizer)):
        assert "directory" in error and str(path) in error


def test_through_the_whole_script(checkpoints, tmp_path, capsys):
    """Also below Dataset.from_generator, which has errors of its own, it is one line and exit code 2."""
    cases = {
        "deep.jsonl": (FILES["deep"][0], "deep.jsonl, row 1: maximum recursion depth"),
        "surrogate.jsonl": (b'{"text": "\\ud83d"}', "surrogate.jsonl, row 1: "),
        "zero.jsonl": (
            json.dumps({"messages": TURNS}).encode(),
            "zero.jsonl, row 1: ZeroDivisionError",
        ),
    }
    zero = tmp_path / "zero.jinja"  # only an answer makes it fail
    zero.write_text(
        "{% for m in messages %}{{ 1 / 0 if m.role == 'assistant' else m.content }}{% endfor %}"
    )
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        arguments = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", str(tmp_path / name), "--output_dir",
                     str(tmp_path / "out"), *(["--chat_template", str(zero)] if "zero" in name else [])]  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script.main(arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and message in line


# ---- Files drawn at random ----

# Pieces that matter to JSON and to us, for text that is nearly right.
SCRAPS = ["{", "}", "[", "]", ",", ":", '"', "\n", "\r\n", "\r", " ", "\ufeff", "\u2028", "\0", "null", "true", "1e999",
          "NaN", "-0", '"prompt"', '"completion"', '"text"', '"messages"', '"role"', '"a"', r'"\ud83d"', r'"\u0000"',
          '{"text": "a"}', '{"prompt": "a", "completion": "b"}\n', '[{"text": ""}]', "#"]  # fmt: skip
PIECES = st.text(max_size=8) | st.sampled_from(
    ["<s>", EOS, "\ud83d", "\0", "{{ x }}", " ", "\n\n", "### 応答:\n"]
)
NAMES = st.sampled_from("text prompt completion instruction input output messages role content system history id".split())  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | PIECES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | PIECES, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
CHAT = st.lists(st.fixed_dictionaries({"role": ROLES, "content": PIECES}), max_size=4)
SHAPES = [
    st.fixed_dictionaries({"text": PIECES}, optional={"id": VALUES}),
    st.fixed_dictionaries({"prompt": PIECES, "completion": PIECES}, optional={"thinking": VALUES}),
    st.fixed_dictionaries(
        {"instruction": PIECES, "output": PIECES}, optional={"input": PIECES, "system": VALUES}
    ),
    st.fixed_dictionaries({"messages": CHAT}),
]
VALID = st.one_of(*[st.lists(shape, min_size=1, max_size=4) for shape in SHAPES])


def as_file(rows, how):
    """Rows as a file, in one of the ways in which people write them."""
    if how % 7 == 6:  # Parquet; what Arrow does not take stays JSON
        with contextlib.suppress(Exception):
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), file)
            return file.getvalue()
    lines = [json.dumps(row, ensure_ascii=how % 2 == 0) for row in rows]
    text = (
        "[" + ",\n ".join(lines) + "]"
        if how % 3 == 0
        else ("\r\n" if how % 5 == 0 else "\n").join(lines)
    )
    encoding = {11: "utf-16", 22: "utf-8-sig", 33: "cp932"}.get(how, "utf-8")
    return text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace")


def damaged(content, seed):
    """Cut, doubled, with other bytes, or with a piece moved."""
    rng = random.Random(seed)
    start, end = sorted(rng.randrange(len(content) + 1) for _ in "ab")
    piece, noise = content[start:end], rng.randbytes(rng.randrange(4))
    return rng.choice([
        content[:start], content[start:], content[:start] + content[end:], content[:end] + piece + content[end:],
        content[:start] + noise + content[start:], content[:start] + noise + content[start + len(noise):],
        content[:start] + rng.choice(SCRAPS).encode() + content[start:], gzip.compress(content, mtime=0),
    ])  # fmt: skip


CONTENT = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(SCRAPS), max_size=12).map(lambda scraps: "".join(scraps).encode()),
    st.builds(as_file, st.lists(VALUES, max_size=4), st.integers(0, 40)),
    st.builds(as_file, VALID, st.integers(0, 40)),
    st.builds(damaged, st.builds(as_file, VALID, st.integers(0, 40)), st.integers(0, 999)),
)


def expected_rows(content, name):
    """The rows of a file by a reading of its own, or None where it holds something else than rows."""
    try:
        if name.endswith(".parquet"):
            return pq.read_table(io.BytesIO(content)).to_pylist()
        # Of a file that holds a part of a BOM only, Python's reader makes an empty one.
        text = "" if content in (b"\xef", b"\xef\xbb") else content.decode("utf-8-sig")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in re.split("\r\n|\r|\n", text) if line.strip()]
        return rows if all(isinstance(row, dict) for row in rows) else None
    except Exception:
        return None


def test_fuzzed_files(tokenizer, tmp_path):
    """Never a traceback, never a row less: all rows of a file, or one line that names it and says 2."""
    seen = {"rows": 0, "refused": 0, "learned": 0, "asked": 0}

    @settings(max_examples=COUNT, **DRAW)
    @given(CONTENT, st.sampled_from(["f.jsonl", "f.json", "f"]))
    def check(content, name):
        name = "f.parquet" if content.startswith(b"PAR1") else name
        path = tmp_path / name
        path.write_bytes(content)
        wanted = expected_rows(content, name)
        found, error = attempt(lambda: [*script.read_rows([str(path)])])
        assert (found is None) == (wanted is None)
        if found is None:
            seen["refused"] += 1
            assert error.startswith(f"error: {path}")
        else:
            seen["rows"] += len(found)
            assert repr([row for _, row in found]) == repr(wanted)  # repr: NaN is not NaN
            assert len({place for place, _ in found}) == len(found)
        examples, error = learn(path, tokenizer)
        assert wanted is not None or examples is None
        if examples is not None:
            seen["learned"] += 1
            assert examples[0]["form"] == "text" or len(examples) == len(wanted)
        if name != "f":
            answer, error = ask(path, tokenizer)
            assert wanted is not None or answer is None
            if answer is not None:
                seen["asked"] += 1
                assert repr(answer[1]) == repr(wanted) and len(answer[2]) == len(wanted)

    check()
    assert min(seen["rows"], seen["refused"]) > COUNT / 5, seen  # not all of one kind
    assert min(seen["learned"], seen["asked"]) > COUNT / 50, seen


# ---- Rows drawn at random: what is learned is what was written ----

TEXT = st.text(max_size=20) | st.sampled_from(
    ["<s>", EOS, f"{EOS}{EOS}", "<s> a", "{{ x }}", "あ\n", "\0", "###  "]
)
ROW = st.one_of(
    st.fixed_dictionaries({"text": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}, optional={"input": TEXT}),
    st.fixed_dictionaries({"messages": st.lists(
        st.fixed_dictionaries({"role": ROLES, "content": TEXT}), min_size=1, max_size=5)}),
)  # fmt: skip


def by_hand(row):
    """A row as [(text, learned)], from the description of the forms, and the text of its last question or None."""
    if "text" in row:
        return [(row["text"] + EOS, True)], None
    if "prompt" in row:
        return [(row["prompt"], False), (row["completion"] + EOS, True)], row["prompt"]
    turns = [(turn["role"], turn["content"]) for turn in row.get("messages", [])]
    if not turns:
        question = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
        turns = [("user", question), ("assistant", row["output"])]
    pieces, asked = [], None
    for name, content in turns:
        if name == "assistant":
            pieces += [(B, False), (content + EOS + "\n", content != "")]
        else:
            head = "指示" if name == "user" else name
            pieces.append((f"### {head}:\n{content}\n\n", False))
            asked = "".join(text for text, _ in pieces) + B
    while pieces and pieces[-1][1] is False and not pieces[-1][0].endswith(EOS + "\n"):
        pieces.pop()  # what no answer follows is not part of the example
    return pieces, asked


@pytest.mark.parametrize("bos", [False, True])
def test_ids_decode_to_the_row(bos, tmp_path):
    """All four forms: the ids are the row's text, the labels its answers, and a question has the ids it had there."""
    tokenizer = make_tokenizer(bos)
    script.choose_chat_template(None, tokenizer)
    seen = []

    @settings(max_examples=COUNT // 5, **DRAW)
    @given(ROW)
    def check(row):
        path = write_jsonl(tmp_path / "row.jsonl", [row])
        pieces, asked = by_hand(row)
        (examples, _) = learn(path, tokenizer)
        (example,) = examples
        first = "<s>" if bos and not "".join(text for text, _ in pieces).startswith("<s>") else ""
        first = "<s>" if bos and row.get("prompt") == "" else first
        first = first if pieces else ""  # no answer, no example
        ids, labels = example["input_ids"], example["labels"]
        assert tokenizer.decode(ids) == first + "".join(text for text, _ in pieces)
        learned = "".join(text for text, is_learned in pieces if is_learned)
        assert parts(ids, labels, tokenizer) == merged([(first, False), *pieces])
        is_empty = not learned.replace(EOS, "") if "messages" not in row else not learned
        if set(row) & {"text", "prompt"}:
            assert (example["outcome"] == "dropped") == is_empty
        seen.append(next(iter(row)))
        if asked is not None:
            found, error = ask(path, tokenizer)
            if asked == "" and not bos:
                assert "the prompt is empty" in error
                return
            question = found[2][0]
            assert tokenizer.decode(question) == ("<s>" * bos if not pieces else first) + asked
            if "messages" not in row or row["messages"][-1]["role"] == "assistant":
                assert ids[: len(question)] == question

    check()
    assert (
        min(seen.count(name) for name in ("text", "prompt", "instruction", "messages"))
        >= COUNT // 100
    )


def merged(pieces):
    found = []
    for text, learned in pieces:
        if text and found and found[-1][1] == learned:
            found[-1] = (found[-1][0] + text, learned)
        elif text:
            found.append((text, learned))
    return found


def test_texts_are_split_without_loss(tokenizer, tmp_path):
    """Pieces of --max_length, put together, are the text and one EOS."""

    @settings(max_examples=50, **DRAW)
    @given(TEXT, st.integers(2, 9))
    def check(text, length):
        examples, _ = learn(write_jsonl(tmp_path / "t.jsonl", [{"text": text}]), tokenizer, length)
        ids = [token for example in examples for token in example["input_ids"]]
        assert tokenizer.decode(ids) == text + EOS and len(examples) == math.ceil(len(ids) / length)
        assert all(example["labels"] == example["input_ids"] for example in examples)

    check()
