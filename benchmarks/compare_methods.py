#!/usr/bin/env python3
"""Train one model on the same data in several ways, and print what each takes as a Markdown table.

Each way is a process of its own that runs the lesson's script as a reader would, and the figures
are those of its all_results.json. Without a model and data given it makes both, offline: a Llama
with random weights, of 57 million parameters (one million with --overfit), and the questions of
../jglue/sample.

    python compare_methods.py            trained parameters, peak memory, time, tokens/s
    python compare_methods.py --overfit  how much of 50 examples each way learns by heart
    python compare_methods.py --task jnli  the score on questions held out, DPO and GRPO included
    python compare_methods.py --model_name_or_path MODEL --train_file train.jsonl
    python compare_methods.py --model_name_or_path MODEL --task jcommonsenseqa --jglue_dir JGLUE

With --task, DPO and GRPO start from what "all parameters" has become: SFT, then DPO. There is a
picture, too: OUTPUT_DIR/comparison.png.

On a CPU, peak memory is that of the whole process: packages, loading and activations too. What
importing the packages takes is therefore measured and printed, and beside the peak stands what
weights, gradients and Adam's moments come to.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IN_8BIT, IN_4BIT = ["--load_in_8bit", "true"], ["--load_in_4bit", "true"]
HEAD = ["--lora_target_modules", "none", "--modules_to_save", "lm_head"]
# name: (what the table calls it, script, its arguments, the learning rate that learns 50 by heart;
# of DPO and GRPO the one of the lesson's job)
METHODS = {
    "full": ("all parameters", "finetune_full", [], 1e-3),
    "last_layer": ("last layer", "finetune_lastlayer", [], 1e-2),
    "last_layer_8bit": ("last layer on 8 bit", "finetune_lora", [*HEAD, *IN_8BIT], 1e-2),
    "lora": ("LoRA", "finetune_lora", [], 3e-3),
    "lora_8bit": ("LoRA on 8 bit", "finetune_lora", IN_8BIT, 3e-3),
    "lora_4bit": ("QLoRA (4 bit)", "finetune_lora", IN_4BIT, 3e-3),
    "dpo": ("SFT, then DPO", "finetune_dpo", [], 5e-4),
    "grpo": ("SFT, then GRPO", "finetune_grpo", [], 2e-3),
}
AFTER_SFT = ("dpo", "grpo")  # they have no meaning without it
SUPERVISED = [name for name in METHODS if name not in AFTER_SFT]
ON_A_TASK = ["full", "last_layer", "lora", "lora_4bit", *AFTER_SFT]
TASKS = {"jnli": "accuracy", "jcommonsenseqa": "accuracy", "jsquad": "exact_match"}
NEW_TOKENS = {"jsquad": 32}  # of an answer; of the other tasks 8
PROBE = """
import json, resource, bitsandbytes, peft, torch
from transformers import Trainer
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"device": device, "threads": torch.get_num_threads(), "gib": gib}))
"""


def main(argv=None):
    args = parse(argv)
    machine = json.loads(run(args, "machine", ["-c", PROBE]).splitlines()[-1])
    data = args.train_file or args.output_dir / f"{args.task or 'jsquad'}_train.jsonl"
    if not args.train_file:
        sample = ["--jglue_dir", args.jglue_dir, "--task", "all" if args.task else "jsquad"]
        sample += ["--output_dir", args.output_dir]
        run(args, "data", [ROOT / "jglue" / "prepare_jglue.py", *sample])
    model = args.model_name_or_path or make_model(args, data)
    if args.task:
        head, rows, note = score(args, model, data, machine)
    elif args.overfit:
        head, rows, note = overfit(args, model, data)
    else:
        head, rows, note = measure(args, model, data, machine)
    names = ("torch", "transformers", "peft", "bitsandbytes")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    where = f"{packages}; {machine['device']}, {machine['threads']} thread(s)"
    steps = f"{args.max_steps} steps of {args.batch_size} rows, rank {args.lora_r}"
    day = time.strftime("%Y-%m-%d")
    print(f"\nMeasured on {day}: {where}; {model}, {data.name}; {steps}. {note}\n")
    for row in (head, ["---", *("---:" for _ in head[1:])], *rows):
        print(f"| {' | '.join(row)} |")


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_name_or_path", help="directory or hub name; default: one that is made here")
    add("--train_file", type=Path, help="JSON Lines; default: the questions of ../jglue/sample")
    add("--validation_file", type=Path, help="adds a column with the loss on it, and a pass")
    names = f"NAME,NAME of {', '.join(METHODS)} (default: those that fit)"
    add("--methods", help=names)
    add("--overfit", action="store_true", help="train on 50 examples and ask for the same 50")
    add("--task", choices=TASKS, help="train on a task's training split, score its validation")
    add("--jglue_dir", type=Path, default=ROOT / "jglue" / "sample", help="for --task")
    steps = "steps of each method (default: 10, with --overfit 300, with --task 60)"
    add("--max_steps", type=int, help=steps)
    more = "with --task: steps of DPO and GRPO after SFT (default 60)"
    add("--more_steps", type=int, default=60, help=more)
    first = "with --overfit and --task: steps of the made model on other texts, before"
    add("--first_steps", type=int, default=300, help=first)
    rows = "rows per step; activations grow with it (default: 4, with --overfit 10, --task 16)"
    add("--batch_size", type=int, help=rows)
    fastest = "runs of each method, of which the fastest counts (default 1)"
    add("--repeat", type=int, default=1, help=fastest)
    rank = "rank of the adapters; their size grows with it (default 16)"
    add("--lora_r", type=int, default=16, help=rank)
    where = "a new directory, for models, results and logs (default: output/compare_methods)"
    add("--output_dir", type=Path, default=Path("output/compare_methods"), help=where)
    args = parser.parse_args(argv)
    check_arguments(args)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        is_new = not any(args.output_dir.iterdir())
    except OSError as error:
        fail(f"--output_dir {args.output_dir} cannot be written ({error.strerror}). Name another.")
    if not is_new:  # what was measured before must not count as measured now
        fail(f"--output_dir {args.output_dir} is not empty. Name a new one.")
    return args


def check_arguments(args):
    """Fill in what depends on the kind of comparison; refuse what cannot be."""
    known = list(METHODS) if args.task else SUPERVISED
    given = ON_A_TASK if args.task else SUPERVISED
    if args.task == "jsquad":  # for which there are no pairs and no reward
        given, known = [name for name in given if name in SUPERVISED], SUPERVISED
    if args.methods is not None:
        given = [name.strip() for name in args.methods.split(",")]
    args.methods = given
    if args.max_steps is None:
        args.max_steps = 60 if args.task else 300 if args.overfit else 10
    if args.batch_size is None:
        args.batch_size = 16 if args.task else 10 if args.overfit else 4
    for name in args.methods:
        if name in AFTER_SFT and not args.task:
            fail(f"--methods {name} needs --task: without answers to score it shows nothing.")
        if name not in known:
            fail(f"--methods {name or '(empty)'} is no method. They are: {', '.join(known)}.")
    if args.task and (args.overfit or args.train_file or args.validation_file or args.repeat > 1):
        others = "--overfit, --train_file, --validation_file, --repeat"
        fail(f"--task has files of its own and asks once. Leave {others} out.")
    for name in ("max_steps", "more_steps", "first_steps", "batch_size", "repeat", "lora_r"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is below 1. Give a positive number.")
    for name in ("train_file", "validation_file"):
        if getattr(args, name) and not getattr(args, name).is_file():
            fail(f"--{name} {getattr(args, name)} does not exist. Give a JSON Lines file.")


def make_model(args, data):
    """A Llama with random weights: its memory shows, or it is trained in minutes."""
    width, depth = (128, 4) if args.overfit or args.task else (768, 8)
    directory = args.output_dir / f"model_{width}x{depth}"
    size = ["--vocab_size", 510, "--hidden_size", width, "--num_hidden_layers", depth]
    size += ["--num_attention_heads", 4]
    options = ["--model_type", "llama", "--text_file", data, "--output_dir", directory, *size]
    run(args, directory.name, [ROOT / "tiny_model" / "make_tiny_model.py", *options])
    say("model", f"{directory}: llama, {depth} layers x {width}, random weights")
    return directory


def train(args, name, method, model, data, *options):
    """Run a method's script from its beginning; return (its all_results.json, its log)."""
    _, script, own, _ = METHODS[method]
    directory = args.output_dir / name
    command = [ROOT / script / f"{script}.py", "--model_name_or_path", model, "--train_file", data]
    command += [*own, *options, "--output_dir", directory, "--save_strategy", "no"]
    if script in ("finetune_lora", "finetune_dpo", "finetune_grpo"):
        command += ["--lora_r", args.lora_r]
    log = run(args, name, command)
    return json.loads((directory / "all_results.json").read_text("utf-8")), log


