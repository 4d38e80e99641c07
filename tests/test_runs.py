"""What a run reads and touches: any path works, its cache notices what changed, no file of others is at risk."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, ROWS, load_script, write_jsonl
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoTokenizer

SCRIPT = ROOT / "finetune_full" / "finetune_full.py"
# What people call their files and directories.
NAMES = [
    "run[1]",
    "a*b?",
    "x{1,2}",
    "a$\\x$b",
    "100%",
    "c#1",
    "with space",
    "日本語",
    "l'été",
    "-dash",
    "a=b",
    "~",
]


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def start(script, model, data, out, *more):
    words = [
        "--model_name_or_path",
        model,
        "--train_file",
        data,
        "--output_dir",
        out,
        "--max_steps",
        2,
        *more,
    ]
    script.main([str(word) for word in words])


def refused(script, capsys, model, data, out, *more):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        start(script, model, data, out, *more)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def tree(directory):
    return {
        p: (p.stat().st_mtime_ns, p.stat().st_size)
        for p in sorted(Path(directory).rglob("*"))
        if p.is_file()
    }


def test_any_path(script, checkpoints, tmp_path, monkeypatch, capsys):
    """Every kind of name as model, data, template, settings and output at once, absolute and relative."""
    monkeypatch.chdir(tmp_path)
    # A pattern would find these in place of the files named.
    write_jsonl(tmp_path / "run1.jsonl", ROWS[:1])
    Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "run1.parquet")
    for number, name in enumerate(NAMES):
        here = tmp_path / f"{name}.d"
        here.mkdir()
        shutil.copytree(checkpoints["gpt2"], here / f"{name}.model")
        data = write_jsonl(here / f"{name}.jsonl", ROWS)
        (here / f"{name}.PARQUET").write_bytes(b"")
        Dataset.from_list(ROWS[:3]).to_parquet(here / f"{name}.PARQUET")
        (here / f"{name}.jinja").write_text(script.CHAT_TEMPLATE, encoding="utf-8")
        settings = {"train_file": [data], "validation_file": f"./{here.name}/{name}.PARQUET",
                    "model_name_or_path": f"./{here.name}/{name}.model/", "max_steps": 1,
                    "chat_template": str(here / f"{name}.jinja"),
                    "output_dir": f"./{here.name}/out {name}/"}  # fmt: skip
        (here / f"{name}.YAML").write_text(
            yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8"
        )
        script.main([str(here / f"{name}.YAML"), "--seed", str(number)])
        found = json.loads((here / f"out {name}" / "all_results.json").read_text(encoding="utf-8"))
        assert [Path(file["file"]).name for file in found["data"]][:2] == [
            f"{name}.jsonl",
            f"{name}.PARQUET",
        ]
        out = capsys.readouterr().out
        assert "7 examples" in out and "3 examples" in out, name
    (tmp_path / "link").symlink_to(tmp_path / "日本語.d")
    start(script, "link/日本語.model", "link/日本語.jsonl", "link/linked")
    assert (tmp_path / "日本語.d" / "linked" / "all_results.json").is_file()


def test_home_and_here(script, checkpoints, tmp_path, monkeypatch):
    """`~` is the home directory also where no shell has seen it, and `.` may be anything."""
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(checkpoints["gpt2"], home / "m")
    here.mkdir()
    write_jsonl(home / "t.jsonl", ROWS)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    start(script, "~/m", "~/t.jsonl", "~/out")
    script.main(
        [
            "--model_name_or_path=~/m",
            "--train_file=~/t.jsonl",
            "--output_dir",
            ".",
            "--max_steps",
            "1",
        ]
    )
    assert (home / "out" / "model.safetensors").is_file() and (here / "model.safetensors").is_file()
    monkeypatch.chdir(home / "m")
    start(script, ".", "../t.jsonl", "../out2")
    assert (home / "out2" / "model.safetensors").is_file()


def test_the_cache_notices_what_changed(script, checkpoints, tmp_path, monkeypatch, capsys):
    """Another content of the same size and age, another template, length, tokenizer; else it really hits."""
    data, calls = tmp_path / "t.jsonl", []
    turns = [{"instruction": row["prompt"], "output": row["completion"]} for row in ROWS]
    write_jsonl(data, turns)
    encode = script.encode
    monkeypatch.setattr(script, "encode", lambda *args: calls.append(1) or encode(*args))
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["gpt2"])
    (tmp_path / "other.jinja").write_text(
        script.CHAT_TEMPLATE.replace("応答", "答え"), encoding="utf-8"
    )

    def examples(template=None, tokenizer=tokenizer, max_length=64):
        calls.clear()
        capsys.readouterr()
        tokenizer.chat_template = None
        script.choose_chat_template(template, tokenizer)

        class Arguments:
            train_file, validation_file, dataset_name = [str(data)], None, None

        files = [{"file": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}]
        training = script.TrainingArguments(str(tmp_path / "o"), use_cpu=True)
        found = script.load_data(Arguments, training, tokenizer, max_length, files)["train_dataset"]
        return [row["input_ids"] for row in found], len(calls)

    first, encoded = examples()
    assert encoded >= len(turns)
    again, encoded = examples()
    assert again == first and encoded <= 1  # the end of a turn is looked at, no row is
    stat, text = data.stat(), data.read_text(encoding="utf-8")
    data.write_text(text.replace("3776m", "3333m"), encoding="utf-8")
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.stat().st_size == stat.st_size
    changed, encoded = examples()
    assert changed != first and encoded >= len(turns)
    data.write_text(text, encoding="utf-8")
    for options in ({"template": str(tmp_path / "other.jinja")}, {"max_length": 40},
                    {"tokenizer": AutoTokenizer.from_pretrained(checkpoints["llama"])}):  # fmt: skip
        other, encoded = examples(**options)
        assert other != first and encoded >= len(turns), options
        again, encoded = examples(**options)
        assert again == other and encoded <= 1


def test_an_edited_copy_reads_anew(checkpoints, tmp_path, capsys, monkeypatch):
    """A copied script with another format_row, same data, same cache: the edit is seen."""
    lesson = tmp_path / "lesson"
    lesson.mkdir()
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    data, text = write_jsonl(tmp_path / "t.jsonl", ROWS), SCRIPT.read_text(encoding="utf-8")
    edited = text.replace("(prompt, False)", "('問い：' + prompt, False)")
    assert edited != text
    examples = []
    for number, source in enumerate((text, text, edited)):
        (lesson / "mine.py").write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("mine", lesson / "mine.py")
        sys.modules["mine"] = mine = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mine)
        capsys.readouterr()
        start(mine, checkpoints["gpt2"], data, tmp_path / f"o{number}")
        lines = capsys.readouterr().out.splitlines()
        examples.append(next(line for line in lines if line.startswith("example")))
    assert examples[0] == examples[1] and "問い：質問" not in examples[0]
    assert "問い：質問" in examples[2]
    # nor does an edited script take a finished run of another for its own, or go on from it
    (lesson / "mine.py").write_text(edited + "\nNEW = 1\n", encoding="utf-8")
    template = tmp_path / "mine.jinja"
    turns = [{"instruction": row["prompt"], "output": row["completion"]} for row in ROWS]
    chats, more = write_jsonl(tmp_path / "c.jsonl", turns), ["--chat_template", template]
    template.write_text(mine.CHAT_TEMPLATE, encoding="utf-8")
    start(mine, checkpoints["gpt2"], chats, tmp_path / "o3", *more)
    template.write_text(mine.CHAT_TEMPLATE.replace("応答", "答え"), encoding="utf-8")
    message = refused(mine, capsys, checkpoints["gpt2"], chats, tmp_path / "o3", *more)
    assert "other data, chat template" in message
    out = tmp_path / "o2"
    message = refused(mine, capsys, checkpoints["gpt2"], data, out)
    assert "another script" in message and "--resume_from_checkpoint" not in message
    # Comments are no code, and the same data may be named otherwise.
    (lesson / "mine.py").write_text(f"{edited}\n# a note\n", encoding="utf-8")
    elsewhere = Path(os.path.relpath(data))
    with pytest.raises(SystemExit) as stop:
        start(mine, checkpoints["gpt2"], elsewhere, out)
    assert stop.value.code == 0 and "finished" in capsys.readouterr().out
    # A file that is called like an option's value hides no change of that option.
    monkeypatch.chdir(tmp_path)
    Path("eager").touch()
    start(mine, checkpoints["gpt2"], data, "o4", "--attn_implementation", "sdpa")
    message = refused(
        mine, capsys, checkpoints["gpt2"], data, "o4", "--attn_implementation", "eager"
    )
    assert "--attn_implementation sdpa, now eager" in message
    (lesson / "mine.py").write_text(edited + "\nNEW = 1\n", encoding="utf-8")
    (out / "all_results.json").unlink()
    (out / "checkpoint-1").mkdir(exist_ok=True)
    shutil.copy(out / "trainer_state.json", out / "checkpoint-1")
    message = refused(mine, capsys, checkpoints["gpt2"], data, out)
    assert f"Or go on: --resume_from_checkpoint {out / 'checkpoint-'}" in message


def test_each_epoch_has_its_own_order(script, checkpoints, tmp_path):
    """Rows are shuffled anew in each epoch, and the same seed gives the same orders."""
    data, losses = write_jsonl(tmp_path / "t.jsonl", ROWS), {}
    for name, more in {"one": [], "again": [], "seed": ["--data_seed", 3]}.items():
        start(script, checkpoints["gpt2"], data, tmp_path / name, "--max_steps", 21, "--learning_rate", 0,
              "--logging_steps", 1, "--per_device_train_batch_size", 1, "--save_strategy", "no", *more)  # fmt: skip
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
    epochs = [losses["one"][i : i + 7] for i in (0, 7, 14)]
    assert sorted(epochs[0]) == pytest.approx(sorted(epochs[1]), abs=1e-6)
    assert len({tuple(f"{loss:.4f}" for loss in epoch) for epoch in epochs}) > 1
    assert losses["one"] == losses["again"] != losses["seed"]


def test_hub_data_sets(script, checkpoints, tmp_path, capsys):
    """A directory stands in for the hub: with a file for what it lacks, and without what it must have."""
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    words = [
        "--model_name_or_path",
        checkpoints["gpt2"],
        "--dataset_name",
        tmp_path / "hub",
        "--max_steps",
        1,
    ]
    words = [str(word) for word in words]
    more = [
        "--validation_file",
        write_jsonl(tmp_path / "v.jsonl", ROWS[:2]),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    script.main([*words, *more])
    out = capsys.readouterr().out
    assert "train      7 examples" in out and "validation 2 examples" in out
    (tmp_path / "hub" / "train.jsonl").rename(tmp_path / "hub" / "test.jsonl")
    with pytest.raises(SystemExit) as stop:
        script.main([*words, "--output_dir", str(tmp_path / "o2")])
    assert stop.value.code == 2
    assert "has only test" in capsys.readouterr().err


def test_several_files(script, checkpoints, tmp_path, capsys):
    one, two = write_jsonl(tmp_path / "1.jsonl", ROWS[:3]), tmp_path / "2.parquet"
    Dataset.from_list(ROWS[3:]).to_parquet(two)
    words = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", one, two, "--validation_file", one, one,
             "--output_dir", tmp_path / "o", "--max_steps", 1, "--per_device_train_batch_size", 7]  # fmt: skip
    script.main([str(word) for word in words])
    out = capsys.readouterr().out
    assert "train      7 examples" in out and "validation 6 examples" in out
    found = json.loads((tmp_path / "o" / "all_results.json").read_text())
    digests = {file["file"]: (file["bytes"], file["sha256"]) for file in found["data"]}
    for path in (Path(one), two):
        content = path.read_bytes()
        assert digests[str(path)] == (len(content), hashlib.sha256(content).hexdigest())
    assert found["versions"]["torch"] and found["hostname"] and found["device"] == "CPU"
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert (found["git_commit"] or "").removesuffix("-dirty") == commit


# ---- Files of others ----


def test_a_model_in_the_output_directory_survives(script, checkpoints, tmp_path, capsys):
    """Public bug reports' way to lose a model: it is a checkpoint-<digits> of the directory written to."""
    keep, data = tmp_path / "keep", write_jsonl(tmp_path / "t.jsonl", ROWS)
    shutil.copytree(checkpoints["llama"], keep / "checkpoint-100")
    before = tree(keep)
    for more in (
        [],
        ["--resume_from_checkpoint", "false"],
        ["--save_total_limit", 1, "--save_steps", 1],
    ):
        assert "--output_dir" in refused(script, capsys, keep / "checkpoint-100", data, keep, *more)
    # the same by a link, from inside it, and with another model
    (tmp_path / "link").symlink_to(keep)
    assert "--output_dir" in refused(
        script, capsys, keep / "checkpoint-100", data, tmp_path / "link"
    )
    assert "another --output_dir" in refused(script, capsys, checkpoints["gpt2"], data, keep)
    assert "another --output_dir" in refused(
        script, capsys, checkpoints["gpt2"], data, keep / "checkpoint-100"
    )
    assert tree(keep) == before


