#!/usr/bin/env python3
"""Score the answers that generate_text.py wrote to a file prepared by prepare_jglue.py.

JSQuAD: exact match and character F1 as JGLUE defines them. JCommonsenseQA, JNLI: accuracy. JSTS:
Pearson and Spearman correlation. Of each generated text only the first line is read (the prompts
ask for one), and what cannot be read as an answer is counted and is wrong; in JSTS it stands for
2.5, the middle of the scale.

    python evaluate_jglue.py --task jsquad --prediction_file output/jsquad_generated.jsonl
    qsub -P GROUP job.sh                                       (preparation, generation and this)

JGLUE's definition for JSQuAD stands in its patch to transformers' squad_metrics.py
(https://github.com/yahoojapan/JGLUE, fine-tuning/patch): compare in lower case, without 。 at the
end, runs of white space as one space; F1 over the characters; the best of the annotators' answers
counts. Costs a second.
"""

import argparse
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

TASKS = ("jsquad", "jcommonsenseqa", "jnli", "jsts")
JNLI_NAMES = {"含意": "entailment", "矛盾": "contradiction", "中立": "neutral"}
MIDDLE = 2.5  # what an unreadable JSTS answer counts as


def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--task", choices=TASKS, required=True, help="which task the file belongs to")
    add("--prediction_file", type=Path, required=True, help="JSON Lines from generate_text.py")
    add("--output_file", type=Path, help="also write the scores here, as JSON")
    return parser.parse_args(argv)


# ---- From a generated text to an answer, or None ----


def first_line(text):
    """Return the first line with something in it."""
    return next((line for line in text.split("\n") if line.strip()), "")


def read_choice(text, choices):
    """Return the index of the choice named by its number (2, 2：…, 2番) or its words, or None."""
    line = first_line(text).strip()
    if match := re.match(r"([0-4])(?![\d.])", unicodedata.normalize("NFKC", line)):
        return int(match.group(1))
    line = line.rstrip("。")
    return choices.index(line) if choices.count(line) == 1 else None


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


def score_jsquad(rows):
    answers = [normalize(first_line(row["generated_text"])) for row in rows]
    golds = [[normalize(gold) for gold in row["answers"]] for row in rows]
    golds = [[gold for gold in each if gold] or [""] for each in golds]
    pairs = list(zip(answers, golds, strict=True))
    best = [max(character_f1(answer, gold) for gold in each) for answer, each in pairs]
    return {
        "unreadable": sum(not answer for answer in answers),
        "exact_match": sum(answer in each for answer, each in pairs) / len(rows),
        "f1": sum(best) / len(rows),
    }


def score_labels(rows, answers):
    """Return the accuracy, and that of always giving the commonest label, which is to be beaten."""
    labels = [row["label"] for row in rows]
    right = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    return {
        "unreadable": answers.count(None),
        "accuracy": right / len(rows),
        "commonest_label": Counter(labels).most_common(1)[0][1] / len(rows),
    }


def score_jcommonsenseqa(rows):
    return score_labels(rows, [read_choice(row["generated_text"], row["choices"]) for row in rows])


def score_jnli(rows):
    return score_labels(rows, [read_relation(row["generated_text"]) for row in rows])


def score_jsts(rows):
    read = [read_similarity(row["generated_text"]) for row in rows]
    answers = [MIDDLE if value is None else value for value in read]
    golds = [row["label"] for row in rows]
    return {
        "unreadable": read.count(None),
        "pearson": correlation(answers, golds),
        "spearman": correlation(ranks(answers), ranks(golds)),
    }


def correlation(left, right):
    """Return Pearson's correlation of two lists, or None where one of them does not vary."""
    import numpy as np

    left, right = (np.asarray(values, dtype=np.float64) for values in (left, right))
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    left, right = left - left.mean(), right - right.mean()
    return float((left @ right) / np.sqrt((left @ left) * (right @ right)))


def ranks(values):
    """Return the rank of each value, equal values sharing the mean of theirs, as Spearman needs."""
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


SCORERS = {
    "jsquad": score_jsquad,
    "jcommonsenseqa": score_jcommonsenseqa,
    "jnli": score_jnli,
    "jsts": score_jsts,
}


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
    if not isinstance(row, dict):
        fail(f"{place} is no object. Give the file that generate_text.py wrote.")
    if not isinstance(row.get("generated_text"), str):
        fail(f"{place} has no text in `generated_text`. Give what generate_text.py wrote.")
    found = gold_task(row)
    if found is None or "id" not in row:
        fields = ", ".join(row)
        fail(
            f"{place} has no {task} answers to compare with (fields: {fields}). Generate from "
            "a file that prepare_jglue.py wrote: it carries them along."
        )
    if found != task:
        fail(f"{place} belongs to {found}, not to {task}. Give --task {found}.")


def read_predictions(path, task):
    """Return the file's rows, each checked, each id once."""
    advice = "Give the file that generate_text.py wrote."
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}). {advice}")
    except OSError as error:
        fail(f"--prediction_file {path} cannot be read ({error.strerror}). {advice}")
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


def print_table(scores):
    """Print names above values, one column each."""
    cells = []
    for name, value in scores.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        text = "undefined" if value is None else text
        cells.append((name, text, max(len(name), len(text))))
    print("  ".join(name.rjust(width) for name, _, width in cells))
    print("  ".join(text.rjust(width) for _, text, width in cells))


def main(argv=None):
    args = parse_args(argv)
    rows = read_predictions(args.prediction_file, args.task)
    scores = {"task": args.task, "rows": len(rows), **SCORERS[args.task](rows)}
    print_table(scores)
    if scores["unreadable"]:
        value = f"{MIDDLE}, the middle of the scale" if args.task == "jsts" else "wrong"
        count = f"{scores['unreadable']} of {len(rows)}"
        print(f"{count} texts could not be read as an answer; they count as {value}")
    if None in scores.values():
        print("a correlation is undefined: the answers (or the labels) are all the same number")
    if args.output_file:
        try:
            args.output_file.parent.mkdir(parents=True, exist_ok=True)
            args.output_file.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"{args.output_file} cannot be written ({error.strerror}). Name another file.")


if __name__ == "__main__":
    main()
