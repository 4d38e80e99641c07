#!/usr/bin/env python3
"""Tell before the queue whether a training fits on its GPUs, how long it takes, and what to type.

Runs on a login node, without a GPU, and reads no weights. All is computed by count_memory.py and
by the formulas here; nothing was measured on a GPU.

By hand    python jobs/estimate.py --model_name_or_path falcon-7b --method full --tokens 5e6
The seven  python jobs/estimate.py --all
In a job   warn_job.py, which the job files call, compares it with the job's GPU and deadline
"""

import argparse
import json
import logging
import math
import os
import re
import shlex
import sys
from pathlib import Path

from count_memory import BITS, GPU_GB, HOST_GB, STAGES, fit
from count_tokens import look_at_data
from count_trl import sequences
from run_common import check, fail, say

HERE = Path(__file__).resolve().parent.parent
MODELS = HERE / "tiny_model" / "models.json"  # not there where a lesson was copied without it
SEVEN = json.loads(MODELS.read_text("utf-8"))["models"] if MODELS.exists() else {}
# Operations a second: what an H200 is advertised with in 16 bit (dense) and in fp32; the share of
# it that we assume; less where weights are unpacked from 8 or 4 bit again and again.
FLOPS, FP32_FLOPS, SHARE, ROUNDED_SHARE = 989e12, 67e12, 0.3, 0.15
# Operations per parameter and token: 2 forward, 2 for gradients of activations, 2 of weights. Where
# not all are trained, minutes() adds the last for what is.
OPERATIONS = {"full": 6, "last_layer": 2, "lora": 4, "lora_8bit": 4, "qlora": 4}
START_MINUTES, MOST_HOURS = 30, 168  # Python, reading weights and data, saving; ABCI's limit
POINTS = {"rt_HG": 3, "rt_HF": 16}  # an hour of a node, standard use; see ABCI's tariff
FOLDERS = {"full": "finetune_full", "last_layer": "finetune_lastlayer"}  # else finetune_lora
TRAINERS = {"sft": None, "dpo": "finetune_dpo", "grpo": "finetune_grpo"}
ROWS = {"full": (4, 8), "last_layer": (16, 16), "lora": (4, 4), "qlora": (4, 4)}  # rt_HG, rt_HF


def is_true(text):
    check(text.lower() in ("true", "false"), f"{text} is neither true nor false.")
    return text.lower() == "true"


def number(text):
    value = float(text.replace(",", "").replace("_", ""))
    if not 0 < value < 1e18:
        raise ValueError
    return int(value) if value == int(value) else value


