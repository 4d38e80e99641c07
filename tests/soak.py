#!/usr/bin/env python3
"""Interrupt trainings at random moments, resume them, compare the results with unbroken runs.

Not part of pytest. Each of 40 runs is interrupted one to three times and resumed until it is
finished: half of them by SIGKILL, half by SIGTERM first, a third inside a save, by a signal to one
rank, to all ranks or to every process as PBS does. A run is good when
- weights, optimizer, scheduler, random states and all losses are those of the unbroken run,
- each attempt went on from the newest complete checkpoint there was,
- a stopped run ends with status 75, one line, a complete checkpoint and no lock,
- nothing is left behind: no process, no lock, no incomplete checkpoint.

By hand     python tests/soak.py                          40 runs; 15 minutes on two cores
            python tests/soak.py --only 'ZeRO' --seed 7   the kinds with this regular expression

Each training is a fork of one process that has imported the heavy packages. Every tenth run
starts real commands (cold).
"""

import argparse
import atexit
import ctypes
import faulthandler
import gc
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import conftest
import datasets
import numpy
import torch
from conftest import ROOT, ROWS, make_checkpoint, write_jsonl
from transformers import AutoTokenizer, GPT2Config, Trainer  # noqa: F401

# ---- What is run ----

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
conftest.CONFIGS["dropout"] = lambda v: GPT2Config(
    vocab_size=v, n_embd=192, n_layer=4, n_head=4, n_positions=64, **DROPOUT
)
COSINE = "--lr_scheduler_type cosine --warmup_steps 5"
# So high a rate spoils the model: an early checkpoint stays the best.
EARLY = "--early_stopping_patience 4 --save_steps 2 --learning_rate 1e-2 --validation_file VALID"
TWO_PARTS, WORKERS = "--gradient_accumulation_steps 2", "--dataloader_num_workers 2"
# Launchers: none (one process), ranks (run_ranks.py and torchrun), torchrun, two (by themselves).
HOWS = ("SIGKILL", "SIGTERM", "STOP")
KINDS = {
    "one process": ("none", f"{COSINE} --save_total_limit 2"),
    "one process, 2 workers, accumulated": ("none", f"{WORKERS} {TWO_PARTS} --logging_steps 3"),
    "one process, early stopping": ("none", f"{EARLY} --save_total_limit 1"),
    "two ranks": ("ranks", f"{COSINE} {WORKERS} --save_total_limit 1"),
    "two ranks, torchrun alone": ("torchrun", TWO_PARTS),
    "ZeRO-2": ("ranks", f"ZERO2 {COSINE} --save_total_limit 2"),
    "ZeRO-2, 2 workers, accumulated": ("ranks", f"ZERO2 {WORKERS} {TWO_PARTS}"),
    "ZeRO-2, early stopping": ("two", f"ZERO2 {EARLY} --save_total_limit 2"),
}
BASE = "--max_steps 24 --save_steps 3 --logging_steps 1 --learning_rate 1e-3"
BASE += " --per_device_train_batch_size 2 --model_name_or_path MODEL --train_file TRAIN"
LIMIT = 180  # seconds for one attempt
NOISE = "Traceback|leaked|terminate called|Exception ignored|SIGABRT|Fatal|Broken pipe"
LIBC = ctypes.CDLL(None)


