#!/usr/bin/env python3
"""Ask a model JGLUE's questions and score its answers, or score answers that are there already.

JSQuAD: exact match and character F1 as JGLUE defines them. JCommonsenseQA, JNLI: accuracy. JSTS:
Pearson and Spearman correlation. Of each generated text only the first line is read (the prompts
ask for one), behind a thought if it begins with one; what cannot be read as an answer is counted
and is wrong; in JSTS it stands for 2.5, the middle of the scale. JCommonsenseQA and JNLI are also
scored without reading: the answer is then the likeliest choice (score_choices.py).

    python evaluate_jglue.py --task all --model_name_or_path MODEL            (--num_fewshot 4)
    python evaluate_jglue.py --task jsquad --prediction_file output/jsquad_generated.jsonl
    qsub -P GROUP -v TASK=all job.sh                           (preparation, and the first of these)

With a model (ask_model.py): reads what prepare_jglue.py wrote, runs make_prompts.py,
generate_text.py and score_choices.py, and writes prompts, answers and scores with 95 % intervals to
--output_dir. Interrupted (status 75), the same command goes on. --limit 50 for a quick look.

JGLUE's definition for JSQuAD (https://github.com/yahoojapan/JGLUE, fine-tuning/patch): compare in
lower case, without 。 at the end, runs of white space as one space; F1 over the characters; the
best of the annotators' answers counts.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

TASKS = ("jsquad", "jcommonsenseqa", "jnli", "jsts")
JNLI_NAMES = {"含意": "entailment", "矛盾": "contradiction", "中立": "neutral"}
MIDDLE = 2.5  # what an unreadable JSTS answer counts as
# A thought and its end; where the prompt began it already, the text has its end only.
OPEN, CLOSE = r"<think>|<\|channel>thought", r"</think>|<channel\|>"
THOUGHT = rf"\A((\s*({OPEN}).*?({CLOSE}))+|((?!{OPEN}).)*?({CLOSE}))"
# Options of generate_text.py and score_choices.py that go to them as they are.
PASSED = ("batch_size", "precision", "device_map", "load_in_8bit", "load_in_4bit")
PASSED += ("allow_partly_quantized", "trust_remote_code", "chat_template", "chat_template_kwargs")


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, switch = parser.add_argument, {"nargs": "?", "const": "true"}
    add("--task", choices=[*TASKS, "all"], required=True, help="one task; with a model also all")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prediction_file", type=Path, help="JSON Lines from generate_text.py")
    what.add_argument("--model_name_or_path", type=os.path.expanduser, help="model or adapter")
    add("--output_file", type=Path, help="of a --prediction_file: also write the scores here")
    add("--data_dir", type=Path, help="where prepare_jglue.py wrote; default: output")
    add("--output_dir", type=Path, help="default: scores/NAME_OF_THE_MODEL in --data_dir")
    add("--num_fewshot", type=int, help="examples from train before each question; default 0")
    add("--apply_chat_template", **switch, choices=["true", "false"], help="ask by turns")
    add("--limit", type=int, help="only so many questions of a task, drawn by --seed")
    add("--seed", type=int, help="draws the examples and --limit; default 42")
    add("--max_new_tokens", type=int, help="longest answer; default 32; time grows with it")
    for name in PASSED:
        is_switch = name.startswith(("load_in", "trust", "allow"))
        add(f"--{name}", **(switch if is_switch else {}), help="as in generate_text.py")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None}
    unused = sorted(given - {"task", "prediction_file", "output_file"})
    if args.prediction_file and unused:
        fail(f"--{unused[0]} does nothing with a --prediction_file. Leave it out.")
    if args.prediction_file and args.task == "all":
        fail("a --prediction_file is of one task. Name that one instead of all.")
    return args


# ---- From a generated text to an answer, or None ----


def first_line(text):
    """Return the first line with something in it, behind a thought; of an open one, nothing."""
    text = re.sub(THOUGHT, "", text, flags=re.DOTALL)
    if re.match(rf"\s*({OPEN}|thought\n)", text):  # Gemma 4's marks are left out in generation
        return ""
    return next((line for line in text.split("\n") if line.strip()), "")


def read_choice(text, choices):
    """Return the index of the choice named by its number (2, 2., 2：…, 2番) or words, or None."""
    line = first_line(text).strip()
    number = re.match(r"([0-4])(?!\d|\.\d|[A-Za-z])(.*)", unicodedata.normalize("NFKC", line))
    words = line.rstrip("。")
    # A choice may begin with a digit itself (3Dプリンター); a mere digit is its number.
    if choices.count(words) == 1 and not (number and number[2] in ("", ".", "。")):
        return choices.index(words)
    return int(number[1]) if number else None


def read_relation(text):
    """Return the relation if the line names exactly one of them, in either language, or None."""
    line = first_line(text).lower()
    named = [label for name, label in JNLI_NAMES.items() if name in line or label in line]
    return named[0] if len(named) == 1 else None


def read_similarity(text):
    """Return the number from 0 to 5 at the start of the line, or None."""
    match = re.match(r"\d+(\.\d+)?", unicodedata.normalize("NFKC", first_line(text).strip()))
    value = float(match.group()) if match else None
    return value if value is not None and value <= 5 else None


# ---- Scores ----


def normalize(text):
    """Return the form of a JSQuAD answer that is compared: JGLUE's steps, in JGLUE's order."""
    return " ".join(text.lower().rstrip("。").split())


def character_f1(answer, gold):
    """Return the harmonic mean of precision and recall over two strings' characters."""
    if not answer or not gold:
        return float(answer == gold)
    same = sum((Counter(answer) & Counter(gold)).values())
    return 2 * same / (len(answer) + len(gold))


