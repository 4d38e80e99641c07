#!/usr/bin/env python3
"""Train one model on the same data in several ways, and print what each takes as a Markdown table.

Each way is a process of its own that runs the lesson's script as a reader would, and the figures are those of its
all_results.json. Without a model and data given it makes both, offline: a Llama with random weights, of 57 million
parameters (one million with --overfit), and the questions of ../jglue/sample.

    python compare_methods.py               trained parameters, peak memory, time, tokens/s
    python compare_methods.py --overfit     how much of 50 examples each way learns by heart, from the same start
    python compare_methods.py --model_name_or_path MODEL --train_file train.jsonl

On a CPU, peak memory is that of the whole process: packages, loading and activations too. What importing the packages
takes is therefore measured and printed, and beside the peak stands what weights, gradients and Adam's moments come to.
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
# name: (what the table calls it, script, its arguments, the learning rate that learns 50 examples by heart)
METHODS = {
    "full": ("all parameters", "finetune_full", [], 1e-3),
    "last_layer": ("last layer", "finetune_lastlayer", [], 1e-2),
    "last_layer_8bit": ("last layer on 8 bit", "finetune_lastlayer", ["--load_in_8bit", "true"], 1e-2),
    "lora": ("LoRA", "finetune_lora", [], 3e-3),
    "lora_8bit": ("LoRA on 8 bit", "finetune_lora", ["--load_in_8bit", "true"], 3e-3),
    "lora_4bit": ("QLoRA (4 bit)", "finetune_lora", ["--load_in_4bit", "true"], 3e-3),
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
        sample = ["--jglue_dir", ROOT / "jglue" / "sample", "--task", "jsquad", "--output_dir", args.output_dir]
        run(args, "data", [ROOT / "jglue" / "prepare_jglue.py", *sample])
    model = args.model_name_or_path or make_model(args, data)
    head, rows, note = overfit(args, model, data) if args.overfit else measure(args, model, data, machine)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    where = f"{time.strftime('%Y-%m-%d')}: {packages}; {machine['device']}, {machine['threads']} thread(s)"
    what = f"{model}, {data.name}; {args.max_steps} steps of {args.batch_size} rows, rank {args.lora_r}"
    print(f"\nMeasured on {where}; {what}. {note}\n")
    for row in (head, ["---", *("---:" for _ in head[1:])], *rows):
        print(f"| {' | '.join(row)} |")


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_name_or_path", help="directory or hub name of the model; default: one that is made here")
    add("--train_file", type=Path, help="JSON Lines to train on; default: the questions of ../jglue/sample")
    add("--validation_file", type=Path, help="adds a column with the loss on it, and a pass over it to each method")
    add("--methods", default=",".join(METHODS), help=f"NAME,NAME of {', '.join(METHODS)} (default: all)")
    add("--overfit", action="store_true", help="train on 50 examples and ask for the same 50 (prompt + completion)")
    add("--max_steps", type=int, help="steps of each method (default: 10, with --overfit 300)")
    add("--first_steps", type=int, default=300, help="with --overfit: steps of the made model on other rows, before")
    add("--batch_size", type=int, help="rows per step; activations grow with it (default: 4, with --overfit 10)")
    add("--repeat", type=int, default=1, help="runs of each method, of which the fastest counts (default 1)")
    add("--lora_r", type=int, default=16, help="rank of the adapters; their size grows with it (default 16)")
    add("--output_dir", type=Path, default=Path("output"), help="where models, results and logs go (default: output)")
    args = parser.parse_args(argv)
    args.methods = [name.strip() for name in args.methods.split(",")]
    args.max_steps = (300 if args.overfit else 10) if args.max_steps is None else args.max_steps
    args.batch_size = (10 if args.overfit else 4) if args.batch_size is None else args.batch_size
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
    except OSError as error:
        fail(f"--output_dir {args.output_dir} cannot be written ({error.strerror}). Name another one.")
    return args


def make_model(args, data):
    """A Llama with random weights: large enough for its memory to show, or small enough to be trained in minutes."""
    width, depth = (128, 4) if args.overfit else (768, 8)
    directory = args.output_dir / f"model_{width}x{depth}"
    size = ["--vocab_size", 510, "--hidden_size", width, "--num_hidden_layers", depth, "--num_attention_heads", 4]
    options = ["--model_type", "llama", "--text_file", data, "--output_dir", directory, *size]
    run(args, directory.name, [ROOT / "tiny_model" / "make_tiny_model.py", *options])
    say("model", f"{directory}: llama, {depth} layers x {width}, random weights")
    return directory


def train(args, name, method, model, data, *options):
    """Run a method's script from its beginning; return (its all_results.json, its log)."""
    _, script, own, _ = METHODS[method]
    directory = args.output_dir / name
    command = [ROOT / script / f"{script}.py", "--model_name_or_path", model, "--train_file", data, *own, *options]
    command += ["--output_dir", directory, "--resume_from_checkpoint", "false", "--save_strategy", "no"]
    log = run(args, name, [*command, *(["--lora_r", args.lora_r] if script == "finetune_lora" else [])])
    return json.loads((directory / "all_results.json").read_text("utf-8")), log


# ---- What each method takes ----


