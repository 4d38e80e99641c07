#!/usr/bin/env python3
"""Talk to a causal language model, or to an adapter on top of one, through its chat template.

What was said before is part of each prompt, with the token ids it had in training; when the
model's positions are full, the oldest turns are forgotten. `exit` or Ctrl-D ends the chat.
Weights take 2 bytes per parameter (4 on a CPU, 1 in 8 bit, about 0.5 in 4 bit). Prompts, tokenizer
and model are those of generate_text.py, which stands beside this file.

By hand  python chat.py --model_name_or_path MODEL
A node   qsub -I -P GROUP -q rt_HG -l select=1; there: source ../jobs/env.sh, and the same
Follows  https://huggingface.co/docs/transformers/chat_templating
"""

import argparse
import logging
import os
import sys
from contextlib import suppress

import torch
from transformers import TextStreamer
from transformers.hf_argparser import string_to_bool
from transformers.utils.logging import disable_progress_bar

try:
    from generate_text import (
        chat_texts,
        check_arguments,
        choose_precision,
        fail,
        keep_answers,
        leading_ids,
        load_model,
        load_tokenizer,
        note,
        set_generation,
    )
except ImportError as error:
    print(f"error: {error}: chat.py needs generate_text.py beside it.", file=sys.stderr)
    raise SystemExit(2) from None

# ---- 1. Settings ----


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add, path = parser.add_argument, {"type": os.path.expanduser}
    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    add("--model_name_or_path", **path, required=True, help="A model or an adapter, or a hub name.")
    add("--max_new_tokens", type=int, default=128, help="Longest answer; time grows with it.")
    add("--do_sample", **switch, help="Draw the tokens instead of taking the likeliest.")
    add("--temperature", type=float, default=1, help="For drawing: below 1 tamer, above 1 wilder.")
    add("--top_p", type=float, default=1, help="Draw from the likeliest tokens of this total.")
    add("--seed", type=int, default=42, help="The same seed draws the same answers.")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="Of weights.")
    add("--device_map", help="auto: all GPUs for one model; cpu: none. Default: one GPU.")
    add("--load_in_8bit", **switch, help="Half the memory; slower, slightly other answers.")
    add("--load_in_4bit", **switch, help="A quarter of the memory (NF4); answers differ more.")
    add("--allow_partly_quantized", **switch, help="Even if most of it stays in 16 bit.")
    add("--chat_template", **path, help="alpaca, or a Jinja file. Default: the tokenizer's own.")
    add("--chat_template_kwargs", default="{}", help='Like {"enable_thinking": false}.')
    add("--trust_remote_code", **switch, help="Run the repository's code. Read it first.")
    # What generate_text.py is asked beside this.
    parser.set_defaults(prompt="", prompt_file=None, output_file=None, batch_size=1)
    parser.set_defaults(compare_base=False, chat=False, form="messages")
    return parser.parse_args(argv)


# ---- 2. Prompts: the same ids as in training ----


def encode_chat(turns, tokenizer):
    """The ids of a conversation as far as the next answer; its parts are tokenized apart."""
    parts = [tokenizer(text, add_special_tokens=False) for text in chat_texts(turns, tokenizer)]
    ids, first = [i for part in parts for i in part["input_ids"]], leading_ids(tokenizer)
    return ids if ids[: len(first)] == first else first + ids


# ---- 3. Chat ----


def main(argv=None):
    args = parse(argv)
    check_arguments(args)
    disable_progress_bar()
    logging.disable(logging.WARNING)
    full = "GPU memory is full. Try --load_in_4bit true, or --device_map auto on several GPUs."
    try:
        precision, reason = choose_precision(args)
        tokenizer = load_tokenizer(args)
        model = load_model(args, precision, tokenizer)
        set_generation(args, model, tokenizer, is_chat=True)
    except Exception as error:  # damaged files can raise anything
        why = error if " " in str(error) else repr(error)
        why = f"{args.model_name_or_path}{args.origin}: {why}"
        fail(full if isinstance(error, torch.OutOfMemoryError) else why)
    note("model", f"{args.model_name_or_path} ({model.config.model_type}){args.origin}")
    where = f"{model.device}, {precision} ({reason}){args.quantised}"
    note("device", f"{where}; exit or Ctrl-D ends the chat")
    try:
        talk(args, model, tokenizer)
    except torch.OutOfMemoryError:
        fail(full)


def talk(args, model, tokenizer):
    """Answer line after line until the end of the input."""
    is_shown, stops, turns = sys.stdout.isatty(), model.generation_config.eos_token_id, []
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True, **plain) if is_shown else None
    for line in read_lines():
        turns.append({"role": "user", "content": line})
        prompt = encode_chat(turns, tokenizer)
        while len(prompt) + args.max_new_tokens > args.positions and len(turns) > 1:
            note("forgotten", turns[0]["content"])
            turns = turns[2:]
            prompt = encode_chat(turns, tokenizer)
        room = min(args.max_new_tokens, args.positions - len(prompt))
        if room < 1:
            note("too long", f"{len(prompt):,} tokens, of {args.positions:,} positions at most")
            turns = []
            continue
        torch.manual_seed(args.seed + len(turns))
        ids = torch.tensor([prompt]).to(model.device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": room}
        output = model.generate(input_ids=ids, streamer=streamer, **options)
        new = output[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(new) if token in stops), len(new))
        start = keep_answers.start_of_answer(args, tokenizer, new[:end]) if keep_answers else 0
        answer = tokenizer.decode(new[start:end], **plain)
        if not is_shown:  # the streamer has shown it already
            print(answer, flush=True)
        turns.append({"role": "assistant", "content": answer})


def read_lines():
    """The lines of the input that are not empty, up to its end or to `exit`."""
    ask = "> " if sys.stdin.isatty() else ""
    if ask:
        import readline  # noqa: F401 -- gives input() line editing that knows wide characters
    with suppress(EOFError):
        while (line := input(ask).strip()) != "exit":
            if line:
                yield line


if __name__ == "__main__":
    main()
