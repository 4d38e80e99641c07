"""Cut anywhere and started again, a run ends as if it had not been stopped, or says why it cannot go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import find_run
import keep_run
import pytest
import run_files
import torch
import yaml
from conftest import ROOT, ROWS, load_script, write_jsonl
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

SCRIPT = ROOT / "finetune_full" / "finetune_full.py"
ONCE = "--max_steps 6 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 2 --learning_rate 1e-3"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def own_signals():
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


@pytest.fixture
def words(checkpoints, tmp_path):
    """Model and data of every run here; --output_dir comes from the test."""
    data = write_jsonl(tmp_path / "t.jsonl", ROWS)
    return ["--model_name_or_path", checkpoints["gpt2"], "--train_file", data]


def start(script, *words):
    """Run to the end; the status."""
    try:
        script.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code
    return 0


def stop_at(monkeypatch, script, step, ask):
    """Let ask() be called when this step is done, before the run looks whether it is asked to stop."""
    look = keep_run.KeepRun.on_step_end

    def ask_and_look(self, args, state, control, **kwargs):
        if state.global_step == step:
            ask()
        look(self, args, state, control, **kwargs)

    monkeypatch.setattr(keep_run.KeepRun, "on_step_end", ask_and_look)


def same(one, other):
    """Whether two runs ended alike: weights, random states, optimizer, losses of all steps."""
    ours, theirs = (load_file(Path(out, "model.safetensors")) for out in (one, other))
    if any(not torch.equal(ours[name], theirs[name]) for name in ours | theirs):
        return False
    histories = []
    for out in (one, other):
        state = json.loads(Path(out, "trainer_state.json").read_text())
        entries = [e for e in state["log_history"] if "loss" in e or "eval_loss" in e]
        keys = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens")
        histories.append([{k: e[k] for k in keys if k in e} for e in entries])
    return histories[0] == histories[1]


def test_stopped_and_resumed_is_not_stopped(
    script, checkpoints, words, tmp_path, monkeypatch, capsys
):
    """By SIGTERM, STOP and deadline in turn; with dropout, an evaluation every step, the best model, patience."""
    model, out = tmp_path / "model", tmp_path / "cut"
    shutil.copytree(words[1], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1, "embd_pdrop": 0.1}))
    test = write_jsonl(tmp_path / "v.jsonl", ROWS[:2])
    more = "--num_train_epochs 9 --save_steps 1 --logging_steps 1 --per_device_train_batch_size 2 --learning_rate 5e-2 --lr_scheduler_type constant"
    words = [*words, "--model_name_or_path", model, "--validation_file", test, *more.split()]
    words += ["--early_stopping_patience", 3, "--gradient_accumulation_steps", 2]
    assert start(script, *words, "--output_dir", tmp_path / "whole") == 0
    whole = json.loads((tmp_path / "whole" / "all_results.json").read_text())
    assert 5 < whole["steps"] < 18, "early stopping must end it, in the middle of an epoch or not"
    asks = {
        1: lambda: os.kill(os.getpid(), signal.SIGTERM),
        2: (out / "STOP").touch,  # at the end of an epoch
        4: lambda: time.sleep(6),
        whole["steps"] - 2: lambda: os.kill(os.getpid(), signal.SIGTERM),  # while it is patient
        whole["steps"]: lambda: os.kill(os.getpid(), signal.SIGTERM),  # when its patience ends
    }
    for step, ask in asks.items():
        with monkeypatch.context() as patch:
            stop_at(patch, script, step, ask)
            if step == 4:  # near enough after a slow step, not before
                patch.setenv("DEADLINE", str(time.time() + 20))
            capsys.readouterr()
            assert start(script, *words, "--output_dir", out) == 75, step
            error = capsys.readouterr().err
        assert "stopped    " in error and "goes on" in error
        assert not (out / "STOP").exists() and not (out / "lock").exists()
        newest = keep_run.find_checkpoints(out)[-1]
        assert not keep_run.what_lacks(newest)
    assert start(script, *words, "--output_dir", out) == 0
    assert same(tmp_path / "whole", out)
    cut = json.loads((out / "all_results.json").read_text())
    assert cut["steps"] == whole["steps"] and cut["eval_loss"] == whole["eval_loss"]
    assert cut["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-9)


def test_epochs_are_counted_too(script, words, tmp_path, monkeypatch):
    """A stop at the end of an epoch leaves that epoch's evaluation and save to it, not to nobody."""
    test = write_jsonl(tmp_path / "v.jsonl", ROWS[:2])
    words = [
        *words,
        *"--num_train_epochs 3 --logging_steps 1 --per_device_train_batch_size 2".split(),
    ]
    words += ["--validation_file", test, "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    words += ["--load_best_model_at_end", "true", "--learning_rate", "1e-2"]
    assert start(script, *words, "--output_dir", tmp_path / "whole") == 0
    for step in (4, 5, 12):  # the last of an epoch, within one, the last of all
        with monkeypatch.context() as patch:
            stop_at(patch, script, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert start(script, *words, "--output_dir", tmp_path / "cut") == 75
    assert start(script, *words, "--output_dir", tmp_path / "cut") == 0
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_the_best_model_of_a_run_that_moved(script, words, tmp_path, monkeypatch):
    """Found where the run is now, though no save follows by which Trainer would see it there."""
    other = write_jsonl(tmp_path / "v.jsonl", [{"prompt": "甲", "completion": "乙丙丁"}])
    words = [*words, "--validation_file", other, "--eval_strategy", "steps", "--eval_steps", 1]
    words += "--save_strategy steps --save_steps 1 --max_steps 8 --learning_rate 0.5".split()
    words += "--load_best_model_at_end true --logging_steps 1".split()
    words += "--per_device_train_batch_size 2".split()
    assert start(script, *words, "--output_dir", tmp_path / "whole") == 0
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 5, "the rate lets later steps be worse"
    with monkeypatch.context() as patch:
        stop_at(patch, script, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(script, *words, "--output_dir", tmp_path / "cut") == 75
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert start(script, *words, "--output_dir", tmp_path / "moved") == 0
    assert same(tmp_path / "whole", tmp_path / "moved")


def test_what_a_name_does_not_tell(script, words, tmp_path, monkeypatch, capsys):
    """A hub's data set may be another one by now, and a DeepSpeed file edited: no exact resume."""
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    place = words.index("--train_file")
    words = [*words[:place], "--dataset_name", tmp_path / "hub", *words[place + 2 :]]
    words += ["--max_steps", "8", "--output_dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        stop_at(patch, script, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(script, *words) == 75
    write_jsonl(tmp_path / "hub" / "train.jsonl", [*ROWS[:-1], ROWS[-1] | {"prompt": "もっと"}])
    line = refused_plainly(script, capsys, *words)
    assert "the data has changed: " in line and "tokens, now " in line
    write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    record = tmp_path / "out" / "run_args.yaml"
    kept, file = record.read_text(), tmp_path / "zero.json"
    file.write_text("{}")
    known = find_run.deepspeed_file({"deepspeed": str(file)})
    assert known != find_run.deepspeed_file({}) is None
    record.write_text(kept.replace("  deepspeed: null", f"  deepspeed: {known}"))
    assert "an edited DeepSpeed file" in refused_plainly(script, capsys, *words)
    record.write_text(kept)
    assert start(script, *words) == 0


def test_a_cache_that_cannot_be_written(script, words, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_rows_on_file", full, raising=False)
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
    other = write_jsonl(tmp_path / "new.jsonl", [ROWS[0] | {"id": "never prepared before"}])
    line = refused_plainly(script, capsys, *words, "--train_file", other, "--output_dir", tmp_path)
    assert "No space left on device" in line and "set HF_HOME" in line


def test_incomplete_and_damaged_checkpoints(script, words, tmp_path, monkeypatch, capsys):
    words += ONCE.split()
    assert start(script, *words, "--output_dir", tmp_path / "whole") == 0
    damages = {
        "cut off in its save": lambda path: (path / "run_id").write_text(
            json.dumps({"run": json.loads((path / "run_id").read_text())["run"]})
        ),
        "a mark of NULs": lambda path: (path / "run_id").write_bytes(b"\0" * 40),
        "a truncated file": lambda path: os.truncate(path / "optimizer.pt", 100),
        "a missing file": lambda path: (path / "scheduler.pt").unlink(),
        "the first file only": lambda path: [p.unlink() for p in path.glob("*") if p.name != "rng_state.pth"],
        "nothing": lambda path: [p.unlink() for p in path.glob("*")],
    }  # fmt: skip
    for case, damage in damages.items():
        out = tmp_path / case
        with monkeypatch.context() as patch:
            stop_at(patch, script, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert start(script, *words, "--output_dir", out) == 75
        damage(out / "checkpoint-5")
        capsys.readouterr()
        status = start(script, *words, "--output_dir", out, "--save_total_limit", "1")
        captured = capsys.readouterr()
        if case == "the first file only":  # not ours to judge, since it has no mark
            assert status == 2 and "checkpoint-5 would be overwritten" in captured.err
            continue
        assert status == 0, captured.err
        assert f"resume     {out / 'checkpoint-4'}" in captured.out
        assert ("set aside as checkpoint-5.incomplete" in captured.out) == (case != "nothing")
        assert same(tmp_path / "whole", out)
        left = sorted(path.name for path in out.glob("checkpoint*"))
        assert left == [*["checkpoint-5"] * (case == "nothing"), "checkpoint-6"], case


def test_a_save_that_fails(script, words, tmp_path, monkeypatch, capsys):
    words += ONCE.split()
    out, save = tmp_path / "cut", torch.save
    assert start(script, *words, "--output_dir", tmp_path / "whole") == 0

    def full(thing, file, *args, **kwargs):
        if "checkpoint-4" in str(file) and "scheduler" in str(file):
            raise OSError(28, "No space left on device")
        save(thing, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        capsys.readouterr()
        assert start(script, *words, "--output_dir", out) == 75
        error = capsys.readouterr().err
    assert "the disk is full, the last checkpoint is whole" in error and "No space left" in error
    assert "Traceback" not in error
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-2"]
    assert start(script, *words, "--output_dir", out) == 0
    assert same(tmp_path / "whole", out)
    assert not list(out.glob("*.incomplete"))
    # The result: only the last checkpoint is there, and with it the next start ends.
    save_model, out = script.FineTuner.save_model, tmp_path / "result"

    def full_at_the_end(self, output_dir=None, _internal_call=False):
        if not _internal_call:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_model(self, output_dir, _internal_call)

    with monkeypatch.context() as patch:
        patch.setattr(script.FineTuner, "save_model", full_at_the_end)
        assert start(script, *words, "--output_dir", out) == 75
    assert start(script, *words, "--output_dir", out) == 0
    assert same(tmp_path / "whole", out)
    # What is no full disk is no reason to submit it again.
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("reset by peer"))
        )
        with pytest.raises(RuntimeError, match="reset by peer"):
            start(script, *words, "--output_dir", tmp_path / "other")


def test_a_full_disk_at_the_start_keeps_the_record(script, words, tmp_path, monkeypatch, capsys):
    words += [*ONCE.split(), "--output_dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        stop_at(patch, script, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(script, *words) == 75
    before, write = (tmp_path / "out" / "run_args.yaml").read_text(), Path.write_text

    def full(path, text, *args, **kwargs):
        if path.name.startswith("run_args"):
            write(path, "")
            raise OSError(28, "No space left on device")
        return write(path, text, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "No space left" in refused_plainly(script, capsys, *words)
    assert (tmp_path / "out" / "run_args.yaml").read_text() == before
    assert start(script, *words) == 0


def test_only_the_first_rank_sets_aside_and_only_this_run_s(script, tmp_path):
    for name, mark in {"checkpoint-1": '{"run": "ours"}', "checkpoint-2": "\0\0"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_id").write_text(mark)
    for run_id in (None, "other"):  # another rank, or no record; another run
        assert run_files.find_complete(tmp_path, run_id) == []
        assert (tmp_path / "checkpoint-1").is_dir()
        assert (tmp_path / "checkpoint-2").is_dir() or run_id
        (tmp_path / "checkpoint-2.incomplete").exists() and shutil.move(
            tmp_path / "checkpoint-2.incomplete", tmp_path / "checkpoint-2"
        )
    run_files.find_complete(tmp_path, "ours")
    assert (tmp_path / "checkpoint-1.incomplete").is_dir()


def test_what_a_kill_left_goes_without_another_save(script, words, tmp_path, monkeypatch):
    words += [*ONCE.split(), "--output_dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        stop_at(patch, script, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(script, *words) == 75
    left, mine = tmp_path / "out" / "checkpoint-7", tmp_path / "out" / "checkpoint-8.incomplete"
    shutil.copytree(tmp_path / "out" / "checkpoint-6", left)
    (left / "optimizer.pt").unlink()
    mine.mkdir()  # somebody's own
    assert start(script, *words) == 0
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-[78]*")] == [mine.name]


def test_records_of_another_form(script, words, tmp_path, capsys):
    """An earlier version's, or one that somebody edited: one line, nothing lost."""
    words += [*ONCE.split(), "--output_dir", tmp_path / "out"]
    assert start(script, *words) == 0
    record = tmp_path / "out" / "run_args.yaml"
    whole = yaml.safe_load(record.read_text())
    data = [{k: v for k, v in f.items() if k != "use"} for f in whole["run"]["data"]]
    for run in ({**whole["run"], "data": data}, None):
        record.write_text(yaml.safe_dump({**whole, "run": run}))
        text = refused_plainly(script, capsys, *words) if run else ""
        assert "other data" in text or not run
    (tmp_path / "out" / "all_results.json").unlink()
    assert "would be overwritten" in refused_plainly(script, capsys, *words)
    record.write_text("")
    assert start(script, *words) == 2


def test_stop_without_saves(script, words, tmp_path, monkeypatch):
    words += [*ONCE.split(), "--save_strategy", "no"]
    assert start(script, *words, "--output_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, script, 3, lambda: (tmp_path / "cut" / "STOP").touch())
        assert start(script, *words, "--output_dir", tmp_path / "cut") == 75
    assert start(script, *words, "--output_dir", tmp_path / "cut") == 0
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_an_evaluation_to_come_still_counts_after_a_save(script, words, tmp_path, monkeypatch):
    """It took 1,000 s in the job before, and in this one none has been: the deadline is too near."""
    test = write_jsonl(tmp_path / "v.jsonl", ROWS[:2])
    words += [
        *ONCE.split(),
        "--validation_file",
        test,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        2,
    ]
    words += ["--max_steps", 60, "--save_steps", 1, "--output_dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        stop_at(patch, script, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(script, *words) == 75
    state = tmp_path / "out" / "checkpoint-3" / "trainer_state.json"
    history = json.loads(state.read_text())
    for entry in history["log_history"]:
        entry.update({"eval_runtime": 1000.0} if "eval_runtime" in entry else {})
    state.write_text(json.dumps(history))
    mark = json.loads((state.parent / "run_id").read_text())
    mark["files"]["trainer_state.json"] = state.stat().st_size
    (state.parent / "run_id").write_text(json.dumps(mark))
    monkeypatch.setenv("DEADLINE", str(time.time() + 900))
    kept = keep_run.KeepRun.look

    def after_a_save(self, args, state, control):
        if state.global_step > 5:
            kept(self, args, state, control)

    monkeypatch.setattr(keep_run.KeepRun, "look", after_a_save)
    assert start(script, *words) == 75
    assert keep_run.find_checkpoints(tmp_path / "out")[-1].name == "checkpoint-6"


def test_evaluations_change_no_weight(script, words, tmp_path):
    """They may be added between two jobs: also with dropout, whose numbers they must not take."""
    model, test = tmp_path / "model", write_jsonl(tmp_path / "v.jsonl", ROWS[:2])
    shutil.copytree(words[1], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1, "embd_pdrop": 0.1}))
    words += ["--model_name_or_path", model, *ONCE.split()]
    more = ["--validation_file", test, "--eval_strategy", "steps", "--eval_steps", 2]
    assert start(script, *words, "--output_dir", tmp_path / "plain") == 0
    assert start(script, *words, *more, "--output_dir", tmp_path / "more") == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "more"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_kill_while_an_old_one_is_removed(script, words, tmp_path, monkeypatch, capsys):
    words += [*ONCE.split(), "--save_total_limit", "1", "--output_dir", tmp_path / "out"]

    class Killed(BaseException):
        pass

    for after in (0, 3, 7):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        unlink, removed = Path.unlink, []

        def die(path, *args, **kwargs):
            if "checkpoint-2" in str(path):
                if len(removed) == after:  # noqa: B023
                    raise Killed
                removed.append(path)  # noqa: B023
            unlink(path, *args, **kwargs)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", die)
            with pytest.raises(Killed):
                start(script, *words)
        assert len(removed) == after
        assert start(script, *words) == 0
        left = sorted(path.name for path in (tmp_path / "out").glob("checkpoint*"))
        assert left == ["checkpoint-6"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(script, words, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        words += ONCE.split()
        line = refused_plainly(
            script, capsys, *words, "--save_steps", 1, "--output_dir", disk / "out"
        )
        assert "are free. Make room" in line
        # Somebody else fills the disk in the meantime: it looked large enough at the start.
        words += ["--save_total_limit", "1"]
        (disk / "other").write_bytes(b"1" * (shutil.disk_usage(disk).free - 800_000))
        kept, keep_run.KeepRun.check_disk = keep_run.KeepRun.check_disk, lambda *_: None
        status = start(script, *words, "--output_dir", disk / "out")
        keep_run.KeepRun.check_disk = kept
        captured = capsys.readouterr()
        assert status == 75 and "the disk is full, the last checkpoint is whole" in captured.err
        (left,) = (disk / "out").glob("checkpoint*")
        assert not keep_run.what_lacks(left)
        subprocess.run([*mount[:1], "-o", "remount,size=20m", str(disk)], check=True)
        assert start(script, *words, "--output_dir", disk / "out") == 0
        assert f"resume     {left}" in capsys.readouterr().out
        assert start(script, *words, "--output_dir", tmp_path / "whole") == 0
        assert same(tmp_path / "whole", disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def refused_plainly(script, capsys, *words):
    capsys.readouterr()
    assert start(script, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_two_runs_in_one_directory(script, words, tmp_path, monkeypatch, capsys):
    words += ["--max_steps", "2", "--output_dir", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    lock, here = tmp_path / "out" / "lock", os.uname().nodename
    sleeper = subprocess.Popen(["sleep", "60"])
    lock.write_text(f"{here} {sleeper.pid} ")
    assert f"process {sleeper.pid} on {here} is writing" in refused_plainly(script, capsys, *words)
    sleeper.kill()
    sleeper.wait()
    lock.write_text(f"hnode999 {os.getpid()} 12.pbs1")
    assert "on hnode999 is writing" in refused_plainly(script, capsys, *words)
    assert lock.read_text().startswith("hnode999")
    os.utime(lock, (time.time() - 121,) * 2)  # nobody touches it any more
    assert start(script, *words) == 0
    assert not lock.exists()
    (tmp_path / "out" / "all_results.json").unlink()
    lock.write_text(f"{here} {sleeper.pid} ")  # killed on this machine: no need to wait
    assert start(script, *words) == 0
    assert not lock.exists()
    (tmp_path / "out" / "all_results.json").unlink()
    lock.write_text("")  # of a crash
    assert "is writing" in refused_plainly(script, capsys, *words)
    with monkeypatch.context() as patch:  # of two that looked at the same moment
        patch.setattr(find_run, "check_lock", lambda path: None)
        assert "exists" in refused_plainly(script, capsys, *words)
    assert lock.exists()


def test_a_lock_is_kept_young(script, tmp_path, monkeypatch):
    naps = iter([0.01] * 50 + [60])
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda _: sleep(next(naps, 60)))
    run_files.take_lock(tmp_path / "lock")
    os.utime(tmp_path / "lock", (0, 0))
    end = time.monotonic() + 20
    while (tmp_path / "lock").stat().st_mtime < 1e6:
        assert time.monotonic() < end
        sleep(0.02)


def test_only_the_same_run_goes_on(script, words, tmp_path, monkeypatch, capsys):
    """Arguments that change no weight may change between two jobs; whatever else does is refused."""
    out, test = tmp_path / "out", write_jsonl(tmp_path / "v.jsonl", ROWS[:2])
    words += [*ONCE.split(), "--output_dir", out]
    with monkeypatch.context() as patch:
        stop_at(patch, script, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(script, *words) == 75
    for more in (["--learning_rate", "1e-4"], ["--per_device_train_batch_size", "1"], ["--warmup_steps", "1"],
                 ["--early_stopping_patience", "2", "--validation_file", test]):  # fmt: skip
        assert more[0] in refused_plainly(script, capsys, *words, *more)
    checkpoint = out / "checkpoint-3"
    kept = {path: path.read_bytes() for path in checkpoint.glob("*")}
    mark = json.loads((checkpoint / "run_id").read_text())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
        files = {n: size for n, size in mark["files"].items() if n != name}
        (checkpoint / "run_id").write_text(json.dumps(mark | {"files": files}))
        line = refused_plainly(script, capsys, *words)
        assert "cannot be continued exactly" in line
        assert (name if name != "rng_state.pth" else "written by 0 processes") in line
        for path, content in kept.items():
            path.write_bytes(content)
    free = "--logging_steps 2 --save_steps 3 --save_total_limit 1 --eval_strategy steps --eval_steps 2 --ddp_timeout 99"
    free = [
        *free.split(),
        "--dataloader_num_workers",
        "1",
        "--validation_file",
        test,
        "--report_to",
        "none",
    ]
    assert start(script, *words, *free) == 0
    assert start(script, *words, "--output_dir", tmp_path / "whole") == 0
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_named_by_hand(script, words, tmp_path, capsys):
    out = tmp_path / "out"
    words += [*ONCE.split(), "--lr_scheduler_type", "constant"]
    assert start(script, *words, "--output_dir", out) == 0
    capsys.readouterr()
    for step, steps in ((6, 6), (4, 6)):  # finished: not a step more
        named = ["--resume_from_checkpoint", out / f"checkpoint-{step}"]
        assert start(script, *words, *named, "--output_dir", tmp_path / f"to{step}") == 0
        assert same(out, tmp_path / f"to{step}")
        assert "not exact" not in capsys.readouterr().out
        results = json.loads((tmp_path / f"to{step}" / "all_results.json").read_text())
        assert results["steps"] == steps
    more = [*words, "--resume_from_checkpoint", out / "checkpoint-4", "--learning_rate", "1e-4"]
    assert start(script, *more, "--output_dir", tmp_path / "other") == 0
    assert "not exact  --learning_rate 0.001, now 0.0001" in capsys.readouterr().out
    # Stopped, the same command goes on from there, not from the checkpoint again.
    for place, named in (("a", out / "checkpoint-2"), (None, out / "checkpoint-6")):
        to = tmp_path / "cut" if place else out
        again = [*words, "--max_steps", "9", "--resume_from_checkpoint", named]
        again += ["--output_dir", to]
        if not place:  # what came after it would be taken for this run's: the result, here
            line = refused_plainly(script, capsys, *again)
            assert "all_results.json came after" in line
            (out / "all_results.json").unlink()
        to.mkdir(exist_ok=True)
        (to / "STOP").touch()
        assert start(script, *again) == 75
        begun = keep_run.find_checkpoints(to)[-1]
        assert int(begun.name[11:]) == int(named.name[11:]) + 1
        (to / "run_args.yaml").write_text((to / "run_args.yaml").read_text())
        capsys.readouterr()
        assert start(script, *again) == 0 and f"resume     {begun}" in capsys.readouterr().out
        assert start(script, *again) == 0 and "finished" in capsys.readouterr().out
    named = ["--resume_from_checkpoint", out / "checkpoint-4", "--output_dir", out]
    line = refused_plainly(script, capsys, *words, *named)
    assert "checkpoint-6" in line and "came after" in line


@pytest.mark.parametrize("value", ["soon", "25:00", "12:60", "10:00:00", "1h", "nan", "-1"])
def test_bad_deadlines(value, script, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEADLINE", value)
    line = refused_plainly(script, capsys, *words, "--output_dir", tmp_path / "out")
    assert f"DEADLINE={value}" in line


def test_the_room_needed(script, words, tmp_path, monkeypatch, capsys):
    """Refused at the start: 37,120 parameters of 12 bytes, six saves and the result."""
    words += [*ONCE.split(), "--save_steps", "1", "--output_dir", tmp_path / "out"]
    one = 37_120 * 12
    usage = type("usage", (), {"free": 7 * one})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refused_plainly(script, capsys, *words)
    assert "7 checkpoints take" in line and "--save_total_limit 1" in line
    usage.free = 3 * one + 1  # one kept, one being written, the result
    assert start(script, *words, "--save_total_limit", "1") == 0


@pytest.mark.parametrize(
    ("quota", "left"), [("100 0 200", 100), ("150* 140 200", 50), ("9 8 0", 0), ("9 0 0", None)]
)
def test_the_room_that_a_quota_leaves(quota, left, tmp_path, monkeypatch):
    """By a stand-in for Lustre's command, which puts a long path into a line of its own."""
    (tmp_path / "lfs").write_text(
        f'#!/bin/bash\n[[ $3 == -g ]] || exit 1\necho "$5"; echo " {quota} - 1 0 0 -"\n'
    )
    (tmp_path / "lfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    room = shutil.disk_usage(tmp_path).free
    found = keep_run.free_bytes(tmp_path)
    assert found == left * 1024 if left is not None else found > room / 2


def run(command, out, ask_at=None, ask=None, **more):
    """Run a command; call ask(process) when the step's line is there. Returns (status, output)."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "29655"} | more
    process = subprocess.Popen([str(word) for word in command], env=env, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if ask_at and line.startswith(f"step {ask_at}/"):
            ask(process)
            ask_at = None
    return process.wait(), "".join(lines)


def test_the_queue_signals_every_process(script, words, tmp_path):
    """As PBS does: the workers that read the data too. They must live until the checkpoint is written."""
    out = tmp_path / "cut"
    words += [
        *ONCE.split(),
        "--num_train_epochs",
        "90",
        "--max_steps",
        "150",
        "--save_steps",
        "100",
    ]
    words += ["--dataloader_num_workers", "2", "--output_dir", out]
    everybody = lambda process: os.killpg(process.pid, signal.SIGTERM)  # noqa: E731
    status, text = run([sys.executable, SCRIPT, *words], out, 10, everybody)
    assert status == 75, text
    assert "stopped    by SIGTERM" in text and "Traceback" not in text
    assert start(script, *words) == 0
    assert start(script, *words, "--output_dir", tmp_path / "whole") == 0
    assert same(tmp_path / "whole", out)


def test_one_rank_is_asked_all_stop(words, tmp_path):
    """SIGTERM to the second of two ranks; the job's status is 75, and no report says that it failed."""
    words += [*ONCE.split(), "--max_steps", "300", "--save_steps", "200"]
    runs = [sys.executable, ROOT / "jobs" / "run_ranks.py"]
    launch = [
        *runs,
        Path(sys.executable).parent / "torchrun",
        "--standalone",
        "--nproc_per_node",
        "2",
        SCRIPT,
        *words,
    ]

    def ask(process):
        children = subprocess.run(
            ["pgrep", "-f", str(tmp_path / "cut")], capture_output=True, text=True
        ).stdout
        ranks = {}
        for pid in map(int, children.split()):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks.update({word: pid for word in environment if word.startswith(b"RANK=")})
        os.kill(ranks[b"RANK=1"], signal.SIGTERM)

    status, text = run([*launch, "--output_dir", tmp_path / "cut"], tmp_path / "cut", 10, ask)
    assert status == 75, text
    assert "stopped    " in text and "Traceback" not in text and "failed" not in text
    status, text = run([*launch, "--output_dir", tmp_path / "cut"], tmp_path / "cut")
    assert status == 0 and "resume     " + str(tmp_path / "cut" / "checkpoint-") in text, text


def test_no_image_setting_costs_a_training(script, words, tmp_path, monkeypatch):
    """They are asked for when all is trained; whatever a hub answers then, the result is written."""

    def fails(*_, **__):
        raise RuntimeError("a time-out of some package")

    monkeypatch.setattr(keep_run, "cached_file", fails)
    assert start(script, *words, *ONCE.split(), "--output_dir", tmp_path / "out") == 0
    assert (tmp_path / "out" / "all_results.json").is_file()


LESSONS = {
    "full": "--save_steps 9",
    "lastlayer": "--train embed_tokens",
    "lora": "--modules_to_save embed_tokens",
    "dpo": "--full true",
    "grpo": "--full true --num_generations 2 --max_completion_length 4",
}


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_padding_token_that_is_eos(lesson, checkpoints, tmp_path, capsys):
    """Trainer would put it into the checkpoint's settings; loaded so, EOS would not be trained."""
    model, script = tmp_path / "model", ROOT / f"finetune_{lesson}" / f"finetune_{lesson}.py"
    shutil.copytree(checkpoints["llama"], model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in ROWS]
    if lesson == "dpo":
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "犬"} for r in ROWS]
    elif lesson == "grpo":
        rows = [row | {"choices": ["a"], "completion": "a"} for row in rows]
    words = ["--model_name_or_path", model, "--train_file", write_jsonl(tmp_path / "d.jsonl", rows)]
    words += "--max_steps 3 --logging_steps 1 --learning_rate 1e-2".split()
    words += [*"--per_device_train_batch_size 4".split(), *LESSONS[lesson].split()]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "STOP").touch()
    for name, status in (("whole", 0), ("cut", 75), ("cut", 0)):
        assert start(load_script(script), *words, "--output_dir", tmp_path / name) == status
    assert f"resume     {tmp_path / 'cut' / 'checkpoint-1'}" in capsys.readouterr().out
    file = "adapter_model.safetensors" if lesson == "lora" else "model.safetensors"
    ours, theirs = (load_file(tmp_path / name / file) for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    for out in (tmp_path / "whole", tmp_path / "cut" / "checkpoint-1"):
        for name in ("config.json", "generation_config.json"):
            if (out / name).exists():
                published, saved = (json.loads((at / name).read_text()) for at in (model, out))
                assert published.get("pad_token_id") is saved.get("pad_token_id") is None, name
        assert (out / "config.json").exists() == (lesson != "lora")
        assert AutoTokenizer.from_pretrained(out).pad_token == tokenizer.eos_token


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_first_evaluation_needs_time_too(
    strategy, script, words, tmp_path, monkeypatch, capsys
):
    """By a clock on which a step of 2 rows takes 10 s, the first 100 s, and an evaluation 300 s.

    None has been measured: that of 72 rows is taken for 180 s, and the step before it is saved in
    time. From then on nothing is estimated any more: it would be more than the next job has.
    """
    clock = SimpleNamespace(now=1000.0, time=lambda: clock.now)

    def tick(seconds=10):
        clock.now += seconds

    def evaluate(self, *args, **kwargs):
        tick(300)
        assert clock.now < float(os.environ["DEADLINE"]), "killed in the evaluation"
        return evaluated(self, *args, **kwargs)

    evaluated = script.FineTuner.evaluate
    monkeypatch.setattr(keep_run, "time", clock)
    monkeypatch.setattr(script.FineTuner, "evaluate", evaluate)
    stop_at(monkeypatch, script, 1, lambda: tick(100))
    for step in range(2, 9):
        stop_at(monkeypatch, script, step, tick)
    words += ["--validation_file", write_jsonl(tmp_path / "v.jsonl", ROWS * 10)]
    words += f"--eval_strategy {strategy} --logging_steps 1 --num_train_epochs 2".split()
    words += "--per_device_train_batch_size 2 --save_steps 4".split()
    words += ["--eval_steps", 4] * (strategy == "steps")
    monkeypatch.setenv("DEADLINE", "1400")
    assert start(script, *words, "--output_dir", tmp_path / "out") == 75
    error = capsys.readouterr().err
    assert "stopped    by DEADLINE (an evaluation may take 3 min) after step 3, which is" in error
    assert clock.now == 1000 + 100 + 2 * 10
    monkeypatch.setenv("DEADLINE", "2450")
    assert start(script, *words, "--output_dir", tmp_path / "out") == 0
    assert clock.now == 1120 + 5 * 10 + 2 * 300
