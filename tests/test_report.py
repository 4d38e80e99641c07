"""jobs/report.py: what it says of a run is what the run's own files say, whatever state they are in.

And jobs/show_ids.py, which compares a prompt's ids with what other programs read.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, ROWS, load_script, make_tokenizer
from matplotlib.figure import Figure

DIGEST = "5" * 64


@pytest.fixture(scope="module")
def script():
    return load_script(ROOT / "jobs" / "report.py")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: (saved.append(a[0]), save(*a, **k))[1])
    return saved


def history(steps, **more):
    """As the training scripts log: sums of each interval."""
    entries = []
    for step in range(10, steps + 1, 10):
        entry = {"step": step, "loss": 4.0 - step / 100, "learning_rate": 1e-3, "grad_norm": 0.5}
        entry |= {"num_learned": 50.0, "num_tokens": 1000.0, "tokens_per_second": 500.0}
        entries.append(entry | more)
    return entries


def make_run(path, script="finetune_lora.py", log=None, given=None, results=None, data=(), step=20):
    """An output_dir; without results as a cut off run leaves it."""
    path.mkdir(parents=True)
    data = [{"use": "train", **file} for file in data]
    data += [{"use": "script", "file": script, "bytes": 1, "sha256": DIGEST}]
    record = {"id": "ab12cd34", "data": data, "precision": "bf16", "device": "NVIDIA H200"}
    record |= {"trainable_parameters": 250, "total_parameters": 1000}
    given = {"model_name_or_path": "MODEL", "output_dir": str(path), **(given or {})}
    text = yaml.safe_dump({**given, "run": record}, allow_unicode=True)
    (path / "run_args.yaml").write_text(text, "utf-8")
    log = history(step) if log is None else log
    state = {"global_step": step, "max_steps": 40, "epoch": 0.5, "log_history": log}
    place = path
    if results is None:
        place = path / f"checkpoint-{step}"
        place.mkdir()
        (place / "run_id").write_text(json.dumps({"run": "ab12cd34"}))
    else:
        results = {**record, "steps": step, "peak_memory_gib": 1.5, **results}
        (path / "all_results.json").write_text(json.dumps(results))
    (place / "trainer_state.json").write_text(json.dumps(state))
    return path


def report(script, *words):
    script.main([str(word) for word in words])
    page = next(word for word in reversed(words) if str(word).endswith(".md"))
    return page.read_text("utf-8")


def tables(text):
    """{heading: rows as lists of cells}; the signs that Markdown needs taken away."""
    found = {}
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.split("\n") if line.startswith("| ")]
        cells = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in lines]
        found[part.split("\n")[0]] = [
            [re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in cells if row[0] != "---"
        ]
    return found


def facts(text, run=1):
    """{name: value} of one of the runs that stand side by side."""
    return {row[0]: row[run] for row in tables(text)["What was trained"]}


def refused(script, capsys, *words):
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    return err


def test_a_finished_run(script, figures, tmp_path, capsys):
    """Each figure of the page, and each point of the picture, from the files by hand."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    data = tmp_path / "データ.jsonl"
    data.write_text(lines + "\n", "utf-8")  # an empty line is no row
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    files = [{"file": str(data), "bytes": data.stat().st_size, "sha256": digest}]
    results = {"train_loss": 3.125, "train_runtime": 4.0, "train_tokens_per_second": 500.0}
    results |= {"eval_loss": 2.25, "eval_runtime": 1.0, "versions": {"torch": "2.13.0"}}
    log = [
        *history(20),
        {"step": 20, "eval_loss": 2.25, "num_tokens": 9},
        {"step": 20, "train_loss": 1},
    ]
    given = {"load_in_4bit": True, "lora_r": 4, "learning_rate": 1e-3}
    run = make_run(tmp_path / "実行 | $x$", log=log, given=given, results=results, data=files)
    text = report(script, run, "--output_file", tmp_path / "new" / "page.md")
    assert capsys.readouterr().out == (
        f"page       {tmp_path}/new/page.md\n"
        f"picture    {tmp_path}/new/page.png: 4 panels of 1 run\n"
    )
    wanted = {
        "directory": str(run),
        "status": "finished",
        "method": "LoRA (load_in_4bit, lora_r 4)",
        "base": "MODEL",
        "trained parameters": "250 of 1,000 (25.00%)",
        "precision": "bf16",
        "device": "NVIDIA H200",
        "steps": "20 of 40 (0.50 epochs)",
        "time": "0:00:04",
        "peak memory": "1.50 GiB (GPU)",
        "tokens/s": "500",
        "training loss, mean": "3.1250",
        "training loss, last logged": "3.8000",
        "eval_loss": "2.2500",
        "packages": "torch 2.13.0",
    }
    assert facts(text) == {"run": "実行 | $x$", **wanted}
    assert tables(text)["On what"][1] == ["train", str(data), f"{data.stat().st_size} bytes",
                                          str(len(ROWS)), digest[:12]]  # fmt: skip
    assert "learning_rate: 0.001" in text and "run:" not in text
    drawn = {axes.get_title(): axes.get_lines() for axes in figures[0].axes}
    points = [
        line.get_xydata().tolist()
        for line in drawn["loss per learned token (nats)  (dashed: validation)"]
    ]
    assert points == [[[10, 3.9], [20, 3.8]], [[20, 2.25]]]
    assert drawn["tokens/s"][0].get_xydata().tolist() == [[10, 500], [20, 500]]
    assert set(drawn) - {"tokens/s", "learning rate", "grad norm"} == {
        "loss per learned token (nats)  (dashed: validation)"
    }
    data.write_text(lines + lines, "utf-8")  # other rows than those trained on
    text = report(script, run, "--output_file", tmp_path / "new" / "page.md")
    assert tables(text)["On what"][1][3] == "changed since"


