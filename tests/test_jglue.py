"""JGLUE: the committed sample, the prompts made of it, and the scores against calculations of their own."""

import gc
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from importlib import metadata
from itertools import combinations
from pathlib import Path

import pytest
from conftest import CONFIGS, ROOT, load_script, make_checkpoint, make_tokenizer

JGLUE = ROOT / "jglue"
SAMPLE = JGLUE / "sample"
SCRIPTS = {
    name: runpy.run_path(str(JGLUE / f"{name}.py"))
    for name in ("make_sample", "prepare_jglue", "evaluate_jglue", "ask_model")
}
TASKS = ("jsquad", "jcommonsenseqa", "jnli", "jsts")


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def prepare(jglue_dir, output_dir, task="all"):
    SCRIPTS["prepare_jglue"]["main"](
        [f"--jglue_dir={jglue_dir}", f"--output_dir={output_dir}", f"--task={task}"]
    )


def evaluate(task, path, *words):
    SCRIPTS["evaluate_jglue"]["main"]([f"--task={task}", f"--prediction_file={path}", *words])


def scores(tmp_path, task, rows):
    """Score rows through the command line's own entry point and return what it writes."""
    output = tmp_path / "scores" / "scores.json"
    evaluate(task, write_lines(tmp_path / "predictions.jsonl", rows), f"--output_file={output}")
    return json.loads(output.read_text())


