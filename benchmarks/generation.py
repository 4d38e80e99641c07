#!/usr/bin/env python3
"""Answer the same prompts in several ways, and print new tokens/s as a Markdown table.

Each way is a process of its own, in turns: ../generate_text/generate_text.py with --batch_size 1,
16 and 64, and transformers' own continuous batching (`generate_batch`) on the same model and the
same ids. Tokens are those of the answers, without the stop token and without padding; the time is
that of answering, without imports and loading. Every way's answers are compared with those that
were made one at a time. Without a model given it makes one, offline: a Llama of 11 million
parameters with random weights; prompts are the questions of ../jglue/sample behind a part of their
text.

    python generation.py --prompts 200
    python generation.py --prompts 1000 --repeat 1 --ways 16,64
    python generation.py --model_name_or_path MODEL --prompt_file prompts.jsonl
"""

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "generate_text" / "generate_text.py"


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", help="directory or hub name; default: one that is made here")
    add("--prompt_file", type=Path, help="JSON Lines; default: made of ../jglue/sample")
    add("--prompts", type=int, default=1000, help="how many of them (default 1000)")
    add("--max_new_tokens", type=int, default=24, help="longest answer (default 24)")
    add("--ways", default="1,16,64,continuous", help="batch sizes, and continuous")
    add("--repeat", type=int, default=3, help="runs of each way, in turns (default 3)")
    add("--cache_pages", type=int, default=256, help="for continuous: pages of 256 tokens")
    add("--output_file", type=Path, help="the figures as JSON, too")
    add("--continuous", help=argparse.SUPPRESS)  # one run of it, in a process of its own
    args = parser.parse_args(argv)
    args.ways = args.ways.split(",")
    for way in args.ways:
        if way != "continuous" and not way.isdecimal():
            fail(f"--ways {way} is no batch size, nor continuous.")
    for name in ("prompts", "max_new_tokens", "repeat", "cache_pages"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be 1 or more, not {getattr(args, name)}.")
    if args.prompt_file and not args.prompt_file.is_file():
        fail(f"{args.prompt_file} is not there. Relative paths start at {Path.cwd()}.")
    return args


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run(*command):
    """Run a script; return what it says on stderr and its peak memory in MiB."""
    with tempfile.TemporaryFile("w+") as log:
        words = [sys.executable, *map(str, command)]
        process = subprocess.Popen(words, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        text = log.read()
    if status:
        fail(f"{' '.join(map(str, command[:4]))} ... failed: {text[-600:]}")
    return text, usage.ru_maxrss / 1024


def make_inputs(args, folder):
    """Return (model, prompts), those given or made."""
    rows = folder / "jsquad_train.jsonl"
    run(ROOT / "jglue/prepare_jglue.py", "--jglue_dir", ROOT / "jglue/sample", "--task", "jsquad",
        "--output_dir", folder)  # fmt: skip
    model, prompts, draw = args.model_name_or_path, folder / "prompts.jsonl", random.Random(0)
    if not model:
        model = folder / "model"
        run(ROOT / "tiny_model/make_tiny_model.py", "--text_file", rows, "--output_dir", model,
            "--model_type", "llama", "--vocab_size", 510, "--hidden_size", 384,
            "--num_hidden_layers", 6, "--num_attention_heads", 6,
            "--initializer_range", 0.1)  # fmt: skip
    if args.prompt_file:
        given = read_lines(args.prompt_file)[: args.prompts]
    else:
        texts = [json.loads(line)["prompt"] for line in read_lines(rows)]
        parts = [draw.choice(texts)[-draw.randrange(20, 250) :] for _ in range(args.prompts)]
        given = [json.dumps({"prompt": part}, ensure_ascii=False) for part in parts]
    prompts.write_text("\n".join(given) + "\n", "utf-8")
    return model, prompts


def answer(args, way, model, prompts, out):
    """One run of one way: its tokens/s, peak memory and answers."""
    words = ["--model_name_or_path", model, "--prompt_file", prompts, "--output_file", out]
    words += ["--max_new_tokens", args.max_new_tokens]
    if way == "continuous":
        inner = json.dumps([*map(str, words)])
        text, peak = run(__file__, "--continuous", inner, "--cache_pages", args.cache_pages)
    else:
        text, peak = run(SCRIPT, *words, "--batch_size", way)
    speed = re.findall(r" ([\d,]+) tok/s", text)[-1]
    answers = [json.loads(line)["generated_text"] for line in read_lines(out)]
    return {"speed": int(speed.replace(",", "")), "mib": peak, "answers": answers}


def read_lines(path):
    """The lines of JSON Lines: splitlines() also cuts at characters that JSON may hold."""
    return [line for line in path.read_text("utf-8").split("\n") if line.strip()]


def answer_continuously(args):
    """Answer a file of prompts by generate_batch, everything else as generate_text.py does it."""
    spec = importlib.util.spec_from_file_location("generate_text", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = script.parse(json.loads(args.continuous))
    script.check_arguments(asked)
    from transformers import ContinuousBatchingConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = script.load_tokenizer(asked)
    form, rows, prompts = script.read_prompts(asked, tokenizer)
    model = script.load_model(asked, script.choose_precision(asked)[0], tokenizer)
    script.set_generation(asked, model, tokenizer, is_chat=form != "prompt")
    # Without a limit its cache takes as much memory as the machine has.
    limit = ContinuousBatchingConfig(num_blocks=args.cache_pages, max_batch_tokens=2048)
    began, stops = time.time(), model.generation_config.eos_token_id
    found = model.generate_batch(
        prompts, continuous_batching_config=limit, max_new_tokens=asked.max_new_tokens
    )
    seconds, tokens = time.time() - began, 0
    results = [result.generated_tokens for result in found.values() if not result.error]
    if len(results) != len(rows):
        fail(f"{len(results)} of {len(rows)} prompts have an answer.")
    with Path(asked.output_file).open("w", encoding="utf-8") as file:
        for row, new in zip(rows, results, strict=True):
            end = next((i for i, token in enumerate(new) if token in stops), len(new))
            tokens += end
            plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            text = tokenizer.decode(new[:end], **plain)
            file.write(json.dumps(row | {"generated_text": text}, ensure_ascii=False) + "\n")
    print(f"done: {tokens / seconds:,.0f} tok/s", file=sys.stderr)


def main(argv=None):
    args = parse(argv)
    if args.continuous:
        answer_continuously(args)
        return
    runs = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = make_inputs(args, Path(folder))
        for turn in range(args.repeat):
            for way in args.ways:
                out = Path(folder, f"{way}_{turn}.jsonl")
                runs[way].append(answer(args, way, model, prompts, out))
                speed = f"{runs[way][-1]['speed']:,} tok/s"
                print(f"run {turn + 1}/{args.repeat}  {way}: {speed}", flush=True)
    report(args, runs)


def report(args, runs):
    """The table, and the same as JSON."""
    alone, results = args.ways[0], []
    for way, found in runs.items():
        speeds = [one["speed"] for one in found]
        pairs = zip(found, runs[alone], strict=True)
        ratios = [one["speed"] / base["speed"] for one, base in pairs]
        answers = zip(found[0]["answers"], runs[alone][0]["answers"], strict=True)
        same = sum(one == other for one, other in answers)
        peak = max(one["mib"] for one in found)
        results.append({"way": way, "speeds": speeds, "ratios": ratios, "same": same, "mib": peak})
    if args.output_file:
        facts = {"date": time.strftime("%Y-%m-%d"), "prompts": len(found[0]["answers"])}
        text = json.dumps({**facts, "results": results}, indent=1)
        args.output_file.write_text(text, "utf-8")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    count = len(found[0]["answers"])
    print(f"\nMeasured on {time.strftime('%Y-%m-%d')}: {versions}; {os.cpu_count()} cores; "
          f"{count:,} prompts, {args.max_new_tokens} tokens at most, median of {args.repeat}, in "
          "brackets least and most.\n")  # fmt: skip
    print(
        f"| Batch | New tokens/s | Compared with {alone} | Peak MiB | Answers equal to {alone}'s |"
    )
    print("|---|---:|---:|---:|---:|")
    for one in results:
        speeds, ratios = one["speeds"], one["ratios"]
        speed = f"{statistics.median(speeds):,.0f} ({min(speeds):,}-{max(speeds):,})"
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
        print(
            f"| {one['way']} | {speed} | {ratio} | {one['mib']:,.0f} | {one['same']} of {count} |"
        )


if __name__ == "__main__":
    main()