# ---- What each method takes ----


def measure(args, model, data, machine):
    options = ["--max_steps", args.max_steps, "--per_device_train_batch_size", args.batch_size]
    options += ["--logging_steps", 1]
    head = ["method", "trained parameters", "share", "peak GiB", "computed GiB", "seconds"]
    head, rows = [*head, "tokens/s"], []
    if args.validation_file:
        options += ["--validation_file", args.validation_file]
        head.append("validation loss")
    for method in args.methods:
        names = [method, *(f"{method}_{number}" for number in range(2, args.repeat + 1))]
        runs = [train(args, name, method, model, data, *options) for name in names]
        results, log = min(runs, key=lambda run: run[0]["train_runtime"])
        trained, total = results["trainable_parameters"], results["total_parameters"]
        row = [METHODS[method][0], f"{trained:,}", f"{trained / total:.2%}"]
        row += [f"{results['peak_memory_gib']:.2f}", f"{needed_bytes(results, log) / 2**30:.2f}"]
        row += [f"{results['train_runtime']:.1f}", f"{results['train_tokens_per_second']:,.0f}"]
        if args.validation_file:
            row.append(f"{results['eval_loss']:.4f}")
        rows.append(row)
        pairs = zip(head[1:], row[1:], strict=True)
        say(method, ", ".join(f"{name} {value}" for name, value in pairs))
    peak = "process, of which imports alone take {gib:.2f}" if machine["device"] == "CPU" else "GPU"
    note = f"Peak: of the {peak.format(**machine)}."
    note += " Computed: weights, gradients and Adam's two moments."
    note += f" Of {args.repeat} runs, the fastest." * (args.repeat > 1)
    return head, rows, note