def parse(argv, only_known=True):
    """The plan as it was asked for; the names are those of the training scripts."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class, parser.error = argparse.RawDescriptionHelpFormatter, fail
    add = parser.add_argument
    add("--model_name_or_path", help=f"A directory, a hub name, or one of {', '.join(SEVEN)}.")
    add("--method", default="full", choices=OPERATIONS, help="Default: full.")
    add("--trainer", default="sft", choices=TRAINERS, help="dpo, grpo: their lessons.")
    add("--precision", default="bf16", choices=("auto", "bf16", "fp16", "fp32"))
    add("--max_length", type=number, help="Tokens per row. Default: up to 1024, as the scripts.")
    add("--per_device_train_batch_size", type=number, default=8, help="Rows at once on each GPU.")
    add("--gradient_accumulation_steps", type=number, default=1)
    add("--activation_checkpointing", type=is_true, nargs="?", const=True, default=False)
    add("--attn_implementation", help="Default: what the model's class takes.")
    add("--optim", default="adamw_torch_fused", help="adamw_bnb_8bit: 2 bytes instead of 8.")
    add("--zero_stage", choices=[*STAGES, "0", "1", "2", "3"], help="Default: the first that fits.")
    add("--deepspeed", help="A configuration instead of --zero_stage.")
    add("--nodes", type=number, help="Nodes of rt_HF, 128 at most. Default: the fewest that fit.")
    add("--gpus", type=number, help="GPUs of a node: 1 is rt_HG, 8 is rt_HF.")
    add("--tokens", type=number, help="Tokens of the training data, read once.")
    add("--train_file", nargs="+", help="Count them roughly here instead.")
    add("--num_train_epochs", type=number, default=3)
    add("--max_steps", type=int, default=-1)
    add("--learned_share", type=number, default=1, help="Tokens with a loss. 1 is plain text.")
    add("--train", default="last_layer", help="As finetune_lastlayer.py's.")
    add("--lora_r", type=number, default=16)
    add("--lora_target_modules", default="all-linear")
    add("--modules_to_save", default="")
    add("--all", action="store_true", help="The README's table: the seven, all methods.")
    if only_known:
        return parser.parse_args(argv)
    add("--max_completion_length", type=int, default=128)
    for name in ("load_in_8bit", "load_in_4bit", "full"):  # what a job says instead of --method
        add(f"--{name}", type=is_true, nargs="?", const=True, default=False)
    for name in ("output_dir", "bf16", "fp16"):
        add(f"--{name}", default="")
    return parser.parse_known_args(argv)[0]


# ---- The plan ----


def load_config(name):
    """(configuration, MODEL of a job); the seven's are here, in tiny_model/models.json."""
    from transformers import AutoConfig

    for short, entry in SEVEN.items():
        if name in (short, entry["hub_id"]):
            return AutoConfig.for_model(**entry["config"]), entry["hub_id"]
    path = Path(os.path.expanduser(name))
    try:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # says each retry
        config = AutoConfig.from_pretrained(path if path.exists() else name)
    except Exception as error:  # of a hub, a file, a class: anything
        reason, known = str(error).split(". ")[0], ", ".join(SEVEN)
        fail(f"no configuration of {name}: give a directory, a hub name or {known}. ({reason})")
    return config, str(path.resolve()) if path.exists() else name


def complete(args):
    """What count_memory.py takes besides: lists, the configuration, defaults that depend on it."""
    check(args.model_name_or_path, "--model_name_or_path is missing (or type --all).")
    args.config, args.job_model = load_config(args.model_name_or_path)
    text = args.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", 0) or getattr(text, "max_seq_len", 10**9)
    args.max_length = args.max_length or min(1024, limit)
    check(args.max_length <= limit, f"--max_length {args.max_length} is over {limit} positions.")
    args.precision = "bf16" if args.precision == "auto" else args.precision
    check(0 < args.learned_share <= 1, "--learned_share is above 0 and at most 1.")
    folder = TRAINERS[args.trainer] or FOLDERS.get(args.method, "finetune_lora")
    several = folder in ("finetune_full", "finetune_lora") or (args.nodes or 1) == 1
    check(several, f"{folder} has no job for several nodes.")
    check(args.trainer == "sft" or args.method != "last_layer", f"{folder} has no last layer.")
    args.learned_share = args.learned_share if args.trainer == "sft" else 1e-9  # no logits stand
    check(args.method == "last_layer" or args.train == "last_layer", "--train is for last_layer.")
    args.lora_alpha, args.lora_dropout, args.new_tokens = 32, 0.0, []
    for name in ("lora_target_modules", "modules_to_save"):
        setattr(args, name, [part for part in (getattr(args, name) or "").split(",") if part])
    args.is_rounding = False  # a file that keeps weights in bf16
    if args.deepspeed:
        try:
            settings = json.loads(Path(args.deepspeed).read_text("utf-8"))
            wanted = settings.get("bf16", {}).get("enabled") in (True, "auto")
            args.is_rounding = wanted and "torch_autocast" not in settings
            zero = settings["zero_optimization"]
            offload = "_offload" if {"offload_optimizer", "offload_param"} & set(zero) else ""
            args.zero_stage = f"zero{zero['stage']}{offload}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--deepspeed {args.deepspeed} is no configuration of DeepSpeed: {error!r}")
    if (args.zero_stage or "").isdigit():
        args.zero_stage = STAGES[int(args.zero_stage)]
    check(args.zero_stage in (None, *STAGES), f"{args.zero_stage} is unknown: {', '.join(STAGES)}.")
    check(not args.nodes or args.nodes <= 128, "--nodes: ABCI gives 128 to a job at most.")
    for name in ("nodes", "gpus", "max_length", "per_device_train_batch_size", "lora_r"):
        value = getattr(args, name)
        check(value is None or value == int(value), f"--{name} {value} is no whole number.")
    return args


