#!/usr/bin/env python3
"""List what a causal language model consists of, and what --train or an adapter means for it.

One line covers the tensors that differ in the number of their block alone: the name to give to
--train, the module it belongs to (what LoRA calls a target), shape, dtype, parameters and their
share of the total. Nothing but the configuration is read: it takes seconds, and no memory, for a
model of any size.

By hand   python show_model.py --model_name_or_path MODEL
A choice  python show_model.py --model_name_or_path MODEL --train 'layers\\.(30|31)\\.'
          (* marks what it trains)
Adapters  python show_model.py --model_name_or_path MODEL --method lora
          (* marks the weights that finetune_lora.py puts an adapter beside)
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path


def main(argv=None):
    args = parse(argv)
    global torch, transformers, model_layers  # takes seconds: --help and a typo do not wait for it
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    model, layers = load_outline(args), load_layers()
    model_layers = layers
    if layers:  # what text does not pass is not trained
        layers.freeze_beside_text(model)
    is_alone = not layers and (args.method or args.train == "last_block")
    problem = "--method lora and --train last_block need `jobs` beside this script's directory."
    check(not is_alone, problem)
    chosen = choose_parameters(model, args.train) if args.train else []
    if args.method == "lora":
        names = {name for name, _ in model.named_modules()}
        targets = layers.fitting(model)
        chosen = [f"{name}.weight" if name in names else name for name in targets]
    head = untie(model, chosen if args.train else [])
    total = sum(parameter.numel() for parameter in model.parameters())
    say("model", f"{args.model_name_or_path} ({model.config.model_type}), {total:,} parameters")
    print_table(list_tensors(model, chosen, total))
    if args.train:
        trained = sum(p.numel() for name, p in model.named_parameters() if name in chosen)
        only = (
            ", and of these the rows of the new tokens only" if args.train == "new_tokens" else ""
        )
        say("trained", f"* {trained:,} of {total:,} parameters ({trained / total:.2%}){only}")
        say("head", f"{head} (by the configuration; the weights decide when they are loaded)")
        memory = 4 * total + 12 * trained
        size = f"{memory / 1e9:,.1f} GB" if memory > 1e9 else f"{memory / 1e6:,.1f} MB"
        how = "computed: 4 bytes per parameter in fp32, 12 more where it is trained"
        say("memory", f"{size} and activations ({how})")
    if args.method == "lora":
        say("coverage", layers.coverage(model, targets))
        weighed = layers.weigh_layers(model)
        rounded = {n for n, (_, why) in weighed.items() if n in names and why != layers.READ_PAST}
        share = layers.share_of(weighed, rounded)
        say("rounded", f"{share:.1%} of them by --load_in_8bit true or --load_in_4bit true")


def load_layers():
    """What the training scripts know of layers, in ../jobs; None where that is not there."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "jobs"))
    try:
        import model_layers
    except ModuleNotFoundError:
        return None
    return model_layers


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Directory or hub name of the model.")
    add(
        "--train", help="last_layer, last_block, input_output, new_tokens, or a regular expression."
    )
    lora = "lora: what finetune_lora.py puts adapters beside, and why not beside the rest."
    add("--method", choices=["lora"], help=lora)
    remote = "Run code from the model's repository. Only if you have read it."
    add("--trust_remote_code", choices=("true", "false"), default="false", help=remote)
    args = parser.parse_args(argv)
    check(not (args.train and args.method), "--train or --method?")
    try:
        re.compile(args.train or "")
    except re.error as error:
        fail(f"--train {args.train} is no regular expression ({error}). Type \\. for a dot.")
    return args


def load_outline(args):
    """The model on the meta device: names, shapes and dtypes without memory for the numbers."""
    from transformers import AutoConfig

    trusted = {"trust_remote_code": args.trust_remote_code == "true"}
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **trusted)
        with torch.device("meta"):
            return auto_class(config).from_config(config, **trusted)
    except Exception as error:  # a damaged file can raise anything
        problem = "is no causal language model here, nor could it be fetched"
        return fail(f"--model_name_or_path {args.model_name_or_path} {problem}: {error}")


def list_tensors(model, chosen, total):
    """Return the table's rows: mark, name, module, tensors, shape, dtype, parameters, share."""
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
        row = ["*" if trained else "", before + ranges(numbers) + after, kind, str(len(numbers))]
        row += [" x ".join(map(str, shape)), str(dtype).removeprefix("torch.")]
        row += ["", f"is {tied_to}"] if tied_to else [f"{size:,}", f"{size / total:.2%}"]
        rows.append(row)
    return rows


def ranges(numbers):
    """Numbers of blocks in short, like 0-3,7; nothing for what stands outside the blocks (-1)."""
    runs = []
    for number in sorted(number for number in numbers if number >= 0):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def print_table(rows):
    rows = [
        [" ", "name", "module", "tensors", "shape", "dtype", "parameters", "share"],
        *rows,
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:7], widths, strict=True)]
        for column in (3, 4, 6):  # numbers stand to the right
            words[column] = row[column].rjust(widths[column])
        print("  ".join([*words, row[7].rjust(7)]).rstrip())


# Copied from jobs/published.py
def auto_class(config):
    """AutoModelForCausalLM; for a model that sees, too, the class that keeps what it sees with."""
    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


# Copied from finetune_lastlayer/finetune_lastlayer.py
def choose_parameters(model, train):
    """The names of the parameters that --train means; a tied head counts under both its names."""
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in parameters if parameter.requires_grad]
    modules = {module: name for name, module in model.named_modules()}
    head = modules[model.get_output_embeddings()]
    embedding = modules[model.get_input_embeddings()]
    parts = {"last_layer": [head], "input_output": [embedding, head]}
    parts["new_tokens"] = parts["input_output"]
    if train == "last_block":
        check(model_layers, "--train last_block needs `jobs` beside this script's directory.")
        parts["last_block"] = [head, *model_layers.last_block(model)]
    if train in parts:
        starts = tuple(f"{part}." for part in parts[train])
        return [name for name in names if name.startswith(starts)]
    chosen = [name for name in names if re.search(train, name)]
    known = f"last_layer, last_block, input_output, new_tokens or names like {names[0]}"
    check(chosen, f"--train {train} names nothing that text passes. Give {known} or {names[-1]}.")
    return chosen


# Copied from finetune_lastlayer/finetune_lastlayer.py
def untie(model, chosen):
    """Give the head its own weights where one end of tied embeddings is trained; say what is so.

    Without the copy the saved head would come back random, without the configuration tied again.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return "has weights of its own"
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    if (names[head] in chosen) == (names[embedding] in chosen):
        return "tied, and stays so: both ends are trained, or neither"
    model.config.tie_word_embeddings = False
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return f"was tied; untied, {head.weight.numel():,} parameters more: one end stays as it is"


# Copied from finetune_full/finetune_full.py
def check(condition, message):
    if not condition:
        fail(message)


# Copied from finetune_full/finetune_full.py
def fail(message, every_rank=False):
    """One line on stderr and exit code 2; of several ranks the first one speaks."""
    text = " ".join(str(message).split())[:600]
    text += " Accept its licence there, then type: hf auth login" if "gated repo" in text else ""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print("error:", text, file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when one leaves
    raise SystemExit(2)


# Copied from finetune_full/finetune_full.py
def say(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", flush=True)


if __name__ == "__main__":
    main()
