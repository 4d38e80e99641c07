"""Many rows, prepared by several processes: the same examples in the same order, the same one line for the first bad
row, the same cache. Parts are of 100 rows here, so that a few hundred rows are many."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, load_script, make_tokenizer, write_jsonl

SCRIPT = ROOT / "finetune_full" / "finetune_full.py"
EOS = 0  # <|endoftext|>


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def tokenizer(script):
    tokenizer = make_tokenizer(bos=True)
    script.choose_chat_template(None, tokenizer)
    return tokenizer


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare_data, "ROWS", 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})  # three helpers
    monkeypatch.delenv("NCPUS", raising=False)


@pytest.fixture
def makers(script, monkeypatch, tmp_path):
    """The processes that encode an example, each time that one does."""
    log, encode = tmp_path / "makers", script.encode

    def encode_and_tell(*args):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return encode(*args)

    monkeypatch.setattr(script, "encode", encode_and_tell)

    def told():
        text = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return text.split()

    return told


def numbered(start, stop):
    """Rows that differ; every 30th has no answer and is dropped, every 40th is too long and is cut."""
    rows = []
    for number in range(start, stop):
        answer = "" if number % 30 == 7 else f"答え{number}" * (30 if number % 40 == 3 else 1)
        rows.append({"prompt": f"質問 {number}?", "completion": answer})
    return rows


def load(script, tokenizer, *files, hub=None):
    files = [str(file) for file in files]
    arguments = SimpleNamespace(
        train_file=files, validation_file=None, dataset_name=hub, dataset_config_name=None
    )
    training = script.TrainingArguments("unused", use_cpu=True, per_device_train_batch_size=1)
    digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    return script.load_data(arguments, training, tokenizer, 40, digests)["train_dataset"]


def check_examples(found, rows, tokenizer):
    """Compare with a calculation of its own, from the rows as they are."""
    expected = []
    for row in rows:
        if row["completion"]:
            prompt, answer = (
                tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in row
            )
            ids, labels = [1, *prompt, *answer, EOS], [-100] * (1 + len(prompt)) + [*answer, EOS]
            expected.append((ids[:40], labels[:40], min(len(ids), 40)))
    columns = (found[name][:] for name in ("input_ids", "labels", "length"))
    assert [*zip(*columns, strict=True)] == expected


def refused(capsys, *call):
    datasets.disable_progress_bars()  # as the script's main does
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(*call)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_same_examples_in_the_same_order(
    script, tokenizer, makers, tmp_path, capsys, monkeypatch
):
    """Files of every kind, whose parts end where they will; from the cache, with any number of cores, nothing is made."""
    rows = numbered(0, 930)
    files = [write_jsonl(tmp_path / "a.jsonl", rows[:430]), tmp_path / "b.parquet", tmp_path / "c.json",
             write_jsonl(tmp_path / "d.jsonl", rows[700:720]), write_jsonl(tmp_path / "e.jsonl", rows[720:])]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows[430:680]), files[1], row_group_size=70)
    files[2].write_text(json.dumps(rows[680:700]))
    check_examples(load(script, tokenizer, *files), rows, tokenizer)
    answers = sum(bool(row["completion"]) for row in rows)
    cut = sum(row["completion"].count("答え") == 30 for row in rows)
    said = capsys.readouterr().out
    assert (
        f"{answers} examples" in said
        and f"{cut} cut" in said
        and f"{930 - answers} dropped" in said
    )
    made = makers()
    assert len(made) >= len(rows) and len({*made}) > 1 and made.count(str(os.getpid())) < 930
    check_examples(load(script, tokenizer, *files), rows, tokenizer)
    monkeypatch.setenv("NCPUS", "1")
    check_examples(load(script, tokenizer, *files), rows, tokenizer)
    assert len(makers()) <= 2  # the end of a turn is looked at, no row is
    text = Path(files[4]).read_text("utf-8")  # rewritten, of the same size
    Path(files[4]).write_text(text.replace("質問 900", "質問 009"), encoding="utf-8")
    rows[900] = rows[900] | {"prompt": "質問 009?"}
    check_examples(load(script, tokenizer, *files), rows, tokenizer)
    assert {*makers()} == {str(os.getpid())}  # one core


def test_rows_of_a_hub_data_set(script, tokenizer, makers, tmp_path):
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", numbered(0, 450))
    check_examples(load(script, tokenizer, hub=str(tmp_path / "hub")), numbered(0, 450), tokenizer)
    assert len({*makers()}) > 1


def test_few_rows_need_no_helper(script, tokenizer, makers, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "start_helpers", None)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", numbered(50 * i, 50 * i + 50)) for i in (0, 1)]
    check_examples(load(script, tokenizer, *files), numbered(0, 100), tokenizer)
    assert {*makers()} == {str(os.getpid())}


BAD = {  # what stands in some rows, and the line
    "json": ({530: "{broken", 810: "{"}, "a.jsonl, row 531: Expecting"),
    "another form": ({410: {"text": "a"}, 250: {"text": "a"}}, "row 251: a row of another form (text)"),
    "a whole part of another form": ({i: {"text": "a"} for i in range(400, 600)}, "row 401: a row of another"),
    "surrogate": ({888: {"prompt": "\ud83d", "completion": ""}, 889: "{"}, "row 889: 'utf-8' codec can't"),
    "the last one": ({899: {"prompt": 1, "completion": ""}}, "row 900: prompt+completion must hold text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_the_first_bad_row_gets_the_line(case, script, tokenizer, tmp_path, capsys):
    bad, wanted = BAD[case]
    rows = [bad.get(number, row) for number, row in enumerate(numbered(0, 900))]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert wanted in refused(capsys, script, tokenizer, tmp_path / "a.jsonl")


def test_what_is_wrong_with_a_file(script, tokenizer, tmp_path, capsys):
    first = write_jsonl(tmp_path / "a.jsonl", numbered(0, 350))
    for content, wanted in ((json.dumps({"text": "a"}), "row 1: a row of another form (text) than before (prompt)"),
                            ("[" + json.dumps({"text": "a"}) + "]", "row 1: a row of another form"),
                            ("質問".encode("cp932"), "codec can't decode"), ("", "has no rows")):  # fmt: skip
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "b.jsonl").write_bytes(content)
        for before in (first, write_jsonl(tmp_path / "few.jsonl", numbered(0, 3))):
            line = refused(capsys, script, tokenizer, before, tmp_path / "b.jsonl")
            assert wanted in line and "b.jsonl" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_helper_that_is_killed_costs_nothing(
    number, script, tokenizer, makers, tmp_path, monkeypatch
):
    """Whatever ends a helper, in the middle of a part: this process makes what is missing."""
    rows, parent, encode = numbered(0, 700), os.getpid(), script.encode

    def encode_or_die(pieces, *args):
        if os.getpid() != parent and "55?" in pieces[0][0]:
            os.kill(os.getpid(), number)
        return encode(pieces, *args)

    monkeypatch.setattr(script, "encode", encode_or_die)
    path = write_jsonl(tmp_path / f"{number}.jsonl", rows)
    check_examples(load(script, tokenizer, path), rows, tokenizer)


def test_no_helper_is_left(script, tokenizer, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", numbered(0, 2000))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:120], "{", *lines[121:]]))
    assert "row 121: " in refused(capsys, script, tokenizer, tmp_path / "a.jsonl")
    assert not multiprocessing.active_children()


def test_a_line_a_minute(script, tokenizer, tmp_path, capsys, monkeypatch):
    clock = itertools.count(time.time(), 25)
    monkeypatch.setattr(prepare_data, "time", SimpleNamespace(time=lambda: next(clock)))
    path = write_jsonl(tmp_path / "a.jsonl", numbered(0, 1000))
    load(script, tokenizer, path)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prepare ")]
    assert 2 <= len(said) <= 4 and all(" of 1,000 rows, left " in line for line in said)


def test_parts():
    """Every row once, in order; no part of more rows than asked for, 64 parts at most for one file."""
    assert prepare_data.HELPERS == 16
    counts = {"a": 0, "b": 99, "c": 1, "d": 150, "e": 20_000, "f": 3}
    kept, prepare_data.count_rows = prepare_data.count_rows, counts.get
    try:
        with pytest.raises(SystemExit):
            prepare_data.cut(["b", "a"])
        counts["a"] = None  # a list: as a whole
        parts, sizes = prepare_data.cut([*counts])
    finally:
        prepare_data.count_rows = kept
    found = {}
    for part, size in zip(parts, sizes, strict=True):
        assert size == sum((stop or start) - start for _, start, stop in part) <= 317
        for file, start, stop in part:
            found.setdefault(file, []).extend(range(start, stop) if stop else [None])
    assert found == {file: [*range(n)] if n else [None] for file, n in counts.items()}
    assert [*found] == [*counts] and len(parts) <= 66


def test_prepared_before_the_training(script, checkpoints, makers, tmp_path, capsys):
    """By the command of jobs/prepare_data.py; the training finds it whatever else it is told."""
    data = write_jsonl(tmp_path / "t.jsonl", numbered(0, 350))
    words = [
        "--model_name_or_path",
        checkpoints["llama"],
        "--train_file",
        data,
        "--max_length",
        "40",
    ]
    prepare_data.main([str(SCRIPT), *words])
    assert "prepared   " in capsys.readouterr().out and not makers()
    script.main(
        [*words, "--max_steps", "1", "--output_dir", str(tmp_path / "o"), "--learning_rate", "1e-3"]
    )
    assert len(makers()) <= 2
    for bad, wanted in (([], "give a training script"), (["none.py"], "give a training script"),
                        ([str(SCRIPT), *words, "--max_length", "65"], "does not fit the 64 positions")):  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            prepare_data.main(bad)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and wanted in line
