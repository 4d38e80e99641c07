#!/usr/bin/env python3
"""Turn JGLUE into prompts and completions that the fine-tuning scripts and generate_text.py read.

JSQuAD, JCommonsenseQA, JNLI and JSTS become JSON Lines, one file per split, with `prompt`,
`completion` and what evaluate_jglue.py needs to score an answer: `id`, and `answers`, `label` or
`choices`. The prompt ends where the answer begins; nothing is put between the two. To change what
the model is asked, edit the four functions of PROMPTS. Where there are choices (JCommonsenseQA,
JNLI), TASK_preferences_train.jsonl and ..._validation.jsonl have the right answer beside a wrong
one, for training on preferences: `id`, `prompt`, `chosen`, `rejected`.

    git clone https://github.com/yahoojapan/JGLUE.git               (once, where there is a network)
    python prepare_jglue.py --jglue_dir JGLUE --output_dir output --task all
    python prepare_jglue.py --jglue_dir sample --output_dir output  (the sample beside this file)
    qsub -P GROUP job.sh                                            (this, generation, the score)

Costs seconds. Data: Kurihara et al. 2022, https://aclanthology.org/2022.lrec-1.317 (CC BY-SA 4.0).
"""

import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # JGLUE's name and ours
JNLI_ANSWERS = {"entailment": "含意", "contradiction": "矛盾", "neutral": "中立"}


def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- What the model is asked, and what it should answer. Edit here. ----


def jsquad_row(row):
    """A question about a paragraph; the answer is a piece of it, the one most annotators gave."""
    title, mark, body = row["context"].partition(" [SEP] ")
    text = f"題名：{title}\n文章：{body}" if mark else f"文章：{title}"
    answers = [answer["text"] for answer in row["answers"]]
    best = Counter(answers).most_common(1)[0][0] if answers else None  # of several the first
    prompt = f"{text}\n質問：{row['question'].strip()}\n答え："
    return row["id"], prompt, best, {"answers": answers}


def jcommonsenseqa_row(row):
    """A question with five choices; the answer is the number of one."""
    choices = [row[f"choice{n}"].strip() for n in range(5)]
    lines = "\n".join(f"{n}：{choice}" for n, choice in enumerate(choices))
    prompt = f"質問：{row['question'].strip()}\n{lines}\n正解の番号："
    label = row.get("label")
    if label is not None and label not in range(5):
        raise ValueError(f"label {label}")
    answer = None if label is None else str(label)
    return row["q_id"], prompt, answer, {"label": label, "choices": choices}


def jnli_row(row):
    """Does the second sentence follow from the first, contradict it, or neither?"""
    prompt = f"前提：{row['sentence1'].strip()}\n仮説：{row['sentence2'].strip()}"
    prompt += "\n関係（含意、矛盾、中立）："
    label = row.get("label")
    answer = None if label is None else JNLI_ANSWERS[label]
    more = {"label": label, "choices": [*JNLI_ANSWERS.values()]}
    return row["sentence_pair_id"], prompt, answer, more


def jsts_row(row):
    """How close in meaning are two sentences, from 0.0 (unrelated) to 5.0 (the same)?"""
    prompt = f"文1：{row['sentence1'].strip()}\n文2：{row['sentence2'].strip()}"
    prompt += "\n意味の近さ（0.0から5.0）："
    label = row.get("label")
    if label is not None and not 0 <= label <= 5:
        raise ValueError(f"label {label}")
    answer = None if label is None else f"{label:.1f}"
    return row["sentence_pair_id"], prompt, answer, {"label": label}


PROMPTS = {
    "jsquad": jsquad_row,
    "jcommonsenseqa": jcommonsenseqa_row,
    "jnli": jnli_row,
    "jsts": jsts_row,
}
# The answers that a task knows; of the wrong ones each preference pair gets one.
CHOICES = {"jcommonsenseqa": list("01234"), "jnli": list(JNLI_ANSWERS.values())}


# ---- Reading and writing ----


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--jglue_dir", type=Path, required=True, help="a checkout of JGLUE (holds datasets/)")
    add("--output_dir", type=Path, required=True, help="where TASK_train.jsonl and others go")
    add("--task", choices=[*PROMPTS, "all"], default="all", help="one task, or all (the default)")
    args = parser.parse_args(argv)
    if not args.jglue_dir.is_dir():
        fail(f"--jglue_dir {args.jglue_dir} is not a directory. Give a checkout of JGLUE.")
    return args


def find_task(jglue_dir, task):
    """Return (version, directory) of the newest DIR/datasets/TASK-vN.M, or None."""
    found = []
    for path in (jglue_dir / "datasets").glob(f"{task}-v*"):
        version = path.name.removeprefix(f"{task}-")
        if path.is_dir() and (match := re.fullmatch(r"v(\d+)\.(\d+)", version)):
            found.append((tuple(map(int, match.groups())), version, path))
    return max(found)[1:] if found else None


