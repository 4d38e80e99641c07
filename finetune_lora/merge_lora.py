#!/usr/bin/env python3
"""Merge a LoRA adapter into its base: a plain model that needs no PEFT, and that any tool can load.

Merges in fp32 into the base in full precision, whatever the adapter was trained on, and casts
afterwards. Nothing is left in --output_dir unless the merged model, and then what was written of
it, answers as base + adapter do. Takes 4 bytes of memory per parameter, and no GPU.

By hand  python merge_lora.py --adapter_name_or_path output --output_dir output/merged
Figures  the same with --verify
Follows  https://huggingface.co/docs/peft/package_reference/lora, "merge_and_unload"
"""

import argparse
import copy
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, TokenizersBackend
from transformers.hf_argparser import string_to_bool
from transformers.utils import cached_file, logging

JOBS, published = Path(__file__).resolve().parent.parent / "jobs", None
if (JOBS / "published.py").exists():  # for a repository's own code, and for notes
    sys.path.insert(0, str(JOBS))  # before files of yours that are called alike
    import published
# What transformers does not write, or not as it was: of the tokenizer, and what shows images.
TOKENIZER = ("special_tokens_map.json", "added_tokens.json")
OTHERS = ("tokenizer.model", "spiece.model", "preprocessor_config.json", "processor_config.json")
OTHERS += ("video_preprocessor_config.json", "chat_template.json")


def main(argv=None):
    args = parse(argv)
    check_output(args)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess and warn
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        name = args.adapter_name_or_path
        adapter = Path(name if Path(name).is_dir() else snapshot_download(name))
        base, dtype = find_base(args, adapter)
        model, tokenizer, ids, alone = load_model(args, adapter, base)
        wanted = logits_of(model, ids)
        check(wanted.isfinite().all(), f"the adapter lacks rows for tokens that {base} lacks.")
        with warnings.catch_warnings(action="ignore"):
            model = model.merge_and_unload(safe_merge=True)
        merged = logits_of(model, ids)
        check_same("the merged model", merged, wanted)
        size, tied = model.num_parameters(), "tied" if is_tied(model) else "untied"
        cast, reloaded = write(args, adapter, base, model, tokenizer, dtype, ids)
    except Exception as error:  # damaged files can raise anything
        why = error if " " in str(error) else repr(error)
        fail(f"{args.adapter_name_or_path} cannot be merged: {why}")
    change = largest(wanted[:, : alone.shape[1], : alone.shape[2]], alone)  # no new tokens
    figures = {
        "base + adapter against the base": change,
        "merged against base + adapter": largest(merged, wanted),
        f"cast to {dtype} against merged": largest(cast, merged),
        "read back against cast": largest(reloaded, cast),
    }
    for name, figure in figures.items() if args.verify else ():
        text = f"{name}: logits differ by {figure:.1e} at most"
        say("verify", f"{text}; the largest is {wanted.abs().max():.1f}")
    if change == 0:
        say("note", "the adapter changes nothing, it was not trained: this is the base")
    text = f"{args.output_dir}: {size:,} parameters in {dtype}, embeddings {tied}"
    lost = figures[f"cast to {dtype} against merged"] / change if change else 0
    say("merged", text + "; answers as base + adapter" * (lost < 0.1))
    if lost >= 0.1:
        say("note", f"{lost:.0%} of what the adapter changes is rounded away: take --dtype fp32")
    generate = "python ../generate_text/generate_text.py --model_name_or_path"
    say("next", f"{generate} {shlex.quote(args.output_dir)} --prompt TEXT")


# ---- What is merged ----


