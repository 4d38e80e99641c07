#!/usr/bin/env python3
"""Merge a LoRA adapter into its base: a plain model that needs no PEFT, and that any tool can load.

Merges in fp32 into the base in full precision, whatever the adapter was trained on, and casts afterwards. Nothing is
left in --output_dir unless the merged model, and then what was written of it, answers as base + adapter do.
Takes 4 bytes of memory per parameter, and no GPU.

By hand       python merge_lora.py --adapter_name_or_path output --output_dir output/merged
Figures       the same with --verify
Follows       https://huggingface.co/docs/peft/package_reference/lora, "merge_and_unload"
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path


def main(argv=None):
    args = parse(argv)
    check_output(args)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, would guess and warn
    adapter = find_adapter(args)
    from transformers.utils import logging  # from here on it takes seconds

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base, dtype, facts = find_base(args, adapter)
    model, tokenizer, ids, alone = load_model(args, adapter, base)
    wanted = logits_of(model, ids)
    if not wanted.isfinite().all():
        fail(f"the tokenizer has {len(tokenizer)} tokens, more than {base}, and the adapter does not bring their rows.")
    model = merge(args, model)
    merged = logits_of(model, ids)
    check_same("the merged model", merged, wanted)
    written = save(args, adapter, base, model, tokenizer, dtype)
    cast, tied, parameters = logits_of(model, ids), is_tied(model), sum(p.numel() for p in model.parameters())
    del model  # what was written takes its memory
    reloaded = logits_of(load_base(args, written), ids)
    check_same("what was written", reloaded, cast, written)
    written.replace(args.output_dir)

    change = largest(wanted[:, : alone.shape[1], : alone.shape[2]], alone)  # without tokens that the base lacks
    if args.verify:
        figures = {"base + adapter against the base": change, "merged against base + adapter": largest(merged, wanted),
                   f"cast to {dtype} against merged": largest(cast, merged),
                   "read back against cast": largest(reloaded, cast)}  # fmt: skip
        for name, figure in figures.items():
            say("verify", f"{name}: logits differ by {figure:.1e} at most; the largest is {wanted.abs().max():.1f}")
    if change == 0:
        say("note", "the adapter changes nothing, it was not trained: this is the base")
    if "bit" in facts.get("trained_on", ""):
        say("note", f"trained on the base in {facts['trained_on']}, merged into it in full precision: without its "
                    "rounding the answers differ a little from what the adapter learned with. Score them.")  # fmt: skip
    say("merged", f"{args.output_dir}: {parameters:,} parameters in {dtype}, embeddings {'' if tied else 'un'}tied; "
                  "answers as base + adapter")  # fmt: skip
    say("next", f"python ../generate_text/generate_text.py --model_name_or_path {args.output_dir} --prompt TEXT")


# ---- What is merged ----


def find_adapter(args):
    """The directory of the adapter; of a hub name, the local copy."""
    name = args.adapter_name_or_path
    try:
        if not Path(name).is_dir():
            from huggingface_hub import snapshot_download

            name = snapshot_download(name)
        kind = json.loads((Path(name) / "adapter_config.json").read_text("utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--adapter_name_or_path {name} is no adapter here, nor could it be fetched: {str(error)[:200]}")
    if kind != "LORA":
        fail(f"the adapter in {name} is of the kind {kind}; only LORA can be merged.")
    return Path(name)


def find_base(args, adapter):
    """Return (base, dtype to write, what the adapter tells of the base); refuse one that is missing or another one."""
    from transformers import AutoConfig

    record = json.loads((adapter / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path") or "?"
    places = [Path(record), adapter / record, adapter.parent / record]
    base = args.base_model_name_or_path or next((str(place) for place in places if place.is_dir()), record)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        fail(f"the adapter's base {base} is not here, nor could it be fetched. Say where it is with "
             f"--base_model_name_or_path. ({str(error)[:150]})")  # fmt: skip
    if getattr(config, "quantization_config", None):
        fail(f"the base {base} is stored quantised: merging would round the adapter away. Give the model in full "
             "precision with --base_model_name_or_path.")  # fmt: skip
    facts = read_facts(adapter)
    if facts.get("fingerprint") is None:
        say("note", "the adapter does not tell which weights it was trained on: only names and shapes are compared")
    elif facts["fingerprint"] != fingerprint(base):
        fail(f"{base} is not what the adapter was trained on ({facts['base_model']}), or its weights have changed: it "
             "would answer nonsense. Say where the right one is with --base_model_name_or_path.")  # fmt: skip
    stored = str(config.dtype).removeprefix("torch.")
    auto = {"bfloat16": "bf16", "float16": "fp16"}.get(stored, "fp32")
    return base, (auto if args.dtype == "auto" else args.dtype), facts


def load_base(args, name):
    """A model in fp32 on the CPU; one that lacks weights is refused."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(name, **options)
    if info["missing_keys"]:
        fail(f"{name} lacks weights that would be random: {sorted(info['missing_keys'])[:3]}. Fetch it again.")
    return model.eval()


