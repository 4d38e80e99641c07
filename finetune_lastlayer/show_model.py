#!/usr/bin/env python3
"""List what a causal language model consists of, and what a --train of finetune_lastlayer.py would train of it.

One line covers the tensors that differ in the number of their block alone: the name to give to --train, the module it
belongs to (what LoRA calls a target), shape, dtype, parameters and their share of the total. Nothing but the
configuration is read: it takes seconds and no memory for a model of any size.

By hand       python show_model.py --model_name_or_path MODEL
A choice      python show_model.py --model_name_or_path MODEL --train 'layers\\.(30|31)\\.'     (* marks what it trains)
"""

import argparse
import os
import re
import sys
import time


def main(argv=None):
    args = parse(argv)
    global torch  # takes seconds: --help and a typo do not wait for it
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = load_outline(args)
    chosen = choose_parameters(model, args.train) if args.train else []
    head = untie(model, chosen)
    total = sum(parameter.numel() for parameter in model.parameters())
    say("model", f"{args.model_name_or_path} ({model.config.model_type}), {total:,} parameters")
    print_table(list_tensors(model, chosen, total))
    if args.train:
        trained = sum(parameter.numel() for name, parameter in model.named_parameters() if name in chosen)
        rows = ", and of these the rows of the new tokens only" if args.train == "new_tokens" else ""
        memory = 4 * total + 12 * trained
        say("trained", f"* {trained:,} of {total:,} parameters ({trained / total:.2%}){rows}")
        say("head", f"{head} (by the configuration; the weights decide when they are loaded)")
        size = f"{memory / 1e9:,.1f} GB" if memory > 1e9 else f"{memory / 1e6:,.1f} MB"
        say("memory", f"{size} and activations (computed: 4 bytes per parameter in fp32, 12 more where it is trained)")


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="Directory or hub name of the model.")
    parser.add_argument("--train", help="last_layer, last_block, input_output, new_tokens, or a regular expression.")
    parser.add_argument("--trust_remote_code", choices=("true", "false"), default="false",
                        help="Run code from the model's repository. Only if you have read it.")  # fmt: skip
    return parser.parse_args(argv)


def load_outline(args):
    """The model on the meta device: names, shapes and dtypes without memory for the numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = {"trust_remote_code": args.trust_remote_code == "true"}
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **trusted)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **trusted)
    except (OSError, ValueError) as error:
        return fail(f"--model_name_or_path {args.model_name_or_path} is no causal language model here, nor could it be "
                    f"fetched: {error}"[:400])  # fmt: skip


def list_tensors(model, chosen, total):
    """Return the table's rows: mark, name, module, tensors, shape, dtype, parameters, share (a tied head has none)."""
    groups, seen = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        before, number, after = re.fullmatch(r"(.*?)((?<=\.)\d+(?=\.)|$)(.*)", name).groups()
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        first = seen.setdefault(id(parameter), name)
        tied_to = first if first != name else None
        key = before, after, kind, parameter.shape, parameter.dtype, name in chosen, tied_to
        groups.setdefault(key, []).append(int(number or -1))
    rows = []
    for (before, after, kind, shape, dtype, trained, tied_to), numbers in groups.items():
        size = len(numbers) * shape.numel()
        row = ["*" if trained else "", before + ranges(numbers) + after, kind, str(len(numbers)),
               " x ".join(map(str, shape)), str(dtype).removeprefix("torch.")]  # fmt: skip
        rows.append([*row, *(["", f"is {tied_to}"] if tied_to else [f"{size:,}", f"{size / total:.2%}"])])
    return rows


def ranges(numbers):
    """Numbers of blocks in short, like 0-3,7; nothing for what stands outside the blocks (-1)."""
    runs = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs if first >= 0)


def print_table(rows):
    rows = [["", "name", "module", "tensors", "shape", "dtype", "parameters", "share"], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    for row in rows:
        numbers = [row[3].rjust(widths[3]), row[4].rjust(widths[4])]
        words = [row[0].ljust(1), row[1].ljust(widths[1]), row[2].ljust(widths[2]), *numbers, row[5].ljust(widths[5])]
        print("  ".join([*words, row[6].rjust(widths[6]), row[7].rjust(7)]).rstrip())


# Copied from finetune_lastlayer/finetune_lastlayer.py
def choose_parameters(model, train):
    """Return the names of the parameters that --train means; a tied head counts under both of its names."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    where = {end: name for name, module in model.named_modules() for end in ends if module is ends[end]}
    parts = {"last_layer": [where["head"]], "input_output": [*where.values()], "new_tokens": [*where.values()]}
    if train == "last_block":
        parts[train] = [where["head"], *last_block(model)]
    if train in parts:
        return [name for name in names if name.startswith(tuple(f"{part}." for part in parts[train]))]
    try:
        chosen = [name for name in names if re.search(train, name)]
    except re.error as error:
        fail(f"--train {train} is no regular expression ({error}). Type \\. for a dot, .* for anything.")
    if not chosen:
        fail(f"--train {train} is in no parameter's name, so nothing would be trained. It is last_layer, last_block, "
             f"input_output, new_tokens, or a regular expression for names like {', '.join([*names[:3], names[-1]])}; "
             "show_model.py lists them all.")  # fmt: skip
    return chosen


# Copied from finetune_lastlayer/finetune_lastlayer.py
def last_block(model):
    """The names of the last block and of what comes behind the blocks, which is the final norm."""
    for name, blocks in model.named_modules():
        if isinstance(blocks, torch.nn.ModuleList) and len(blocks) == model.config.num_hidden_layers:
            parent, _, own = name.rpartition(".")
            children = [child for child, _ in model.get_submodule(parent).named_children()]
            behind = children[children.index(own) + 1 :]
            return [f"{name}.{len(blocks) - 1}", *(f"{parent}.{child}" for child in behind)]
    return fail(f"{type(model).__name__} has no list of its blocks. Give --train a regular expression instead.")


# Copied from finetune_lastlayer/finetune_lastlayer.py
def untie(model, chosen):
    """Give the head weights of its own where one end of tied embeddings is trained alone; return what to say of it.

    It takes both copy and configuration: without the copy the saved head would come back random, without the
    configuration other programs would tie it again.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return "has weights of its own"
    ends = {m: f"{name}.weight" in chosen for name, m in model.named_modules() if m in (head, embedding)}
    if ends[head] == ends[embedding]:
        return f"tied to the input embeddings, and stays so: {'both are' if ends[head] else 'neither is'} trained"
    model.config.tie_word_embeddings = False
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return (f"was tied to the input embeddings; untied, {head.weight.numel():,} parameters more, so that the "
            f"{'input' if ends[head] else 'output'} stays as it is")  # fmt: skip


# Copied from finetune_full/finetune_full.py
def fail(message, every_rank=False):
    """Print one line on stderr and leave with exit code 2; of several ranks only the first speaks."""
    if every_rank or int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when one leaves: let the first one speak
    raise SystemExit(2)


# Copied from finetune_full/finetune_full.py
def say(name, text):
    """One line of the report that the first rank prints."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{name:<11}{text}", flush=True)


if __name__ == "__main__":
    main()
