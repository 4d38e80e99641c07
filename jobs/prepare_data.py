#!/usr/bin/env python3
"""Prepare the examples of large files with all cores, in bounded memory, before or in a training.

The rows are cut into parts (10,000 rows or more, 64 parts at most). Helpers put parts into the
cache of `datasets`, from where the training takes them in the order of the files. What no helper
finishes, because of a bad row or a signal, it makes itself: the first bad row gets its line.

The training scripts import this file where `jobs` lies beside their directory. By hand, on a node
without a GPU, with the arguments that decide what the examples are, it prepares without training:

    python ../jobs/prepare_data.py finetune_full.py --model_name_or_path MODEL --train_file FILE
"""

import importlib.util
import itertools
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import datasets
import transformers
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from pyarrow.parquet import ParquetFile
from run_common import check, fail, say

ROWS, PARTS, HELPERS = 10_000, 64, 16  # rows of a part at least; parts, helpers at most


class Rows:
    """A data set of the hub, of which the first rows can be passed over without being read."""

    def __init__(self, data, start, stop):
        self.data, self.start, self.stop = data, start, stop

    def __iter__(self):
        yield from itertools.repeat(None, self.start)
        yield from self.data.select(range(self.start, self.stop))

    def __str__(self):
        return str(self.data)


def from_generator(*args, **options):
    """The same as Dataset.from_generator gives, made by several processes where it has many rows.

    A cache that cannot be written is named.
    """
    try:
        return make_dataset(*args, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        cache = datasets.config.HF_DATASETS_CACHE
        fail(f"{error.__cause__}: the cache {cache} cannot be written. Make room, or set HF_HOME.")


def make_dataset(generator, features, gen_kwargs, fingerprint):
    """Dataset.from_generator, or that of the parts.

    `gen_kwargs` have a `source`; the generator takes parts of it as (file, start, stop), and as
    `form` what the rows before a part are.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each helper warns as it starts
    parts, sizes = cut(gen_kwargs["source"])
    if len(parts) == 1:
        return Dataset.from_generator(
            generator, features, gen_kwargs=gen_kwargs, fingerprint=fingerprint
        )
    keys = [f"{fingerprint}-{Hasher.hash([(str(f), *range) for f, *range in p])}" for p in parts]

    def make(number, form=None):
        args = {**gen_kwargs, "source": parts[number], "form": form}
        return Dataset.from_generator(
            generator, features, gen_kwargs=args, fingerprint=keys[number]
        )

    found, began, last = [make(0)], time.time(), time.time()
    form, file = found[0][0]["form"], found[0].cache_files[0]["filename"]
    is_cached = all(Path(file.replace(keys[0], key)).exists() for key in keys)
    helpers = [] if is_cached else start_helpers(make, len(parts), form)
    try:
        for number in range(1, len(parts)):
            found.append(make(number, form))  # waits for the helper that is making it
            if time.time() - last > 60:
                last, done, total = time.time(), sum(sizes[: number + 1]), sum(sizes)
                left = (last - began) / (done - sizes[0]) * (total - done) / 60
                say("prepare", f"{done:,} of {total:,} rows, left {left:.0f} min")
    finally:
        for helper in helpers:
            helper.kill()
            helper.join()
    return concatenate_datasets(found)


def cut(source):
    """Return (parts, how many rows each has); a part is a tuple of (file, start, stop)."""
    counts = [count_rows(file) for file in source]
    size, parts, sizes = max(ROWS, math.ceil(sum(filter(None, counts)) / PARTS)), [[]], [0]
    for file, count in zip(source, counts, strict=True):
        check(count != 0, f"{file} has no rows.")
        for start in range(0, count or 1, size):
            stop = count and min(start + size, count)
            if parts[-1] and sizes[-1] + (stop or start) - start > size:
                parts.append([])
                sizes.append(0)
            part = file if isinstance(file, str) else Rows(file, start, stop)
            parts[-1].append((part, start, stop))
            sizes[-1] += (stop or start) - start
    return [tuple(part) for part in parts], sizes


def count_rows(file):
    """The number of rows, or of lines; None where it is read as a whole, or cannot be read."""
    if not isinstance(file, str):
        return len(file)
    try:
        if file.lower().endswith(".parquet"):
            return ParquetFile(file).metadata.num_rows
        with Path(file).open(encoding="utf-8-sig") as lines:
            if lines.read(1000).lstrip().startswith("["):
                return None
            lines.seek(0)
            return sum(1 for _ in lines)
    except Exception:  # who reads it says what is wrong, and where
        return None


def start_helpers(make, count, form):
    """Start a process for each core that this job has; each makes every so many-th part."""
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, int(os.environ.get("NCPUS") or cores), HELPERS, count - 1)
    fork, helpers = multiprocessing.get_context("fork"), []
    for first in range(1, cores + 1) if cores > 1 else ():
        args = (make, range(first, count, cores), form, os.getpid())
        helpers.append(fork.Process(target=help_out, args=args, daemon=True))
        helpers[-1].start()
    return helpers


def help_out(make, numbers, form, parent):
    """What a helper does. It says nothing: what it cannot do, its parent tries again."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    for number in numbers:
        if os.getppid() == parent:
            make(number, form)


def main(argv=None):
    from check_arguments import check_arguments
    from find_run import describe

    words = sys.argv[1:] if argv is None else argv
    check(words and Path(words[0]).is_file(), "give a training script, and its arguments.")
    spec = importlib.util.spec_from_file_location("training_script", words[0])
    sys.modules[spec.name] = train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        script, training, given = train.parse(words[1:])
        check_arguments(script, training, given)
        tokenizer, max_length = train.load_tokenizer(script)
        train.load_data(script, training, tokenizer, max_length, describe(script, words[0]))
    except Exception as error:
        fail(error if " " in str(error) else repr(error))
    say("prepared", "a training with these arguments begins with what is in the cache now")


if __name__ == "__main__":
    main()
