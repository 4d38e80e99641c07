#!/usr/bin/env python3
"""Train the same model with 1, 2, ... processes, and print useful tokens/s as a Markdown table.

Each row is a run of ../finetune_full/finetune_full.py under torchrun, one process per GPU (without
a GPU: of one thread each), with the same rows per process and step. Efficiency is tokens/s divided
by processes x tokens/s of the first row. Without a model and data given it makes both, offline: a
small Llama, and the questions of ../jglue/sample.

    python scaling.py --processes 1,2
    python scaling.py --processes 1,8 --model_name_or_path MODEL \\
        --deepspeed ../deepspeed_configs/zero2.json
    python scaling.py --processes 1,2 --optim adamw_torch_fused,adamw_bnb_8bit --repeat 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    first = "N,N: how many processes, the first is what the others compare with"
    add("--processes", default="1,2", help=first)
    small = "directory or hub name; default: a Llama of 3.4 million parameters made here"
    add("--model_name_or_path", help=small)
    add("--train_file", type=Path, help="JSON Lines; default: the questions of ../jglue/sample")
    rows = "rows per process and step (default 16)"
    add("--per_device_train_batch_size", type=int, default=16, help=rows)
    add("--max_steps", type=int, default=40, help="steps of each run (default 40)")
    add("--optim", default="adamw_torch_fused", help="NAME,NAME: optimizers, a row each")
    add("--deepspeed", type=Path, help="a DeepSpeed configuration; needs GPUs")
    turns = "runs of each row, in turns; the table has the median (default 1)"
    add("--repeat", type=int, default=1, help=turns)
    args = parser.parse_args(argv)
    try:
        args.processes = [int(number) for number in args.processes.split(",")]
    except ValueError:
        fail(f"--processes {args.processes} must be numbers with commas between them, such as 1,2.")
    least = {"processes": min(args.processes), "max_steps": args.max_steps, "repeat": args.repeat}
    for name, value in least.items():
        if value < 1:
            fail(f"--{name} must be 1 or more, not {value}.")
    for path in filter(None, (args.train_file, args.deepspeed)):
        if not path.is_file():
            fail(f"{path} is not there. Relative paths start at {Path.cwd()}.")
    return args


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run(*command):
    """Run a script of the collection; where it fails, so does this, with its last lines."""
    # Torchrun's own default, but only for several processes:
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env)
    if done.returncode:
        fail(f"{' '.join(map(str, command[:8]))} ... failed: {(done.stderr or done.stdout)[-600:]}")


def make_inputs(args, folder):
    """The model and the data: those given, or small ones made in folder."""
    data = args.train_file
    if data is None:
        data = folder / "jsquad_train.jsonl"
        run(sys.executable, ROOT / "jglue/prepare_jglue.py", "--jglue_dir", ROOT / "jglue/sample",
            "--task", "jsquad", "--output_dir", folder)  # fmt: skip
    if args.model_name_or_path:
        return args.model_name_or_path, data
    model = folder / "model"
    run(sys.executable, ROOT / "tiny_model/make_tiny_model.py", "--text_file", data, "--output_dir",
        model, "--model_type", "llama", "--vocab_size", 510, "--hidden_size", 256,
        "--num_hidden_layers", 4, "--num_attention_heads", 4)  # fmt: skip
    return model, data


def train(args, model, data, folder, processes, optim):
    """One training; returns its all_results.json."""
    out = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               processes, ROOT / "finetune_full/finetune_full.py", "--model_name_or_path", model,
               "--train_file", data, "--output_dir", out, "--save_strategy", "no",
               "--max_steps", args.max_steps, "--optim", optim,
               "--per_device_train_batch_size", args.per_device_train_batch_size]  # fmt: skip
    run(*command, *(["--deepspeed", args.deepspeed] if args.deepspeed else []))
    return json.loads(Path(out, "all_results.json").read_text())


def main(argv=None):
    args = parse(argv)
    import torch

    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread each"
    rows = [(processes, optim) for optim in args.optim.split(",") for processes in args.processes]
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder), rows)
    speed = {}
    for row in rows:
        speed[row] = statistics.median(r["train_tokens_per_second"] for r in results[row])
    size = results[rows[0]][0]["total_parameters"]
    names = ("torch", "transformers", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    steps = f"{args.max_steps} steps of {args.per_device_train_batch_size} rows per process"
    kind = args.deepspeed or "data parallel"
    print(f"\nMeasured on {time.strftime('%Y-%m-%d')}: {versions}; {place}; {size:,} parameters, "
          f"{steps}, {kind}, median of {args.repeat}.\n")  # fmt: skip
    print("| Processes | Optimizer | Tokens/s | Efficiency | Peak memory per process |")
    print("|---:|---|---:|---:|---:|")
    for processes, optim in rows:
        now, first = speed[processes, optim], speed[args.processes[0], optim]
        share = f"{now * args.processes[0] / first / processes:.0%}"
        peak = max(r["peak_memory_gib"] for r in results[processes, optim])
        print(f"| {processes} | {optim} | {now:,.0f} | {share} | {peak:.2f} GiB |")


def measure(args, folder, rows):
    """{row: the results of its runs}; each row in its turn."""
    model, data = make_inputs(args, folder)
    results, began = {row: [] for row in rows}, time.monotonic()
    total = len(rows) * args.repeat
    for number, (processes, optim) in enumerate(rows * args.repeat, 1):
        found = train(args, model, data, folder, processes, optim)
        results[processes, optim].append(found)
        left = (time.monotonic() - began) / number * (total - number)
        speed = f"{found['train_tokens_per_second']:,.0f} tok/s"
        print(f"run {number}/{total}  {processes} process(es), {optim}: {speed}, "
              f"about {left:.0f} s left", flush=True)  # fmt: skip
    return results


if __name__ == "__main__":
    main()