def jsquad_values(rows):
    """Return, for each row, whether the answer is empty, whether it is exact, and its F1."""
    answers = [normalize(first_line(row["generated_text"])) for row in rows]
    golds = [[normalize(gold) for gold in row["answers"]] for row in rows]
    golds = [[gold for gold in each if gold] or [""] for each in golds]
    pairs = list(zip(answers, golds, strict=True))
    best = [max(character_f1(answer, gold) for gold in each) for answer, each in pairs]
    return [not answer for answer in answers], [answer in each for answer, each in pairs], best


def score_jsquad(rows):
    empty, exact, best = map(sum, jsquad_values(rows))
    return {"unreadable": empty, "exact_match": exact / len(rows), "f1": best / len(rows)}


def score_labels(rows, answers):
    """Return the accuracy, and that of always giving the commonest label, which is to be beaten."""
    labels = [row["label"] for row in rows]
    right = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    scores = {"unreadable": answers.count(None), "accuracy": right / len(rows)}
    return scores | {"commonest_label": Counter(labels).most_common(1)[0][1] / len(rows)}


def score_jcommonsenseqa(rows):
    return score_labels(rows, [read_choice(row["generated_text"], row["choices"]) for row in rows])


def score_jnli(rows):
    return score_labels(rows, [read_relation(row["generated_text"]) for row in rows])


def jsts_values(rows):
    """Return what was read of each answer, the number it counts as, and the right one."""
    read = [read_similarity(row["generated_text"]) for row in rows]
    answers = [MIDDLE if value is None else value for value in read]
    return read, answers, [row["label"] for row in rows]


def score_jsts(rows):
    read, answers, golds = jsts_values(rows)
    scores = {"unreadable": read.count(None), "pearson": correlation(answers, golds)}
    return scores | {"spearman": correlation(ranks(answers), ranks(golds))}


def correlation(left, right):
    """Return Pearson's correlation of two lists, or None where one of them does not vary."""
    left, right = (np.asarray(values, dtype=np.float64) for values in (left, right))
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    left, right = left - left.mean(), right - right.mean()
    return float((left @ right) / np.sqrt((left @ left) * (right @ right)))