def prepare(work):
    """A frozen copy of what is run (a run goes on with the same script only), model and data."""
    for name in ("finetune_full", "jobs", "deepspeed_configs"):
        shutil.copytree(ROOT / name, work / "tree" / name)
    for name in ("soak.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, work / "tree")
    make_checkpoint(work / "model", "dropout")
    rows = [{**row, "prompt": f"{i}番 {row['prompt']}"} for i in range(6) for row in ROWS]
    write_jsonl(work / "train.jsonl", rows)
    write_jsonl(work / "valid.jsonl", ROWS[:3])


def command(work, kind, out):
    """The words of a kind's training, without Python in front."""
    launcher, text = KINDS[kind]
    places = {"MODEL": "model", "TRAIN": "train.jsonl", "VALID": "valid.jsonl"}
    places |= {"ZERO2": "tree/deepspeed_configs/zero2.json"}
    words = f"{BASE} {text}".replace("ZERO2", "--deepspeed ZERO2").split()
    words = [str(work / places[word]) if word in places else word for word in words]
    words = [str(work / "tree/finetune_full/finetune_full.py"), *words, "--output_dir", str(out)]
    words = [str(work / "tree/soak.py"), "--launch", *words] if "ZERO2" in text else words
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
    if launcher in ("ranks", "torchrun"):
        words = [*torchrun, "--nproc_per_node", "2", *words]
    return [str(work / "tree/jobs/run_ranks.py"), *words] if launcher == "ranks" else words


def launch_on_cpu(words):
    """Run a script under DeepSpeed on CPU: accelerate is told what it cannot find without a GPU."""
    import accelerate.state
    from accelerate.utils import DistributedType

    state = accelerate.state.PartialState
    state._prepare_backend = lambda self, *a, **k: ("gloo", DistributedType.NO)
    state.default_device = property(lambda self: torch.device("cpu"))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


# ---- Processes: a fork of this one takes the place of a Python that would import for seconds ----


def become(words, env):
    """Be a fresh process that was started with these words; never return."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # as exec does
            is_int = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_int else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir, datasets.config.HF_DATASETS_CACHE = None, Path(env["HF_HOME"], "datasets")
    LIBC.prctl(15, f"rank{env.get('RANK', '')}".encode())  # its name, by which to find it
    faulthandler.enable()
    status, sys.argv = 1, words
    try:
        if words[0].endswith("torchrun"):
            runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    # An ordinary end, but without taking the modules to pieces, which takes a fork ten seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    LIBC.exit(status)


def fork_for_popen():
    """Let subprocess.Popen fork, too, where it would start torchrun or a Python script."""
    usual = subprocess.Popen._execute_child

    def execute(self, args, *more):
        words = [str(word) for word in args] if isinstance(args, list | tuple) else [""]
        if words[0] == sys.executable:
            words = [word for word in words[1:] if word != "-u"]
        elif not words[0].endswith("torchrun"):
            return usual(self, args, *more)
        (_, _, _, _, _, env, *_), pipes = more[:9], more[9:15]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if more[-2]:
                os.setsid()
            for place, pipe in enumerate(pipes[number] for number in (0, 3, 5)):
                if pipe != -1:
                    os.dup2(pipe, place)
            become(words, dict(os.environ) if env is None else env)
        self._child_created = True
        self._close_pipe_fds(*pipes)
        return None

    subprocess.Popen._execute_child = execute


def start(words, env, log, is_cold):
    """Start a process in a session of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    if not is_cold:
        become(words, env)
    words = words if words[0].endswith("torchrun") else [sys.executable, *words]
    os.execve(words[0], words, env)
    return None


def tree():
    """The ids of all processes below this one; the upper ones first."""
    children, found = {}, [os.getpid()]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # it has just ended
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(path.parent.name))
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def find_ranks():
    """{rank: process id}"""
    ranks = {}
    for pid in reversed(tree()):  # a rank stands above its workers, which have its name
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            environment = Path(f"/proc/{pid}/environ").read_text()
        except OSError:
            continue
        if found := re.search(r"^rank(\d)$", name) or re.search(r"(?:^|\0)RANK=(\d)", environment):
            ranks[int(found[1])] = pid
    return ranks