def test_where_a_relative_data_file_lies(script, tmp_path, monkeypatch):
    """It starts where the run was started, which is where its output_dir starts, too."""
    (tmp_path / "job").mkdir()
    data = tmp_path / "job" / "train.json"
    data.write_text(json.dumps(ROWS), "utf-8")
    file = {
        "file": "train.json",
        "bytes": 1,
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
    }
    run = make_run(tmp_path / "job" / "output" / "2", given={"output_dir": "output/2"}, data=[file])
    monkeypatch.chdir("/")
    text = report(script, run, "--output_file", tmp_path / "page.md")
    assert tables(text)["On what"][1][3] == str(len(ROWS))


def test_a_run_that_is_cut_off_or_goes_on(script, tmp_path):
    """The last checkpoint of this run counts, not the files of an earlier one in the same place."""
    run = make_run(tmp_path / "run", step=20)
    older = {"global_step": 999, "log_history": [{"step": 999, "loss": 9.0}]}
    (run / "trainer_state.json").write_text(json.dumps(older))  # of an earlier run
    os.utime(run / "trainer_state.json", (1000, 1000))
    other = run / "checkpoint-500"  # without this run's mark
    other.mkdir()
    (other / "trainer_state.json").write_text(json.dumps(older))
    damaged = run / "checkpoint-30"
    damaged.mkdir()
    (damaged / "run_id").write_text(json.dumps({"run": "ab12cd34"}))
    (damaged / "trainer_state.json").write_text('{"global_step": 30, "log_h')
    page = tmp_path / "page.md"
    found = facts(report(script, run, "--output_file", page))
    assert found["status"] == "not finished, checkpoint-20 on record"
    assert found["steps"] == "20 of 40 (0.50 epochs)"
    assert (
        found["time"] == "0:00:04 up to the last step on record"
    )  # 2 x 1000 tokens at 500 a second
    assert found["training loss, last logged"] == "3.8000"
    assert "trainer_state.json cannot be read" in page.read_text("utf-8")
    started = make_run(tmp_path / "started", step=20)  # an earlier run's state, nothing of its own
    (started / "checkpoint-20").rename(tmp_path / "away")
    (started / "trainer_state.json").write_text(json.dumps(older))
    os.utime(started / "trainer_state.json", (1000, 1000))
    found = facts(report(script, started, "--output_file", page))
    assert found["status"] == "not finished, no step on record" and "steps" not in found
    (run / "lock").touch()
    assert facts(report(script, run, "--output_file", page))["status"].startswith("training, ")
    os.utime(run / "lock", (time.time() - 200,) * 2)
    assert facts(report(script, run, "--output_file", page))["status"].startswith("not finished")