def needed_bytes(results, log):
    """Weights, gradients and Adam's two moments in fp32; of a frozen base, what its script says."""
    trained = results["trainable_parameters"]
    if base := re.search(r"^base .*?([\d,.]+) MiB", log, re.M):
        return float(base[1].replace(",", "")) * 2**20 + 16 * trained
    return 4 * results["total_parameters"] + 12 * trained


# ---- How much of 50 examples each method learns by heart ----


def overfit(args, model, data):
    note, (few, others) = "The start: the model as given", split_rows(args, data)
    if not args.model_name_or_path:
        first = ["--max_steps", args.first_steps, "--per_device_train_batch_size", 32]
        results, _ = train(args, "start", "full", model, others, *first, "--learning_rate", 3e-3)
        model = args.output_dir / "start"
        note = f"The start: all parameters, {args.first_steps} x 32 other rows"
        say("start", f"trained on other rows, loss {results['train_loss']:.4f}")
    head = ["method", "trained parameters", "learning rate", "last loss", "exact match", "merged"]
    start = ask(args, "start", model, few, [])["exact_match"]
    rows = [["none (the start)", "0", "", "", f"{start:.2f}", ""]]
    say("start", f"exact match {rows[0][4]}")
    for method in args.methods:
        title, _, own, rate = METHODS[method]
        options = ["--max_steps", args.max_steps, "--per_device_train_batch_size", args.batch_size]
        options += ["--warmup_steps", 10, "--learning_rate", rate]
        results, log = train(args, method, method, model, few, *options)
        loss = re.findall(r"^step .*? loss (\S+)", log, re.M)[-1:] or [""]
        bits = own[-2:]  # the kind of base; which layers are adapted stands in the adapter
        scores = ask(args, method, args.output_dir / method, few, bits)
        scores = [f"{scores['exact_match']:.2f}", ""]
        if bits:  # on the base in full precision, which merging adds it to
            merged = ask(args, f"{method}_merged", args.output_dir / method, few, [])
            scores[1] = f"{merged['exact_match']:.2f}"
        rows.append([title, f"{results['trainable_parameters']:,}", f"{rate:g}", *loss, *scores])
        say(method, f"loss {loss[0]}, exact match {scores[0]}")
    note += ". Trained on 50 rows, then asked for the same 50; merged: with the full base."
    return head, rows, note


