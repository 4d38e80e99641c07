#!/usr/bin/env python3
"""How likely does a model find each of the answers that a question allows?

Each row of the file has a `prompt` (or `messages`) and `answer_choices`, a list of texts; rows
without are left out. Written is the same row with, for each choice, `choice_logprobs`, the sum of
the log-probabilities of its tokens behind the prompt (no token for the end of an answer counts),
and `choice_tokens`, their number. The prompt has the ids that it has in training and in generation,
and a choice those of an answer: both are tokenized apart, BOS comes once. What a chat template
writes before each answer (an empty thought, say) belongs to the prompt. evaluate_jglue.py writes
such files, runs this and turns the numbers into scores.

    python score_choices.py --model_name_or_path MODEL --prompt_file FILE --output_file OUT

Costs less than generating: one pass over the prompt where all choices are single tokens, else one
for each choice. Interrupted, the same command goes on where it stopped; a file STOP beside OUT,
SIGTERM or $DEADLINE end it between two batches, with status 75 (as in generate_text.py).
Follows https://github.com/EleutherAI/lm-evaluation-harness (its multiple-choice tasks).
"""

import argparse
import inspect
import json
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path += [
    str(Path(__file__).resolve().parent.parent / name) for name in ("generate_text", "jobs")
]
try:  # the model and its ids as in generation; what lets a file go on where it was cut off
    import keep_answers

    from generate_text import (
        check,
        check_arguments,
        choose_precision,
        encode_prompt,
        fail,
        load_model,
        load_tokenizer,
        note,
        string_to_bool,
    )
except ImportError:
    needed = "../jobs and ../generate_text"
    print(f"error: this script needs the directories {needed}. Copy them along.", file=sys.stderr)
    raise SystemExit(2) from None

# What generate_text.py asks for, and what is not asked for here.
FIXED = {"prompt": None, "max_new_tokens": 1, "do_sample": False, "temperature": 1, "top_p": 1}
FIXED |= {"seed": 0, "compare_base": False, "chat": False}


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add, path = parser.add_argument, {"type": os.path.expanduser}
    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    add("--model_name_or_path", **path, required=True, help="A model or an adapter, or a hub name.")
    add("--prompt_file", **path, required=True, help="JSON Lines with answer_choices in each row.")
    add("--output_file", **path, required=True, help="Where the rows go, with choice_logprobs.")
    add("--batch_size", type=int, help="Texts at once. Default: 64 on a GPU, 8 on a CPU.")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="Of weights.")
    add("--device_map", help="auto: all GPUs for one model; cpu: none. Default: one GPU.")
    add("--load_in_8bit", **switch, help="Half the memory; slower, slightly other numbers.")
    add("--load_in_4bit", **switch, help="A quarter of the memory (NF4); numbers differ more.")
    add("--allow_partly_quantized", **switch, help="Even if most of it stays in 16 bit.")
    add("--chat_template", **path, help="alpaca, or a Jinja file. Default: the tokenizer's own.")
    add("--chat_template_kwargs", default="{}", help='Like {"enable_thinking": false}.')
    add("--trust_remote_code", **switch, help="Run the repository's code. Read it first.")
    parser.set_defaults(**FIXED)
    return parser.parse_args(argv)


# ---- Reading ----


def encode_choice(row, choice, tokenizer):
    """The ids of an answer as in training, but its end; those of what the template puts first."""
    encode, lead = partial(tokenizer, add_special_tokens=False, verbose=False), ""
    if "messages" in row:
        turns, render = row["messages"], tokenizer.apply_chat_template
        before = render(turns, tokenize=False, add_generation_prompt=True)
        after = render([*turns, {"role": "assistant", "content": choice}], tokenize=False)
        start, found, _ = after.removeprefix(before).partition(choice)
        if after.startswith(before) and found:  # if not, it cannot be trained, but generated
            lead = start  # a space, or an empty thought
    return encode(lead + choice)["input_ids"], encode(lead)["input_ids"]


def encode_row(row, tokenizer, positions):
    """Return (ids of the prompt, ids of each choice); raise ValueError on what cannot be scored."""
    choices = row["answer_choices"]
    is_list = isinstance(choices, list) and all(isinstance(one, str) for one in choices)
    if not is_list or len({*choices}) < max(2, len(choices)):
        raise ValueError("answer_choices must be a list of two or more different texts.")
    if "messages" in row and row["messages"][-1]["role"] == "assistant":
        raise ValueError("the last message is an answer already.")
    prompt = encode_prompt(row, tokenizer)[1]
    pairs = [encode_choice(row, choice, tokenizer) for choice in choices]
    # A lead is no choice, as far as its ids are the same before all of them.
    lead = os.path.commonprefix([ids for pair in pairs for ids in pair])  # noqa: RUF071 -- of ids
    prompt, ids = prompt + lead, [choice[len(lead) :] for choice, _ in pairs]
    if not prompt or not all(ids) or len({*map(tuple, ids)}) < len(ids):
        raise ValueError("the prompt or a choice has no tokens, or two choices have the same.")
    longest = len(prompt) + max(map(len, ids))
    if longest > positions:
        raise ValueError(f"{longest:,} tokens, of {positions:,} positions at most.")
    return prompt, ids


