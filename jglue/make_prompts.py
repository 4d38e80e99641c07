#!/usr/bin/env python3
"""Write the questions of JGLUE's validation data as a model is asked them in an evaluation.

Reads what prepare_jglue.py wrote and writes one file that generate_text.py and score_choices.py
read: each question as it is, or behind examples from the training data (the same ones before each
question of a task, drawn by the seed; none of them is a question that is asked). Examples are put
before it as text with an empty line between, or, for instruction-tuned models, as earlier turns of
a conversation. `answer_choices` are the answers that a question allows. evaluate_jglue.py runs it.

    python make_prompts.py --task all --output_file output/prompts.jsonl
    python make_prompts.py --task jnli --num_fewshot 4 --output_file output/prompts.jsonl

Costs a second.
"""

import argparse
import json
import random
import sys
from pathlib import Path

TASKS = ("jsquad", "jcommonsenseqa", "jnli", "jsts")
# Copied from jglue/prepare_jglue.py
JNLI_ANSWERS = {"entailment": "含意", "contradiction": "矛盾", "neutral": "中立"}
# Copied from jglue/prepare_jglue.py
CHOICES = {"jcommonsenseqa": list("01234"), "jnli": list(JNLI_ANSWERS.values())}


# Copied from jglue/prepare_jglue.py
def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--task", choices=[*TASKS, "all"], required=True, help="one task, or all")
    add("--data_dir", type=Path, default=Path("output"), help="where prepare_jglue.py wrote")
    add("--output_file", type=Path, required=True, help="where the prompts go, as JSON Lines")
    add("--num_fewshot", type=int, default=0, help="examples from train before each question")
    add("--turns", action="store_true", help="as messages, for the model's chat template")
    add("--limit", type=int, help="only so many questions of a task, drawn by --seed")
    add("--seed", type=int, default=42, help="draws the examples and --limit")
    args = parser.parse_args(argv)
    if args.num_fewshot < 0 or (args.limit is not None and args.limit < 1):
        fail("--num_fewshot must be 0 or more, --limit 1 or more.")
    return args


def read_rows(data_dir, task, split):
    """Return the rows that prepare_jglue.py wrote for a split."""
    path, rows = data_dir / f"{task}_{split}.jsonl", []
    command = f"python prepare_jglue.py --jglue_dir JGLUE --output_dir {data_dir}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        fail(f"{path} is not there. Type: {command}")
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read ({error}). Type: {command}")
    if not rows:
        fail(f"{path} is empty. Type: {command}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"id", "prompt", "completion"} <= set(row):
            fail(f"{path} row {number} is no question with its answer. Type: {command}")
        if row["completion"] not in CHOICES.get(task, [row["completion"]]):
            fail(f"{path} row {number} answers {row['completion']}. Edit CHOICES in this script.")
    return rows


def draw(args, task):
    """Return (questions, examples) of a task: the same ones for the same seed."""
    rows = read_rows(args.data_dir, task, "validation")
    if args.limit and args.limit < len(rows):
        chosen = random.Random(f"{args.seed} {task}").sample(range(len(rows)), args.limit)
        rows = [rows[number] for number in sorted(chosen)]
    if not args.num_fewshot:
        return rows, []
    asked = {row["prompt"] for row in read_rows(args.data_dir, task, "validation")}
    known = [row for row in read_rows(args.data_dir, task, "train") if row["prompt"] not in asked]
    if len(known) < args.num_fewshot:
        fail(f"{task} has {len(known)} training rows for --num_fewshot {args.num_fewshot}.")
    return rows, random.Random(f"{args.seed} {task}").sample(known, args.num_fewshot)


def make_prompt(task, row, examples, as_turns):
    """Return the row with the examples before its question, and the answers that it allows."""
    row = {"task": task, **row, "examples": [example["id"] for example in examples]}
    if task in CHOICES:
        row["answer_choices"] = CHOICES[task]
    if not as_turns:
        shown = [example["prompt"] + example["completion"] for example in examples]
        return row | {"prompt": "\n\n".join([*shown, row["prompt"]])}
    turns = []
    for example in examples:
        turns.append({"role": "user", "content": example["prompt"]})
        turns.append({"role": "assistant", "content": example["completion"]})
    turns.append({"role": "user", "content": row.pop("prompt")})
    return row | {"messages": turns}


def main(argv=None):
    args, lines = parse_args(argv), []
    for task in TASKS if args.task == "all" else [args.task]:
        rows, examples = draw(args, task)
        for row in rows:
            prompt = make_prompt(task, row, examples, args.turns)
            lines.append(json.dumps(prompt, ensure_ascii=False) + "\n")
        print(f"{task:<15} {len(rows):>6,} questions, {len(examples)} examples before each")
    text, output = "".join(lines), args.output_file
    try:
        if output.exists() and output.read_text(encoding="utf-8") != text:
            fail(f"{output} holds other prompts. Choose another place, or remove it.")
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_name(f".{output.name}.part")  # a killed run leaves no half of a file
        part.write_text(text, encoding="utf-8")
        part.replace(output)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{output} cannot be written ({error}). Name another file.")


if __name__ == "__main__":
    main()