def ranks(values):
    """Return the rank of each value, equal values sharing the mean of theirs, as Spearman needs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


SCORERS = (score_jsquad, score_jcommonsenseqa, score_jnli, score_jsts)
SCORERS = dict(zip(TASKS, SCORERS, strict=True))


# ---- Reading and checking the file ----


def gold_task(row):
    """Return the task whose gold fields a row has, or None."""
    answers, choices, label = (row.get(name) for name in ("answers", "choices", "label"))
    number = isinstance(label, int | float) and not isinstance(label, bool)
    if isinstance(answers, list) and answers and all(isinstance(one, str) for one in answers):
        return "jsquad"
    if isinstance(choices, list) and len(choices) == 5 and number and label in range(5):
        return "jcommonsenseqa"
    if isinstance(label, str) and label in JNLI_NAMES.values():
        return "jnli"
    return "jsts" if choices is None and number and 0 <= label <= 5 else None


def check_row(row, task, place):
    """Leave with a message unless the row can be scored for the task."""
    if not isinstance(row, dict) or not isinstance(row.get("generated_text"), str):
        fail(f"{place} has no text in `generated_text`. Give what generate_text.py wrote.")
    found = gold_task(row)
    if found is None or "id" not in row:
        problem = f"{place} has no {task} answers to compare with (fields: {', '.join(row)})"
        fail(f"{problem}. Generate from a file that prepare_jglue.py wrote: it carries them along.")
    if found != task:
        fail(f"{place} belongs to {found}, not to {task}. Give --task {found}.")


def read_predictions(path, task):
    """Return the file's rows, each checked, each id once."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        fail(f"--prediction_file {path} cannot be read: {error}. Give what generate_text.py wrote.")
    rows, seen = [], {}
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            fail(f"{place} is not JSON ({error.msg}, column {error.colno}). Generate it again.")
        check_row(row, task, place)
        if row["id"] in seen:
            fail(f"{place} has the id {row['id']} of line {seen[row['id']]}. Remove one of them.")
        seen[row["id"]] = number
        rows.append(row)
    if not rows:
        fail(f"{path} is empty: there is nothing to score. Run generate_text.py first.")
    return rows


def describe_data(path, rows):
    """Return which questions these are, by the sha256 of the file that prepare_jglue.py wrote."""
    made = ("generated_text", "base_generated_text")
    rows = [{name: row[name] for name in row if name not in made} for row in rows]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return {"file": str(path), "rows": len(rows), "questions_sha256": digest}


def print_table(scores):
    """Print names above values, one column each."""
    cells = []
    for name, value in scores.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        text = "undefined" if value is None else text
        cells.append((name, text, max(len(name), len(text))))
    print("  ".join(name.rjust(width) for name, _, width in cells))
    print("  ".join(text.rjust(width) for _, text, width in cells))


def score_file(args):
    """Score the answers of one task that were generated before."""
    rows = read_predictions(args.prediction_file, args.task)
    scores = {"task": args.task, "rows": len(rows), **SCORERS[args.task](rows)}
    print_table(scores)
    if scores["unreadable"]:
        value = f"{MIDDLE}, the middle of the scale" if args.task == "jsts" else "wrong"
        count = f"{scores['unreadable']} of {len(rows)}"
        print(f"{count} texts could not be read as an answer; they count as {value}")
    if None in scores.values():
        print("a correlation is undefined: the answers (or the labels) are all the same number")
    scores["data"] = describe_data(args.prediction_file, rows)
    if args.output_file:
        try:
            args.output_file.parent.mkdir(parents=True, exist_ok=True)
            args.output_file.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"{args.output_file} cannot be written ({error.strerror}). Name another file.")


def main(argv=None):
    args = parse_args(argv)
    if args.prediction_file:
        return score_file(args)
    try:
        from ask_model import evaluate_model
    except ImportError as error:
        fail(f"{error}. ask_model.py stands beside this script: copy it along.")
    return evaluate_model(args)


if __name__ == "__main__":
    main()