class Attempt:
    """One start of a run's command; the processes it consists of."""

    def __init__(self, work, folder, kind, number, is_cold):
        self.out, self.log = folder / "out", folder / f"attempt-{number}.txt"
        self.kind, self.launcher = kind, KINDS[kind][0]
        self.before = {path.stat().st_ino for path in self.out.glob("checkpoint-*")}
        self.saves, self.seen, self.statuses = [], None, {}
        self.began, self.first_step, self.limit = time.time(), None, time.time() + LIMIT
        env = {n: v for n, v in os.environ.items() if not re.match("DEADLINE|PBS_|RUN_RANKS", n)}
        env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        env |= {"TMPDIR": str(folder / "tmp"), "TOKENIZERS_PARALLELISM": "false"}
        env |= {"PYTHONFAULTHANDLER": "1"}
        if "ZeRO" in kind:
            env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
        (folder / "tmp").mkdir(exist_ok=True, parents=True)
        words, sets = command(work, kind, self.out), [{}]
        if self.launcher == "two":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            sets = [both | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        self.pids = [start(words, env | more, self.log, is_cold) for more in sets]

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def is_over(self):
        """Whether all has ended; also takes the status of what has, as PBS or init does."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return False
                if pid in self.pids:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            return True

    def is_saving(self):
        """Whether a checkpoint is being written now; counts and times the saves."""
        now, found = time.time(), False
        for path in self.out.glob("checkpoint-*"):
            try:
                is_new = path.name[11:].isdecimal() and path.stat().st_ino not in self.before
                found |= is_new and "files" not in read_json(path / "run_id")
            except OSError:  # it was removed meanwhile
                pass
        if found and self.seen is None:
            self.seen = now
        elif self.seen is not None and not found:
            self.saves.append(now - self.seen)
            self.seen = None
        return found

    def wait_for(self, condition):
        """Wait until condition() holds; False where all ended, or the time, before."""
        while not self.is_over():
            if condition():
                return True
            if time.time() > self.limit:
                return False
            time.sleep(0.002)
        return False

    def is_in_training(self):
        self.is_saving()
        if not self.first_step and re.search("^step", self.text(), re.M):
            self.first_step = time.time()
        return self.first_step

    def finish(self):
        """Wait for the end; what is wrong if it does not come."""
        self.wait_for(lambda: self.is_in_training() and False)
        left = tree()
        for pid in left:  # print where it hangs, then end
            os.kill(pid, signal.SIGABRT)
            time.sleep(0.3)
        for pid in tree():
            os.kill(pid, signal.SIGKILL)
        self.limit = time.time() + 10
        self.wait_for(lambda: False)
        return [f"{len(left)} processes still there after {LIMIT} s: {self.log}"] if left else []


# ---- One run ----


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def complete_steps(out):
    """The steps of complete checkpoints, in order."""
    steps = []
    for path in out.glob("checkpoint-*"):
        files = read_json(path / "run_id").get("files")
        there = {n: (path / n).stat().st_size for n in files or () if (path / n).is_file()}
        if path.name[11:].isdecimal() and files and there == files:
            steps.append(int(path.name[11:]))
    return sorted(steps)


def wait_for_moment(attempt, place, unbroken, chance):
    """Wait for a random moment of this kind; False where the attempt ended before."""
    done = max(complete_steps(attempt.out), default=0)
    if place == "save":
        passed = chance.randrange(max(1, min(5, (unbroken["steps"] - done) // 3)))
        if not attempt.wait_for(lambda: attempt.is_saving() and len(attempt.saves) >= passed):
            return False
        seconds = 1.1 * unbroken["save"]  # and the removal of older ones
    elif place == "start":
        seconds = unbroken["startup"]
    else:
        if not attempt.wait_for(attempt.is_in_training):
            return False
        seconds = unbroken["training"] * max(0.1, 1 - done / unbroken["steps"])
    until = time.time() + chance.uniform(0, seconds)
    return attempt.wait_for(lambda: time.time() > until)


def strike(attempt, how, chance):
    """Ask the run to stop, or kill it; whom, in words."""
    ranks, everybody = find_ranks(), tree()
    if how == "STOP":
        attempt.out.mkdir(exist_ok=True)
        (attempt.out / "STOP").touch()
        return "STOP"
    targets = {"everybody": everybody}
    if attempt.launcher == "none":
        targets["the process"] = attempt.pids
    elif len(ranks) == 2:
        targets |= {"both ranks": [*ranks.values()]}
        targets |= {f"rank {rank}": [pid] for rank, pid in ranks.items()}
    whom = chance.choice([*targets])
    for pid in targets[whom]:
        try:
            os.kill(pid, getattr(signal, how))
        except ProcessLookupError:
            continue
    return f"{how} to {whom}"


def judge(attempt, how, begun, is_done):
    """What is wrong with how an attempt ended after a signal (None: it was left alone)."""
    text, statuses = attempt.text(), [*attempt.statuses.values()]
    is_finished = (attempt.out / "all_results.json").is_file()
    noise, faults = re.search(f".*({NOISE}).*", text), []
    if how is None or is_finished:
        if any(statuses) and not is_done and not (attempt.launcher == "torchrun" and how):
            faults.append(f"{'finished' if is_finished else 'failed'}, with status {statuses}")
        if noise and how is None:
            faults.append(f"noise: {noise[0][:150]}")
        return faults
    if 0 in statuses:
        faults.append(f"not finished, but status {statuses}")
    if how == "SIGKILL" or not begun:
        return faults
    wanted = {1} if attempt.launcher == "torchrun" else {75}
    if set(statuses) != wanted:
        faults.append(f"status {statuses} after {how}")
    stopped = re.findall(r"^stopped    .* after step (\d+)", text, re.M)
    if len(stopped) != 1:
        return [*faults, f"{len(stopped)} lines `stopped` after {how}"]
    if attempt.launcher == "torchrun":  # it reports a failure, with a traceback of its own
        noise = re.search(".*(leaked|terminate called|Exception ignored|Fatal).*", text)
    if noise:
        faults.append(f"noise after {how}: {noise[0][:150]}")
    if int(stopped[0]) not in complete_steps(attempt.out):
        faults.append(f"step {stopped[0]} is said to be saved, and is not")
    left = [name for name in ("lock", "STOP") if (attempt.out / name).exists()]
    return [*faults, f"left after {how}: {left}"] if left else faults


def interrupt(attempt, how, place, unbroken, chance):
    """Strike at a random moment; (what was done, whether training and all were begun and done)."""
    if not how or not wait_for_moment(attempt, place, unbroken, chance):
        return None, False, False
    begun, is_done = (re.search(word, attempt.text(), re.M) for word in ("^step", "^done"))
    place = "inside a save" if attempt.is_saving() else place
    return [how, strike(attempt, how, chance), place], begun, is_done


def run_to_the_end(work, folder, kind, plan, unbroken, chance, is_cold):
    """Run, interrupt as planned, resume until it is finished; return what happened."""
    faults, strikes, plan, newest = [], [], [*plan], 0
    for number in range(1, 13):
        attempt = Attempt(work, folder, kind, number, is_cold)
        how, place = plan[0] if plan else (None, None)
        struck, begun, is_done = interrupt(attempt, how, place, unbroken, chance)
        when = time.time()
        wrong = attempt.finish() + judge(attempt, struck and how, begun, is_done)
        resumed = re.findall(
            r"^resume     .*?(?:checkpoint-(\d+)|from the start.*)$", attempt.text(), re.M
        )
        if resumed and int(resumed[0] or 0) != newest:
            wrong.append(f"went on from step {resumed[0] or 0}, but {newest} was complete")
        newest = max(complete_steps(attempt.out), default=0)
        faults += [f"{attempt.log}: {text}" for text in wrong]
        is_finished = (attempt.out / "all_results.json").is_file()
        if struck and not is_finished:
            strikes.append([*struck, round(time.time() - when, 1), newest])
            if place != "save" or struck[2] == "inside a save":
                plan = plan[1:]
        if is_finished:
            (attempt.out / "STOP").unlink(missing_ok=True)  # asked too late
            break
        if not struck and any(attempt.statuses.values()):
            break
    if not is_finished:
        faults.append(f"{attempt.log}: not finished after {number} attempts")
    return {"faults": faults, "strikes": strikes, "attempts": number}, attempt


def run_unbroken(work, folder, kind):
    """The run to compare with; how long its parts take."""
    result, attempt = run_to_the_end(work, folder, kind, [], None, None, False)
    if not result["faults"]:
        result["startup"] = attempt.first_step - attempt.began
        end = (attempt.out / "all_results.json").stat().st_mtime
        result["training"] = end - attempt.first_step
        result["save"] = sum(attempt.saves) / len(attempt.saves)
        result["steps"] = read_json(attempt.out / "all_results.json")["steps"]
    return result


def run_interrupted(work, folder, kind, plan, unbroken, seed, is_cold):
    chance = random.Random(seed)
    for _ in range(6):  # again where it was finished before the signal came
        shutil.rmtree(folder, ignore_errors=True)
        result, attempt = run_to_the_end(work, folder, kind, plan, unbroken, chance, is_cold)
        if result["strikes"] or result["faults"]:
            break
    else:
        result["faults"].append(f"{folder}: never interrupted, it was always faster")
    if (attempt.out / "all_results.json").is_file():
        whole = work / "whole" / re.sub("\\W+", "-", kind) / "out"
        result["differences"] = differences(attempt.out, whole)
        result["faults"] += [f"{attempt.out}: {text}" for text in result["differences"]]
        result["faults"] += [f"{attempt.out}: {name} is left" for name in leftovers(attempt.out)]
    result["tmp"] = sorted(path.name for path in (folder / "tmp").glob("*"))
    return result


# ---- What is compared ----


def leftovers(out):
    """What should not be there at the end of a run."""
    steps = complete_steps(out)
    names = [
        path.name for path in out.glob("checkpoint-*") if path.name[11:] not in map(str, steps)
    ]
    return names + [name for name in ("lock", "STOP") if (out / name).exists()]


def is_same(one, other):
    """Whether two things read from checkpoints are the same, bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, numpy.ndarray):
        return numpy.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if hasattr(one, "__dict__"):
        return is_same(vars(one), vars(other))
    return one == other