def refusal(capsys, run, *arguments):
    """Return the one line on stderr of a run that must refuse."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(SAMPLE, folder)
    return folder


# ---- The sample ----


def test_sample_is_what_its_generator_writes(tmp_path):
    SCRIPTS["make_sample"]["main"](["--output_dir", str(tmp_path)])
    written = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    committed = {
        path.relative_to(SAMPLE): path.read_bytes() for path in SAMPLE.rglob("*") if path.is_file()
    }
    assert written == committed
    assert sum(map(len, committed.values())) < 2_200_000
    SCRIPTS["make_sample"]["main"](["--output_dir", str(tmp_path), "--seed", "1"])
    assert {path.read_bytes() for path in tmp_path.rglob("*.json")}.isdisjoint(committed.values())


def sample_paragraphs(split):
    document = json.loads(
        (SAMPLE / f"datasets/jsquad-v1.3/{split}-v1.3.json").read_text(encoding="utf-8")
    )
    return [
        (article["title"], part) for article in document["data"] for part in article["paragraphs"]
    ]


def test_sample_is_in_jglue_s_formats():
    fields = {
        "jcommonsenseqa": [
            "q_id",
            "question",
            "choice0",
            "choice1",
            "choice2",
            "choice3",
            "choice4",
            "label",
        ],
        "jnli": ["sentence_pair_id", "yjcaptions_id", "sentence1", "sentence2", "label"],
        "jsts": ["sentence_pair_id", "yjcaptions_id", "sentence1", "sentence2", "label"],
    }
    for split in ("train", "valid"):
        for title, part in sample_paragraphs(split):
            assert list(part) == ["qas", "context"] and part["context"].startswith(
                f"{title} [SEP] "
            )
            assert 3 <= len(part["qas"]) <= 4
            for question in part["qas"]:
                assert (
                    set(question) == {"question", "id", "answers", "is_impossible"}
                    and not question["is_impossible"]
                )
                for answer in question["answers"]:
                    start = answer["answer_start"]
                    assert (
                        part["context"][start : start + len(answer["text"])] == answer["text"] != ""
                    )
        for task, names in fields.items():
            rows = read_lines(SAMPLE / f"datasets/{task}-v1.3/{split}-v1.3.json")
            assert 30 <= len(rows) <= 200 and all(list(row) == names for row in rows)
            assert len({str(row[names[0]]) for row in rows}) == len(rows)
            labels = Counter(row["label"] for row in rows)
            if task == "jcommonsenseqa":
                assert set(labels) == set(range(5))
                assert all(len({row[f"choice{n}"] for n in range(5)}) == 5 for row in rows)
            elif task == "jnli":
                assert set(labels) == {"entailment", "contradiction", "neutral"}
                assert max(labels.values()) < 0.4 * len(rows)
            else:
                assert (
                    min(labels) == 0
                    and max(labels) == 5
                    and all(round(5 * label, 9) % 1 == 0 for label in labels)
                )


def things_in(context):
    """Return the person, thing, place and day of a sentence, found in its text."""
    found = {}
    for kind, names in SCRIPTS["make_sample"]["FACT"].items():
        there = [name for name in names if name in context]
        found[kind] = [
            name for name in there if not any(name != other and name in other for other in there)
        ]
    assert all(len(names) == 1 for names in found.values()), (context, found)
    return [(kind, names[0]) for kind, names in sorted(found.items())]


def test_validation_shares_no_prompt_and_no_pair_with_training(prepared):
    pairs = {}
    for split in ("train", "valid"):
        facts = [things_in(part["context"]) for _, part in sample_paragraphs(split)]
        pairs[split] = {pair for fact in facts for pair in combinations(fact, 2)}
        assert len(pairs[split]) > len(facts)
    assert not pairs["train"] & pairs["valid"]
    known = {thing for pair in pairs["train"] for thing in pair}
    assert {thing for pair in pairs["valid"] for thing in pair} <= known, (
        "a name that training never shows"
    )
    for task in TASKS:
        train, valid = (
            read_lines(prepared / f"{task}_{split}.jsonl") for split in ("train", "validation")
        )
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}, task
        assert not {row["id"] for row in train} & {row["id"] for row in valid} or task != "jsquad"
    ids = [row["id"] for row in read_lines(prepared / "jsquad_train.jsonl")]
    assert len(ids) == len(set(ids))


def bigrams(text):
    return {text[n : n + 2] for n in range(len(text) - 1)}


def test_looking_training_answers_up_does_not_help(prepared):
    """By the same question, by the commonest answer of its kind of question, by the most similar training prompt."""
    train, valid = (
        read_lines(prepared / f"jsquad_{split}.jsonl") for split in ("train", "validation")
    )
    names = [name for lists in SCRIPTS["make_sample"]["FACT"].values() for name in lists]
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def kind_of(row):
        return pattern.sub("X", row["prompt"].split("\n質問：")[1])

    by_question, by_kind = {}, {}
    for row in train:
        by_question.setdefault(row["prompt"].split("\n質問：")[1], Counter())[
            row["completion"]
        ] += 1
        by_kind.setdefault(kind_of(row), Counter())[row["completion"]] += 1
    kinds = {kind_of(row) for row in valid}
    assert kinds == set(by_kind) and len(kinds) >= 4
    asked = [row for row in valid if row["prompt"].split("\n質問：")[1] in by_question]
    assert asked, "no validation question occurs in training: the look-up would be empty"
    similar = [(bigrams(row["prompt"]), kind_of(row), row["completion"]) for row in train]

    def nearest(row):
        wanted, kind = bigrams(row["prompt"]), kind_of(row)
        same_kind = ((shown, answer) for shown, shown_kind, answer in similar if shown_kind == kind)
        return max(same_kind, key=lambda pair: len(wanted & pair[0]) / len(wanted | pair[0]))[1]

    guesses = {
        "question": [
            by_question.get(row["prompt"].split("\n質問：")[1], by_kind[kind_of(row)]).most_common(
                1
            )[0][0]
            for row in valid
        ],
        "kind": [by_kind[kind_of(row)].most_common(1)[0][0] for row in valid],
        "nearest": [nearest(row) for row in valid[::2]],
    }
    asked_of = {"question": valid, "kind": valid, "nearest": valid[::2]}
    limits = {
        "question": 0.2,
        "kind": 0.2,
        "nearest": 0.3,
    }  # the last one sees the text, which has the answer in it
    for name, answers in guesses.items():
        right = [
            answer in row["answers"] for answer, row in zip(answers, asked_of[name], strict=True)
        ]
        assert sum(right) / len(right) < limits[name], (name, sum(right) / len(right))


# ---- Preparation ----


def jsquad_document(*paragraphs):
    """A JSQuAD file: each paragraph is (title, context, [(id, question, answers)])."""
    articles = []
    for title, context, questions in paragraphs:
        qas = [
            {
                "question": question,
                "id": name,
                "answers": [{"text": text, "answer_start": context.find(text)} for text in answers],
                "is_impossible": False,
            }
            for name, question, answers in questions
        ]
        articles.append({"title": title, "paragraphs": [{"qas": qas, "context": context}]})
    return {"data": articles}


CHOICES = ["掲示板", "パソコン ", "マザーボード", "　ハードディスク", "まな板"]
QUESTION = {
    "q_id": 7,
    "question": "主要な基板は？ ",
    **{f"choice{n}": text for n, text in enumerate(CHOICES)},
    "label": 2,
}
PAIR = {
    "sentence_pair_id": "3",
    "yjcaptions_id": "1-2-3",
    "sentence1": "猫がいます。",
    "sentence2": "動物がいます。",
}
SQUAD = jsquad_document(
    ("梅雨", "梅雨 [SEP] 梅雨は雨季の一種である。5月から7月に来る。",
     [("q0", "梅雨とは何季か? ", ["雨季", "雨季の一種", "雨季"]), ("q1", "いつか", ["5月", "5月から7月"])]),
    ("題", "区切りのない段落。", [("q2", "何がない", ["区切り"])]),
)  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """A JGLUE directory with one validation file a task, an older version beside it."""
    folder = tmp_path / "JGLUE"
    write_lines(folder / "datasets/jsquad-v1.3/valid-v1.3.json", [SQUAD])
    write_lines(folder / "datasets/jcommonsenseqa-v1.3/valid-v1.3.json", [QUESTION])
    write_lines(folder / "datasets/jcommonsenseqa-v1.1/train-v1.1.json", [QUESTION])
    write_lines(folder / "datasets/jnli-v1.10/valid-v1.10.json", [PAIR | {"label": "entailment"}])
    write_lines(folder / "datasets/jnli-v1.9/valid-v1.9.json", [PAIR | {"label": "neutral"}])
    write_lines(folder / "datasets/jsts-v1.3/valid-v1.3.json", [PAIR | {"label": 3}])
    return folder


def test_prompts_word_for_word(small, tmp_path, capsys):
    prepare(small, tmp_path / "out")
    shown = capsys.readouterr().out
    text = "題名：梅雨\n文章：梅雨は雨季の一種である。5月から7月に来る。\n質問："
    expected = {
        "jsquad": [
            {
                "id": "q0",
                "prompt": f"{text}梅雨とは何季か?\n答え：",
                "completion": "雨季",
                "answers": ["雨季", "雨季の一種", "雨季"],
            },
            {
                "id": "q1",
                "prompt": f"{text}いつか\n答え：",
                "completion": "5月",
                "answers": ["5月", "5月から7月"],
            },
            {
                "id": "q2",
                "prompt": "文章：区切りのない段落。\n質問：何がない\n答え：",
                "completion": "区切り",
                "answers": ["区切り"],
            },
        ],
        "jcommonsenseqa": [
            {
                "id": "7",
                "prompt": "質問：主要な基板は？\n0：掲示板\n1：パソコン\n2：マザーボード\n3：ハードディスク\n"
                "4：まな板\n正解の番号：",
                "completion": "2",
                "label": 2,
                "choices": ["掲示板", "パソコン", "マザーボード", "ハードディスク", "まな板"],
            }
        ],
        "jnli": [
            {
                "id": "3",
                "prompt": "前提：猫がいます。\n仮説：動物がいます。\n関係（含意、矛盾、中立）：",
                "completion": "含意",
                "label": "entailment",
                "choices": ["含意", "矛盾", "中立"],
            }
        ],
        "jsts": [
            {
                "id": "3",
                "prompt": "文1：猫がいます。\n文2：動物がいます。\n意味の近さ（0.0から5.0）：",
                "completion": "3.0",
                "label": 3,
            }
        ],
    }
    for task, rows in expected.items():
        assert read_lines(tmp_path / "out" / f"{task}_validation.jsonl") == rows
        assert not (tmp_path / "out" / f"{task}_train.jsonl").exists()
    assert re.search(r"jsquad +v1.3 +validation +3 rows", shown) and re.search(
        r"jsquad +v1.3 +train +not in", shown
    )
    assert (
        "v1.10" in shown and "v1.9" not in shown and "v1.1 " not in shown
    )  # the newest, and no mixture of versions


def test_splits_test_and_stale(small, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(SAMPLE, out, "jsquad")
    first = (out / "jsquad_train.jsonl").read_bytes()
    prepare(SAMPLE, out, "jsquad")
    assert (out / "jsquad_train.jsonl").read_bytes() == first
    (out / "mine.txt").write_text("kept")
    unanswered = {name: value for name, value in QUESTION.items() if name != "label"}
    write_lines(small / "datasets/jcommonsenseqa-v1.3/test-v1.3.json", [unanswered])
    write_lines(small / "datasets/jnli-v1.10/test-v1.10.json", [PAIR | {"label": "contradiction"}])
    capsys.readouterr()
    prepare(small, out)
    shown = capsys.readouterr().out
    assert (
        not (out / "jsquad_train.jsonl").exists() and "jsquad_train.jsonl.before now" in shown
    )  # the sample's would be of other data; nobody's rows are lost
    assert (out / "jsquad_train.jsonl.before").read_bytes() == first
    (out / "jnli_test.jsonl").write_text("edited by hand")
    prepare(small, out)
    assert (out / "jnli_test.jsonl.before").read_text() == "edited by hand"
    assert "edited: it is jnli_test.jsonl.before now" in capsys.readouterr().out
    assert (out / "mine.txt").read_text() == "kept" and not list(out.glob(".*"))
    (row,) = read_lines(out / "jcommonsenseqa_test.jsonl")
    assert set(row) == {"id", "prompt"} and "1 without an answer" in shown
    assert read_lines(out / "jnli_test.jsonl")[0]["completion"] == "矛盾"


def test_preparation_refuses(small, tmp_path, capsys):
    out, datasets = tmp_path / "out", small / "datasets"
    assert "not a directory" in refusal(capsys, prepare, tmp_path / "none", out)
    shutil.rmtree(datasets / "jsts-v1.3")
    error = refusal(capsys, prepare, small, out, "jsts")
    assert (
        "no jsts-vN.M" in error
        and "it has jcommonsenseqa-v1.1, jcommonsenseqa-v1.3, jnli-v1.10" in error
    )
    assert "holds datasets/" in refusal(capsys, prepare, datasets, out)
    prepare(small, out)  # a missing task is said, not fatal, when all are asked for
    assert "jsts            not in" in capsys.readouterr().out
    (datasets / "jsts-v1.3").mkdir()
    assert "neither" in refusal(capsys, prepare, small, out, "jsts")
    cases = [
        ("jsts", '{"sentence_pair_id": "1"}\n', "fields"),
        ("jsts", json.dumps(PAIR | {"label": 6}), "label 6"),
        ("jsts", json.dumps(PAIR | {"label": "3.0"}), "fields"),
        ("jsts", json.dumps(PAIR), "no answer"),
        ("jsts", json.dumps(PAIR | {"label": 1.0}) + "\n{oops\n", "line 2"),
        ("jsts", "[1, 2]\n", "line 1"),
        ("jsts", "\n", "no jsts question"),
        ("jsts", (json.dumps(PAIR | {"label": 1.0}) + "\n") * 2, "more than once"),
        ("jnli", json.dumps(PAIR | {"label": "含意"}), "fields"),
        ("jcommonsenseqa", json.dumps(QUESTION | {"label": -1}), "label -1"),
        ("jcommonsenseqa", json.dumps(QUESTION | {"label": 5}), "label 5"),
        ("jcommonsenseqa", json.dumps(QUESTION | {"choice3": None}), "fields"),
        ("jsquad", json.dumps({"data": [{"title": "x"}]}), "data > paragraphs > qas"),
        (
            "jsquad",
            json.dumps({"data": [{"paragraphs": [{"qas": [3], "context": "x"}]}]}),
            "data > paragraphs > qas",
        ),
        ("jsquad", json.dumps([1]), "data > paragraphs > qas"),
        ("jsquad", '{"data":\n [', "line 2"),
        ("jsquad", json.dumps({"data": []}), "no jsquad question"),
        ("jsquad", json.dumps(jsquad_document(("t", "文", [("q", "何", [])]))), "no answer"),
        ("jnli", b"\x83\x65\x83\x58", "not UTF-8"),
    ]
    for task, content, expected in cases:
        (version,) = {"jnli": ["v1.10"]}.get(task, ["v1.3"])
        path = datasets / f"{task}-{version}" / f"valid-{version}.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert expected in refusal(capsys, prepare, small, out, task), (task, content)
    (tmp_path / "file").write_text("")
    assert "cannot be" in refusal(capsys, prepare, SAMPLE, tmp_path / "file" / "below")


@pytest.mark.skipif(
    "JGLUE_DIR" not in os.environ, reason="JGLUE_DIR does not name a checkout of JGLUE"
)
def test_real_jglue(tmp_path):
    source = Path(os.environ["JGLUE_DIR"])
    prepare(source, tmp_path)
    for path in sorted(tmp_path.glob("*_validation.jsonl")):
        rows, task = read_lines(path), path.name.split("_")[0]
        newest = max((source / "datasets").glob(f"{task}-v*/valid-*.json"))
        if task == "jsquad":
            articles = json.loads(newest.read_text(encoding="utf-8"))["data"]
            records = [
                (part["context"], q)
                for article in articles
                for part in article["paragraphs"]
                for q in part["qas"]
            ]
            for row, (context, question) in zip(rows, records, strict=True):
                title, body = context.split(" [SEP] ", 1)
                assert (
                    f"題名：{title}\n文章：{body}\n質問：{question['question'].strip()}\n答え："
                    == row["prompt"]
                )
                assert row["completion"] in context and row["completion"] in row["answers"]
                assert row["answers"] == [answer["text"] for answer in question["answers"]]
        else:
            records = read_lines(newest)
            assert [row["label"] for row in rows] == [record["label"] for record in records]
            assert all(row["prompt"].endswith("：") for row in rows)
        right = [row | {"generated_text": row["completion"]} for row in rows]
        result = scores(tmp_path, task, right)
        assert result["rows"] == len(records) and result["unreadable"] == 0
        main = {"jsquad": "exact_match", "jsts": "pearson"}.get(task, "accuracy")
        assert result[main] == pytest.approx(1.0)


# ---- Scores ----


def test_jsquad_scores(tmp_path):
    cases = [  # generated, gold answers, exact match, F1 by hand
        ("東京", ["東京"], 1, 1),
        ("東京。", ["東京"], 1, 1),
        ("東京", ["東京。。"], 1, 1),
        ("JR東海", ["jr東海"], 1, 1),
        ("a　 b", ["A b"], 1, 1),
        ("ＪＲ", ["JR"], 0, 0),  # JGLUE does not fold widths
        ("東京、", ["東京"], 0, 4 / 5),  # nor remove other punctuation
        ("東京都", ["東京"], 0, 4 / 5),
        ("京東", ["東京"], 0, 1),  # characters are counted, not ordered
        ("ああい", ["あいい"], 0, 2 / 3),
        ("5月から7月", ["5月", "7月", "5月から7月まで"], 0, 12 / 14),
        ("大阪", ["東京"], 0, 0),
        ("", ["東京"], 0, 0),
        ("\n\n", ["東京"], 0, 0),
        ("\n東京\n質問：次は", ["東京"], 1, 1),  # only the first line is the answer
        ("東京 質問", ["東京"], 0, 4 / 7),  # a space is a character
    ]
    rows = [
        {"id": str(n), "answers": golds, "generated_text": text}
        for n, (text, golds, _, _) in enumerate(cases)
    ]
    for row, (text, golds, exact, f1) in zip(rows, cases, strict=True):
        result = scores(tmp_path, "jsquad", [row])
        assert (result["exact_match"], result["f1"]) == (exact, pytest.approx(f1)), (text, golds)
    result = scores(tmp_path, "jsquad", rows)
    assert result == {
        "task": "jsquad",
        "rows": len(cases),
        "unreadable": 2,
        "exact_match": pytest.approx(statistics.fmean(case[2] for case in cases)),
        "f1": pytest.approx(statistics.fmean(case[3] for case in cases)),
        "data": result["data"],
    }


def slow_f1(left, right):
    """Character F1 by striking out matches one by one, precision and recall kept apart."""
    rest, same = list(right), 0
    for character in left:
        if character in rest:
            rest.remove(character)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(left), same / len(right)
    return 2 * precision * recall / (precision + recall)


def test_jsquad_scores_of_random_strings(tmp_path):
    rng = random.Random(3)

    def text():
        return "".join(rng.choices("東京大阪AbC12", k=rng.randint(1, 8)))

    rows = [
        {
            "id": str(n),
            "answers": [text() for _ in range(rng.randint(1, 3))],
            "generated_text": text(),
        }
        for n in range(300)
    ]
    best = [
        max(slow_f1(row["generated_text"].lower(), gold.lower()) for gold in row["answers"])
        for row in rows
    ]
    assert scores(tmp_path, "jsquad", rows)["f1"] == pytest.approx(
        statistics.fmean(best), abs=1e-12
    )


def test_accuracy_and_what_cannot_be_read(tmp_path, capsys):
    choices = ["掲示板", "パソコン", "マザーボード", "2号", "まな板"]
    cases = [  # generated text, what it is read as
        *(
            (text, 2)
            for text in (
                "2",
                "２",
                " 2\n",
                "2：マザーボード",
                "2番です",
                "2.",
                "2. 掲示板",
                "２．",
                "２．マザーボード",
                "2。",
                "マザーボード",
                "マザーボード。",
            )
        ),
        *(("まな板", 4), ("4", 4), ("0", 0)),
        *(
            (text, None)
            for text in (
                "10",
                "2.5",
                "２．５",
                "2.5番",
                "２０",
                "5",
                "",
                "わからない",
                "ボード",
                "答えは2",
            )
        ),
    ]
    rows = [
        {"id": str(n), "choices": choices, "label": 2, "generated_text": text}
        for n, (text, _) in enumerate(cases)
    ]
    result = scores(tmp_path, "jcommonsenseqa", rows)
    assert result["accuracy"] == pytest.approx(sum(read == 2 for _, read in cases) / len(cases))
    assert (
        result["unreadable"] == sum(read is None for _, read in cases)
        and result["commonest_label"] == 1
    )
    for number, (text, read) in enumerate(
        cases
    ):  # each one is right exactly with the label it is read as
        for label in range(5):
            one = scores(tmp_path, "jcommonsenseqa", [rows[number] | {"label": label}])
            assert one["accuracy"] == (label == read), (text, label)
    cases = [
        ("含意", "entailment"), ("矛盾です。", "contradiction"), ("neutral", "neutral"), ("Entailment", "entailment"),
        ("含意、矛盾、中立", None), ("", None), ("はい", None), ("中立\n含意", "neutral"),
    ]  # fmt: skip
    labels = [
        "entailment",
        "contradiction",
        "neutral",
        "entailment",
        "neutral",
        "neutral",
        "neutral",
        "entailment",
    ]
    rows = [
        {"id": n, "label": label, "generated_text": text}
        for n, (label, (text, _)) in enumerate(zip(labels, cases, strict=True))
    ]
    result = scores(tmp_path, "jnli", rows)
    assert (result["accuracy"], result["unreadable"], result["commonest_label"]) == (
        4 / 8,
        3,
        4 / 8,
    )
    shown = capsys.readouterr().out
    assert (
        "3 of 8 texts could not be read as an answer; they count as wrong" in shown
        and "0.5000" in shown
    )


def test_choices_that_begin_with_a_digit(tmp_path):
    """Their exact words are read before a number is; a mere digit is the number that was asked for."""
    choices = ["3D映画", "4", "3Dプリンター", "2号", "0番線"]
    cases = {"3Dプリンター": 2, "3Dプリンター。": 2, "3D映画": 0, "2号": 3, "0番線": 4, "0番": 0}
    cases |= {"3": 3, "3.": 3, "４": 4, "4。": 4, "1": 1, "3：2号": 3, "3Dテレビ": None}
    for text, read in cases.items():
        for label in range(5):
            row = {"id": "1", "choices": choices, "label": label, "generated_text": text}
            result = scores(tmp_path, "jcommonsenseqa", [row])
            assert result["accuracy"] == (label == read), (text, label)
            assert result["unreadable"] == (read is None), text


THOUGHTS = [
    "<think>\n\n</think>\n\n",
    "\n<think>\n花瓶？ 4かも。矛盾。\n</think>\n",
    "<|channel>thought\n<channel|>",
    "<|channel>thought\n花瓶？ 4\n\n<channel|>\n",
    "花瓶？ 4かも。\n</think>\n\n",  # the prompt began it
    "<think>4</think><think>\n</think>",
]
UNENDED = [
    "<think>\n{}",
    "\n\n<think>{}\n",
    "<|channel>thought\n{}",
    "thought\n{}",  # generation leaves special tokens out, as Gemma 4's marks are
    "<think></think>\n<think>\n{}",
]
GOLD = {
    "jsquad": ({"answers": ["辞書"]}, "辞書"),
    "jcommonsenseqa": ({"label": 2, "choices": ["a", "b", "c", "d", "e"]}, "2"),
    "jnli": ({"label": "entailment"}, "含意"),
    "jsts": ({"label": 3.5}, "3.5"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_thought_before_the_answer(task, tmp_path):
    """A closed one is no part of the answer; one without an end leaves no answer."""
    gold, right = GOLD[task]

    def score(texts):
        rows = [{"id": n, **gold, "generated_text": text} for n, text in enumerate(texts)]
        if task == "jsts":  # correlations need two labels
            rows.append({"id": "other", "label": 1.0, "generated_text": "1.0"})
        result = scores(tmp_path, task, rows)
        return result["unreadable"], result.get("exact_match", result.get("accuracy"))

    for thought in THOUGHTS:
        assert score([thought + right]) in ((0, 1), (0, None)), thought
        assert score([thought]) in ((1, 0), (1, None)), thought
    for text in UNENDED:
        assert score([text.format(right)]) in ((1, 0), (1, None)), text
    # Only what begins with a thought has one: what comes behind an answer was never read.
    assert score([f"{right}\n<think>\n?</think>\n9"]) in ((0, 1), (0, None))
    if task == "jsts":
        rows = [
            {"id": n, "label": n + 0.5, "generated_text": f"{t}{n}.5"}
            for n, t in enumerate(THOUGHTS[:5])
        ]
        assert scores(tmp_path, task, rows)["pearson"] == pytest.approx(1)


def test_scores_say_of_which_data(prepared, small, tmp_path):
    """By the sha256 of the file that prepare_jglue.py wrote: the sample is not the real JGLUE."""
    prepare(small, tmp_path / "other")
    for folder in (prepared, tmp_path / "other"):
        for task in TASKS:
            file = folder / f"{task}_validation.jsonl"
            rows = read_lines(file)
            answered = [row | {"generated_text": "x", "base_generated_text": "y"} for row in rows]
            data = scores(tmp_path, task, answered)["data"]
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            name = str(tmp_path / "predictions.jsonl")
            assert data == {"file": name, "rows": len(rows), "questions_sha256": digest}


def rank(values):
    """Ranks by counting: equal values share the mean of the places they take."""
    return [
        sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values
    ]


def test_correlations(tmp_path, capsys):
    rng = random.Random(5)
    golds = [rng.randrange(26) / 5 for _ in range(200)]
    texts = [f"{min(5, max(0, gold + rng.gauss(0, 1))):.1f}" for gold in golds]
    rows = [
        {"id": n, "label": gold, "generated_text": text}
        for n, (gold, text) in enumerate(zip(golds, texts, strict=True))
    ]
    answers = [float(text) for text in texts]
    result = scores(tmp_path, "jsts", rows)
    assert 0.5 < result["pearson"] < 1 and result["unreadable"] == 0
    assert result["pearson"] == pytest.approx(statistics.correlation(answers, golds), abs=1e-9)
    assert result["spearman"] == pytest.approx(
        statistics.correlation(rank(answers), rank(golds)), abs=1e-9
    )
    spoilt = {0: "", 1: "とても近い", 2: "5.1", 3: "-1", 4: "10", 5: "３．０点\n1.0"}
    for n, text in spoilt.items():
        rows[n]["generated_text"] = text
        answers[n] = 3.0 if n == 5 else 2.5
    capsys.readouterr()
    result = scores(tmp_path, "jsts", rows)
    assert result["unreadable"] == 5 and "they count as 2.5" in capsys.readouterr().out
    assert result["pearson"] == pytest.approx(statistics.correlation(answers, golds), abs=1e-9)
    assert result["spearman"] == pytest.approx(
        statistics.correlation(rank(answers), rank(golds)), abs=1e-9
    )
    same = scores(tmp_path, "jsts", [row | {"generated_text": "x"} for row in rows])
    assert same["pearson"] is None and same["spearman"] is None and same["unreadable"] == 200
    assert "undefined" in capsys.readouterr().out


def test_right_answers_score_one(prepared, tmp_path):
    for task in TASKS:
        rows = read_lines(prepared / f"{task}_validation.jsonl")
        result = scores(
            tmp_path, task, [row | {"generated_text": row["completion"]} for row in rows]
        )
        values = [
            result[name]
            for name in ("exact_match", "f1", "accuracy", "pearson", "spearman")
            if name in result
        ]
        assert (
            values == pytest.approx([1] * len(values))
            and result["unreadable"] == 0
            and result["rows"] == len(rows)
        )
        if task != "jsts":  # answers of other questions score about as badly as a guess
            shifted = [
                row | {"generated_text": other["completion"]}
                for row, other in zip(rows, rows[7:] + rows[:7], strict=True)
            ]
            result = scores(tmp_path, task, shifted)
            assert result.get("exact_match", result.get("accuracy")) < 0.6, task


def test_scoring_refuses(prepared, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    good = {
        task: read_lines(prepared / f"{task}_validation.jsonl")[0] | {"generated_text": "x"}
        for task in TASKS
    }
    for task in TASKS:
        for other in set(TASKS) - {task}:
            write_lines(path, [good[other]])
            assert f"--task {other}" in refusal(capsys, evaluate, task, path)
        write_lines(
            path, [{name: value for name, value in good[task].items() if name != "generated_text"}]
        )
        assert "line 1 has no text in `generated_text`" in refusal(capsys, evaluate, task, path)
        for spoilt in ({"generated_text": None}, {"generated_text": 3}):
            assert "generated_text" in refusal(
                capsys, evaluate, task, write_lines(path, [good[task] | spoilt])
            )
        bare = {"id": "1", "prompt": "x", "generated_text": "y"}
        assert "prepare_jglue.py" in refusal(capsys, evaluate, task, write_lines(path, [bare]))
        unnamed = {name: value for name, value in good[task].items() if name != "id"}
        assert "prepare_jglue.py" in refusal(capsys, evaluate, task, write_lines(path, [unnamed]))
        write_lines(path, [good[task], good[task] | {"id": "other"}, good[task]])
        assert "line 3" in refusal(capsys, evaluate, task, path)
    for spoilt in ({"answers": []}, {"answers": "x"}, {"answers": [1]}):
        assert "jsquad answers" in refusal(
            capsys, evaluate, "jsquad", write_lines(path, [good["jsquad"] | spoilt])
        )
    for spoilt in ({"label": 5}, {"label": "2"}, {"label": None}, {"choices": ["a"]}):
        write_lines(path, [good["jcommonsenseqa"] | spoilt])
        assert "error" in refusal(capsys, evaluate, "jcommonsenseqa", path)
    path.write_text(json.dumps(good["jnli"]) + '\n\n{"id": \n')
    assert "line 3 is not JSON" in refusal(capsys, evaluate, "jnli", path)
    path.write_text("3\n")
    assert "has no text in `generated_text`" in refusal(capsys, evaluate, "jnli", path)
    path.write_text("\n")
    assert "empty" in refusal(capsys, evaluate, "jnli", path)
    path.write_bytes(b"\x83\x65\n")
    assert "can't decode" in refusal(capsys, evaluate, "jnli", path)
    assert "cannot be read" in refusal(capsys, evaluate, "jnli", tmp_path / "none.jsonl")
    assert "cannot be read" in refusal(capsys, evaluate, "jnli", tmp_path)
    write_lines(path, [good["jnli"]])
    assert "cannot be written" in refusal(
        capsys, evaluate, "jnli", path, f"--output_file={path}/below.json"
    )


def test_alone_in_an_empty_folder(prepared, tmp_path):
    """Copies of the scripts need nothing of the project but data, and --help is quick."""
    write_lines(
        tmp_path / "p.jsonl",
        [row | {"generated_text": "1"} for row in read_lines(prepared / "jsts_validation.jsonl")],
    )
    runs = {
        "make_sample": ["--output_dir", "made"],
        "prepare_jglue": ["--jglue_dir", "made", "--output_dir", "out"],
        "evaluate_jglue": ["--task", "jsts", "--prediction_file", "p.jsonl"],
    }
    for name, arguments in runs.items():
        copy = shutil.copy(JGLUE / f"{name}.py", tmp_path)
        done = subprocess.run(
            [sys.executable, copy, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, done.stderr
        typo = subprocess.run(
            [sys.executable, copy, "--tsk", "x"], cwd=tmp_path, capture_output=True, text=True
        )
        assert typo.returncode == 2 and "error:" in typo.stderr and "Traceback" not in typo.stderr
    assert len(read_lines(tmp_path / "out" / "jnli_train.jsonl")) > 100


# ---- Preference pairs ----


def test_preference_pairs(prepared, small, tmp_path, capsys):
    allowed = {"jcommonsenseqa": set("01234"), "jnli": {"含意", "矛盾", "中立"}}
    for task in TASKS:
        for split in ("train", "validation"):
            path = prepared / f"{task}_preferences_{split}.jsonl"
            assert path.exists() == (task in allowed)
            rows = read_lines(prepared / f"{task}_{split}.jsonl")
            pairs = read_lines(path) if task in allowed else []
            for row, pair in zip(rows, pairs, strict=task in allowed):
                assert list(pair) == ["id", "prompt", "chosen", "rejected"]
                kept = [pair["id"], pair["prompt"], pair["chosen"]]
                assert kept == [row["id"], row["prompt"], row["completion"]]
                assert pair["rejected"] in allowed[task] - {row["completion"]}
            counts = Counter(pair["rejected"] for pair in pairs)  # not always the same wrong one
            assert {*counts} == allowed.get(task, set())
            assert max(counts.values(), default=0) <= len(pairs) / len(counts or [0]) * 2
    before = {path.name: path.read_bytes() for path in prepared.glob("*preferences*")}
    prepare(SAMPLE, prepared)
    assert before == {path.name: path.read_bytes() for path in prepared.glob("*preferences*")}
    # A pair hangs on its own id alone: not on the rows before it, nor on the split.
    single = write_lines(
        tmp_path / "one/datasets/jnli-v1.3/train-v1.3.json",
        read_lines(SAMPLE / "datasets/jnli-v1.3/train-v1.3.json")[40:41],
    ).parents[2]
    prepare(single, tmp_path / "one_out", "jnli")
    (pair,) = read_lines(tmp_path / "one_out/jnli_preferences_train.jsonl")
    assert pair == read_lines(prepared / "jnli_preferences_train.jsonl")[40]
    # Two choices with the same words are both right, or both wrong.
    twins = QUESTION | {"choice0": "マザーボード", "choice4": "マザーボード "}
    many = [twins | {"q_id": number} for number in range(40)]
    write_lines(small / "datasets/jcommonsenseqa-v1.3/valid-v1.3.json", many)
    prepare(small, tmp_path / "out", "jcommonsenseqa")
    pairs = read_lines(tmp_path / "out/jcommonsenseqa_preferences_validation.jsonl")
    assert {pair["rejected"] for pair in pairs} == {"1", "3"}
    same = QUESTION | {f"choice{n}": "猫" for n in range(5)}
    write_lines(small / "datasets/jcommonsenseqa-v1.3/valid-v1.3.json", [same])
    assert "all choices are the same" in refusal(
        capsys, prepare, small, tmp_path / "out", "jcommonsenseqa"
    )
    # Pairs of an earlier run go with the split that they belong to.
    (prepared / "jnli_train.jsonl").rename(tmp_path / "gone")
    folder = tmp_path / "only_valid"
    shutil.copytree(SAMPLE, folder)
    (folder / "datasets/jnli-v1.3/train-v1.3.json").unlink()
    shutil.copytree(prepared, tmp_path / "again")
    prepare(folder, tmp_path / "again", "jnli")
    assert not (tmp_path / "again/jnli_preferences_train.jsonl").exists()
    (tmp_path / "gone").rename(prepared / "jnli_train.jsonl")


# ---- Likelihoods ----


def make_model(folder, kind, bos=False):
    """A checkpoint as in conftest.py, long enough for JGLUE's prompts in single bytes."""
    kept = CONFIGS[kind]

    def longer(rows):
        config = kept(rows)
        for name in ("n_positions", "max_position_embeddings", "max_seq_len"):
            if hasattr(config, name):
                setattr(config, name, 1024)
        return config

    CONFIGS[kind] = longer
    try:
        return make_checkpoint(folder, kind, bos)
    finally:
        CONFIGS[kind] = kept


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("jglue_models")
    return {
        kind: make_model(root / kind, kind, bos=kind == "llama")
        for kind in ("gpt2", "falcon_alibi", "mpt", "llama")
    }


