"""What a directory holds of a training, for report.py: facts as text, data files, logged values.

Everything is read leniently: a file that is missing or damaged costs what stood in it and a note.
"""

import functools
import hashlib
import json
import re
import time
from itertools import pairwise
from pathlib import Path

import yaml
from run_files import find_checkpoints

KINDS = {"full": "all parameters", "lora": "LoRA", "dpo": "DPO", "grpo": "GRPO"}
DETAILS = "full load_in_8bit load_in_4bit lora_target_modules modules_to_save lora_r beta".split()
UNDRAWN = "(eval_)?(step|epoch|total_flos|num_.*|train_.*|perplexity|runtime|.*_per_second)"
CHANGES = "rewards/margins rewards/accuracies reward kl completions/mean_length".split()
TASKS = ("jsquad", "jcommonsenseqa", "jnli", "jsts")
ASIDE = "config|tokenizer|trainer_state|all_results|index|vocab|special_tokens|processor"


def read_run(directory):
    """{facts, scores: {row of the table: text}, given: arguments, kind, curves, files, notes}."""
    notes = []
    given = read(directory / "run_args.yaml", yaml.safe_load, notes)
    results = read(directory / "all_results.json", json.loads, notes)
    adapter = read(directory / "adapter_config.json", json.loads, notes)
    record = given.pop("run", None)
    record = {**(record if isinstance(record, dict) else {}), **results}
    state, place = find_state(directory, bool(results), record.get("id"), notes)
    history = state.get("log_history")
    history = [e for e in history if isinstance(e, dict)] if isinstance(history, list) else []
    history = [{name: e[name] for name in e if is_number(e[name])} for e in history]
    files = record.get("data")
    files = [entry for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    script = next((str(file.get("file")) for file in files if file.get("use") == "script"), "")
    kind, curves = re.sub(r"^finetune_|\.py$", "", script), read_curves(history)
    facts = {"directory": str(directory), "status": "finished"}
    facts |= {"method": name_method(kind, given, adapter)}
    facts |= {"base": given.get("model_name_or_path") or adapter.get("base_model_name_or_path")}
    facts |= results_of(record, results, state, history)
    for name in CHANGES:
        if name in curves:
            facts[f"{name}, first → last"] = change(curves[name])
    scores = read_scores(directory, notes)
    if not results:
        facts["status"] = status_of(directory, bool(history or given), place)
    if given.get("dataset_name"):
        notes.append(f"data set of a hub, without a file to describe: {given['dataset_name']}")
    files = [file for file in files if file.get("use") != "script"]
    run = {"facts": facts, "scores": scores, "given": given, "kind": kind, "curves": curves}
    return {**run, "files": files, "notes": [f"{directory}: {note}" for note in notes]}


def read(path, parse, notes, kind=dict):
    """The object in a file; {} if there is none."""
    try:
        found = parse(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({' '.join(str(error).split())[:80]})")
        return {}
    if not isinstance(found, kind):
        notes.append(f"{path.name} holds something else")
        return {}
    return found


def find_state(directory, is_finished, run_id, notes):
    """(trainer_state.json, where it lies): the result's, else the last checkpoint's of this run."""
    top, record = directory / "trainer_state.json", directory / "run_args.yaml"
    paths = [path / top.name for path in reversed(find_checkpoints(directory, run_id))]
    if is_finished:
        paths.insert(0, top)
    elif top.exists() and not (record.exists() and older(top, record)):
        paths.append(top)  # not that of an earlier run
    for path in paths:
        if state := read(path, json.loads, notes):
            return state, path.parent.name
    return {}, None


def older(one, other):
    return one.stat().st_mtime < other.stat().st_mtime


def status_of(directory, is_run, place):
    """What an output_dir without a result is."""
    if not is_run:
        is_model = any((directory / f"{name}config.json").exists() for name in ("", "adapter_"))
        return "not trained here" if is_model else "nothing here"
    lock = directory / "lock"
    lives = lock.exists() and time.time() - lock.stat().st_mtime < 120
    return f"{'training' if lives else 'not finished'}, {place or 'no step'} on record"


def name_method(kind, given, adapter):
    """The lesson, and the options that make it another one."""
    if kind == "lastlayer":
        return f"part of the model: {given.get('train', 'last_layer')}"
    name = KINDS.get(kind, kind) or ("an adapter" if adapter else None)
    details = [n if given[n] is True else f"{n} {given[n]}" for n in DETAILS if given.get(n)]
    return f"{name} ({', '.join(details)})" if details else name


# ---- Figures ----


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(value):
    """A number for a table."""
    if not is_number(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e4 else f"{value:.4g}"


def duration(seconds):
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def read_curves(history):
    """{name: [(step, value), ...]} of everything that was logged over the steps."""
    curves = {}
    for entry in history:
        for name, value in entry.items():
            is_drawn = name == "tokens_per_second" or not re.fullmatch(UNDRAWN, name)
            if is_number(value) and is_number(entry.get("step")) and is_drawn:
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def change(points):
    return f"{show(points[0][1])} → {show(points[-1][1])}"


def results_of(record, results, state, history):
    """Rows of the table: size, precision, steps, time, memory, losses."""
    trained, total = record.get("trainable_parameters"), record.get("total_parameters")
    steps, last = results.get("steps", state.get("global_step")), state.get("max_steps")
    facts = dict.fromkeys(("trained parameters", "precision", "device", "steps"))  # their order
    if is_number(trained) and is_number(total) and total:
        facts["trained parameters"] = f"{trained:,} of {total:,} ({trained / total:.2%})"
    facts |= {"precision": record.get("precision"), "device": record.get("device")}
    if is_number(steps):
        facts["steps"] = f"{steps:,} of {last:,}" if is_number(last) else f"{steps:,}"
        epochs = state.get("epoch")
        facts["steps"] += f" ({epochs:.2f} epochs)" if is_number(epochs) else ""
    facts["time"] = time_of(results, history)
    facts["peak memory"] = None
    if is_number(memory := results.get("peak_memory_gib")):
        what = "process" if record.get("device") == "CPU" else "GPU"
        facts["peak memory"] = f"{memory:.2f} GiB ({what})"
    speed = results.get("train_tokens_per_second")
    facts["tokens/s"] = f"{speed:,.0f}" if is_number(speed) else None
    losses = [entry["loss"] for entry in history if is_number(entry.get("loss"))]
    mean = results.get("train_loss")
    facts["training loss, mean"] = show(mean) if is_number(mean) else None
    facts["training loss, last logged"] = show(losses[-1]) if losses else None
    versions = record.get("versions") if isinstance(record.get("versions"), dict) else {}
    names = ("torch", "transformers", "peft", "trl")
    facts["packages"] = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    facts["commit"] = str(record.get("git_commit") or "")[:12]
    evaluation = next((e for e in reversed(history) if "eval_loss" in e), {}) | results
    for name, value in evaluation.items():
        is_score = name == "eval_perplexity" or not re.fullmatch(UNDRAWN, name)
        if name.startswith("eval_") and is_number(value) and is_score:
            facts[name] = show(value)
    if best := state.get("best_model_checkpoint"):
        facts["best"] = f"{Path(str(best)).name} ({show(state.get('best_metric'))})"
    return facts


def time_of(results, history):
    """The training's time. A resumed run's result knows the last start's only: the log has all."""
    entries = [e for e in history if "loss" in e and "num_learned" in e]
    logged, whole = sum(e.get("num_tokens", 0) for e in entries), None
    if entries and all(e.get("tokens_per_second") for e in entries):
        whole = sum(e.get("num_tokens", 0) / e["tokens_per_second"] for e in entries)
    elif not entries:
        logged, whole = grpo_time([e for e in history if "loss" in e and "step" in e])
    seconds, speed = results.get("train_runtime"), results.get("train_tokens_per_second")
    if not is_number(seconds):
        return whole and f"{duration(whole)} up to the last step on record"
    share = speed * seconds / logged if logged and is_number(speed) else 1
    if share > 0.999:
        return duration(seconds)
    start = f"{duration(seconds)} of it" if whole else f"{duration(seconds)} for"
    start += f" the last start ({share:.0%} of the tokens)"
    return f"{duration(max(whole, seconds))}, {start}" if whole else start


def grpo_time(entries):
    """(tokens, seconds) of all steps: TRL logs the tokens so far, and the mean time of a step."""
    if not entries or not all("step_time" in e for e in entries):
        return entries[-1].get("num_tokens") if entries else None, None
    steps = [0, *(e["step"] for e in entries)]
    counts = [after - before for before, after in pairwise(steps)]
    seconds = sum(e["step_time"] * count for e, count in zip(entries, counts, strict=True))
    return entries[-1].get("num_tokens"), seconds


# ---- Scores of evaluate_jglue.py ----


def read_scores(directory, notes):
    """{task and name: text} of the JSON files that hold scores of tasks."""
    scores = {}
    paths = [*sorted(directory.glob("*.json")), *sorted(directory.glob("scores/**/*.json"))]
    stems = [path.stem for path in paths]
    for path in paths:
        if re.search(ASIDE, path.name) or not path.is_file() or path.stat().st_size > 1e6:
            continue
        where, known = path.stem, {*scores}
        if stems.count(where) > 1:  # several of this name: by their paths
            where = path.relative_to(directory).with_suffix("").as_posix()
        is_plain = where == path.stem and where.startswith("scores")
        for task, found in find_tasks(read(path, json.loads, notes, dict | list)):
            texts, pairs = {}, []
            for name, value in flatten(found, task):
                if isinstance(value, list):
                    pairs.append((name, f" [{show(value[0])}, {show(value[1])}]"))
                elif "interval" not in name:  # which may be null, too
                    texts[name] = "undefined" if value is None else show(value)
            for name, interval in pairs:  # beside its score: accuracy_ci95 belongs to accuracy
                owners = [owner for owner in texts if owner.removeprefix(task) in name]
                owner = max(owners, key=len, default=name)
                texts[owner] = texts.get(owner, "") + interval
            for name, text in texts.items():
                name = name if is_plain and name not in known else f"{name} ({where})"
                scores[name] = f"{scores[name]}; {text}" if name in scores else text
    return scores


def find_tasks(node, name=None):
    """(task, its scores) for each object that names a task or stands below the name of one."""
    if isinstance(node, dict):
        task = node.get("task", name)
        if task in TASKS:
            yield task, node
        else:
            for key, value in node.items():
                yield from find_tasks(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from find_tasks(value, name)


def flatten(node, name):
    """(name, value) of numbers, nulls and pairs of numbers at any depth; which data, as a text."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "data" and isinstance(value, dict):
                rows, digest = show(value.get("rows")), str(value.get("questions_sha256"))[:12]
                yield f"{name} data", f"{value.get('file')}, {rows} rows, {digest}"
            elif key != "examples":  # the ids of a prompt's, not scores
                yield from flatten(value, name if key in ("value", "score") else f"{name} {key}")
    is_pair = isinstance(node, list) and len(node) == 2 and all(map(is_number, node))
    if is_pair or is_number(node) or node is None:
        yield name, node


# ---- Data files ----


@functools.cache
def count_rows(path, changed):
    """(rows, sha256) of JSON Lines, JSON or Parquet; rows is None where they cannot be counted."""
    digest, count = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".parquet":
                import pyarrow.parquet

                digest = hashlib.file_digest(file, "sha256")
                return pyarrow.parquet.ParquetFile(path).metadata.num_rows, digest.hexdigest()
            if file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                text = path.read_bytes()
                return len(json.loads(text)), hashlib.sha256(text).hexdigest()
            file.seek(0)
            for line in file:
                digest.update(line)
                count += bool(line.strip())
    except Exception:  # a damaged file, or no pyarrow: the rest of the page stands
        return None, None
    return count, digest.hexdigest()