def learned(history, exact):
    """The losses; where a stop logged between two lines, their sums up to the lines both have."""
    names = "step loss eval_loss grad_norm learning_rate num_tokens num_learned".split()
    entries = [entry for entry in history if {"loss", "eval_loss"} & set(entry)]
    if exact:
        return [{name: entry[name] for name in names if name in entry} for entry in entries]
    sums, total = {}, 0
    for entry in entries:
        total += entry["loss"] * entry["num_learned"]
        sums[entry["step"]] = total
    return sums


def differences(cut, whole):
    """In what two finished runs differ; their last checkpoints count, too."""
    found, files = [], []
    states = [read_json(out / "trainer_state.json") for out in (cut, whole)]
    results = [read_json(out / "all_results.json") for out in (cut, whole)]
    for name in ("global_step", "best_metric", "best_global_step", "epoch"):
        if states[0][name] != states[1][name]:
            found.append(f"{name} {states[0][name]}, not {states[1][name]}")
    every = states[1]["logging_steps"] == 1
    ours, theirs = (learned(state["log_history"], every) for state in states)
    if every and ours != theirs:
        where = [i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]]
        found.append(f"{len(ours)} entries of losses, {len(theirs)} unbroken; differ: {where[:9]}")
    if not every and any(abs(ours[step] / theirs[step] - 1) > 1e-9 for step in theirs):
        found.append("the losses differ")
    for name in ("train_loss", "eval_loss", "steps"):
        if name in results[1] and not abs(results[0][name] - results[1][name]) < 1e-9:
            found.append(f"{name} {results[0][name]}, not {results[1][name]}")
    for out in (cut, whole):
        last = out / f"checkpoint-{max(complete_steps(out), default=0)}"
        paths = [path for path in last.rglob("*") if path.suffix in (".pt", ".pth", ".safetensors")]
        files.append(
            {str(path.relative_to(out)): path for path in [*paths, out / "model.safetensors"]}
        )
    if files[0].keys() != files[1].keys():
        return [*found, f"other files: {sorted(files[0].keys() ^ files[1].keys())}"]
    for name, path in files[0].items():
        other = files[1][name]
        if path.read_bytes() == other.read_bytes():
            continue
        read = lambda path: torch.load(path, weights_only=False)  # noqa: E731
        if path.suffix == ".safetensors" or not is_same(read(path), read(other)):
            found.append(f"{name} differs")
    return found