def load_model(args, adapter, base):
    """Return (base + adapter in fp32, tokenizer, ids to try it on, the base's logits); refuse what does not fit."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from transformers import AutoTokenizer

    own = (adapter / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter if own else base, trust_remote_code=args.trust_remote_code)
        model, saved = load_base(args, base), load_peft_weights(str(adapter), device="cpu")
        rows = len(model.get_input_embeddings().weight)
        ids = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(0))
        alone = logits_of(model, ids)
        prepare_embeddings(model, saved, len(tokenizer))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", ".*missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter).eval()
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning) as error:
        fail(f"{args.adapter_name_or_path} does not fit on {base}: {str(error)[:250]}")
    known = {*get_peft_model_state_dict(model, save_embedding_layers=False), *model.state_dict()}
    if not known >= saved.keys():
        fail(f"{args.adapter_name_or_path} does not fit on {base}, which has no {min(saved.keys() - known)}.")
    new = torch.arange(rows, len(tokenizer)).expand(2, -1)[:, -16:]
    return model, tokenizer, torch.cat([ids, new], 1), alone


def prepare_embeddings(model, saved, tokens):
    """Make room for new tokens, and untie where the adapter replaces one end."""
    import torch

    rows = len(model.get_input_embeddings().weight)
    model.config.tie_word_embeddings = is_tied(model)  # what counts is the file, not what its config says
    if tokens > rows:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for weight in (embedding.weight, head.weight):
        weight.data[rows:] = torch.nan  # so that a row which the adapter does not bring shows
    ends = tuple(f"base_model.model.{name}." for name, m in model.named_modules() if m is embedding or m is head)
    if is_tied(model) and any(key.startswith(ends) and ".token_adapter." not in key for key in saved):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def merge(args, model):
    """The base with the adapter added to its weights; refuses an adapter that makes them infinite or NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            fail(f"{args.adapter_name_or_path} cannot be merged: {str(error)[:200]}")


def save(args, adapter, base, model, tokenizer, dtype):
    """Cast the model and write it beside --output_dir, with what other tools look for; return the directory."""
    import torch
    from safetensors import SafetensorError
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    if (adapter / "generation_config.json").is_file():  # with the tokens that end an answer
        model.generation_config = GenerationConfig.from_pretrained(adapter)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        )
    written = Path(args.output_dir).with_name(Path(args.output_dir).name + ".partial")
    shutil.rmtree(written, ignore_errors=True)
    try:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        mask = os.umask(0)
        os.umask(mask)
        for path in written.glob("*.safetensors"):
            path.chmod(0o666 & ~mask)  # safetensors writes for the owner only
        for name in ("tokenizer.model", "spiece.model"):  # transformers reads these, and writes tokenizer.json alone
            quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
            source = adapter / name if (adapter / name).is_file() else cached_file(base, name, **quiet)
            if source is not None:
                shutil.copy(source, written / name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(written, ignore_errors=True)
        fail(f"--output_dir {args.output_dir} cannot be written: {str(error)[:200]}")
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return written


# ---- Comparing ----


def logits_of(model, ids):
    """Logits of token ids, shape (rows, tokens, vocabulary)."""
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def largest(one, other):
    """The largest difference of two models' logits."""
    return (one - other).abs().max().item()


def check_same(name, found, wanted, written=None):
    """Refuse a result whose logits differ by more than 1e-4 of the largest one: fp32 rounding stays far below."""
    if not largest(found, wanted) <= 1e-4 * wanted.abs().max().item():
        if written:
            shutil.rmtree(written)
        fail(f"{name} does not answer as it should: its logits differ by {largest(found, wanted):.1e}, the largest "
             f"is {wanted.abs().max():.1e}. Nothing was written. (Beyond fp16's range? Try --dtype bf16.)")  # fmt: skip


def is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


# ---- Arguments and errors ----


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, switch = parser.add_argument, {"type": boolean, "nargs": "?", "const": True, "default": False}
    add("--adapter_name_or_path", required=True, help="Directory or hub name of the adapter.")
    add("--output_dir", required=True, help="Where the merged model goes; must be empty or not there.")
    add("--base_model_name_or_path", help="Where the base is now. Default: where the adapter says it was.")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="What to store. auto: as the base.")
    add("--verify", **switch, help="Print how far the logits differ at each step.")
    add("--trust_remote_code", **switch, help="Run code from the model's repository. Only if you have read it.")
    return parser.parse_args(argv)


def check_output(args):
    """Refuse what could not be written, before anything is loaded."""
    output = Path(args.output_dir)
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            fail(f"--output_dir {output} holds something already. Choose another, or remove it.")
        output.mkdir(parents=True, exist_ok=True)
        writable = os.access(output.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        fail(f"--output_dir {output} cannot be written. Choose another directory.")


# Copied from generate_text/generate_text.py
def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


# Copied from finetune_lora/finetune_lora.py
def fingerprint(name):
    """A hash over 16 entries of each tensor of a checkpoint; the same in any file format and dtype that loses nothing.

    It tells the base that an adapter was trained on from another model of the same shape. None without weight files.
    """
    from zipfile import is_zipfile

    import torch
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    directory, samples = Path(cached_file(name, "config.json")).parent, set()
    files = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    for file in files:
        is_safe = file.suffix == ".safetensors"  # either way only what is looked at is read
        tensors = load_file(file) if is_safe else torch.load(file, "cpu", mmap=is_zipfile(file), weights_only=True)
        for tensor in tensors.values():
            samples.add(tensor.flatten()[:: max(1, tensor.numel() // 16)].to(torch.float32).numpy().tobytes())
    return hashlib.sha256(b"".join(sorted(samples))).hexdigest() if files else None


# Copied from finetune_lora/finetune_lora.py
def read_facts(directory):
    """What save_adapter wrote about the base; empty where something else made the adapter."""
    path = Path(directory) / "base_model.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


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