def test_the_time_of_a_resumed_run(script, tmp_path):
    """all_results.json knows the last start: 3 of 4 intervals before it, of 2 seconds each."""
    results = {"train_runtime": 2.0, "train_tokens_per_second": 500.0, "train_loss": 1.0}
    run, page = make_run(tmp_path / "run", log=history(40), results=results), tmp_path / "page.md"
    text = report(script, run, "--output_file", page)
    assert facts(text)["time"] == "0:00:08, 0:00:02 of it the last start (25% of the tokens)"
    log = [{k: v for k, v in e.items() if k != "tokens_per_second"} for e in history(40)]
    run = make_run(tmp_path / "old", log=log, results=results)
    text = report(script, run, "--output_file", page)
    assert facts(text)["time"] == "0:00:02 for the last start (25% of the tokens)"


GRPO_TIMES = {
    7: 1.5,
    14: 1.0,
    20: 2.0,
    21: 3.0,
    24: 0.5,
}  # logged at other steps where it was saved


def test_the_time_of_a_resumed_grpo_run(script, tmp_path):
    """TRL logs the mean time of a step and the tokens since the beginning; the last start made 40%."""
    log = [
        {"step": step, "loss": 0.1, "reward": 1.0, "step_time": time, "num_tokens": step * 100.0}
        for step, time in GRPO_TIMES.items()
    ]
    log += [{"step": 24, "train_loss": 0.1, "train_runtime": 15.0}]
    seconds = 7 * 1.5 + 7 * 1.0 + 6 * 2.0 + 1 * 3.0 + 3 * 0.5
    assert seconds == 34
    results = {"train_runtime": 17.0, "train_tokens_per_second": 960 / 17, "train_loss": 0.1}
    words = {"script": "finetune_grpo.py", "log": log, "step": 24}
    run, page = make_run(tmp_path / "run", results=results, **words), tmp_path / "page.md"
    found = facts(report(script, run, "--output_file", page))
    assert found["time"] == "0:00:34, 0:00:17 of it the last start (40% of the tokens)"
    results |= {"train_runtime": 36.0, "train_tokens_per_second": 2400 / 36}
    run = make_run(tmp_path / "once", results=results, **words)
    assert facts(report(script, run, "--output_file", page))["time"] == "0:00:36"
    run = make_run(tmp_path / "cut", **words)
    found = facts(report(script, run, "--output_file", page))
    assert found["time"] == "0:00:34 up to the last step on record"
    for entry in log[:2]:  # a log without: the last part only
        del entry["step_time"]
    results |= {"train_runtime": 17.0, "train_tokens_per_second": 960 / 17}
    run = make_run(tmp_path / "old", results=results, **words)
    found = facts(report(script, run, "--output_file", page))
    assert found["time"] == "0:00:17 for the last start (40% of the tokens)"


DPO = [
    {"step": s, "loss": 0.5, "rewards/margins": s / 10, "rewards/accuracies": 0.5} for s in (1, 2)
]
GRPO = [
    {"step": s, "loss": 0.1, "reward": s, "kl": 0.1, "completions/mean_length": 9} for s in (1, 2)
]
GRPO += [{"step": 2, "eval_reward": 1.5, "eval_runtime": 1}]