def read_records(task, path):
    """Yield (place, record) for every question of a JSQuAD file, every line of another task's."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}). JGLUE's files are: fetch it again.")
    if task != "jsquad":
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield f"{path} line {number}", parse(line, f"{path} line {number}")
        return
    try:
        articles = parse(content, path)["data"]
        parts = [part for article in articles for part in article["paragraphs"]]
        questions = [{**qa, "context": part["context"]} for part in parts for qa in part["qas"]]
    except (KeyError, TypeError) as error:
        fail(f"{path} is not in JSQuAD's form, data > paragraphs > qas ({error!r}). Get it again.")
    for number, question in enumerate(questions, 1):
        yield f"{path} question {number}", question


def parse(text, place):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{place} line {error.lineno}" if "\n" in text else place
        fail(f"{place} is not JSON ({error.msg} at column {error.colno}). Fetch the file again.")


def make_rows(task, split, path):
    """Return the split's rows. Only a test split may lack answers: rows without `completion`."""
    rows = []
    for place, record in read_records(task, path):
        try:
            name, prompt, answer, gold = PROMPTS[task](record)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            fail(f"{place} does not have {task}'s fields ({error!r}). Fetch JGLUE again.")
        if answer is None and split != "test":
            fail(f"{place} has no answer to learn or to score. Fetch the file again.")
        row = {"id": str(name), "prompt": prompt}
        rows.append(row if answer is None else row | {"completion": answer, **gold})
    if not rows:
        fail(f"{path} holds no {task} question. Fetch it again.")
    repeated = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if repeated:
        fail(f"{path} uses the id {repeated[0]} more than once. Fetch it again.")
    return rows


def make_pairs(task, rows):
    """Return a preference pair for each row: the right answer, and a wrong one drawn by its id."""
    pairs = []
    for row in rows:
        wrong = [answer for answer in CHOICES[task] if answer != row["completion"]]
        if len(wrong) == len(CHOICES[task]):
            fail(f"{task} answers {row['completion']}, not one of CHOICES. Edit CHOICES alike.")
        if isinstance(row["label"], int):  # two choices can have the same words: both are right
            words = row["choices"]
            wrong = [n for n in wrong if words[int(n)] != words[row["label"]]]
        if not wrong:
            fail(f"{task}, id {row['id']}: all choices are the same. Fetch JGLUE again.")
        rejected = random.Random(f"{task} {row['id']}").choice(wrong)  # the same one each time
        pair = {"id": row["id"], "prompt": row["prompt"], "chosen": row["completion"]}
        pairs.append(pair | {"rejected": rejected})
    return pairs


def write_rows(path, rows):
    """Write JSON Lines under another name first, so that a killed run leaves no half of a file."""
    part = path.with_name(f".{path.name}.part")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.write_text(text, encoding="utf-8")
    if path.exists() and path.read_bytes() != part.read_bytes():
        set_aside(path)  # of other data, or edited
    part.replace(path)


def set_aside(path):
    """Give a file another name, which no file has, and say so."""
    names = (path.with_name(f"{path.name}.before{n or ''}") for n in itertools.count())
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    print(f"kept       {path} was of other data, or edited: it is {aside.name} now")


def prepare_task(task, found, output_dir):
    """Write one file per split found and print a line for each."""
    version, directory = found
    present = [split for split in SPLITS if (directory / f"{split}-{version}.json").is_file()]
    if not {"train", "valid"} & set(present):
        names = f"train-{version}.json nor valid-{version}.json"
        fail(f"{directory} holds neither {names}. Fetch JGLUE again.")
    for split, ours in SPLITS.items():
        output = output_dir / f"{task}_{ours}.jsonl"
        preferences = output_dir / f"{task}_preferences_{ours}.jsonl"
        line = f"{task:<15} {version}  {ours:<11}"
        if split in present:
            rows = make_rows(task, ours, directory / f"{split}-{version}.json")
            write_rows(output, rows)
            longest = max(len(row["prompt"] + row.get("completion", "")) for row in rows)
            unanswered = sum("completion" not in row for row in rows)
            note = f", {unanswered:,} without an answer: to generate from, not to score"
            note = f"the longest {longest:,} characters{note if unanswered else ''}"
            print(f"{line} {len(rows):>7,} rows, {note} -> {output}")
            if task in CHOICES and split != "test":
                write_rows(preferences, make_pairs(task, rows))
                print(f"{line} {len(rows):>7,} preference pairs -> {preferences}")
        else:
            for file in (output, preferences):
                if file.exists():  # the two splits would be of different data
                    set_aside(file)
            if split != "test":
                print(f"{line} not in {directory}")


def main(argv=None):
    args = parse_args(argv)
    tasks = list(PROMPTS) if args.task == "all" else [args.task]
    found = {task: find_task(args.jglue_dir, task) for task in tasks}
    if not any(found.values()):
        names = " or ".join(f"{task}-vN.M" for task in tasks)
        there = sorted(path.name for path in (args.jglue_dir / "datasets").glob("*-v*"))
        fail(
            f"{args.jglue_dir}/datasets holds no {names} (it has "
            f"{', '.join(there) or 'no data set'}). Give the directory that holds datasets/."
        )
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for task, place in found.items():
            if place:
                prepare_task(task, place, args.output_dir)
            else:
                print(f"{task:<15} not in {args.jglue_dir}/datasets")
    except OSError as error:
        fail(f"{error.filename} cannot be read or written ({error.strerror}). See ls -l.")
    prepared = f"{args.output_dir}/{next(task for task in tasks if found[task])}"
    files = f"--prompt_file {prepared}_validation.jsonl --output_file {prepared}_generated.jsonl"
    command = "python ../generate_text/generate_text.py --model_name_or_path MODEL"
    print(f"next            {command} {files}")


if __name__ == "__main__":
    main()
