"""What run a directory holds, and whether this start goes on with it.

A run is its run_args.yaml: an id, the arguments, the data. It goes on from its newest complete
checkpoint if nothing has changed that would change a weight; else it is refused.
"""

import ast
import hashlib
import os
import subprocess
from pathlib import Path

import torch
import yaml
from check_arguments import check_arguments
from run_common import check, read_deadline, say
from run_files import check_lock, find_checkpoints, find_complete, take_lock, what_lacks
from template_day import keep_day

# Arguments that change no weight, by their beginnings; some only where no evaluation matters.
LED_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
FREE = ("output_dir", "resume_from", "ddp_timeout", "log", "report_to", "run_name", "dataloader_")
FREE += ("save_total_limit",)
# What decides on ids and weights beside the script itself, if it imports that.
PARTS = ("model_layers", "model_text", "script_parts", "pair_trainer", "keep_grpo")
FREE_WITHOUT_BEST = ("eval_", "save_", "per_device_eval", "validation")
# Of these, the sha256 is on record: the same file may have another name.
FILES = ("train_file", "validation_file", "chat_template", "deepspeed")


def find_run(script, training, given, source):
    """Return (checkpoint to go on from or None, record of this run); ends if it is finished.

    `given` are the arguments that are not the default, `source` is the training script's file. The
    first process of a node looks first, and takes the lock. What cannot work is refused.
    """
    check_arguments(script, training, given)
    training.deadline = read_deadline()
    with training.main_process_first(local=False):
        found = _find_run(script, training, given, source)
    if not found:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # or a rank may end by SIGABRT
        raise SystemExit(0)
    found[1]["day"] = keep_day(training.output_dir, *found)
    return found


def _find_run(script, training, given, source):
    output_dir, wanted = Path(training.output_dir), str(training.resume_from_checkpoint or "true")
    output_dir.mkdir(parents=True, exist_ok=True)
    check(os.access(output_dir, os.W_OK), f"--output_dir {output_dir} cannot be written.")
    advice = f"Choose another --output_dir than {output_dir}, or move what it holds."
    data, is_finished = describe(script, source), (output_dir / "all_results.json").is_file()
    is_first, lock = training.process_index == 0, output_dir / "lock"
    if is_first:
        check_lock(lock)
    before, changed = what_changed(output_dir, training, given, data)
    run_id = before.get("id")
    others = [] if run_id else ["config.json", "adapter_config.json"]
    others = [name for name in others if (output_dir / name).exists()]
    complete, resume = find_complete(output_dir, run_id if is_first else None), None
    named = None if wanted.lower() in ("true", "false") else str(Path(wanted).resolve())
    since = came_after(complete, named) + [output_dir / "all_results.json"] * is_finished
    is_again = named and named == before.get("from_checkpoint")
    if named and not (is_again and since):
        resume, complete = Path(wanted), []
        is_ours = not run_id or is_again or resume.resolve().parent == output_dir.resolve()
        check(is_ours, f"it holds another run than the checkpoint's. {advice}")
        changed = start_from(resume, training, given, data, since)
    elif is_finished or complete:
        if wanted.lower() == "false":
            changed.append("a new start")
        go_on = "" if is_finished else f" Or go on: --resume_from_checkpoint {complete[-1]}"
        check(not changed, f"it holds another run ({'; '.join(changed)}). {advice}{go_on}")
        if is_finished:
            say("finished", f"{output_dir} holds this run's result")
            return None
        resume = complete[-1]
        lost = what_is_lost(resume, training)
        check(not lost, f"{resume} cannot be continued exactly: {', '.join(lost)}. {advice}")
        training.restore_callback_states_from_checkpoint = True  # early stopping counts on
    run_id = run_id if resume or not changed else None
    run = {"id": run_id or os.urandom(4).hex(), "data": data, "deepspeed": deepspeed_file(given)}
    if start := named or (resume and before.get("from_checkpoint")):
        run["from_checkpoint"] = start
    ours = [*complete, *find_checkpoints(output_dir, run["id"])]
    others += [path.name for path in find_checkpoints(output_dir) if path not in ours]
    check(not others, f"{', '.join(others)} would be overwritten. {advice}")
    if is_first:
        take_lock(lock)
    run |= {"hostname": os.uname().nodename, "git_commit": git_commit(source)}
    return resume and str(resume), run


def git_commit(source):
    """The commit that a script is of, with -dirty behind it where files have changed; or None."""
    git = "git describe --always --abbrev=40 --dirty --exclude '*'"  # no tags: the commit
    here = Path(source).resolve().parent
    done = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or None