def split_rows(args, data):
    """Files with the first 50 rows, which are learned by heart, and with the others."""
    files = args.output_dir / "fifty.jsonl", args.output_dir / "others.jsonl"
    try:
        with data.open(encoding="utf-8") as file:
            few, others = [json.loads(line) for line in islice(file, 50)], file.read()
        few = [{**row, "id": str(n), "answers": [row["completion"]]} for n, row in enumerate(few)]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"--overfit needs JSON Lines of prompt + completion; {data} has other ({error!r}).")
    if len(few) < 50 or not (others.strip() or args.model_name_or_path):
        fail(f"--overfit needs 50 rows, and others for the made model; {data} has too few.")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in few]
    files[0].write_text("".join(lines), encoding="utf-8")
    files[1].write_text(others, encoding="utf-8")
    return files


def ask(args, name, model, few, options, new_tokens=32):
    """Scores of a model's answers to a file; of an adapter's, on its own kind of base."""
    answers = args.output_dir / f"{name}_answers.jsonl"
    scores = args.output_dir / f"{name}_scores.json"
    options = ["--max_new_tokens", new_tokens, "--batch_size", 50, *options]
    files = ["--model_name_or_path", model, "--prompt_file", few, "--output_file", answers]
    run(args, f"{name}_answers", [ROOT / "generate_text" / "generate_text.py", *files, *options])
    task = ["--task", args.task or "jsquad", "--prediction_file", answers]
    run(
        args,
        f"{name}_scores",
        [ROOT / "jglue" / "evaluate_jglue.py", *task, "--output_file", scores],
    )
    return json.loads(scores.read_text("utf-8"))


# ---- A task's score after each method ----


def score(args, model, data, machine):
    """Train on a task's training split by each method, and ask its validation split."""
    note = "Base: the model as given"
    if not args.model_name_or_path:
        texts = write_texts(args)
        first = ["--max_steps", args.first_steps, "--per_device_train_batch_size", 32]
        train(args, "base", "full", model, texts, *first, "--learning_rate", 3e-3)
        model = args.output_dir / "base"
        note = f"Base: trained on the questions alone as plain text, {args.first_steps} x 32 rows"
        say("base", "made")
    found = [{"title": "base, untrained on the task", "base": True}]
    found[0] |= held_out(args, "base_model", model, [])
    for method in args.methods:
        found.append(one_method(args, method, model, data))
        say(method, f"{TASKS[args.task]} {found[-1]['score']:.3f}")
    draw(args, found, args.output_dir / "comparison.png")
    number, steps = found[0]["rows"], f"DPO, GRPO: {args.more_steps} steps more"
    peak = f"of the process, of which imports alone take {machine['gib']:.2f}"
    peak = peak if machine["device"] == "CPU" else "of the GPU"
    note += f"; {steps}. {TASKS[args.task]} on {number} rows held out, with the 95 % interval"
    note += f" (Wilson) of so few rows, of one seed. Peak: {peak}."
    if chance := found[0].get("commonest"):
        note += f" Always the commonest label: {chance:.2f}."
    head = ["method", "trained parameters", "share", "seconds", "peak GiB", TASKS[args.task]]
    return head, [cells(row) for row in found], note


def one_method(args, method, model, data):
    """Train, ask; what it took and what it scored."""
    title, _, own, rate = METHODS[method]
    options = ["--max_steps", args.max_steps, "--per_device_train_batch_size", args.batch_size]
    before, seconds = model, 0
    if method in AFTER_SFT:
        before, data, options, seconds = after_sft(args, method, model, data)
    options += ["--learning_rate", rate, "--warmup_steps", 10]
    results, _ = train(args, method, method, before, data, *options)
    row = {"title": title, "before": seconds, "seconds": results["train_runtime"]}
    row |= {"trained": results["trainable_parameters"], "total": results["total_parameters"]}
    row["peak"] = results["peak_memory_gib"]
    return row | held_out(args, method, args.output_dir / method, own[-2:])