# ---- The command ----


def say(text):
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def in_two_slots(jobs, note):
    """Call each job in a process of its own, two at a time; the list of what they return."""
    results, running, waiting = [None] * len(jobs), {}, [*enumerate(jobs)]
    while waiting or running:
        while waiting and len(running) < 2:
            number, (folder, is_deepspeed, function, *more) = waiting.pop(0)
            if is_deepspeed and "deepspeed" not in sys.modules:
                import deepspeed  # noqa: F401 -- once for all that are forked from here on
            shutil.rmtree(folder, ignore_errors=True)
            pid = os.fork()
            if pid == 0:
                work_alone(folder, function, more)
            running[pid] = number, folder
        pid, _ = os.wait()
        number, folder = running.pop(pid)
        lost = {"faults": [f"the soak itself failed, see {folder}.txt"], "strikes": []}
        results[number] = read_json(folder.with_name(folder.name + ".json")) or lost
        note(number, results[number], sum(result is not None for result in results))
    return results


def work_alone(folder, function, more):
    try:
        LIBC.prctl(36, 1)  # what loses its parent becomes a child of this process
        fork_for_popen()
        result = function(more[0], folder, *more[1:])
        folder.with_name(folder.name + ".json").write_text(json.dumps(result))
    except BaseException:
        folder.with_name(folder.name + ".txt").write_text(traceback.format_exc())
    os._exit(0)