def choose(model, prompts, output, *words):
    files = [f"--model_name_or_path={model}", f"--prompt_file={prompts}"]
    script = load_script(JGLUE / "score_choices.py")
    script.main([*files, f"--output_file={output}", *words])
    return read_lines(output)


def summed(model, prompt, choice):
    """The log-probability of ids behind a prompt: a forward pass without padding for each."""
    import torch

    total = 0.0
    for number, token in enumerate(choice):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + choice[:number]])).logits[0, -1].double()
        total += (logits[token] - torch.logsumexp(logits, 0)).item()
    return total


# One is the beginning of another: its text is the prompt of that one's last token, and the
# second row's prompt is the first row's with a choice. Lengths from 1 to 12 tokens.
CHOICE_ROWS = [
    {"prompt": "質問: 空\n答え: ", "answer_choices": ["0", "01", "青い", "青いです", "中立"]},
    {"prompt": "質問: 空\n答え: 0", "answer_choices": ["1", "12", "青い"]},
    {"prompt": "猫", "answer_choices": ["2", "3"]},
    {"prompt": "前提: 猫がいる。\n仮説: 犬がいる。\n関係: ", "answer_choices": ["含意", "矛盾"]},
]


def test_likelihoods_against_one_by_one(models, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    no_choices = {"prompt": "x", "answers": ["y"]}
    prompts = write_lines(tmp_path / "p.jsonl", [no_choices, *CHOICE_ROWS])
    for kind, path in models.items():
        one = choose(path, prompts, tmp_path / f"{kind}1.jsonl", "--batch_size=1")
        all_at_once = choose(path, prompts, tmp_path / f"{kind}9.jsonl", "--batch_size=9")
        assert "1 rows without answer_choices" in capsys.readouterr().err
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        for row, alone, together in zip(CHOICE_ROWS, one, all_at_once, strict=True):
            assert row.items() <= alone.items() and row.items() <= together.items()
            start = tokenizer.encode(row["prompt"], add_special_tokens=False)
            start = ([1] if kind == "llama" else []) + start
            ids = [tokenizer.encode(c, add_special_tokens=False) for c in row["answer_choices"]]
            expected = pytest.approx([summed(model, start, choice) for choice in ids], abs=1e-4)
            assert alone["choice_logprobs"] == expected, kind
            assert together["choice_logprobs"] == expected, kind
            assert alone["choice_tokens"] == together["choice_tokens"] == [*map(len, ids)]


def test_likelihoods_of_an_adapter_and_of_turns(models, tmp_path):
    """An adapter beside its base; a conversation gets the ids that training gives it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=128, target_modules="all-linear", init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    turns = [
        {"role": "user", "content": "空は?"},
        {"role": "assistant", "content": "青い"},
        {"role": "user", "content": "猫は?"},
    ]
    row = {"messages": turns, "answer_choices": ["静か", "0", "中立"]}
    prompts = write_lines(tmp_path / "p.jsonl", [row])
    template = tmp_path / "t.jinja"  # BOS stands in it already, and a space before each answer
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' }}"
        "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ m.content + '|' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    scored = choose(
        tmp_path / "adapter", prompts, tmp_path / "o.jsonl", f"--chat_template={template}"
    )
    tokenizer = make_tokenizer(bos=True)

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    start = ids("<s>u:空は?|a:") + ids(" 青い<|endoftext|>") + ids("u:猫は?|a:") + ids(" ")
    choices = [ids(choice) for choice in row["answer_choices"]]
    assert all(ids(" ") + ids(f"{choice}") == ids(f" {choice}") for choice in row["answer_choices"])
    expected = [summed(adapted, start, choice) for choice in choices]
    assert scored[0]["choice_logprobs"] == pytest.approx(expected, abs=1e-4)
    with adapted.disable_adapter():
        unlike = [summed(adapted, start, choice) for choice in choices]
    assert scored[0]["choice_logprobs"] != pytest.approx(unlike, abs=0.1)


# What is written before each answer: what of it has its own ids before all choices, and what not.
LEADS = {"<think>\n\n</think>\n\n": ("<think>\n\n</think>\n\n", ""), "答え: ": ("答え:", " ")}


@pytest.mark.parametrize("lead", LEADS)
def test_what_a_template_writes_before_an_answer_is_no_choice(lead, models, tmp_path):
    """It is neither in the sums nor in the numbers of tokens, which change which choice is taken."""
    from transformers import AutoModelForCausalLM

    turns = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '|' }}"
    turns += "{% else %}{{ LEAD + m.content + eos_token }}{% endif %}{% endfor %}"
    (tmp_path / "t.jinja").write_text("{{ bos_token }}" + turns.replace("LEAD", repr(lead)))
    choices = ["矛盾", "約束", "い"]  # a space and 約束's first byte are one token
    rows = [
        {"messages": [{"role": "user", "content": f"猫{n}"}], "answer_choices": choices}
        for n in range(12)
    ]
    prompts, template = (
        write_lines(tmp_path / "p.jsonl", rows),
        f"--chat_template={tmp_path}/t.jinja",
    )
    found = choose(models["llama"], prompts, tmp_path / "o.jsonl", template)
    tokenizer = make_tokenizer(bos=True)
    model = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    before, joined = LEADS[lead]
    own = [ids(joined + choice) for choice in choices]
    whole = [ids(lead + choice) for choice in choices]  # the ids that training gives an answer
    assert whole == [ids(before) + choice for choice in own]
    assert not joined or ids(lead) != whole[1][: len(ids(lead))]
    others = 0
    for row, scored in zip(rows, found, strict=True):
        start = ids(f"<s>{row['messages'][0]['content']}|")
        sums = [summed(model, start + ids(before), choice) for choice in own]
        assert scored["choice_logprobs"] == pytest.approx(sums, abs=1e-4)
        assert scored["choice_tokens"] == [*map(len, own)]
        with_lead = [summed(model, start, text) / len(text) for text in whole]
        without = [value / len(choice) for value, choice in zip(sums, own, strict=True)]
        best = without.index(max(without))
        others += best != with_lead.index(max(with_lead))
        taken = SCRIPTS["ask_model"]["score_choices"]([scored | {"completion": choices[best]}])
        assert taken["acc_per_token"] == 1
    assert joined or others, "the lead changes nothing here: this test would not see it"


def test_choices_go_on_where_they_stopped(models, tmp_path, monkeypatch):
    prompts = write_lines(tmp_path / "p.jsonl", CHOICE_ROWS)
    whole = choose(models["gpt2"], prompts, tmp_path / "whole.jsonl", "--batch_size=1")
    script, output = load_script(JGLUE / "score_choices.py"), tmp_path / "o.jsonl"
    real, calls = script.score_rows, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 2:
            (tmp_path / "STOP").touch()
        return real(*arguments)

    monkeypatch.setattr(script, "score_rows", stopping)
    with pytest.raises(SystemExit) as stop:
        choose(models["gpt2"], prompts, output, "--batch_size=1")
    assert stop.value.code == 75 and not output.exists()
    del stop  # and with it the lock of the run that stopped
    gc.collect()
    assert choose(models["gpt2"], prompts, output, "--batch_size=1") == whole
    assert len(calls) == 4, "a row was scored twice"
    with pytest.raises(SystemExit) as stop:  # and a finished file is not made again
        choose(models["gpt2"], prompts, output, "--batch_size=1")
    assert stop.value.code == 0 and len(calls) == 4


def test_choices_refuse(models, tmp_path, capsys, monkeypatch):
    import torch

    cases = {
        "answer_choices must be": {"prompt": "a", "answer_choices": ["x"]},
        "different texts": {"prompt": "a", "answer_choices": ["x", "x"]},
        "row 1": {"prompt": "a", "answer_choices": ["x", 3]},
        "has no tokens": {"prompt": "a", "answer_choices": ["x", ""]},
        "1,024 positions at most": {"prompt": "a" * 1024, "answer_choices": ["x", "y"]},
        "nothing to score": {"prompt": "a"},
        "is an answer already": {
            "messages": [{"role": "assistant", "content": "a"}], "answer_choices": ["x", "y"]
        },
    }  # fmt: skip
    for number, (message, row) in enumerate(cases.items()):
        prompts = write_lines(tmp_path / f"{number}.jsonl", [row])
        output = tmp_path / f"{number}_out.jsonl"
        assert message in refusal(capsys, choose, models["gpt2"], prompts, output)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": \n')
    assert "row 1" in refusal(capsys, choose, models["gpt2"], bad, tmp_path / "o.jsonl")
    assert "is no file" in refusal(capsys, choose, models["gpt2"], tmp_path / "no", tmp_path / "o")
    good = write_lines(tmp_path / "good.jsonl", CHOICE_ROWS)
    assert "Choose another" in refusal(capsys, choose, models["gpt2"], good, good)
    with monkeypatch.context() as patch:  # as a tokenizer without the characters does
        patch.setattr(
            load_script(JGLUE / "score_choices.py"), "encode_choice", lambda *_: ([5], [])
        )
        words = (capsys, choose, models["gpt2"], good, tmp_path / "o.jsonl")
        assert "two choices have the same" in refusal(*words)
    words = (capsys, choose, models["gpt2"], good, tmp_path / "o.jsonl", "--batch_size=0")
    assert "--batch_size must be 1" in refusal(*words)
    # Weights that overflow give no numbers: without a word the first choice would always win.
    from transformers import AutoModelForCausalLM

    spoilt = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    spoilt.transformer.ln_f.weight.data[:] = torch.inf
    spoilt.save_pretrained(tmp_path / "spoilt")
    make_tokenizer().save_pretrained(tmp_path / "spoilt")
    with pytest.raises(SystemExit) as stop:
        choose(tmp_path / "spoilt", good, tmp_path / "n.jsonl")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: the model gives no numbers")


# ---- Asking a model ----


def test_scores_of_choices_where_the_three_differ():
    """lm-evaluation-harness' acc is the best sum, acc_norm the best sum by characters."""
    rows = [
        {
            "answer_choices": ["含意", "矛盾する", "中立"], "choice_tokens": [2, 3, 6],
            "choice_logprobs": sums, "completion": right,
        }
        for sums, right in (
            ([-3.0, -4.0, -6.0], "含意"),  # by characters -1.5 -1.0 -3.0, by tokens -1.5 -1.33 -1.0
            ([-3.0, -4.0, -6.0], "矛盾する"),
            ([-3.0, -4.0, -6.0], "矛盾する"),
            ([-3.0, -4.0, -6.0], "中立"),
            ([-3.0, -4.0, -6.0], "中立"),
            ([-3.0, -4.0, -6.0], "中立"),
            ([-3.0, -4.0, -6.0], "中立"),
            ([-2.0, -9.0, -2.0], "中立"),  # a tie: the first counts, which is wrong
        )
    ]  # fmt: skip
    scores = SCRIPTS["ask_model"]["score_choices"](rows)
    assert scores == {"ties": 1, "acc": 0.125, "acc_norm": 0.25, "acc_per_token": 0.625}


def test_intervals():
    wilson, bootstrap = (SCRIPTS["ask_model"][name] for name in ("wilson", "bootstrap"))
    z = statistics.NormalDist().inv_cdf(0.975)
    for right, count in ((0, 8), (1, 10), (5, 10), (119, 240), (240, 240)):
        share = right / count
        for limit, sign in zip(wilson(share, count), (1, -1), strict=True):
            # Wilson's limits are the p from which the share lies z standard errors away.
            away = sign * z * (limit * (1 - limit) / count) ** 0.5
            assert share == pytest.approx(limit + away, abs=1e-6)
    rng = random.Random(1)
    values = [rng.random() for _ in range(400)]
    error = z * statistics.pstdev(values) / 20
    low, high = bootstrap(lambda column: column.mean(), values)
    assert [low, high] == pytest.approx(
        [statistics.fmean(values) - error, statistics.fmean(values) + error], abs=0.15 * error
    )
    assert bootstrap(lambda column: column.mean(), values) == [low, high], "not seeded"
    others = [value + rng.gauss(0, 0.3) for value in values]
    correlation = SCRIPTS["evaluate_jglue"]["correlation"]
    import math

    middle = math.atanh(statistics.correlation(values, others))
    fisher = [math.tanh(middle + sign * z / 397**0.5) for sign in (-1, 1)]
    assert bootstrap(correlation, values, others) == pytest.approx(fisher, abs=0.02)
    assert bootstrap(correlation, [1.0] * 50, values[:50]) is None
    assert bootstrap(lambda column: column.mean(), [0.0] * 9) is None, "no spread, no interval"


def make_prompts(prepared, output, *words):
    script = runpy.run_path(str(JGLUE / "make_prompts.py"))
    script["main"]([f"--data_dir={prepared}", f"--output_file={output}", *words])
    return read_lines(output)


def test_few_shot_prompts(prepared, tmp_path, capsys):
    plain = make_prompts(prepared, tmp_path / "0.jsonl", "--task=all")
    count = 0
    for task in TASKS:
        own = [row for row in plain if row["task"] == task]
        for row, asked in zip(read_lines(prepared / f"{task}_validation.jsonl"), own, strict=True):
            assert row.items() <= asked.items() and asked["examples"] == []
            count += 1
            if task in ("jcommonsenseqa", "jnli"):
                assert asked["completion"] in asked["answer_choices"]
    assert len(plain) == count
    few = make_prompts(prepared, tmp_path / "3.jsonl", "--task=all", "--num_fewshot=3")
    turns = make_prompts(prepared, tmp_path / "t.jsonl", "--task=all", "--num_fewshot=3", "--turns")
    drawn, known = set(), {}
    for task in TASKS:
        known[task] = {one["id"]: one for one in read_lines(prepared / f"{task}_train.jsonl")}
    for zero, row, chat in zip(plain, few, turns, strict=True):
        shown = [known[row["task"]][name] for name in row["examples"]]
        assert len({one["id"] for one in shown}) == 3 and chat["examples"] == row["examples"]
        text = "".join(f"{one['prompt']}{one['completion']}\n\n" for one in shown)
        assert row["prompt"] == text + zero["prompt"] and "prompt" not in chat
        said = [(turn["role"], turn["content"]) for turn in chat["messages"]]
        pairs = [(one["prompt"], one["completion"]) for one in shown]
        expected = [pair for p, c in pairs for pair in (("user", p), ("assistant", c))]
        assert said == [*expected, ("user", zero["prompt"])]
        drawn.add((row["task"], *row["examples"]))
    assert len(drawn) == 4, "each question of a task has the same examples"
    words = ("--task=jnli", "--num_fewshot=3")
    other = make_prompts(prepared, tmp_path / "s.jsonl", *words, "--seed=1")
    assert other[0]["examples"] != next(r for r in few if r["task"] == "jnli")["examples"]
    limited = make_prompts(prepared, tmp_path / "l.jsonl", "--task=jnli", "--limit=10")
    names = [row["id"] for row in limited]
    assert (
        len(set(names)) == 10
        and names != [row["id"] for row in plain if row["task"] == "jnli"][:10]
    )

    # No example is a question that is asked, with or without --limit.
    shared = tmp_path / "shared"
    rows = read_lines(prepared / "jsts_validation.jsonl")
    write_lines(shared / "jsts_validation.jsonl", rows)
    write_lines(
        shared / "jsts_train.jsonl", [*rows, *read_lines(prepared / "jsts_train.jsonl")[:2]]
    )
    words = ("--task=jsts", "--num_fewshot=2", "--limit=1")
    (row,) = make_prompts(shared, tmp_path / "n.jsonl", *words)
    known = [one["prompt"] for one in read_lines(prepared / "jsts_train.jsonl")[:2]]
    assert all(prompt in row["prompt"] for prompt in known)
    refused = (capsys, make_prompts, shared, tmp_path / "x.jsonl", "--task=jsts")
    assert "has 2 training rows" in refusal(*refused, "--num_fewshot=3")
    assert "--limit 1 or more" in refusal(*refused, "--limit=0")
    assert "jsquad_validation.jsonl is not there. Type: python prepare" in refusal(
        capsys, make_prompts, shared, tmp_path / "x.jsonl", "--task=all"
    )
    assert "holds other prompts" in refusal(
        capsys, make_prompts, prepared, tmp_path / "l.jsonl", "--task=jnli", "--limit=11"
    )
    bare = {"id": "1", "prompt": "x"}  # as in a test split
    write_lines(shared / "jsts_validation.jsonl", [bare])
    assert "no question with its answer" in refusal(*refused)


@pytest.fixture
def in_process(monkeypatch):
    """evaluate_jglue.py whose scripts run in this process: (module, what was run)."""
    script, done = load_script(JGLUE / "evaluate_jglue.py"), []

    def run(path, *words):
        done.append((path.name, [str(word) for word in words]))
        try:
            load_script(path).main([str(word) for word in words])
        except SystemExit as end:  # a finished file ends with 0
            if end.code:
                raise

    monkeypatch.setattr(load_script(JGLUE / "ask_model.py"), "run", run)
    return script, done


def test_all_tasks_of_a_model(prepared, models, tmp_path, in_process, capsys, monkeypatch):
    script, done = in_process
    words = ["--task=all", f"--model_name_or_path={models['llama']}", f"--data_dir={prepared}"]
    words += ["--limit=6", "--num_fewshot=1", "--max_new_tokens=4", f"--output_dir={tmp_path}"]
    script.main(words)
    assert [name for name, _ in done] == ["make_prompts.py", "generate_text.py", "score_choices.py"]
    stem = tmp_path / "all_1shot_limit6"
    result = json.loads(Path(f"{stem}.json").read_text())
    page = Path(f"{stem}.md").read_text()
    assert page in capsys.readouterr().out and list(result["tasks"]) == list(TASKS)
    assert (result["model"], result["num_fewshot"], result["limit"]) == (models["llama"], 1, 6)
    assert result["precision"] == "fp32" and result["versions"].keys() >= {"torch", "transformers"}
    rows, chosen = (read_lines(f"{stem}_{name}.jsonl") for name in ("answers", "choices"))
    for task, entry in result["tasks"].items():
        own = [row for row in rows if row["task"] == task]
        assert len(own) == entry["rows"] == 6 and len(entry["examples"]) == 1
        for name, value in scores(tmp_path, task, own).items():  # as of a --prediction_file
            assert name in ("task", "data") or entry[name] == value
        file = prepared / f"{task}_validation.jsonl"
        digest, count = hashlib.sha256(file.read_bytes()).hexdigest(), len(read_lines(file))
        data = {"file": str(file), "rows": count, "questions_sha256": digest}
        assert entry["data"] == data
        assert f"{file} ({count:,} rows, sha256 {digest[:12]})" in page
        for name, limits in entry["intervals"].items():
            assert f"| {task} | {name} | " in page
            assert limits is None or limits[0] <= entry[name] <= limits[1]
        likely = [row for row in chosen if row["task"] == task]
        if task in ("jcommonsenseqa", "jnli"):
            best = [
                max(zip(r["choice_logprobs"], r["answer_choices"], strict=True)) for r in likely
            ]
            right = sum(
                pair[1] == row["completion"] for pair, row in zip(best, likely, strict=True)
            )
            assert entry["acc"] == right / 6
        assert ("acc" in entry) == bool(likely) == (task in ("jcommonsenseqa", "jnli"))
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with monkeypatch.context() as patch:  # not even the versions: no answer was made with these
        patch.setattr(metadata, "version", lambda name: "99")
        script.main(words)  # nothing is made again, and the scores are the same
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    changed = [word for word in words if not word.startswith("--max_new")]
    assert "holds other answers" in refusal(capsys, script.main, changed)

    # By turns: the options go to both scripts.
    done.clear()
    words[0] = "--task=jnli"
    chat = ["--apply_chat_template", "--chat_template=alpaca", "--precision=fp32"]
    script.main([*words, *chat])
    for _, given in done[1:]:
        assert given[given.index("--chat_template") + 1] == "alpaca" and "--precision" in given
    page = (tmp_path / "jnli_1shot_chat_limit6.md").read_text()
    assert "1-shot, asked by turns of the chat template" in page and "| jnli | acc |" in page
    assert "### 応答" in capsys.readouterr().err  # generate_text.py's example


def test_the_versions_are_those_that_the_answers_were_made_with(
    prepared, models, tmp_path, in_process, monkeypatch
):
    """Of two starts with other packages both are named, as soon as both have made answers."""
    script, _ = in_process
    words = ["--task=jnli", f"--model_name_or_path={models['llama']}", f"--data_dir={prepared}"]
    words += ["--limit=4", "--batch_size=2", "--max_new_tokens=2", f"--output_dir={tmp_path / 'o'}"]
    generate, chosen = (
        load_script(path)
        for path in (ROOT / "generate_text" / "generate_text.py", JGLUE / "score_choices.py")
    )
    stem, real, calls = tmp_path / "o" / "jnli_0shot_limit4", metadata.version, []

    def start(peft, stops_at=None):
        """Start with another peft; return what the page says of it, None where there is none yet."""
        calls.clear()
        monkeypatch.setattr(metadata, "version", lambda n: peft if n == "peft" else real(n))

        def counted(function):
            def call(*arguments):
                calls.append(1)
                if len(calls) == stops_at:
                    (tmp_path / "o" / "STOP").touch()
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(generate, "generate", counted(generate.generate))
            patch.setattr(chosen, "score_rows", counted(chosen.score_rows))
            try:
                script.main(words)
            except SystemExit as stop:
                assert stop.code == 75
        gc.collect()  # and with it the lock of a run that stopped
        page, result = Path(f"{stem}.md"), Path(f"{stem}.json")
        if not page.exists():
            return None
        shown = re.search(r", peft ([^,.]*(?:\.[0-9][^,.]*)*)", page.read_text())[1]
        assert json.loads(result.read_text())["versions"]["peft"] == shown
        return shown

    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "STOP").touch()
    assert start("1.0") is None and not calls  # it stopped before it made an answer
    assert start("2.0", stops_at=1) is None and len(calls) == 1
    assert start("2.0") == "2.0" and len(calls) == 3  # the other half, and the choices in two
    assert start("3.0") == "2.0" and not calls
    for file in tmp_path.glob("o/*"):  # made anew: by one start one half, the rest by another
        file.unlink()
    assert start("4.0", stops_at=1) is None and len(calls) == 1
    assert start("5.0") == "4.0 and 5.0" and len(calls) == 3
    assert start("6.0") == "4.0 and 5.0" and not calls
    Path(f"{stem}_choices.jsonl").unlink()
    assert start("7.0") == "4.0 and 5.0 and 7.0" and len(calls) == 2
    Path(f"{stem}_versions.json").unlink()  # as of answers made before versions were kept
    assert start("8.0") == "not recorded" and not calls