def measure(args, model, data, machine):
    options = ["--max_steps", args.max_steps, "--per_device_train_batch_size", args.batch_size, "--logging_steps", 1]
    options += ["--validation_file", args.validation_file] if args.validation_file else []
    head = ["method", "trained parameters", "share", "peak GiB", "computed GiB", "seconds", "tokens/s"]
    head, rows = [*head, *(["validation loss"] if args.validation_file else [])], []
    for method in args.methods:
        runs = [train(args, method, method, model, data, *options) for _ in range(args.repeat)]
        results, log = min(runs, key=lambda run: run[0]["train_runtime"])
        trained, total = results["trainable_parameters"], results["total_parameters"]
        rows.append([METHODS[method][0], f"{trained:,}", f"{trained / total:.2%}", f"{results['peak_memory_gib']:.2f}",
                     f"{needed_bytes(results, log) / 2**30:.2f}", f"{results['train_runtime']:.1f}",
                     f"{results['train_tokens_per_second']:,.0f}"])  # fmt: skip
        rows[-1] += [f"{results['eval_loss']:.4f}"] if args.validation_file else []
        say(method, ", ".join(f"{name} {value}" for name, value in zip(head[1:], rows[-1][1:], strict=True)))
    peak = "process, of which imports alone take {gib:.2f}" if machine["device"] == "CPU" else "GPU"
    note = f"Peak: of the {peak.format(**machine)}. Computed: weights, gradients and Adam's two moments."
    note += f" Of {args.repeat} runs, the fastest." * (args.repeat > 1)
    return head, rows, note


def needed_bytes(results, log):
    """Weights, gradients and Adam's two moments in fp32; of a frozen base, the bytes that the script itself reports."""
    trained = results["trainable_parameters"]
    if base := re.search(r"^base .*?([\d,.]+) ([MG])iB", log, re.M):
        return float(base[1].replace(",", "")) * {"M": 2**20, "G": 2**30}[base[2]] + 16 * trained
    return 4 * results["total_parameters"] + 12 * trained


# ---- How much of 50 examples each method learns by heart ----


def overfit(args, model, data):
    note, (few, others) = "The start: the model as given", split_rows(args, data)
    if not args.model_name_or_path:
        first = ["--max_steps", args.first_steps, "--per_device_train_batch_size", 32, "--learning_rate", 3e-3]
        results, _ = train(args, "start", "full", model, others, *first)
        model, note = args.output_dir / "start", f"The start: all parameters, {args.first_steps} x 32 other rows"
        say("start", f"trained on other rows, loss {results['train_loss']:.4f}")
    head = ["method", "trained parameters", "learning rate", "last loss", "exact match", "merged"]
    rows = [["none (the start)", "0", "", "", f"{ask(args, 'start', model, few, []):.2f}", ""]]
    say("start", f"exact match {rows[0][4]}")
    for method in args.methods:
        title, _, own, rate = METHODS[method]
        options = [
            "--max_steps",
            args.max_steps,
            "--per_device_train_batch_size",
            args.batch_size,
            "--warmup_steps",
            10,
        ]
        results, log = train(args, method, method, model, few, *options, "--learning_rate", rate)
        loss = re.findall(r"^step .*? loss (\S+)", log, re.M)[-1:] or [""]
        scores = [f"{ask(args, method, args.output_dir / method, few, own):.2f}", ""]
        if own:  # on the base in full precision, which merging adds it to
            scores[1] = f"{ask(args, f'{method}_merged', args.output_dir / method, few, []):.2f}"
        rows.append([title, f"{results['trainable_parameters']:,}", f"{rate:g}", *loss, *scores])
        say(method, f"loss {loss[0]}, exact match {scores[0]}")
    note += ". Trained on 50 rows, then asked for the same 50; merged: with the base in full precision."
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
        fail(f"--overfit needs 50 rows, and others for the made model to begin with; {data} has too few.")
    files[0].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in few), encoding="utf-8")
    files[1].write_text(others, encoding="utf-8")
    return files


def ask(args, name, model, few, options):
    """Exact match of a model's answers to the 50; of an adapter, on the kind of base that it was trained on."""
    answers, scores = (args.output_dir / f"{name}_{what}" for what in ("answers.jsonl", "scores.json"))
    for old in (answers, Path(f"{answers}.partial")):  # with them it would go on where another run has stopped
        old.unlink(missing_ok=True)
    options = ["--max_new_tokens", 32, "--batch_size", 50, *options]
    files = ["--model_name_or_path", model, "--prompt_file", few, "--output_file", answers]
    run(args, f"{name}_answers", [ROOT / "generate_text" / "generate_text.py", *files, *options])
    score = ["--task", "jsquad", "--prediction_file", answers, "--output_file", scores]
    run(args, f"{name}_scores", [ROOT / "jglue" / "evaluate_jglue.py", *score])
    return json.loads(scores.read_text("utf-8"))["exact_match"]


# ---- Running and printing ----


def run(args, name, command):
    """Run Python with its output in a log and return that; a failure's own error line becomes ours."""
    path = args.output_dir / f"{name}.log"
    with path.open("w", encoding="utf-8") as log:
        status = subprocess.run([sys.executable, *map(str, command)], stdout=log, stderr=subprocess.STDOUT).returncode
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