def test_methods_side_by_side(script, figures, tmp_path):
    """What each logged is drawn for it; losses that measure different things do not share a panel."""
    runs = [
        make_run(tmp_path / "全部", "finetune_full.py", given={"learning_rate": 1}),
        make_run(tmp_path / "dpo", "finetune_dpo.py", log=DPO, given={"learning_rate": 2}),
        make_run(tmp_path / "grpo", "finetune_grpo.py", log=GRPO, given={"beta": 0.5}),
    ]
    (tmp_path / "empty").mkdir()
    page = tmp_path / "page.md"
    text = report(script, *runs, tmp_path / "empty", "--output_file", page)
    columns = [facts(text, number) for number in (1, 2, 3, 4)]
    assert [column["run"] for column in columns] == ["1: 全部", "2: dpo", "3: grpo", "4: empty"]
    assert [column["method"] for column in columns] == [
        "all parameters",
        "DPO",
        "GRPO (beta 0.5)",
        "–",
    ]
    assert columns[3]["status"] == "nothing here"
    assert columns[1]["rewards/margins, first → last"] == "0.1000 → 0.2000"
    assert columns[2]["reward, first → last"] == "1 → 2"
    assert tables(text)["Arguments in which they differ"] == [
        ["run", "1: 全部", "2: dpo", "3: grpo"],
        ["learning_rate", "1", "2", "–"],
        ["beta", "–", "–", "0.5"],
    ]
    assert "losses of different methods measure different things" in text
    drawn = {axes.get_title(): len(axes.get_lines()) for axes in figures[0].axes}
    for title in (
        "loss per learned token (nats)",
        "DPO loss",
        "GRPO loss",
        "rewards/margins",
        "kl",
    ):
        assert drawn[title] == 1
    assert drawn["reward  (dashed: validation)"] == 2
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[:3] == ["1: 全部", "2: dpo", "3: grpo"]


