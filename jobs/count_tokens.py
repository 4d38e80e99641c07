"""Count the tokens of training data roughly, from the first rows of each file; for estimate.py."""

import json
import math
import os
from pathlib import Path

from run_common import fail


def texts(value):
    """All texts in a row, however deep."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if type(value) is list else ():
        yield from texts(part)


def first_rows(file):
    """(the first 300 rows of a file, how many it has, roughly)."""
    path = Path(os.path.expanduser(file))
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow.parquet import ParquetFile

            parquet = ParquetFile(path)
            return next(parquet.iter_batches(300)).to_pylist(), parquet.metadata.num_rows
        with path.open(encoding="utf-8-sig") as lines:
            if lines.read(1000).lstrip().startswith("["):
                rows = json.loads(path.read_text("utf-8-sig"))
                return rows[:300], len(rows)
            lines.seek(0)
            lines = [line for _, line in zip(range(300), lines, strict=False) if line.strip()]
        size = sum(len(line.encode()) for line in lines)
        return [json.loads(line) for line in lines], path.stat().st_size / size * len(lines)
    except Exception as error:  # of a damaged file, anything
        return fail(f"--train_file {file}: {error!r}")


def look_at_data(args):
    """(tokens of the training data, those of its longest row), from the first rows of each file."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.job_model, local_files_only=True)
        length = lambda text: len(tokenizer(text, verbose=False)["input_ids"])  # noqa: E731
    except Exception:  # not fetched yet, or not to be read
        length = lambda text: len(text.encode()) / 3  # noqa: E731 -- a Japanese letter
    tokens, longest = 0, 2
    for file in args.train_file:
        rows, number_of_rows = first_rows(file)
        lengths = [length("\n".join(texts(row))) for row in rows]
        longest = max(longest, *lengths)
        if "text" not in rows[0]:  # texts are split, other rows are cut
            lengths = [min(value, args.max_length) for value in lengths]
        tokens += sum(lengths) / len(rows) * number_of_rows
    return tokens, min(args.max_length, math.ceil(longest))