def test_checkpoints_of_others_are_neither_removed_nor_overwritten(
    script, checkpoints, tmp_path, capsys
):
    """Retention counts and removes this run's own; other names, unmarked ones and links stay."""
    model, data, out = checkpoints["gpt2"], write_jsonl(tmp_path / "t.jsonl", ROWS), tmp_path / "o"
    other = tmp_path / "elsewhere"
    shutil.copytree(model, other)
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-1-old", "mycheckpoint-3"):
        shutil.copytree(model, out / name)
    (out / "checkpoint-last").symlink_to(other)
    before = tree(out) | tree(other)
    more = ["--save_steps", 1, "--save_total_limit", 1, "--max_steps", 4]
    start(script, model, data, out, *more)
    assert {path.name for path in out.glob("checkpoint-[0-9]")} == {"checkpoint-4"}
    assert before.items() <= (tree(out) | tree(other)).items()
    # going on: an unmarked complete checkpoint is resumed from, and stays; a link is not followed
    (out / "all_results.json").unlink()
    (out / "checkpoint-4" / "run_id").unlink()
    record = out / "run_args.yaml"
    record.write_text(record.read_text().replace("max_steps: 4", "max_steps: 6"))
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text()) | {"max_steps": 6}
    (out / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    before |= tree(out / "checkpoint-4")
    capsys.readouterr()
    start(script, model, data, out, *more[:-1], 6)
    assert f"resume     {out / 'checkpoint-4'}" in capsys.readouterr().out
    assert {path.name for path in out.glob("checkpoint-[0-9]")} == {"checkpoint-4", "checkpoint-6"}
    assert before.items() <= (tree(out) | tree(other)).items()
    # what a later save would overwrite is refused at the start, also where it is a link
    shutil.copytree(model, tmp_path / "copied" / "checkpoint-1")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "checkpoint-1").symlink_to(other)
    for name in ("copied", "linked"):
        assert "checkpoint-1 would be overwritten" in refused(
            script, capsys, model, data, tmp_path / name, *more
        )
    assert before.items() <= (tree(out) | tree(other)).items()


