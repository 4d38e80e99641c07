#!/usr/bin/env python3
"""Train one model on the same data in several ways, and print what each takes as a Markdown table.

Each way is a process of its own that runs the lesson's script as a reader would, and the figures
are those of its all_results.json. Without a model and data given it makes both, offline: a Llama
with random weights, of 57 million parameters (one million with --overfit), and the questions of
../jglue/sample.

    python compare_methods.py            trained parameters, peak memory, time, tokens/s
    python compare_methods.py --overfit  how much of 50 examples each way learns by heart
    python compare_methods.py --model_name_or_path MODEL --train_file train.jsonl

On a CPU, peak memory is that of the whole process: packages, loading and activations too. What
importing the packages takes is therefore measured and printed, and beside the peak stands what
weights, gradients and Adam's moments come to.
"""

import argparse
import json
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
# name: (what the table calls it, script, its arguments, the learning rate that learns 50 by heart)
METHODS = {
    "full": ("all parameters", "finetune_full", [], 1e-3),
    "last_layer": ("last layer", "finetune_lastlayer", [], 1e-2),
    "last_layer_8bit": ("last layer on 8 bit", "finetune_lora", [*HEAD, *IN_8BIT], 1e-2),
    "lora": ("LoRA", "finetune_lora", [], 3e-3),
    "lora_8bit": ("LoRA on 8 bit", "finetune_lora", IN_8BIT, 3e-3),
    "lora_4bit": ("QLoRA (4 bit)", "finetune_lora", IN_4BIT, 3e-3),
}
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
    data = args.train_file or args.output_dir / "jsquad_train.jsonl"
    if not args.train_file:
        sample = ["--jglue_dir", ROOT / "jglue" / "sample", "--task", "jsquad"]
        sample += ["--output_dir", args.output_dir]
        run(args, "data", [ROOT / "jglue" / "prepare_jglue.py", *sample])
    model = args.model_name_or_path or make_model(args, data)
    if args.overfit:
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
    names = f"NAME,NAME of {', '.join(METHODS)} (default: all)"
    add("--methods", default=",".join(METHODS), help=names)
    add("--overfit", action="store_true", help="train on 50 examples and ask for the same 50")
    add("--max_steps", type=int, help="steps of each method (default: 10, with --overfit 300)")
    first = "with --overfit: steps of the made model on other rows, before"
    add("--first_steps", type=int, default=300, help=first)
    rows = "rows per step; activations grow with it (default: 4, with --overfit 10)"
    add("--batch_size", type=int, help=rows)
    fastest = "runs of each method, of which the fastest counts (default 1)"
    add("--repeat", type=int, default=1, help=fastest)
    rank = "rank of the adapters; their size grows with it (default 16)"
    add("--lora_r", type=int, default=16, help=rank)
    where = "a new directory, for models, results and logs (default: output)"
    add("--output_dir", type=Path, default=Path("output"), help=where)
    args = parser.parse_args(argv)
    args.methods = [name.strip() for name in args.methods.split(",")]
    if args.max_steps is None:
        args.max_steps = 300 if args.overfit else 10
    if args.batch_size is None:
        args.batch_size = 10 if args.overfit else 4
    for name in args.methods:
        if name not in METHODS:
            fail(f"--methods {name or '(empty)'} is no method. They are: {', '.join(METHODS)}.")
    for name in ("max_steps", "first_steps", "batch_size", "repeat", "lora_r"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is below 1. Give a positive number.")
    for name in ("train_file", "validation_file"):
        if getattr(args, name) and not getattr(args, name).is_file():
            fail(f"--{name} {getattr(args, name)} does not exist. Give a JSON Lines file.")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        is_new = not any(args.output_dir.iterdir())
    except OSError as error:
        fail(f"--output_dir {args.output_dir} cannot be written ({error.strerror}). Name another.")
    if not is_new:  # what was measured before must not count as measured now
        fail(f"--output_dir {args.output_dir} is not empty. Name a new one.")
    return args


def make_model(args, data):
    """A Llama with random weights: its memory shows, or it is trained in minutes."""
    width, depth = (128, 4) if args.overfit else (768, 8)
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
    if script == "finetune_lora":
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
    rows = [["none (the start)", "0", "", "", f"{ask(args, 'start', model, few, []):.2f}", ""]]
    say("start", f"exact match {rows[0][4]}")
    for method in args.methods:
        title, _, own, rate = METHODS[method]
        options = ["--max_steps", args.max_steps, "--per_device_train_batch_size", args.batch_size]
        options += ["--warmup_steps", 10, "--learning_rate", rate]
        results, log = train(args, method, method, model, few, *options)
        loss = re.findall(r"^step .*? loss (\S+)", log, re.M)[-1:] or [""]
        bits = own[-2:]  # the kind of base; which layers are adapted stands in the adapter
        scores = [f"{ask(args, method, args.output_dir / method, few, bits):.2f}", ""]
        if bits:  # on the base in full precision, which merging adds it to
            scores[1] = f"{ask(args, f'{method}_merged', args.output_dir / method, few, []):.2f}"
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


def ask(args, name, model, few, options):
    """Exact match of a model's answers to the 50; of an adapter, on its own kind of base."""
    answers = args.output_dir / f"{name}_answers.jsonl"
    scores = args.output_dir / f"{name}_scores.json"
    options = ["--max_new_tokens", 32, "--batch_size", 50, *options]
    files = ["--model_name_or_path", model, "--prompt_file", few, "--output_file", answers]
    run(args, f"{name}_answers", [ROOT / "generate_text" / "generate_text.py", *files, *options])
    score = ["--task", "jsquad", "--prediction_file", answers, "--output_file", scores]
    run(args, f"{name}_scores", [ROOT / "jglue" / "evaluate_jglue.py", *score])
    return json.loads(scores.read_text("utf-8"))["exact_match"]


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
