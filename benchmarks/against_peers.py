#!/usr/bin/env python3
"""Measure finetune_full.py and finetune_lora.py beside TRL's SFTTrainer and a script of 2023.

Each run is a process of its own, and the ways take turns, --repeat times. All train the same model
on the same rows (prompt + completion, loss on the completion) with the same optimizer, attention,
learning rate, precision and threads, and with about as many tokens a step, for one epoch. The
peers stand in peers.py.

    python against_peers.py --train_file jsquad_validation.jsonl
    python against_peers.py --train_file rows.jsonl --model_name_or_path MODEL   a model of yours
    python against_peers.py --ways full,trl_512 --repeat 5                       two ways only

Tokens are those of the examples, padding not counted, and the time runs from the first step's begin
to the last step's end. The first step is counted from the start of the process. Peak memory: of the
process (VmHWM), on a GPU what torch reserved. Share of the matmul: what a 2,048 x 2,048 product
reaches between the runs, against 6 operations per trained weight and token (4 where frozen), for
the head only where a loss is, and causal attention. Writes table, JSON and picture.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRL = "TRL, packed, rows of {}"
# name: (what the table calls it, the group in which it is compared)
WAYS = {
    "full": ("finetune_full.py", "full"),
    "trl_512": (TRL.format(512), "full"),
    "trl_1024": (TRL.format("1,024"), "full"),
    "trl_2048": (TRL.format("2,048"), "full"),
    "trl_padded": ("TRL, padded", "full"),
    "padded_2023": ("every row padded to {block} (2023)", "full"),
    "lora": ("finetune_lora.py", "lora"),
    "lora_trl": ("TRL with LoRA, packed, rows of {best}", "lora"),
}
BF16 = {"avx512_bf16", "amx_bf16"}  # a processor without one is ten times slower in bf16


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--train_file", type=Path, help="JSON Lines; default: the questions of ../jglue/sample")
    small = "directory or hub name; default: a Llama of 16.8 million parameters made here"
    add("--model_name_or_path", help=small)
    add("--ways", default=",".join(WAYS), help=f"NAME,NAME (default: {','.join(WAYS)})")
    add("--precision", default="auto", help="fp32, bf16 or both; auto: what the device is fast in")
    add("--examples", type=int, default=90, help="rows that are trained on (default 90)")
    add("--rows", type=int, default=4, help="rows at once (default 4)")
    add("--accumulate", type=int, default=5, help="times that makes a step (default 5)")
    add("--block", type=int, default=512, help="tokens a row at most, longer ones stay out")
    add("--lora_r", type=int, default=16, help="rank of the adapters (default 16)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    add("--repeat", type=int, default=3, help="runs of each way, in turns (default 3)")
    where = "a new directory, for all that is written (default: output/against_peers)"
    add("--output_dir", type=Path, default=Path("output/against_peers"), help=where)
    args = parser.parse_args(argv)
    for name in ("examples", "rows", "accumulate", "block", "lora_r", "threads", "repeat"):
        check(getattr(args, name) > 0, f"--{name} {getattr(args, name)} is below 1. Raise it.")
    args.ways = args.ways.split(",")
    unknown = [name for name in args.ways if name not in WAYS]
    check(not unknown, f"--ways {', '.join(unknown)}: they are {', '.join(WAYS)}.")
    known = args.precision in ("auto", "fp32", "bf16", "fp32,bf16")
    check(known, f"--precision {args.precision} is not auto, fp32, bf16 or fp32,bf16.")
    is_there = args.train_file is None or args.train_file.is_file()
    check(is_there, f"--train_file {args.train_file} does not exist. Give a JSON Lines file.")
    out = args.output_dir
    is_new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(is_new, f"--output_dir {out} is not empty. Name a new one.")
    out.mkdir(parents=True, exist_ok=True)
    return args


def check(condition, message):
    if not condition:
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
        raise SystemExit(2)


# ---- What is trained on ----


def script(*words):
    """Run a script of the collection; where it fails, so does this, with its last lines."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    check(done.returncode == 0, f"{words[0]} failed: {(done.stderr or done.stdout)[-600:]}")