def start_from(checkpoint, training, given, data, since):
    """Say how exactly a checkpoint named by hand is continued; return what differs.

    It may be another run's. `since` is what the output_dir holds of later steps, or a result.
    """
    lacks, place = what_lacks(checkpoint), checkpoint.resolve().parent
    check(not lacks, f"{checkpoint} is no complete checkpoint: {lacks}.")
    later = [str(path) for path in since if path.resolve().parent == place]
    advice = "Choose another --output_dir, or move them."
    check(not later, f"{', '.join(later)} came after {checkpoint}. {advice}")
    changed = what_changed(place, training, given, data)[1] + what_is_lost(checkpoint, training)
    say("not exact" if changed else "exact", "; ".join(changed) or "the same run")
    return changed


def deepspeed_file(given):
    """The sha256 of DeepSpeed's configuration file, or None: its name says nothing of an edit."""
    file = Path(given.get("deepspeed") or "")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def came_after(checkpoints, named):
    """Of these checkpoints, those of a later step than one that is named, or of another place."""
    if not named:
        return []
    near = [path for path in checkpoints if path.resolve().parent == Path(named).parent]
    number = Path(named).name[11:]
    later = [path for path in near if number.isdecimal() and int(path.name[11:]) > int(number)]
    return later + [path for path in checkpoints if path not in near]


def describe(script, source):
    """Use, name, size and sha256 of the data files, the chat template and the training script."""
    uses = [("train", file) for file in script.train_file or []]
    uses += [("validation", file) for file in script.validation_file or []]
    uses += [("template", file) for file in [script.chat_template or ""] if Path(file).is_file()]
    text, here = Path(source).read_text("utf-8"), Path(__file__)
    held = [name for name in PARTS if f"from {name} import" in text or f"import {name}\n" in text]
    held += ["chat_turns", "keep_model"]
    uses += [("script", file) for file in [source, *(here.with_name(f"{n}.py") for n in held)]]
    described = []
    for use, file in uses:
        with Path(file).open("rb") as stream:
            digest, size = hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()
        name = Path(file).name if use == "script" else file  # a copy elsewhere is the same
        entry = {"use": use, "file": str(name), "bytes": size, "sha256": digest}
        if use == "script":  # but for comments and blank lines
            code = ast.dump(ast.parse(Path(file).read_text("utf-8")))
            entry["code"] = hashlib.sha256(code.encode()).hexdigest()
        described.append(entry)
    return described


def is_same(was, now):
    """Whether two lists of described files agree, wherever these lie."""
    return len(was) == len(now) and all(map(is_same_file, was, now))


def is_same_file(was, now):
    is_code = "code" in was and was["code"] == now.get("code")
    return was.get("use") == now.get("use") and (was["sha256"] == now["sha256"] or is_code)


def are_files(names):
    names = names if isinstance(names, list) else [names or ""]
    return all(Path(name).is_file() for name in names)


def what_changed(directory, training, given, data):
    """Return (the run on record in a directory, what differs that may change a weight)."""
    record = Path(directory, "run_args.yaml")
    before = (yaml.safe_load(record.read_text("utf-8")) if record.is_file() else None) or {}
    run = before.pop("run", None) or {}
    needs = training.load_best_model_at_end or training.lr_scheduler_type in LED_BY_EVALUATION
    free = FREE if needs else FREE + FREE_WITHOUT_BEST
    names = sorted(name for name in {*before, *given} if not name.startswith(free))
    pairs = [(name, before.get(name), given.get(name)) for name in names]
    if {"data", "deepspeed"} <= run.keys():
        pairs = [pair for pair in pairs if pair[0] not in FILES or not are_files(pair[2])]
    changed = [f"--{name} {was}, now {now}" for name, was, now in pairs if was != now]
    was = run.get("data", data)
    was, now = ([f for f in d if not f.get("use", "").startswith(free)] for d in (was, data))
    if not is_same(was, now):
        changed.append("other data, chat template or another script")
    if "deepspeed" in run and run["deepspeed"] != deepspeed_file(given):
        changed.append("an edited DeepSpeed file")
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
    if run.get("precision", precision) != precision:
        changed.append(f"precision {run['precision']}, now {precision}")
    return run, changed


def what_is_lost(checkpoint, training):
    """Why training cannot go on from a checkpoint as if it had not stopped, as a list."""
    ranks = len([*checkpoint.glob("rng_state*.pth")])
    lost = [f"written by {ranks} processes"] if ranks != training.world_size else []
    parts = ["scheduler.pt", "latest" if training.deepspeed else "optimizer.pt"]
    return lost + [f"{part} is not there" for part in parts if not (checkpoint / part).is_file()]