def after_sft(args, method, model, data):
    """(the model that "all parameters" made, data, options, seconds it took) for DPO and GRPO."""
    sft = args.output_dir / "full"
    if not sft.exists():
        one_method(args, "full", model, data)
    seconds = json.loads((sft / "all_results.json").read_text("utf-8"))["train_runtime"]
    options = ["--max_steps", args.more_steps, "--per_device_train_batch_size", args.batch_size]
    if method == "dpo":
        data = data.with_name(f"{args.task}_preferences_train.jsonl")
        if not data.is_file():
            fail(f"{data.name} is not there: prepare_jglue.py writes none for {args.task}.")
        return sft, data, options, seconds
    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    choices = sorted({row["completion"] for row in rows})  # the reward asks for them
    data = data.with_name(f"{args.task}_rewards.jsonl")
    write_rows(data, [{"choices": choices, **row} for row in rows])
    tokens = NEW_TOKENS.get(args.task, 8)
    return sft, data, [*options, "--max_completion_length", tokens], seconds


def write_texts(args):
    """The questions of the training splits as plain text, without their answers."""
    files = sorted(args.output_dir.glob("*_train.jsonl"))
    rows = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    texts = dict.fromkeys(row["prompt"] for row in rows if isinstance(row.get("prompt"), str))
    path = args.output_dir / "texts.jsonl"
    write_rows(path, [{"text": text} for text in texts])
    return path


def write_rows(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def held_out(args, name, model, options):
    """What a model scores on the validation split."""
    file = args.output_dir / f"{args.task}_validation.jsonl"
    scores = ask(args, name, model, file, options, NEW_TOKENS.get(args.task, 8))
    value, number = scores[TASKS[args.task]], scores["rows"]
    low, high = wilson(round(value * number), number)
    found = {"score": value, "low": low, "high": high, "rows": number}
    return found | {"commonest": scores.get("commonest_label")}


def wilson(right, number):
    """The 95 % interval of a share: Wilson's, which holds for few rows and for 0 and 1, too."""
    z, share = 1.959964, right / number
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2)) / (1 + z**2 / number)
    return max(0.0, middle - z * half), min(1.0, middle + z * half)


def cells(row):
    """A line of the table."""
    interval = f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    if row.get("base"):
        return [row["title"], "0", "", "", "", interval]
    seconds = f"{row['seconds']:.1f}"
    if row["before"]:
        seconds = f"{row['before']:.1f} + {seconds}"
    share = f"{row['trained'] / row['total']:.2%}"
    return [row["title"], f"{row['trained']:,}", share, seconds, f"{row['peak']:.2f}", interval]


def draw(args, found, path):
    """Score, time and memory of each method, side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return say("picture", f"none: matplotlib does not load ({error})")
    figure = Figure(figsize=(11, 0.8 + 0.42 * len(found)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    places = range(len(found))
    for place, row in enumerate(found):
        left.plot([row["low"], row["high"]], [place, place], color="tab:blue", linewidth=2)
        left.plot(row["score"], place, "o", color="tab:blue")
    title = f"{args.task}: {TASKS[args.task]}, held out, with 95 % interval"
    if found[0].get("commonest"):
        left.axvline(found[0]["commonest"], color="grey", linestyle=":", linewidth=1)
        title += " (dotted: the commonest label)"
    left.set_title(title, fontsize=9)
    left.set_xlim(-0.02, 1.02)
    middle.barh(places, [row.get("before", 0) for row in found], color="tab:grey")
    starts = [row.get("before", 0) for row in found]
    middle.barh(places, [row.get("seconds", 0) for row in found], left=starts, color="tab:orange")
    middle.set_title("training, s (grey: SFT before)", fontsize=9)
    right.barh(places, [row.get("peak", 0) for row in found], color="tab:green")
    right.set_title("peak memory, GiB", fontsize=9)
    left.set_yticks(places, [row["title"] for row in found], fontsize=9)
    left.invert_yaxis()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3, axis="x")
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    return say("picture", path)


# ---- Running and printing ----


def run(args, name, command):
    """Run Python with its output in a log and return that; a failure's error line becomes ours."""
    path, words = args.output_dir / f"{name}.log", [sys.executable, *map(str, command)]
    with path.open("w", encoding="utf-8") as log:
        status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode
    text = path.read_text(encoding="utf-8", errors="replace")
    if status:
        errors = re.findall(r"error: (.+)", text) or [f"it ended with status {status}."]
        fail(f"{name}: {errors[-1]} The log is {path}.")
    return text


def say(name, text):
    print(f"{name:<16}{text}", flush=True)


def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