def read_prompts(args, tokenizer):
    """Return (rows, [(ids of the prompt, ids of each choice)])."""
    rows, texts, left_out = [], [], 0
    for number, line in enumerate(Path(args.prompt_file).read_text("utf-8").split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict) and "answer_choices" in row:
                texts.append(encode_row(row, tokenizer, args.positions))
                rows.append(row)
            elif line.strip():
                left_out += 1
        except Exception as error:  # a template can raise anything
            fail(f"{args.prompt_file}, row {number}: {error}")
    check(rows, f"{args.prompt_file} has no row with answer_choices: there is nothing to score.")
    if left_out:
        note("left out", f"{left_out:,} rows without answer_choices")
    return rows, texts


# ---- Scoring ----


def main(argv=None):
    args = parse(argv)
    check("WORLD_SIZE" not in os.environ, "score_choices.py is one process. Leave torchrun out.")
    check_arguments(args)
    for name in FIXED.keys() - {"do_sample"}:
        delattr(args, name)  # they change no score, and are not to be recorded
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.disable(logging.WARNING)
    full = "GPU memory is full. Try a smaller --batch_size, --load_in_4bit or --device_map auto."
    try:
        precision, reason = choose_precision(args)
        args.batch_size = args.batch_size or (8 if reason == "no GPU in use" else 64)
        tokenizer = load_tokenizer(args)
        rows, texts = read_prompts(args, tokenizer)
        keep_answers.claim_output(args, precision, texts, __file__)
        model = load_model(args, precision, tokenizer).eval()
    except Exception as error:  # damaged files can raise anything
        why = error if " " in str(error) else repr(error)
        why = f"{args.model_name_or_path}{args.origin}: {why}"
        fail(full if isinstance(error, torch.OutOfMemoryError) else why)
    note("model", f"{args.model_name_or_path} ({model.config.model_type}){args.origin}")
    note("device", f"{model.device}, {precision} ({reason})")
    note("choices", f"of {len(rows):,} prompts, {max(len(p) for p, _ in texts):,} tokens at most")
    try:
        score_file(args, model, rows, texts)
    except torch.OutOfMemoryError:
        fail(full)
    except OSError as error:  # a full disk, most often
        fail(f"{error}: {args.output_file} is not finished. The same command goes on from there.")


def score_file(args, model, rows, texts):
    """Score what has no score yet, the longest first, a batch of rows at a time."""
    order = sorted(range(len(rows)), key=lambda i: -len(texts[i][0]))
    scores, began = keep_answers.read_answers(args), time.time()
    before = len(scores)
    for first in range(0, len(order), args.batch_size):
        numbers = [i for i in order[first : first + args.batch_size] if i not in scores]
        if not numbers:
            continue
        keep_answers.stop_if_asked(args, f"{len(scores):,} of {len(rows):,} rows are scored")
        results = score_rows(args, model, [texts[i] for i in numbers])
        keep_answers.add_answers(args, numbers, results)
        scores.update(zip(numbers, results, strict=True))
    keep_answers.finish(args, rows, scores)
    done = f"{len(scores) - before:,} scored now, in {time.time() - began:,.0f} s"
    note("done", f"{len(rows):,} rows in {args.output_file}; {done}")


def score_rows(args, model, texts):
    """For each (prompt, choices): the choices' summed log-probabilities, and their tokens."""
    # The last token of a choice predicts nothing here: choices of one token share their text.
    pairs = [(prompt, choice) for prompt, choices in texts for choice in choices]
    needed = {((*prompt, *choice[:-1]), len(prompt) - 1) for prompt, choice in pairs}
    inputs, found = sorted(needed, key=lambda text: len(text[0])), {}
    for first in range(0, len(inputs), args.batch_size):
        batch = inputs[first : first + args.batch_size]
        found.update(zip(batch, predict(model, batch), strict=True))
    results = []
    for prompt, choices in texts:
        sums = []
        for choice in choices:
            logprobs = found[(*prompt, *choice[:-1]), len(prompt) - 1]
            sums.append(sum(logprobs[n, token].item() for n, token in enumerate(choice)))
        finite = all(-float("inf") < value <= 0 for value in sums)
        check(finite, f"the model gives no numbers ({sums[0]}). Try --precision bf16 or fp32.")
        lengths = [len(choice) for choice in choices]
        results.append({"choice_logprobs": sums, "choice_tokens": lengths})
    return results


def predict(model, inputs):
    """For each (text, start): the log-probabilities of what follows its tokens from start on."""
    import torch

    # On the right, so without a mask: no architecture looks at what comes later.
    width = max(len(text) for text, _ in inputs)
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text, _ in inputs])
    keep = width - min(start for _, start in inputs)  # as many logits, to save memory
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = "logits_to_keep" in inspect.signature(inner.forward).parameters
    options = {"logits_to_keep": keep} if takes else {}
    with torch.inference_mode():
        logits = model(input_ids=ids.to(model.device), use_cache=False, **options).logits
    results = []
    for row, (text, start) in zip(logits[:, -keep:], inputs, strict=True):
        part = row[start - width + keep : len(text) - width + keep]
        results.append(part.float().log_softmax(-1).cpu())
    return results


if __name__ == "__main__":
    main()