def test_fifty_runs(script, figures, tmp_path):
    """A line each; what all have alike is said once; no colour twice; no text over another."""
    for number in range(50):
        make_run(tmp_path / "sweep" / f"{number:02}", given={"learning_rate": number + 1})
    (tmp_path / "sweep" / "note.txt").touch()  # as output/* names it, too
    runs = sorted((tmp_path / "sweep").iterdir())
    text = report(script, *runs, "--output_file", tmp_path / "page.md")
    assert len(tables(text)["What was trained"]) == 51
    assert tables(text)["What was trained"][0] == ["run", "directory"]
    assert (
        "In all of them: status not finished, checkpoint-20 on record; method LoRA; base MODEL"
        in text
    )
    assert tables(text)["Arguments in which they differ"][50] == ["50: 49", "50"]
    figure = figures[0]
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 50
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.legends[0].get_texts()]
    boxes += [axes.title.get_window_extent() for axes in figure.axes]
    boxes += [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    overlaps = [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.overlaps(b)]
    assert not overlaps
    assert all(figure.bbox.contains(box.x0, box.y0) for box in boxes)


SCORES = [
    {"task": "jsquad", "rows": 240, "exact_match": 0.5, "f1": 0.75},
    {"jnli": {"accuracy": {"value": 0.25, "ci95": [0.125, 0.375]}}, "model": "x"},
    [{"task": "jsts", "pearson": None, "num_fewshot": 3}],
    {"task": "jcommonsenseqa", "accuracy": 0.5, "accuracy_norm": 0.25, "accuracy_norm_ci": [0, 1]},
    {"task": "no task of ours", "rows": 1},
    "text",
]
EVALUATED = {"accuracy": 0.25, "acc": 0.5, "acc_norm": 0.75, "examples": [1, 2]}
EVALUATED["data"] = {"file": "o/jnli.jsonl", "rows": 54, "questions_sha256": DIGEST}
EVALUATED["intervals"] = {"accuracy": [0, 1], "acc": [0.25, 0.75], "acc_norm": None}


def test_scores(script, tmp_path):
    """In today's form of evaluate_jglue.py and in others; a base that was only asked stands along."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    for number, scores in enumerate(SCORES):
        (base / f"scores_{number}.json").write_text(json.dumps(scores))
    (base / "broken.json").write_text("{")
    (base / "scores" / "model").mkdir(parents=True)
    asked = base / "scores" / "model" / "all_2shot.json"
    asked.write_text(json.dumps({"num_fewshot": 2, "tasks": {"jnli": EVALUATED}}))
    text = report(script, base, "--output_file", tmp_path / "page.md")
    assert facts(text) == {
        "run": "base",
        "directory": str(base),
        "status": "not trained here",
        "jsquad rows": "240",
        "jsquad exact_match": "0.5000",
        "jsquad f1": "0.7500",
        "jnli accuracy": "0.2500 [0.1250, 0.3750]",
        "jsts pearson": "undefined",
        "jsts num_fewshot": "3",
        "jcommonsenseqa accuracy": "0.5000",
        "jcommonsenseqa accuracy_norm": "0.2500 [0, 1]",
        "jnli data (all_2shot)": f"o/jnli.jsonl, 54 rows, {DIGEST[:12]}",
        "jnli accuracy (all_2shot)": "0.2500 [0, 1]",
        "jnli acc (all_2shot)": "0.5000 [0.2500, 0.7500]",
        "jnli acc_norm (all_2shot)": "0.7500",
    }
    assert "broken.json cannot be read" in text and "scores_5.json holds something else" in text


def test_scores_of_the_same_name_in_several_directories(script, tmp_path):
    """Each stands on the page, by its path; where a name is the only one, it is enough."""
    run = make_run(tmp_path / "run")
    values = {"checkpoint-100/jsquad_0shot": 0.9, "checkpoint-20/jsquad_0shot": 0.1}
    values |= {"a/scores": 0.2, "b/scores": 0.3, "c/scores": 0.4, "c/other": 0.5, "scores_2": 0.6}
    for name, value in values.items():
        path = run / "scores" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"tasks": {"jsquad": {"f1": value}}}))
    found = facts(report(script, run, "--output_file", tmp_path / "page.md"))
    shown = {name: value for name, value in found.items() if name.startswith("jsquad")}
    assert shown == {
        "jsquad f1 (scores/checkpoint-100/jsquad_0shot)": "0.9000",
        "jsquad f1 (scores/checkpoint-20/jsquad_0shot)": "0.1000",
        "jsquad f1 (scores/a/scores)": "0.2000",
        "jsquad f1 (scores/b/scores)": "0.3000",
        "jsquad f1 (scores/c/scores)": "0.4000",
        "jsquad f1 (other)": "0.5000",
        "jsquad f1": "0.6000",
    }
    two = [{"task": "jsquad", "f1": 0.25}, {"task": "jsquad", "f1": 0.75}]
    (run / "scores.json").write_text(json.dumps(two))  # the usual place keeps its plain name
    found = facts(report(script, run, "--output_file", tmp_path / "page.md"))
    assert found["jsquad f1"] == "0.2500; 0.7500"
    assert found["jsquad f1 (scores_2)"] == "0.6000"


WRONG = {
    "run_args.yaml": ["{", "- 1", "run: 3", "run: {data: [1, {file: 2}], versions: 1}", "a: [b"],
    "trainer_state.json": ["{", "[]", '{"log_history": 3}', '{"log_history": [1, {"loss": "low"}]}',
                           '{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "loss": Infinity}]}'],
    "all_results.json": ["", '{"data": {}, "train_runtime": "x", "total_parameters": 0}'],
    "adapter_config.json": ["[]"],
}  # fmt: skip


def test_damaged_files(script, tmp_path):
    """The rest of the page stands, and a note says what was not read."""
    results = {"train_loss": 1.0, "train_runtime": 1.0, "train_tokens_per_second": 2.0}
    run = make_run(tmp_path / "run", results=results)
    for name, texts in WRONG.items():
        kept = (run / name).read_text("utf-8") if (run / name).exists() else None
        for text in texts:
            (run / name).write_text(text, "utf-8")
            found = script.read_run(run)
            assert found["facts"]["directory"] == str(run), (name, text)
            script.make_panels([found])
            script.make_page([found | {"label": "x"}], tmp_path / "none.png", "")
        (run / name).unlink() if kept is None else (run / name).write_text(kept, "utf-8")
    (run / "trainer_state.json").write_bytes(b"\xff\xfe")
    assert "trainer_state.json cannot be read" in report(
        script, run, "--output_file", tmp_path / "page.md"
    )


def test_refusals_and_files_of_others(script, tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "nowhere does not exist" in refused(script, capsys, run, tmp_path / "nowhere")
    assert "holds no training" in refused(script, capsys, tmp_path / "empty")
    assert "is no directory" in refused(script, capsys, run / "run_args.yaml")
    assert "must end in .md" in refused(script, capsys, run, "--output_file", tmp_path / "page")
    assert "cannot be written" in refused(
        script, capsys, run, "--output_file", "/proc/none/page.md"
    )
    for name in ("report.md", "report.png"):
        (run / name).write_text("mine")
        assert "was not written by this program" in refused(script, capsys, run)
        assert (run / name).read_text() == "mine"
        (run / name).unlink()
        assert not [*run.glob("report*")]  # the other one is not written either
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        script.main([str(run)])
        assert "picture    none: matplotlib does not load" in capsys.readouterr().out
        assert "No picture: matplotlib does not load" in (run / "report.md").read_text("utf-8")
    script.main([str(run)])
    assert "![What was logged](<report.png>)" in (run / "report.md").read_text("utf-8")
    state = run / "checkpoint-20" / "trainer_state.json"
    state.write_text('{"global_step": 1, "log_history": []}')
    script.main([str(run)])  # an earlier picture would be wrong now
    assert not (run / "report.png").exists()
    assert "No picture: nothing was logged." in (run / "report.md").read_text("utf-8")
    assert {path.name for path in run.iterdir()} == {"run_args.yaml", "checkpoint-20", "report.md"}


def test_no_torch(tmp_path):
    """It starts at once, on a login node too."""
    run = make_run(tmp_path / "run")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import report; report.main(); "
    code += "print(sorted({'torch', 'transformers', 'numpy.linalg'} & set(sys.modules) - {'numpy.linalg'}))"
    command = [sys.executable, "-c", code, str(ROOT / "jobs"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_real_training(script, checkpoints, train_file, tmp_path):
    """What finetune_full.py logs adds up: tokens over speed is the time that the steps took."""
    out, page = tmp_path / "out", tmp_path / "page.md"
    words = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file]
    words += ["--output_dir", out, "--max_steps", 4, "--logging_steps", 1, "--save_strategy", "no"]
    load_script(ROOT / "finetune_full" / "finetune_full.py").main([str(word) for word in words])
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    seconds = [entry["num_tokens"] / entry["tokens_per_second"] for entry in steps]
    results = json.loads((out / "all_results.json").read_text())
    assert len(steps) == 4 and min(seconds) > 0
    assert 0.5 * results["train_runtime"] < sum(seconds) <= results["train_runtime"]
    text = report(script, out, "--output_file", page)
    assert facts(text)["method"] == "all parameters"
    assert facts(text)["steps"].startswith("4 of 4")
    assert facts(text)["training loss, mean"] == f"{results['train_loss']:.4f}"
    assert tables(text)["On what"][1][3] == str(len(ROWS))


# ---- show_ids.py ----


def ids_of(capsys, directory, *words):
    """(exit status, {first word of a line: the rest}) of show_ids.py."""
    with pytest.raises(SystemExit) as stop:
        load_script(ROOT / "jobs" / "show_ids.py").main(
            ["--model_name_or_path", str(directory), *words]
        )
    out, err = capsys.readouterr()
    lines = [line.split(maxsplit=1) for line in (out + err).splitlines()]
    return stop.value.code, {line[0]: line[1] for line in lines}


def test_ids_are_compared_with_what_others_read(checkpoints, tmp_path, capsys):
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    tokenizer = make_tokenizer(bos=True)
    end = tokenizer.eos_token_id
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    status, found = ids_of(capsys, model, "--prompt", "水")
    wanted = [1, *tokenizer("水", add_special_tokens=False)["input_ids"]]
    assert (status, found["ids"]) == (0, " ".join(map(str, wanted)))
    assert found["BOS"] == "<s> (1) before every text"
    assert found["ends"] == f"<|endoftext|> ({end})" and "same" in found
    # The template that training would save is not there.
    status, found = ids_of(capsys, model, "--instruction", "水")
    assert status == 1 and "no chat template" in found["differs"]
    # Others would not stop.
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    status, found = ids_of(capsys, model, "--prompt", "水")
    assert status == 1 and f"does not end at <|endoftext|> ({end})" in found["differs"]
    # AutoTokenizer builds a class that overrules tokenizer.json.
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    file = json.loads((model / "tokenizer.json").read_text("utf-8"))
    file["pre_tokenizer"]["add_prefix_space"] = True
    (model / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    config = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    config["tokenizer_class"] = "GPT2Tokenizer"
    (model / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    status, found = ids_of(capsys, model, "--prompt", "水")
    assert status == 1 and found["differs"].startswith("AutoTokenizer from id ")
    status, found = ids_of(capsys, tmp_path / "nowhere", "--prompt", "水")
    assert status == 2 and list(found) == ["error:"]