def minutes(args, tokens):
    """Computing time of this many tokens on all GPUs."""
    share = ROUNDED_SHARE if args.method in ("lora_8bit", "qlora") else SHARE
    speed = (FP32_FLOPS if args.precision == "fp32" else FLOPS) * share * args.nodes * args.gpus
    operations = OPERATIONS[args.method] + 2 * args.activation_checkpointing
    if args.train not in ("last_layer", "last_block"):
        operations += 2
    operations += 2 * (args.trainer == "dpo")  # the reference
    operations *= args.counts.base - args.counts.idle
    # Gradients of the weights: a head alone can be most of a model. Adapters are small.
    learned = {"full": 0, "last_layer": args.counts.trained}.get(args.method, args.counts.head)
    operations += (4 if args.train == "last_block" else 2) * learned  # it has activations above
    return operations * tokens / speed / 60


# ---- What it prints ----


def qsub_line(args, hours):
    """The command that submits it, from here."""
    folder = TRAINERS[args.trainer] or FOLDERS.get(args.method, "finetune_lora")
    short = next((s for s, entry in SEVEN.items() if entry["hub_id"] == args.job_model), None)
    # Its tokenizer is refused until it is converted, into this directory.
    model = "../generate_text/output/rinna" if short == "japanese-gpt-neox-3.6b" else args.job_model
    data = str(Path(args.train_file[0]).resolve()) if args.train_file else "my.jsonl"
    output = f"output/{short or Path(model).name}-{args.method}"
    names = {"MODEL": model, "TRAIN_FILE": data, "OUTPUT_DIR": output}
    if args.stage != "none" or args.nodes > 1:
        is_plain = args.stage == "none"
        own = args.deepspeed and str(Path(args.deepspeed).resolve())
        names["DEEPSPEED"] = "" if is_plain else own or f"../deepspeed_configs/{args.stage}.json"
    for name, value in names.items():
        good = re.fullmatch(r"[^\s,\"'\\$`]*", value)
        check(good, f"{name}={value} does not pass through qsub -v: take blanks and commas away.")
    words = {"num_train_epochs": args.num_train_epochs, "max_length": args.max_length}
    words["per_device_train_batch_size"] = args.per_device_train_batch_size
    words["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    is_tuned = short and args.method == "full" and args.trainer == "sft"
    tuned = SEVEN[short]["full_fine_tuning"] if is_tuned else None
    words |= {"full": "true"} if args.method == "full" and args.trainer != "sft" else {}
    words |= {"learning_rate": tuned["learning_rate"]} if tuned else {}
    words |= {"precision": args.precision} if args.precision != "bf16" else {}
    words |= {"activation_checkpointing": "true"} if args.activation_checkpointing else {}
    given = ("attn_implementation", "optim", "max_steps", "train", "lora_r")
    words |= {n: getattr(args, n) for n in given if getattr(args, n) != parse([]).__dict__[n]}
    words |= {f"load_in_{BITS[args.method]}bit": "true"} if args.method in BITS else {}
    modules = {n: ",".join(getattr(args, n)) for n in ("lora_target_modules", "modules_to_save")}
    words |= {n: value for n, value in modules.items() if value not in ("", "all-linear")}
    for name, value in words.items():
        if not re.fullmatch(r"[^\s,\"'\\`]*", str(value)):
            problem = f"--{name} {value} does not pass through qsub -v"
            return f"{problem}: write it into a settings file, and type -v CONFIG=FILE"
    names["ARGS"] = f'"{" ".join(f"--{name} {value}" for name, value in words.items())}"'
    variables = ",".join(f"{name}={value}" for name, value in names.items())
    nodes = f" -l select={args.nodes}" if args.nodes > 1 else ""
    where = f"-q {args.queue}{nodes} -l walltime={hours}:00:00"
    job = "job_multinode.sh" if nodes else "job.sh"
    way = os.path.relpath(HERE / folder)
    enter = "" if way == "." else f"cd {shlex.quote(way)} && "
    return f"{enter}qsub -P GROUP {where} -v {variables} {job}"


def step_tokens(args):
    """Tokens of an optimizer's step, at most."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return sequences(args, rows) * args.max_length * args.nodes * args.gpus


def show(args, tokens):
    """The whole answer."""
    counts, rows, length = args.counts, args.per_device_train_batch_size, args.max_length
    trained = f"{counts.base:,} parameters, {counts.trained:,} trained"
    say("model", f"{args.job_model} ({args.config.model_type}), {trained}")
    stage = "no DeepSpeed" if args.stage == "none" else f"{args.stage}.json"
    where = f"{args.nodes} x {args.queue}, {args.nodes * args.gpus} GPU, {stage}, {args.precision}"
    say("where", f"{where}; {rows} rows x {length} tokens on each GPU")
    for name, size in args.items.items():
        say("", f"{name:<14}{size / 1e9:8.2f} GB")
    say("needed", f"   {args.need / 1e9:19.2f} GB of {GPU_GB} GB on each GPU (computed)")
    say("host", f"{args.host / 1e9:.0f} GB of {HOST_GB[args.queue]} GB in each node's memory")
    most = f"at most {args.most} rows of {length} tokens" if args.most else "not even one row"
    say("fits" if args.fits else "too large", f"{most} on each GPU")
    if args.trainer == "grpo":
        say("time", "not estimated: answers are written token by token")
        return
    if not tokens:
        each = minutes(args, 1e6) * 60
        say("time", f"{each:.2f} s per million tokens; --tokens N tells hours and points")
        return
    needed = minutes(args, tokens)
    hours = math.ceil(2 * (START_MINUTES + needed) / 60)
    say("time", f"{needed / 60:.1f} h for {tokens:,.0f} tokens (formula: jobs/README.en.md)")
    used, most = (args.nodes * POINTS[args.queue] * h for h in (0.5 + needed / 60, hours))
    say("points", f"about {used:.1f}; {most:.0f} are taken at the start, what is left comes back")
    if hours > MOST_HOURS:
        jobs, hours = math.ceil(hours / MOST_HOURS), MOST_HOURS
        say("chain", f"{hours} h are ABCI's limit: submit {jobs} jobs with jobs/chain.sh")
    if args.fits:
        say("type", qsub_line(args, hours))


def table():
    """The rows of the README's table: 10,000 examples of 512 tokens, once, with its batches."""
    for short, entry in SEVEN.items():
        cells, tuned = [], entry["full_fine_tuning"]
        for method, (alone, several) in ROWS.items():
            for where, rows in (("--gpus 1 --zero_stage none", alone), ("--nodes 1", several)):
                words = f"--model_name_or_path {short} --method {method} --max_length 512 {where}"
                words += f" --per_device_train_batch_size {rows}"
                words += " --activation_checkpointing" if method == "full" else ""
                args = fit(complete(parse(words.split())))
                if args.fits:
                    break
            place = [f"`{args.queue}`"] if method == "full" or args.queue == "rt_HF" else []
            place += [f"`{args.stage}.json`"] if args.stage != "none" else []
            needed = f"{args.need / 1e9:.0f} GB", f"{math.ceil(minutes(args, 5_120_000))} min"
            cells.append(", ".join([*place, *needed]))
        rate = f"{tuned['learning_rate'] if tuned else 2e-5:.0e}".replace("e-0", "e-")
        cells.insert(1, rate)
        yield f"| `{entry['hub_id']}` | {' | '.join(cells)} |"


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.all:
        return print(*table(), sep="\n")
    check(args.gpus in (None, 1, 8), "--gpus is 1 (rt_HG) or 8 (rt_HF): no job has another number.")
    args, tokens = complete(args), args.tokens
    if args.train_file:
        check(not tokens and len(args.train_file) == 1, "give --tokens, or one --train_file.")
        tokens, longest = look_at_data(args)
        text = f"about {tokens:,.0f} tokens; the longest of some rows has {longest:,}"
        say("data", f"{text}, the memory is that of rows of {args.max_length:,}")
    fit(args)
    tokens = (tokens or 0) * args.num_train_epochs
    return show(args, step_tokens(args) * args.max_steps if args.max_steps > 0 else tokens)


if __name__ == "__main__":
    main()
