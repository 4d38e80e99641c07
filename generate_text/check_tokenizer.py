#!/usr/bin/env python3
"""Count what a tokenizer, as transformers reads it now, loses of your texts, and where ids differ.

Only for models with a sentencepiece file, whose ids are the right ones. Where texts are lost,
convert_tokenizer.py writes a tokenizer without that fault.

By hand  python check_tokenizer.py --model_name_or_path DIR --text_file train.jsonl
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Copied from generate_text/convert_tokenizer.py
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.model")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, path = parser.add_argument, {"type": os.path.expanduser}
    add("--model_name_or_path", **path, required=True, help="A directory, or a fetched hub model.")
    add("--text_file", **path, required=True, help="JSON Lines or JSON: all texts; else each line.")
    args = parser.parse_args(argv)
    file = args.text_file
    check(Path(file).is_file(), f"--text_file {file} is not there, seen from {Path.cwd()}.")
    directory = find_model(args.model_name_or_path)
    files = [directory / name for name in SENTENCEPIECE if Path(directory, name).is_file()]
    check(files, f"{directory} holds none of {', '.join(SENTENCEPIECE)}: nothing to compare with.")
    count_losses(directory, files[0], Path(file))


def count_losses(directory, file, text_file):
    """Say how many texts get other ids than from the sentencepiece file, and how many are lost."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = SentencePieceProcessor(model_file=str(file))
    texts, lost, other, characters = read_texts(text_file), [], 0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=False)
        other += ids != model.encode(text)
        if back != text:
            lost.append(f"{text[:60]!r} came back as {back[:60]!r}")
            characters += sum(character not in back for character in text)
    print(f"texts      {len(texts):,} in {text_file}")
    print(f"ids        {other:,} get other ids than from sentencepiece itself")
    gone = f"{characters:,} characters are gone"
    print(f"lost       {len(lost):,} do not come back as they were; {gone}")
    if lost:
        print(f"example    {lost[0]}")


def read_texts(path):
    """Every string in a JSON Lines or JSON file; of another file, every line."""
    suffix = path.suffix.lower()
    try:
        content = path.read_text(encoding="utf-8-sig")
        values = json.loads(content) if suffix == ".json" else content.split("\n")
        if suffix == ".jsonl":
            values = [json.loads(line) for line in values if line.strip()]
    except ValueError as error:
        fail(f"{path} is not UTF-8, or malformed JSON: {error}.")
    texts = [text for text in strings(values) if text]
    check(texts, f"{path} holds no text.")
    return texts


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


# Copied from generate_text/convert_tokenizer.py
def check(condition, message):
    if not condition:
        fail(message)


# Copied from generate_text/convert_tokenizer.py
def fail(message):
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


# Copied from generate_text/convert_tokenizer.py
def find_model(name):
    """The directory of a model: the path itself, or the hub's cache of it."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        fail(f"{name} is not here. Fetch it first: bash ../jobs/fetch_model.sh {name}")


if __name__ == "__main__":
    main()