def test_evaluation_refuses(prepared, in_process, tmp_path, capsys):
    script, done = in_process
    model, file = "--model_name_or_path=m", "--prediction_file=f"
    cases = {
        "Name that one instead of all": ["--task=all", file],
        "--num_fewshot does nothing": ["--task=jnli", file, "--num_fewshot=0"],
        "--apply_chat_template does nothing": ["--task=jnli", file, "--apply_chat_template"],
        "give --output_dir": ["--task=all", model, "--output_file=x"],
        "--chat_template does nothing without": ["--task=all", model, "--chat_template=alpaca"],
    }
    for message, words in cases.items():
        assert message in refusal(capsys, script.main, words)
    for words in ([], [model, file], [model, "--num_fewshots=1"], [model, "--limit=x"]):
        with pytest.raises(SystemExit) as stop:
            script.main(["--task=jnli", *words])
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err
    assert not done
    args = ["--task=jnli", model, f"--data_dir={tmp_path}"]
    assert "Type: python prepare_jglue.py" in refusal(capsys, script.main, args)


def test_a_script_s_end_is_the_evaluation_s(tmp_path):
    """Its status is passed on; SIGTERM reaches it, and the evaluation waits for it."""
    run = SCRIPTS["ask_model"]["run"]
    child = tmp_path / "child.py"
    for text, status in (("raise SystemExit(75)", 75), ("import os\nos.kill(os.getpid(), 9)", 137)):
        child.write_text(text)
        with pytest.raises(SystemExit) as stop:
            run(child)
        assert stop.value.code == status
    child.write_text("")
    assert run(child) is None
    # What generate_text.py does: it ends its batch, and leaves with 75.
    child.write_text(
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(0.3)\n    open('ended', 'w').close()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\nopen('begun', 'w').close()\ntime.sleep(30)\n"
    )
    text = "import pathlib, runpy\nrun = runpy.run_path(%r)['run']\nrun(pathlib.Path(%r))\n"
    words = [sys.executable, "-c", text % (str(JGLUE / "ask_model.py"), str(child))]
    env = os.environ | {"PYTHONPATH": str(JGLUE)}
    parent = subprocess.Popen(words, cwd=tmp_path, env=env)
    while not (tmp_path / "begun").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    time.sleep(0.1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=20) == 75 and (tmp_path / "ended").exists()


def test_scoring_a_file_needs_no_torch(prepared, tmp_path):
    rows = read_lines(prepared / "jsts_validation.jsonl")
    write_lines(tmp_path / "p.jsonl", [row | {"generated_text": "1"} for row in rows])
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it was imported')")
    for words in (["--task=jsts", f"--prediction_file={tmp_path}/p.jsonl"], ["--help"]):
        command = [sys.executable, str(JGLUE / "evaluate_jglue.py"), *words]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