def test_another_program_s_model_is_not_overwritten(script, checkpoints, tmp_path, capsys):
    data, out = write_jsonl(tmp_path / "t.jsonl", ROWS), tmp_path / "o"
    shutil.copytree(checkpoints["llama"], out)
    before = tree(out)
    assert "config.json would be overwritten" in refused(
        script, capsys, checkpoints["gpt2"], data, out
    )
    assert "--output_dir holds the model" in refused(script, capsys, out, data, out)
    assert tree(out) == before


def test_retention_keeps_the_best(script, checkpoints, tmp_path):
    """As Trainer does it: the newest ones and the best."""
    data = write_jsonl(tmp_path / "t.jsonl", ROWS)
    other = write_jsonl(tmp_path / "v.jsonl", [{"prompt": "甲", "completion": "乙丙丁"}])
    start(script, checkpoints["gpt2"], data, tmp_path / "o", "--validation_file", other, "--save_steps", 1,
          "--early_stopping_patience", 9, "--save_total_limit", 1, "--max_steps", 6, "--learning_rate", 0.05)  # fmt: skip
    state = json.loads((tmp_path / "o" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.is_dir()
    assert {path.name for path in (tmp_path / "o").glob("checkpoint-*")} == {
        best.name,
        "checkpoint-6",
    }


def test_files_follow_the_umask(script, checkpoints, tmp_path):
    data, mask = write_jsonl(tmp_path / "t.jsonl", ROWS), os.umask(0o027)
    try:
        start(script, checkpoints["gpt2"], data, tmp_path / "o", "--save_steps", 1)
    finally:
        os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert modes == {0o640}
    with safe_open(tmp_path / "o" / "checkpoint-1" / "model.safetensors", "pt") as file:
        assert file.keys()


ALONE = """
import sys
for folder in sys.argv[1:4]:
    sys.path.insert(0, folder)
import finetune_full, finetune_lastlayer, finetune_lora
words = sys.argv[4:]
for module in (finetune_full, finetune_lastlayer, finetune_lora):
    assert module.keep_run is None
    for more in (["new"], ["new"], ["other", "--resume_from_checkpoint", "true"]):
        try:
            module.main([*words, "--output_dir", module.__name__ + "/" + more[0], *more[1:]])
        except SystemExit as stop:
            print("left", stop.code, flush=True)
"""


def test_copied_alone(checkpoints, train_file, tmp_path):
    """Without `jobs` a script trains what it trains with it, once, and touches nothing that is there."""
    folders, words = [], ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file]
    words += ["--max_steps", "2", "--save_steps", "1", "--save_total_limit", "1"]
    for name in ("finetune_full", "finetune_lastlayer", "finetune_lora"):
        folders.append(tmp_path / "copies" / name)
        folders[-1].mkdir(parents=True)
        shutil.copy(ROOT / name / f"{name}.py", folders[-1])
    command = [sys.executable, "-c", ALONE, *map(str, folders), *words]
    env = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\nleft 2\n") == 3 and run.stdout.count("left 2") == 6
    assert run.stdout.count("alone      ") == 3
    for name in ("finetune_full", "finetune_lastlayer", "finetune_lora"):
        out = tmp_path / name / "new"
        assert f"error: {name}/new is not empty." in run.stderr
        assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-2"]
        assert not (tmp_path / name / "other").exists()
        whole = tmp_path / "whole" / name
        load_script(ROOT / name / f"{name}.py").main([*words, "--output_dir", str(whole)])
        (file,) = (path.name for path in out.glob("*.safetensors"))
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    refused = "error: to resume, to keep the best model, or for DeepSpeed, put `jobs` beside"
    assert run.stderr.count(refused) == 3