def find_base(args, adapter):
    """Return (base, dtype to write); says which base it is, and which one was trained on."""
    settings = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    kind = settings["peft_type"]
    check(kind == "LORA", f"{adapter} is of the kind {kind}; only LORA can be merged.")
    record = settings.get("base_model_name_or_path") or "?"
    places = [Path(place, record) for place in (".", adapter, adapter.absolute().parent)]
    base = args.base_model_name_or_path or next((str(p) for p in places if p.is_dir()), record)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
    except Exception as error:
        problem = f"its base {base} is not here. Say where: --base_model_name_or_path."
        fail(f"{args.adapter_name_or_path} cannot be merged: {problem} ({error})")
    stored = getattr(config, "quantization_config", {}).get("quant_method")
    problem = f"the base {base} is stored quantised ({stored}): that would round the adapter away"
    is_good = stored in (None, "mxfp4", "fp8", "mxfp8", "compressed-tensors")  # can be unpacked
    check(is_good, f"{problem}. Give it in full precision with --base_model_name_or_path.")
    say("base", f"{base}; the adapter was trained on {record}")
    stored = str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
    auto = {"bfloat16": "bf16", "float16": "fp16"}.get(stored, "fp32")
    return base, (auto if args.dtype == "auto" else args.dtype)


def load_base(args, name):
    """A model in fp32 on the CPU; one that lacks weights is refused."""
    options = {"trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **options)
    if stored := getattr(config, "quantization_config", None):
        stored["dequantize"] = True
    options |= {"config": config, "dtype": "float32", "output_loading_info": True}
    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    load = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    is_own = args.trust_remote_code and hasattr(config, "auto_map")
    check(published or not is_own, "a repository's own code needs `jobs` beside this directory.")
    load = published.loader(config) if published else load
    model, info = load.from_pretrained(name, **options)
    if stored:
        model._weight_conversions = None  # it would write them packed again, or by other names
    wrong = [*info["missing_keys"], *(k for k in info["unexpected_keys"] if "weight_scale" in k)]
    problem = f"{name} lacks weights, or has packed ones: {sorted(wrong)[:3]}"
    check(not wrong, f"{problem}. Fetch it again, in bf16 or fp16.")
    return model.eval()


def load_model(args, adapter, base):
    """Return (base + adapter in fp32, tokenizer, ids to try it on, the base's logits)."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    model, saved = load_base(args, base), load_peft_weights(str(adapter), device="cpu")
    if published:
        published.say_rounding(adapter, model)
    rows, tokenizer = len(model.get_input_embeddings().weight), read_tokenizer(args, base)
    known = tokenizer.get_vocab()
    convert = f"python ../generate_text/convert_tokenizer.py --model_name_or_path {base}"
    check(max(known.values()) < rows, f"{base} has more tokens than rows. Convert it: {convert}")
    if (adapter / "tokenizer_config.json").is_file():  # it may have new tokens besides
        tokenizer = read_tokenizer(args, str(adapter))
        is_same = known.items() <= tokenizer.get_vocab().items()
        check(is_same, f"{base} has another vocabulary than it.")
    tokens = max(tokenizer.get_vocab().values()) + 1
    ids = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(0))
    alone = logits_of(model, ids)
    prepare_embeddings(model, saved, tokens)
    with warnings.catch_warnings(action="ignore"):
        warnings.filterwarnings("error", ".*missing adapter keys")
        model = PeftModel.from_pretrained(model, adapter).eval()
    known = {*get_peft_model_state_dict(model, save_embedding_layers=False), *model.state_dict()}
    unknown = sorted(saved.keys() - known)[:3]
    check(not unknown, f"{adapter} does not fit on {base}, which lacks {unknown}.")
    new = torch.arange(rows, max(rows, tokens)).expand(2, -1)[:, -16:]
    return model, tokenizer, torch.cat([ids, new], 1), alone


def read_tokenizer(args, name):
    """The tokenizer of tokenizer.json as it stands: a class may add tokens to it."""
    try:
        return TokenizersBackend.from_pretrained(name)
    except Exception:  # there is only a sentencepiece file, or code of its own
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)


def prepare_embeddings(model, saved, tokens):
    """Make room for new tokens, and untie where the adapter replaces one end."""
    rows = len(model.get_input_embeddings().weight)
    model.config.tie_word_embeddings = is_tied(model)  # the file counts, not what its config says
    if tokens > rows:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for end in ends:
        end.weight.data[rows:] = float("nan")  # a row which the adapter does not bring shows
    names = tuple(f"base_model.model.{name}." for name, m in model.named_modules() if m in ends)
    replaced = [key for key in saved if key.startswith(names) and ".token_adapter." not in key]
    if is_tied(model) and replaced:
        ends[1].weight = copy.deepcopy(ends[1].weight)
        model.config.tie_word_embeddings = False


def write(args, adapter, base, model, tokenizer, dtype, ids):
    """Cast the model, write it, read it back; return both logits. What is wrong does not stay."""
    if (adapter / "generation_config.json").is_file():  # with the tokens that end an answer
        model.generation_config = GenerationConfig.from_pretrained(adapter)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    fine = "|".join(model._get_dtype_plan(kind)).replace("*", ".*") or "$^"  # fp32 when loaded, too
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if re.search(fine, name) else kind)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=args.output_dir) as written:
        tokenizer.save_pretrained(written)
        copy_files(adapter, base, written)
        model.save_pretrained(written)
        os.umask(mask := os.umask(0))
        for path in Path(written).glob("*.safetensors"):
            path.chmod(0o666 & ~mask)  # safetensors writes for the owner only
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        cast = logits_of(model, ids)
        model.to("meta")  # what was written takes its memory
        reloaded = logits_of(load_base(args, written), ids)
        check_same("what was written", reloaded, cast)
        # config.json, which makes it a model, comes last.
        for path in sorted(Path(written).iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(Path(args.output_dir, path.name))
    with suppress(Exception):  # a note must not cost the result; nor need `jobs` be there
        published.tell_tokenizer(Path(args.output_dir))
    return cast, reloaded


def copy_files(adapter, base, written):
    """Put the published files in place of what transformers wrote of them, and beside them."""
    own = adapter if (adapter / "tokenizer_config.json").is_file() else base
    quiet = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    for name in [*os.listdir(written), *TOKENIZER, *OTHERS]:  # noqa: PTH208 -- names
        for source in (adapter, base) if name in OTHERS else (own,):
            if file := cached_file(str(source), name, **dict.fromkeys(quiet, False)):
                shutil.copyfile(file, Path(written, name))
                break


# ---- Comparing ----


def logits_of(model, ids):
    """Logits of token ids, shape (rows, tokens, vocabulary)."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def largest(one, other):
    """The largest difference of two models' logits."""
    return (one - other).abs().max().item()


def check_same(name, found, wanted):
    """Refuse logits that differ by more than 1e-4 of the largest one: rounding stays far below."""
    difference, scale = largest(found, wanted), wanted.abs().max().item()
    problem = f"{name} does not answer as it should: its logits differ by {difference:.1e}"
    hint = "Nothing was written. (Beyond fp16's range? Try --dtype bf16.)"
    check(difference <= 1e-4 * scale, f"{problem}, the largest is {scale:.1e}. {hint}")


def is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


# ---- Arguments and errors ----


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add, path = parser.add_argument, {"type": os.path.expanduser}
    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    add("--adapter_name_or_path", **path, required=True, help="Directory, hub name of the adapter.")
    add("--output_dir", **path, required=True, help="Where the model goes; empty or not there.")
    add("--base_model_name_or_path", **path, help="Where the base is. Default: the adapter's.")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="To be stored.")
    add("--verify", **switch, help="Print how far the logits differ at each step.")
    add("--trust_remote_code", **switch, help="Run the repository's code. Read it first.")
    return parser.parse_args(argv)


def check_output(args):
    """Refuse what could not be written, before anything is loaded."""
    output, is_free = Path(args.output_dir), False
    with suppress(OSError):
        output.mkdir(parents=True, exist_ok=True)
        is_free = os.access(output, os.W_OK) and not any(output.iterdir())
    check(is_free, f"--output_dir {output} must be empty, and yours to write. Choose another.")


# Copied from finetune_full/finetune_full.py
def say(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", flush=True)


# Copied from generate_text/generate_text.py
def fail(message):
    text = " ".join(str(message).split())[:600]
    text += " Accept its licence there, then type: hf auth login" if "gated repo" in text else ""
    print("error:", text, file=sys.stderr)
    raise SystemExit(2)


# Copied from finetune_full/finetune_full.py
def check(condition, message):
    if not condition:
        fail(message)


if __name__ == "__main__":
    main()