def make_plan(count, kinds, seed):
    """[(kind, [(signal, place), ...], seed, is cold)]: the first signal and place by turns."""
    chance, plan = random.Random(seed), []
    for i in range(count):
        how = ("SIGKILL", "SIGTERM")[(i + i // len(kinds)) % 2]
        place = "save" if i % 3 == 0 else chance.choice(["training"] * 4 + ["start"])
        strikes = [(how, place)]
        for _ in range(chance.randrange(3)):
            how = chance.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGTERM", "STOP"])
            strikes.append((how, chance.choice(["training", "training", "save", "start"])))
        plan.append((kinds[i % len(kinds)], strikes, chance.randrange(2**32), i % 10 == 9))
    return plan


def show(kinds, plan, results):
    """The table."""
    columns = ["runs", "signals", "kill/term/stop", "in a save", "one rank", "identical", "faults"]
    print(f"{'kind':<38}" + "".join(f"{column:>15}" for column in columns))
    for kind in [*kinds, "all"]:
        mine = [r for (k, *_), r in zip(plan, results, strict=True) if kind in (k, "all")]
        strikes = [strike for result in mine for strike in result["strikes"]]
        hows = [how for how, *_ in strikes]
        good = sum(result.get("differences") == [] for result in mine)
        counts = [len(mine), len(strikes), "/".join(str(hows.count(n)) for n in HOWS),
                  sum(place == "inside a save" for _, _, place, *_ in strikes),
                  sum(bool(re.search(r" rank \d", whom)) for _, whom, *_ in strikes),
                  f"{good} of {len(mine)}", sum(len(result["faults"]) for result in mine)]  # fmt: skip
        print(f"{kind:<38}" + "".join(f"{count:>15}" for count in counts))
    slowest = max((s[3] for r in results for s in r["strikes"] if s[0] != "SIGKILL"), default=0)
    print(f"the slowest stop took {slowest:.0f} s")


def main():
    if sys.argv[1:2] == ["--launch"]:
        return launch_on_cpu(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="Default: the time.")
    parser.add_argument("--work", help="An empty directory for all files. Default: a new one.")
    parser.add_argument("--only", default="", help="Regular expression: the kinds to run.")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp(prefix="soak")).resolve()
    work.mkdir(exist_ok=True)
    if [*work.glob("*")]:
        parser.error(f"{work} is not empty")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    gc.freeze()
    say(f"seed {args.seed}, in {work}")
    prepare(work)
    kinds = [kind for kind in KINDS if re.search(args.only, kind)]
    jobs = [(work / "whole" / re.sub(r"\W+", "-", kind), "ZeRO" in kind, run_unbroken, work, kind)
            for kind in kinds]  # fmt: skip
    (work / "whole").mkdir()
    wholes = dict(zip(kinds, in_two_slots(jobs, lambda *_: None), strict=True))
    for kind, whole in wholes.items():
        if whole["faults"]:
            sys.exit(f"{kind} does not even run unbroken: {whole['faults']}")
        times = ", ".join(f"{name} {whole[name]:.1f}" for name in ("startup", "training", "save"))
        say(f"{kind}: {whole['steps']} steps; seconds: {times}")
    plan = sorted(make_plan(args.runs, kinds, args.seed), key=lambda run: "ZeRO" in run[0])
    jobs = [(work / f"{i:02}", "ZeRO" in kind, run_interrupted, work, kind, strikes, wholes[kind], *more)
            for i, (kind, strikes, *more) in enumerate(plan)]  # fmt: skip
    began = time.time()

    def note(number, result, done):
        for fault in result["faults"]:
            say(f"FAULT in {plan[number][0]}: {fault}  (signals: {result['strikes']})")
        if done % 4 == 0:
            left = (time.time() - began) / done * (len(jobs) - done) / 60
            say(f"{done} of {len(jobs)} runs, {left:.0f} min left")

    results = in_two_slots(jobs, note)
    show(kinds, plan, results)
    if any(result["faults"] for result in results):
        sys.exit(f"faults: see {work}")
    if not args.work:
        shutil.rmtree(work)
    return None


if __name__ == "__main__":
    main()
