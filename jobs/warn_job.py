#!/usr/bin/env python3
"""Warn where a training will not fit on this job's GPU, or not finish before its deadline.

The job files start it beside the training, which it never holds up; what it cannot tell is no
reason to stop either. By hand: python warn_job.py GPUS SCRIPT.py ARGUMENTS-OF-THE-SCRIPT...
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from count_memory import GPU_GB, MARGIN, fit
from count_tokens import look_at_data
from estimate import complete, minutes, parse, step_tokens
from run_common import read_deadline, say


def read_job(gpus, script, *words):
    """The plan that a job's words describe; a settings file may come first."""
    words = list(words)
    if words and words[0].lower().endswith((".yaml", ".yml", ".json")):
        settings = yaml.safe_load(Path(os.path.expanduser(words.pop(0))).read_text("utf-8"))
        settings.pop("run", None)
        for name, value in settings.items():
            if value is not None:
                values = value if isinstance(value, list) else [value]
                words[:0] = [f"--{name}", *map(str, values)]
    args = parse(words, only_known=False)
    args.gpus, args.nodes = int(gpus), int(os.environ.get("NODES") or 1)
    args.zero_stage = args.zero_stage or "none"
    rounded = "qlora" if args.load_in_4bit else "lora_8bit" if args.load_in_8bit else "lora"
    methods = {"finetune_full.py": "full", "finetune_lastlayer.py": "last_layer"}
    args.method = methods.get(script, "full" if args.full else rounded)
    args.trainer = {"finetune_dpo.py": "dpo", "finetune_grpo.py": "grpo"}.get(script, "sft")
    wanted = [name for name in ("bf16", "fp16") if getattr(args, name).lower() == "true"]
    args.precision = wanted[0] if wanted else args.precision
    return complete(args)


def gpu_bytes():
    """Memory of this node's first GPU, asked without taking any of it."""
    command = "nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits".split()
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(out.split()[0]) * 2**20
    return GPU_GB / MARGIN * 1e9


def share_done(output_dir):
    """How much of the training its newest checkpoint has behind it."""
    done = [0]
    for file in Path(output_dir or "output").glob("checkpoint-*/trainer_state.json"):
        state = json.loads(file.read_text("utf-8"))
        done.append(state["global_step"] / max(state["max_steps"], 1))
    return max(done)


def warn(args):
    """Compare a plan with this job's GPU and deadline."""
    tokens, longest = look_at_data(args) if args.train_file else (0, args.max_length)
    longest += args.max_completion_length if args.trainer == "grpo" else 0
    args.max_length = min(args.max_length, longest)
    fit(args)
    size, rows = gpu_bytes(), args.per_device_train_batch_size
    if args.need > MARGIN * size:
        text = f"{rows} rows x {args.max_length} tokens need {args.need / 1e9:.0f} GB of this GPU's"
        remedy = "python ../jobs/estimate.py tells what fits"
        text += f" {MARGIN * size / 1e9:.0f} GB, 7 % left for gaps (computed)"
        say("warning", f"does not fit: {text}; {remedy}")
    if args.trainer == "grpo":  # how long its answers take is not estimated
        return
    tokens *= args.num_train_epochs
    if args.max_steps > 0:
        tokens = args.max_steps * min(step_tokens(args), tokens or step_tokens(args))
    needed = minutes(args, tokens) / 60 * (1 - share_done(args.output_dir))
    left = max(0, read_deadline() - time.time()) / 3600
    if needed > left:
        text = f"about {needed:.1f} h of computing (computed), {left:.1f} h left"
        remedy = "it will save and stop in time; then submit it again"
        say("warning", f"does not finish before the deadline: {text}; {remedy}")


def main(argv=None):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            warn(read_job(*(sys.argv[1:] if argv is None else argv)))
    except (Exception, SystemExit) as reason:
        say("estimate", f"none ({said.getvalue().strip() or repr(reason)})")


if __name__ == "__main__":
    main()
