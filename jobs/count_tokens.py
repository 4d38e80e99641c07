"""Count the tokens of training data roughly, from 300 rows all over each file; for estimate.py."""

import json
import math
import os
from pathlib import Path

from run_common import check, fail


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


def some_rows(file):
    """(up to 300 rows from all over a file, how many it has, roughly)."""
    path = Path(os.path.expanduser(file))
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow.parquet import ParquetFile

            parquet = ParquetFile(path)
            number, groups = parquet.metadata.num_rows, range(parquet.num_row_groups)
            groups, rows = groups[:: max(1, len(groups) // 10)], []
            for group in groups:
                some = next(parquet.iter_batches(300 // len(groups), row_groups=[group]), None)
                rows += some.to_pylist() if some else []
        elif is_list(path):
            rows = json.loads(path.read_text("utf-8-sig"))
            rows, number = spread(rows), len(rows)
        else:
            lines = some_lines(path)
            number = path.stat().st_size / max(1, sum(map(len, lines))) * len(lines)
            rows = [json.loads(line.decode("utf-8-sig")) for line in lines]
    except Exception as error:  # of a damaged file, anything
        fail(f"--train_file {file}: {error!r}")
    is_good = rows and all(isinstance(row, dict) for row in rows)
    check(is_good, f"--train_file {file} holds no rows: objects, one a line or in a list.")
    return rows, number


def spread(rows):
    """Ten rows in succession at each of 30 places."""
    starts = range(0, len(rows), max(10, len(rows) // 30))
    return [row for start in starts for row in rows[start : start + 10]]


def is_list(path):
    with path.open(encoding="utf-8-sig") as file:
        return file.read(1000).lstrip().startswith("[")


def some_lines(path):
    """Ten lines at each of 30 places of a file."""
    found, size = {}, path.stat().st_size
    with path.open("rb") as file:
        for part in range(30):
            file.seek(part * size // 30)
            if part:
                file.readline()  # the rest of a line
            for _ in range(10):
                place, line = file.tell(), file.readline()
                if line.strip():
                    found[place] = line
    return list(found.values())


def look_at_data(args):
    """(tokens of the training data, those of its longest row), from some rows of each file."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.job_model, local_files_only=True)
        length = lambda text: len(tokenizer(text, verbose=False)["input_ids"])  # noqa: E731
    except Exception:  # not fetched yet, or not to be read
        length = lambda text: len(text.encode()) / 3  # noqa: E731 -- a Japanese letter
    tokens, longest = 0, 2
    for file in args.train_file:
        rows, number_of_rows = some_rows(file)
        lengths = [[length("\n".join(texts(one))) for one in answers(row)] for row in rows]
        lengths = [value for values in lengths for value in values]
        longest = max(longest, *lengths)
        if "text" not in rows[0]:  # texts are split, other rows are cut
            lengths = [min(value, args.max_length) for value in lengths]
        tokens += sum(lengths) / len(rows) * number_of_rows
    return tokens, min(args.max_length, math.ceil(longest))
