#!/usr/bin/env python3
"""Compare how generate_text.py reads a prompt with what other programs read from the same DIR.

vLLM, lm-evaluation-harness and most others take AutoTokenizer, its chat template and
generation_config.json. Where those give other ids, or stop elsewhere, a model answers worse there
and nothing says why. Needs no weights. Exit status: 0 all the same, 1 something differs.

By hand       python show_ids.py --model_name_or_path DIR --prompt TEXT
A chat        python show_ids.py --model_name_or_path DIR --instruction TEXT
"""

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parent.parent / "generate_text"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model_name_or_path", type=os.path.expanduser, required=True, help="a model, an adapter")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--prompt", help="a text as it is, as in rows with `prompt`")
    kind.add_argument("--instruction", help="a user's turn, which goes into the chat template")
    add("--trust_remote_code", action="store_true", help="run the repository's code")
    given = parser.parse_args(argv)
    import generate_text  # the real one: a copy could drift away from it

    words = ["--model_name_or_path", given.model_name_or_path, "--prompt", given.prompt or ""]
    args = generate_text.parse(words + ["--trust_remote_code"] * given.trust_remote_code)
    generate_text.check_arguments(args)
    row = {"prompt": given.prompt}
    if given.instruction is not None:
        row = {"instruction": given.instruction}
    try:
        tokenizer = generate_text.load_tokenizer(args)
        form, ours = generate_text.encode_prompt(row, tokenizer)
        ends = ends_of(generate_text, args, tokenizer, form)
        theirs = other_ids(args, row)
        their_ends = saved_ends(args.model_name_or_path)
    except Exception as error:  # damaged files can raise anything
        why = error if " " in str(error) else repr(error)
        generate_text.fail(f"{args.model_name_or_path}: {why}")
    show = tokenizer.convert_ids_to_tokens
    print(f"ids        {' '.join(map(str, ours))}")
    print(f"tokens     {' '.join(map(str, show(ours)))}")
    first = generate_text.leading_ids(tokenizer)
    print(f"BOS        {f'{show(first)[0]} ({first[0]})' if first else 'none'} before every text")
    print(f"ends       {', '.join(f'{show(i)} ({i})' for i in ends)}")
    problems = list(compare(given, args, tokenizer, ours, theirs, ends, their_ends))
    for problem in problems:
        print(f"differs    {problem}")
    if not problems:
        print("same       AutoTokenizer gives these ids, generation_config.json these ends")
    if args.recorded:
        print(f"adapter    on {args.base}: merge it first (merge_lora.py), or name both")
    raise SystemExit(1 if problems else 0)


def ends_of(generate_text, args, tokenizer, form):
    """The ids at which generate_text.py stops."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(args.base, trust_remote_code=args.trust_remote_code)
    try:
        saved = GenerationConfig.from_pretrained(args.base)
    except OSError:  # there is none: as a model has it then
        saved = GenerationConfig.from_model_config(config)
    model = SimpleNamespace(generation_config=saved, config=config)
    generate_text.set_generation(args, model, tokenizer, is_chat=form != "prompt")
    return model.generation_config.eos_token_id


def other_ids(args, row):
    """What AutoTokenizer alone makes of the row; None where it has no chat template for it."""
    from transformers import AutoTokenizer

    name, remote = args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **remote)
    if "prompt" in row:
        return tokenizer(row["prompt"])["input_ids"]
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": row["instruction"]}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def saved_ends(name):
    """eos_token_id of generation_config.json, else of config.json, as a list."""
    from transformers.utils import cached_file  # of a directory and of a hub name

    quiet = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    for file in ("generation_config.json", "config.json"):
        if path := cached_file(name, file, **dict.fromkeys(quiet, False)):
            ids = json.loads(Path(path).read_text("utf-8")).get("eos_token_id")
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []


def compare(given, args, tokenizer, ours, theirs, ends, their_ends):
    """A line for everything that others would do differently."""
    if theirs is None:
        yield "it has no chat template. Save it with one: tokenizer.chat_template, save_pretrained"
    elif ours != theirs:
        place = 0  # where they part
        while ours[: place + 1] == theirs[: place + 1]:
            place += 1
        yield f"AutoTokenizer from id {place} on: {' '.join(map(str, theirs[place:][:12]))} ..."
    missing = sorted({*ends} - {*their_ends})
    if missing:
        words = " ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in missing)
        yield f"generation_config.json does not end at {words} ({', '.join(map(str, missing))})"


if __name__ == "__main__":
    main()
