#!/usr/bin/env python3
"""How tokens/s and peak memory of finetune_full.py change with length, batch and model size.

One thing at a time changes, from the middle of each list; each point is a run of its own, as a
reader would start it, of rows of one length (a text split at --max_length, loss on every token).
The model is a Llama with random weights and the vocabulary of the questions of ../jglue/sample.

    python growth.py                                          the table, growth.json, growth.png
    python growth.py --lengths 1024,2048,4096 --batches 1,2,4 --widths 1024,2048   on a GPU

Tokens/s and memory are taken as in against_peers.py.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from against_peers import ROOT, check, measure, processor, script

AXES = {"lengths": "tokens per row", "batches": "rows at once", "widths": "width of the model"}


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--lengths", default="64,128,256,512,1024", help="N,N: tokens per row")
    add("--batches", default="1,2,4,8,16", help="N,N: rows at once, which are a step")
    add("--widths", default="128,256,512,768", help="N,N: hidden sizes, multiples of 64")
    add("--num_hidden_layers", type=int, default=4, help="of each model (default 4)")
    add("--tokens", type=int, default=4096, help="of each run, and 3 steps at least")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    add("--repeat", type=int, default=2, help="runs of each point, in turns (default 2)")
    where = "a new directory, for all that is written (default: output/growth)"
    add("--output_dir", type=Path, default=Path("output/growth"), help=where)
    args = parser.parse_args(argv)
    for name in AXES:
        numbers = getattr(args, name).split(",")
        good = all(number.isdecimal() and int(number) > 0 for number in numbers)
        check(good, f"--{name} must be whole numbers with commas between them, such as 1,2.")
        setattr(args, name, [int(number) for number in numbers])
    check(min(args.lengths) > 1, "--lengths: a row of one token learns nothing. Begin at 2.")
    good = all(width % 64 == 0 for width in args.widths)
    check(good, "--widths must be multiples of 64, such as 128,256.")
    for name in ("num_hidden_layers", "tokens", "threads", "repeat"):
        check(getattr(args, name) > 0, f"--{name} {getattr(args, name)} is below 1. Raise it.")
    out = args.output_dir
    is_new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(is_new, f"--output_dir {out} is not empty. Name a new one.")
    out.mkdir(parents=True, exist_ok=True)
    return args


def points_of(args):
    """Each point once: (length, rows, width), one of them away from the middle."""
    lists = [getattr(args, name) for name in AXES]
    middle = [numbers[(len(numbers) - 1) // 2] for numbers in lists]
    points = []
    for place, numbers in enumerate(lists):
        points += [(*middle[:place], number, *middle[place + 1 :]) for number in numbers]
    return middle, list(dict.fromkeys(points))


def make_text(args):
    """A file with one row of text, long enough for the largest run; it is split into rows."""
    folder = args.output_dir
    script(ROOT / "jglue/prepare_jglue.py", "--jglue_dir", ROOT / "jglue/sample", "--task",
           "jsquad", "--output_dir", folder)  # fmt: skip
    source = folder / "jsquad_train.jsonl"
    rows = [json.loads(line) for line in source.open(encoding="utf-8")]
    text = "\n".join(row["prompt"] + row["completion"] for row in rows)
    most = max(
        length * rows * steps_of(args, length, rows) for length, rows, _ in points_of(args)[1]
    )
    most *= 8  # characters: a token of these has about two
    text *= 1 + most // len(text)
    file = folder / "text.jsonl"
    file.write_text(json.dumps({"text": text[:most]}, ensure_ascii=False) + "\n", "utf-8")
    return source, file


def steps_of(args, length, rows):
    return max(3, args.tokens // (length * rows))


def make_model(args, source, width):
    model = args.output_dir / f"model_{width}"
    size = ["--vocab_size", 510, "--hidden_size", width, "--num_attention_heads", width // 64]
    size += ["--num_hidden_layers", args.num_hidden_layers]
    size += ["--max_position_embeddings", max(args.lengths), "--model_type", "llama"]
    make = ROOT / "tiny_model/make_tiny_model.py"
    script(make, "--text_file", source, "--output_dir", model, *size)
    return model


def train(args, model, file, point, out):
    length, rows, _ = point
    command = [ROOT / "finetune_full/finetune_full.py", "--model_name_or_path", model]
    command += ["--train_file", file, "--output_dir", out, "--max_length", length]
    command += ["--per_device_train_batch_size", rows, "--max_steps", steps_of(args, length, rows)]
    command += ["--logging_steps", 1, "--save_strategy", "no"]
    return measure([str(word) for word in command], out, args.threads)


def main(argv=None):
    args = parse(argv)
    import torch

    gpu = torch.cuda.is_available()
    memory = "peak_reserved_mib" if gpu else "peak_mib"
    source, file = make_text(args)
    middle, points = points_of(args)
    models = {width: make_model(args, source, width) for width in args.widths}
    runs = {point: [] for point in points}
    for turn in range(1, args.repeat + 1):
        for point in points:
            out = args.output_dir / "{}_{}_{}".format(*point)
            runs[point].append(train(args, models[point[2]], file, point, out))
            speed = runs[point][-1]["tokens_per_second"]
            print(f"{turn}/{args.repeat}  {point}: {speed:,.0f} tok/s", flush=True)
    found = {}
    for place, name in enumerate(AXES):
        found[name] = []
        for number in getattr(args, name):
            results = runs[(*middle[:place], number, *middle[place + 1 :])]
            line = {"at": number}
            for key, value in (("speed", "tokens_per_second"), ("memory", memory)):
                line[key] = statistics.median(run[value] for run in results)
            found[name].append(line)
    where = torch.cuda.get_device_name() if gpu else processor(Path("/proc/cpuinfo").read_text())
    about = {"date": time.strftime("%Y-%m-%d"), "device": where, "threads": args.threads}
    about |= {"middle": middle, "torch": torch.__version__, "repeat": args.repeat}
    (args.output_dir / "growth.json").write_text(json.dumps([about, found], indent=1) + "\n")
    print_table(about, found, args)
    draw(found, args.output_dir / "growth.png")


def print_table(about, found, args):
    text = "{} tokens per row, {} rows at once, width {}".format(*about["middle"])
    print(f"\nMeasured on {about['date']}: torch {about['torch']}; {about['device']}, "
          f"{about['threads']} thread(s); a Llama of {args.num_hidden_layers} layers; {text}, "
          f"and one of them changed. Median of {args.repeat}.\n")  # fmt: skip
    print("| changed | to | tokens/s | peak MiB |\n|---|---:|---:|---:|")
    for name, lines in found.items():
        for line in lines:
            print(f"| {AXES[name]} | {line['at']:,} | {line['speed']:,.0f} "
                  f"| {line['memory']:,.0f} |")  # fmt: skip


def draw(found, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    titles = {"speed": "tokens/s", "memory": "peak memory, MiB"}
    for row, (key, title) in zip(axes, titles.items(), strict=True):
        row[0].set_ylabel(title)
        for axis, (name, lines) in zip(row, found.items(), strict=True):
            at = [line["at"] for line in lines]
            axis.plot(at, [line[key] for line in lines], marker="o")
            axis.set_xscale("log", base=2)
            axis.set_xticks(at, [f"{number:,}" for number in at])
            axis.grid(visible=True, alpha=0.3)
            if key == "memory":
                axis.set_xlabel(AXES[name])
        row[0].set_ylim(bottom=0)  # of all three, once all lines are there
    figure.savefig(file, dpi=150)
    print(f"picture    {file}")
    return figure


if __name__ == "__main__":
    main()