def make_inputs(args):
    """(model, file of the rows, figures about them)."""
    source = args.train_file
    if source is None:
        source = args.output_dir / "jsquad_train.jsonl"
        sample = ["--jglue_dir", ROOT / "jglue/sample", "--task", "jsquad"]
        script(ROOT / "jglue/prepare_jglue.py", *sample, "--output_dir", args.output_dir)
    model = args.model_name_or_path
    if model is None:
        model = args.output_dir / "model"
        size = ["--vocab_size", 8000 if args.train_file else 510, "--hidden_size", 384]
        size += ["--num_hidden_layers", 6, "--num_attention_heads", 6]
        size += ["--max_position_embeddings", 2048, "--model_type", "llama"]
        make = ROOT / "tiny_model/make_tiny_model.py"
        script(make, "--text_file", source, "--output_dir", model, *size)
    from transformers import AutoTokenizer

    tokenizer, rows = AutoTokenizer.from_pretrained(model), []
    with source.open(encoding="utf-8") as file:
        for line in filter(str.strip, file):
            row = json.loads(line)
            good = isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)
            check(good, f"{source}: every row needs prompt and completion, found {line[:60]}.")
            parts = [row["prompt"], row["completion"]]
            length, learned = count_tokens(tokenizer, *parts)
            if length <= args.block:
                row = {"prompt": row["prompt"], "completion": row["completion"]}
                rows.append((length, learned, row))
    check(len(rows) >= 4, f"{source} has {len(rows)} rows of up to {args.block} tokens: too few.")
    rows.sort(key=lambda item: item[0])
    step = max(1, len(rows) // args.examples)  # all lengths, as often as they occur
    rows, file = rows[step // 2 :: step][: args.examples], args.output_dir / "rows.jsonl"
    text = [json.dumps(row, ensure_ascii=False) for *_, row in rows]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    lengths = [length for length, *_ in rows]
    about = {"examples": len(rows), "tokens": sum(lengths)}
    about["learned"] = sum(learned for _, learned, _ in rows)
    about["squares"] = sum(length**2 for length in lengths)
    return str(model), file, about


def count_tokens(tokenizer, prompt, completion):
    """(tokens of the example, those with a loss): BOS where the tokenizer adds it, and EOS."""
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return len(tokenizer(prompt)["input_ids"]) + len(answer) + 1, len(answer) + 1


def flops_per_token(model, about, lora_r=0):
    """What a token needs, padding and logits without a loss left out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    head = net.get_output_embeddings().weight
    beside = [m.weight for m in net.modules() if isinstance(m, torch.nn.Embedding)]
    beside = {id(weight) for weight in [*beside, head]}
    layers = [w for w in net.parameters() if w.dim() == 2 and id(w) not in beside]
    inside = sum(w.numel() for w in layers)
    share, needed = about["learned"] / about["tokens"], 6
    adapter = 0
    if lora_r:  # no gradients of the frozen weights
        needed = 4
        adapter = 6 * sum(lora_r * sum(w.shape) for w in layers)
    # Scores and values, forward 1 and backward 2 times, half of each square.
    attention = 6 * config.hidden_size * config.num_hidden_layers
    attention *= about["squares"] / about["tokens"]
    return needed * (inside + share * head.numel()) + adapter + attention


# ---- One run ----


def command_of(args, way, model, data, out, precision, about, best):
    """The command of one run, and how many rows it takes at once and accumulates."""
    words = ["--model_name_or_path", model, "--train_file", data, "--output_dir", out]
    words += ["--num_train_epochs", 1, "--logging_steps", 1, "--save_strategy", "no"]
    words += ["--optim", "adamw_torch_fused", "--learning_rate", 2e-5]
    batch, accumulate = args.rows, args.accumulate
    rows = best if way == "lora_trl" else way.removeprefix("trl_")
    if way in ("full", "lora"):
        start = [ROOT / f"finetune_{way}/finetune_{way}.py", "--precision", precision]
        start += ["--max_length", args.block, "--attn_implementation", "sdpa"]
    else:
        start = [ROOT / "benchmarks/peers.py", "padded" if way == "padded_2023" else "trl"]
        words += ["--bf16", precision == "bf16", "--use_cpu", about["device"] == "CPU"]
        words += ["--report_to", "none"]
    if way == "padded_2023":
        words += ["--block", args.block]
    elif "trl" in way:
        words += ["--loss_type", "nll", "--activation_checkpointing", False]
        words += ["--max_length", args.block if rows == "padded" else rows]
        if rows != "padded":  # one packed row at once is its fastest: of more, one mask is made
            words += ["--packing", True]
            tokens = args.rows * args.accumulate * about["tokens"] / about["examples"]
            batch, accumulate = 1, max(1, round(tokens / int(rows)))
    if way.startswith("lora"):
        words += ["--lora_r", args.lora_r]
    words += ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulate]
    return [str(word) for word in start + words]


def measure(command, out, threads):
    """Run it; {tok/s, peak MiB, first step s, ...} from what it prints, writes and takes."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_DATASETS_CACHE": f"{out}_cache"}
    began, marks, peak = time.perf_counter(), [], 0
    with Path(f"{out}.log").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, env=env, text=True
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.match(r"begin|example |step \d+/", line):
                now, used = time.perf_counter() - began, cpu_seconds(process.pid)
                marks.append((now, used))
                peak = max(peak, resident_peak(process.pid))
        status = process.wait()
        errors.seek(0)
        said = errors.read()
    check(status == 0, f"{' '.join(command[:2])} failed: {(said or ''.join(lines))[-600:]}")
    check(len(marks) > 1, f"{command[0]} made no step: raise --examples.")
    results = json.loads(Path(out, "all_results.json").read_text(encoding="utf-8"))
    tokens = results.get("num_tokens") or own_tokens(out)
    (start, used), (end, used_at_end) = marks[0], marks[-1]
    shutil.rmtree(out)
    shutil.rmtree(f"{out}_cache", ignore_errors=True)
    return {
        "tokens": tokens,
        "seconds": end - start,
        "cpu_seconds": used_at_end - used,
        "tokens_per_second": tokens / (end - start),
        "tokens_per_cpu_second": tokens / (used_at_end - used),
        "first_step_seconds": marks[1][0],
        "first_step_cpu_seconds": marks[1][1],
        "start_cpu_seconds": used,
        "steps": len(marks) - 1,
        "peak_mib": peak / 1024,
        "peak_reserved_mib": results["peak_reserved_gib"] * 1024,
    }


def own_tokens(out):
    state = json.loads(Path(out, "trainer_state.json").read_text(encoding="utf-8"))
    return sum(entry.get("num_tokens", 0) for entry in state["log_history"])


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_peak(pid):
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def matmul_flops(threads, device, precision):
    """Operations a second of a 2,048 x 2,048 product, the best of five."""
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times, count = [], 50 if device == "cuda" else 1
    for _ in range(6):
        wait()
        began = time.perf_counter()
        for _ in range(count):
            a @ a
        wait()
        times.append((time.perf_counter() - began) / count)
    return 2 * 2048**3 / min(times[1:])


# ---- All runs, and what comes of them ----


def main(argv=None):
    args = parse(argv)
    import torch

    gpu = torch.cuda.is_available()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = precisions_of(flags, gpu)
    asked = {"fp32", "bf16"} if args.precision == "auto" else set(args.precision.split(","))
    device = torch.cuda.get_device_name() if gpu else "CPU"
    model, data, about = make_inputs(args)
    about |= {"device": device, "threads": args.threads, "date": time.strftime("%Y-%m-%d")}
    about |= {"processor": processor(flags), "rows": args.rows, "accumulate": args.accumulate}
    about |= {"model": model, "block": args.block, "repeat": args.repeat}
    about["versions"] = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    found = {"about": about, "precisions": {}}
    for precision in sorted(asked, reverse=True):
        if precision == "bf16" and precision not in fast:
            found["precisions"][precision] = "not measured: no avx512_bf16 or amx_bf16"
        elif precision in fast or args.precision != "auto":
            found["precisions"][precision] = run_all(args, precision, model, data, about)
    (args.output_dir / "against_peers.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    (args.output_dir / "against_peers.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    draw(found, args.output_dir / "against_peers.png")


def precisions_of(flags, gpu):
    """What the device computes fast in: a processor in fp32, and in bf16 if it has a unit."""
    if gpu:
        return {"bf16"}
    return {"fp32", "bf16"} if BF16 & set(flags.split()) else {"fp32"}


def processor(flags):
    name = re.search(r"model name\s*:\s*(.+)", flags)
    return name[1].strip() if name else "unknown"


def run_all(args, precision, model, data, about):
    """{way: {"runs": [...]}} of all ways in turns, and the matmul between the runs."""
    place = "cpu" if about["device"] == "CPU" else "cuda"
    runs, peaks, best = {way: [] for way in args.ways}, [], "512"
    packed = [way for way in args.ways if way.startswith("trl_") and way[4:].isdigit()]
    flops = {kind: flops_per_token(model, about, args.lora_r * (kind == "lora"))
             for kind in ("full", "lora")}  # fmt: skip
    for turn in range(1, args.repeat + 1):
        for way in args.ways:
            if way == "lora_trl" and packed:  # packed as it was fastest in the first turn
                best = max(packed, key=lambda name: runs[name][0]["tokens_per_second"])[4:]
            peaks.append(matmul_flops(args.threads, place, precision))
            out = args.output_dir / f"{precision}_{way}_{turn}"
            command = command_of(args, way, model, data, out, precision, about, best)
            result = measure(command, out, args.threads)
            close = abs(result["tokens"] / about["tokens"] - 1) < 0.01
            problem = f"{way} counts {result['tokens']} tokens, and the rows have"
            check(close, f"{problem} {about['tokens']}.")
            runs[way].append(result)
            print(f"{precision} {turn}/{args.repeat}  {way:<12}"
                  f"{result['tokens_per_second']:8,.0f} tok/s  {result['peak_mib']:6,.0f} MiB  "
                  f"first step {result['first_step_seconds']:.1f} s", flush=True)  # fmt: skip
    return {"matmul": statistics.median(peaks), "matmuls": peaks, "flops": flops, "best": best,
            "ways": runs}  # fmt: skip


def summary(found, precision):
    """[{name, value: (median, least, most), ...}], ratios taken turn by turn."""
    block, all_runs = found["about"]["block"], found["precisions"][precision]
    ways, lines = all_runs["ways"], []
    for way, runs in ways.items():
        title, group = WAYS[way]
        line = {"way": way, "name": title.format(block=block, best=all_runs["best"])}
        line["group"] = group
        for name in ("tokens_per_second", "tokens_per_cpu_second", "first_step_seconds",
                     "peak_mib", "peak_reserved_mib"):  # fmt: skip
            line[name] = spread([run[name] for run in runs])
        peak = all_runs["flops"][group] / all_runs["matmul"]
        line["share"] = spread([run["tokens_per_second"] * peak for run in runs])
        lines.append(line)
    for line in lines:
        peers = [w for w in lines if w["group"] == line["group"]]
        trl = [w for w in peers if "trl" in w["way"]]
        fastest = max(trl, key=lambda w: w["tokens_per_second"][0])["way"] if trl else None
        old = [w["way"] for w in peers if w["way"] == "padded_2023"]
        for name, other in (("x_trl", fastest), ("x_2023", old[0] if old else None)):
            line[name] = ratio(ways[line["way"]], ways[other]) if other else None
    return lines


def spread(values):
    return statistics.median(values), min(values), max(values)


def ratio(runs, others):
    key = "tokens_per_second"
    return spread([run[key] / other[key] for run, other in zip(runs, others, strict=True)])


def table(found):
    """Markdown: what was measured on what, and a table for each precision."""
    about = found["about"]
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    where = about["processor"] if about["device"] == "CPU" else about["device"]
    text = f"Measured on {about['date']}: {packages}; {where}, {about['threads']} thread(s); "
    text += f"{about['examples']:,} rows of {about['tokens']:,} tokens, "
    text += f"{about['learned'] / about['tokens']:.0%} of them with a loss; "
    text += f"{about['rows']} rows x {about['accumulate']} a step. Median of {about['repeat']} "
    text += "(least-most); ratios turn by turn.\n"
    for precision, runs in found["precisions"].items():
        if isinstance(runs, str):
            text += f"\n{precision}: {runs}\n"
            continue
        text += f"\n{precision}; the matmul reaches {runs['matmul'] / 1e9:,.0f} GFLOP/s.\n\n"
        head = ["", "tokens/s", "x TRL's fastest", "x 2023", "of the matmul"]
        head += ["tokens/CPU s", "peak MiB", "first step s"]
        text += f"| {' | '.join(head)} |\n|---{'|---:' * (len(head) - 1)}|\n"
        memory = "peak_mib" if about["device"] == "CPU" else "peak_reserved_mib"
        for line in summary(found, precision):
            cells = [line["name"], between(line["tokens_per_second"], ",.0f")]
            cells += [between(line["x_trl"], ".2f")]
            cells += [between(line["x_2023"], ".1f"), f"{line['share'][0]:.0%}"]
            cells += [f"{line['tokens_per_cpu_second'][0]:,.0f}", between(line[memory], ",.0f")]
            cells += [between(line["first_step_seconds"], ".1f")]
            text += f"| {' | '.join(cells)} |\n"
    return text


def between(values, form):
    if values is None:
        return "-"
    middle, least, most = (format(value, form) for value in values)
    return middle if least == most else f"{middle} ({least}-{most})"


def draw(found, file):
    """Bars of each precision that was measured: speed, memory, first step."""
    from matplotlib.figure import Figure

    measured = [name for name, runs in found["precisions"].items() if isinstance(runs, dict)]
    if not measured:
        return
    memory = "peak_mib" if found["about"]["device"] == "CPU" else "peak_reserved_mib"
    titles = {"tokens_per_second": "tokens/s", memory: "peak memory, MiB"}
    titles["first_step_seconds"] = "first step after, s"
    figure = Figure(figsize=(12, 3.2 * len(measured)), layout="constrained")
    axes = figure.subplots(len(measured), 3, squeeze=False, sharey="row")
    for precision, row in zip(measured, axes, strict=True):
        lines = summary(found, precision)[::-1]
        for (name, title), axis in zip(titles.items(), row, strict=True):
            middle, least, most = zip(*(line[name] for line in lines), strict=True)
            low = [m - a for m, a in zip(middle, least, strict=True)]
            high = [b - m for m, b in zip(middle, most, strict=True)]
            color = ["tab:orange" if line["way"] in ("full", "lora") else "tab:gray"
                     for line in lines]  # fmt: skip
            axis.barh([line["name"] for line in lines], middle, xerr=(low, high), color=color)
            axis.set_title(f"{precision}: {title}", fontsize=10)
    figure.savefig(file, dpi=150)
    print(f"picture    {file}")


if __name__ == "__main__":
    main()
