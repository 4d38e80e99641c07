"""Count the tokens of training data roughly, from 300 rows all over each file; for estimate.py."""

import json
import math
import os
import random
from pathlib import Path

from model_text import CHAT_TEMPLATE
from run_common import check, fail

ROWS = 300


def texts(value):
    """All texts in a row, however deep."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if type(value) is list else ():
        yield from texts(part)


def answers(row):
    """A row as what is learned at once: of a pair, each answer with its prompt."""
    prompt, pair = row.get("prompt") or [], [row.get("chosen"), row.get("rejected")]
    if not all(pair):
        return [row]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [one if one[: len(asked)] == asked else [prompt, one] for one in pair]


def turns_of(one):
    """The turns of what a chat template is for; None for plain text."""
    if isinstance(one, list):  # of a pair: turns, or [prompt, answer], of turns or texts
        turns = [turn for part in one for turn in (part if isinstance(part, list) else [part])]
        return turns if all(isinstance(turn, dict) for turn in turns) else None
    if "instruction" in one and "output" in one:
        question = "\n\n".join(filter(None, (one["instruction"], one.get("input"))))
        answer = {"role": "assistant", "content": one["output"]}
        return [{"role": "user", "content": question}, answer]
    return next((one[key] for key in ("messages", "prompt") if type(one.get(key)) is list), None)


def length_of(one, tokenizer):
    """Tokens of an answer with its prompt; without a tokenizer of a Japanese letter's 3 bytes."""
    plain = "\n".join(texts(one))
    if not tokenizer:
        return len(plain.encode()) / 3
    try:
        text = tokenizer.apply_chat_template(turns_of(one), tokenize=False)
        text += "\n".join(texts(one.get("tools"))) if isinstance(one, dict) else ""
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception:  # no turns, or none that this template takes
        return len(tokenizer(plain, verbose=False)["input_ids"])


def some_rows(file):
    """[(rows of about one length, how many of that length there are)] from all over a file."""
    path = Path(os.path.expanduser(file))
    try:
        if path.suffix.lower() == ".parquet":
            groups = parquet_rows(path)
        elif is_list(path):
            rows = json.loads(path.read_text("utf-8-sig"))
            sizes = ((place, sum(map(len, texts(row)))) for place, row in enumerate(rows))
            groups = [([rows[place] for place in places], n) for places, n in draw(sizes)]
        else:
            with path.open("rb") as lines:
                groups = [
                    ([read_line(lines, place) for place in places], n)
                    for places, n in draw(sizes_of_lines(path))
                ]
    except Exception as error:  # of a damaged file, anything
        fail(f"--train_file {file}: {error!r}")
    is_good = groups and all(isinstance(row, dict) for rows, _ in groups for row in rows)
    check(is_good, f"--train_file {file} holds no rows: objects, one a line or in a list.")
    return groups


def parquet_rows(path):
    """A row from each of 30 places in 10 groups."""
    from pyarrow.parquet import ParquetFile

    parquet = ParquetFile(path)
    groups, rows = range(parquet.num_row_groups), []
    groups = groups[:: max(1, len(groups) // 10)]
    for group in groups:
        step = max(1, parquet.metadata.row_group(group).num_rows * len(groups) // ROWS)
        for batch in parquet.iter_batches(step, row_groups=[group]):
            rows += batch.slice(0, 1).to_pylist()
    return [(rows, parquet.metadata.num_rows)] if rows else []


def draw(sizes):
    """Draw places from (place, size): the same number of each magnitude, few of which hold most."""
    kept, number, chance = {}, {}, random.Random(0)
    for place, size in sizes:
        kind = size.bit_length()
        seen = number[kind] = number.get(kind, 0) + 1
        if seen <= ROWS:
            kept.setdefault(kind, []).append(place)
        elif (other := chance.randrange(seen)) < ROWS:
            kept[kind][other] = place
    share = max(1, ROWS // max(1, len(kept)))
    drawn = {kind: chance.sample(places, min(share, len(places))) for kind, places in kept.items()}
    return [(sorted(places), number[kind]) for kind, places in drawn.items()]


def is_list(path):
    with path.open(encoding="utf-8-sig") as file:
        return file.read(1000).lstrip().startswith("[")


def sizes_of_lines(path):
    """(where it begins, bytes) of each line that is not empty: all are passed, few are parsed."""
    place = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield place, len(line)
            place += len(line)


def read_line(file, place):
    file.seek(place)
    return json.loads(file.readline().decode("utf-8-sig"))


def look_at_data(args):
    """(tokens of the training data, those of its longest row), from some rows of each file."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.job_model, local_files_only=True)
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    except Exception:  # not fetched yet, or not to be read
        tokenizer = None
    tokens, longest = 0, 2
    for file in args.train_file:
        for rows, number in some_rows(file):
            lengths = [length_of(one, tokenizer) for row in rows for one in answers(row)]
            longest = max(longest, *lengths)
            if "text" not in rows[0]:  # texts are split, other rows are cut
                lengths = [min(value, args.max_length) for value in lengths]
            tokens += sum(lengths) / len(rows) * number
    return tokens, min(args.max_length, math.ceil(longest))
