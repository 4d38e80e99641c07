#!/usr/bin/env python3
"""Prepare a million rows as a training does, and print time and memory as a Markdown table.

Makes a file of short questions and answers (those of ../jglue/sample, with a number in each, so
that no two rows are alike) and a small tokenizer, then runs ../jobs/prepare_data.py with
../finetune_full/finetune_full.py: once for each number of workers, from an empty cache, and once
more from the cache that this left. Memory is looked up in /proc twice a second; "own" is what a
process shares with no file and so cannot be given back.

    python data_at_scale.py --workers 2
    python data_at_scale.py --rows 100000 --workers 1,2 --output_file data_at_scale.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows (default 1,000,000)")
    parser.add_argument("--workers", default="1,2", help="N,N: cores to use, one run each")
    parser.add_argument("--output_file", type=Path, help="the figures as JSON, too")
    args = parser.parse_args(argv)
    try:
        args.workers = [int(number) for number in args.workers.split(",")]
    except ValueError:
        fail(f"--workers {args.workers} must be numbers with commas between them, such as 1,2.")
    for name, value in (("workers", min(args.workers)), ("rows", args.rows)):
        if value < 1:
            fail(f"--{name} must be 1 or more, not {value}.")
    cores = len(os.sched_getaffinity(0))
    if max(args.workers) > cores:
        fail(f"--workers {max(args.workers)}: this process may use {cores} cores.")
    return args


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        fail(f"{command[0]} failed: {(done.stderr or done.stdout)[-600:]}")


def make_inputs(args, folder):
    """Return (model, data): a tokenizer with a small model, and the rows."""
    run(ROOT / "jglue/prepare_jglue.py", "--jglue_dir", ROOT / "jglue/sample", "--task", "jsquad",
        "--output_dir", folder)  # fmt: skip
    few = folder / "jsquad_train.jsonl"
    model, data = folder / "model", folder / "rows.jsonl"
    run(ROOT / "tiny_model/make_tiny_model.py", "--text_file", few, "--output_dir", model,
        "--model_type", "llama", "--vocab_size", 510, "--hidden_size", 64,
        "--num_hidden_layers", 1, "--num_attention_heads", 4)  # fmt: skip
    given = [json.loads(line) for line in few.read_text("utf-8").strip().split("\n")]
    draw = random.Random(0)
    with data.open("w", encoding="utf-8") as file:
        for number in range(args.rows):
            row = draw.choice(given)
            prompt = f"{number}: {row['prompt'][-draw.randrange(30, 120) :]}"
            row = {"prompt": prompt, "completion": row["completion"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return model, data


def watch(pid, peaks, seconds=0.5):
    """Until the process ends, note the most memory of it and of any child, in MiB."""
    while True:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for who, number in [("parent", pid), *(("helper", child) for child in children)]:
                text = Path(f"/proc/{number}/status").read_text()
                for name in ("VmHWM", "RssAnon"):
                    size = int(text.split(f"{name}:")[1].split()[0]) / 1024
                    peaks[f"{who} {name}"] = max(size, peaks.get(f"{who} {name}", 0))
        except (OSError, IndexError):  # a process that ended
            if not Path(f"/proc/{pid}/status").exists():
                return
        time.sleep(seconds)


def prepare(workers, model, data, cache):
    """One preparation: seconds, seconds of CPU of all its processes, peaks, and what it said."""
    script = ROOT / "finetune_full/finetune_full.py"
    command = [sys.executable, ROOT / "jobs/prepare_data.py", script, "--model_name_or_path", model]
    command += ["--train_file", data]
    env = os.environ | {"NCPUS": str(workers), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    began, peaks = time.time(), {}
    log = (cache / "log.txt").open("w+")
    process = subprocess.Popen([*map(str, command)], env=env, stdout=log, stderr=log)
    threading.Thread(target=watch, args=(process.pid, peaks), daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.time() - began
    log.seek(0)
    said = log.read().splitlines()
    if status:
        fail(f"prepare_data.py failed: {' '.join(said)[-600:]}")
    found = {"seconds": seconds, "user": usage.ru_utime, "system": usage.ru_stime}
    return found | {"mib": peaks, "said": [line for line in said if line]}


def main(argv=None):
    args = parse(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model, data = make_inputs(args, Path(folder))
        size = data.stat().st_size / 1e6
        for workers in args.workers:
            with tempfile.TemporaryDirectory() as cache:
                first = prepare(workers, model, data, Path(cache))
                second = prepare(workers, model, data, Path(cache))
                files = Path(cache).glob("datasets/**/*.arrow")
                disk = sum(file.stat().st_size for file in files) / 1e6
            print(*first["said"], sep="\n", flush=True)
            results.append({"workers": workers, "first": first, "second": second, "disk_mb": disk})
    if args.output_file:
        machine = {"rows": args.rows, "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
        text = json.dumps({**machine, "file_mb": size, "results": results}, indent=1)
        args.output_file.write_text(text, "utf-8")
    sizes = f"a file of {size:,.0f} MB, {results[0]['disk_mb']:,.0f} MB in the cache"
    print(f"\nMeasured on {time.strftime('%Y-%m-%d')}: {args.rows:,} rows, {sizes}.\n")
    print("| Workers | Seconds | CPU seconds, user | Rows per user second | Parent, peak MiB "
          "(own) | Of a helper, MiB (own) | Second start, seconds (user) |")  # fmt: skip
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for result in results:
        first, second, mib = result["first"], result["second"], result["first"]["mib"]
        peak = [f"{mib.get(f'{who} VmHWM', 0):,.0f} ({mib.get(f'{who} RssAnon', 0):,.0f})"
                for who in ("parent", "helper")]  # fmt: skip
        again = f"{second['seconds']:.1f} ({second['user']:.1f})"
        print(f"| {result['workers']} | {first['seconds']:,.0f} | {first['user']:,.0f} "
              f"| {args.rows / first['user']:,.0f} | {' | '.join(peak)} | {again} |")  # fmt: skip


if __name__ == "__main__":
    main()
