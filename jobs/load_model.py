"""The prompts, the tokenizer and the model as generate_text.py has them, for what only measures.

jglue/score_choices.py imports this file: a score is worth nothing where the ids are other ones
than those of training and generation. `find_base(args)` comes first, then load_tokenizer(args) and
load_model(args, precision, tokenizer). What they read in `args` are the options of generate_text.py
of the same names.
"""

import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from model_text import choose_chat_template, exact_tokenizer, leading_ids
from run_common import check

# ---- Prompts: the same ids as in training ----


# Copied from finetune_full/finetune_full.py
UNUSED = "system history tools chosen rejected thinking reasoning reasoning_content".split()


# Copied from generate_text/generate_text.py
def encode_prompt(row, tokenizer):
    """Return (form, ids) of what stands before a row's (last) answer: as in format_row, encode."""
    if unused := [name for name in UNUSED if row.get(name)]:
        raise ValueError(f"{', '.join(unused)} would be left out: remove it, or make it text.")
    if isinstance(row.get("messages"), list):
        form, turns = "messages", row["messages"]
    elif "prompt" in row and ("completion" in row or not {"instruction", "output"} <= set(row)):
        form, turns = "prompt", [{"role": "user", "content": row["prompt"]}]
    elif "instruction" in row:
        question = [row["instruction"], row["input"]] if row.get("input") else [row["instruction"]]
        form, turns = "instruction", [{"role": "user", "content": "\n\n".join(question)}]
    else:
        raise ValueError(f"no messages, prompt or instruction in the columns {', '.join(row)}.")
    for turn in turns:
        for name, value in turn.items() if isinstance(turn, dict) else ():
            if name not in ("role", "content") and value not in (None, "", [], {}):
                raise ValueError(f"a turn is role and content: its {name} would be left out.")
        if not isinstance(turn, dict) or {type(turn.get(k)) for k in ("role", "content")} != {str}:
            raise ValueError(f"{form} must hold text, found {str(turn)[:60]}.")
    texts = chat_texts(turns, tokenizer) if form != "prompt" else [row["prompt"]]
    "".join(texts).encode()  # raises on half a surrogate pair, which JSON can write
    parts = [tokenizer(text, add_special_tokens=False, verbose=False) for text in texts]
    ids, first = [i for part in parts for i in part["input_ids"]], leading_ids(tokenizer)
    return form, ids if ids[: len(first)] == first else first + ids


# Copied from generate_text/generate_text.py
def chat_texts(turns, tokenizer):
    """What stands before each answer of a conversation, and the answer, as far as its last one."""
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise ValueError("the conversation has no turn to answer.")
    texts, done, render = [], "", tokenizer.apply_chat_template
    stops = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    for stop in [*stops, len(turns)]:
        if stop:
            before = render(turns[:stop], tokenize=False, add_generation_prompt=True)
        else:  # a conversation may begin with an answer
            before = render([{**turns[0], "content": "\0"}], tokenize=False).split("\0")[0]
        after = render(turns[: stop + 1], tokenize=False) if stop < len(turns) else before
        if not after.startswith(before):  # training refuses it
            return [render(turns, tokenize=False, add_generation_prompt=True)]
        if not before.startswith(done):  # it rewrites earlier turns: as in training
            texts, done = [], ""
        texts += [before[len(done) :], after[len(before) :]]
        done = after
    return texts


# ---- Tokenizer and model ----


def find_base(args):
    """Find the base of an adapter: sets args.base, args.recorded (as trained), args.origin."""
    name, args.recorded, args.origin = args.model_name_or_path, "", ""
    record, args.base = Path(name, "adapter_config.json"), name
    if record.is_file():
        with suppress(ValueError):
            args.recorded = json.loads(record.read_text("utf-8")).get("base_model_name_or_path")
        check(args.recorded, f"{record} names no base: put it there as base_model_name_or_path.")
        places = [Path(at, args.recorded) for at in (".", name, Path(name).absolute().parent)]
        args.base = next((str(place) for place in places if place.is_dir()), args.recorded)
        args.origin = f", adapter on {args.base}, trained on {args.recorded}"


# Copied from generate_text/generate_text.py
def load_tokenizer(args):
    """Return the tokenizer, an adapter's own where it has one; sets args.positions."""
    from transformers import AutoConfig

    name, remote = args.base, {"trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **remote)
    args.version, config = getattr(config, "_commit_hash", None), config.get_text_config()
    tokenizer = exact_tokenizer(name, config.vocab_size, note, **remote)
    if args.recorded and Path(args.model_name_or_path, "tokenizer_config.json").is_file():
        known, name = tokenizer.get_vocab().items(), args.model_name_or_path
        # An adapter may bring rows for new tokens.
        tokenizer = exact_tokenizer(name, config.vocab_size, note, grown=True, **remote)
        check(known <= tokenizer.get_vocab().items(), f"{args.base} has another vocabulary.")
    choose_chat_template(args.chat_template, tokenizer, args.chat_template_kwargs)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    found = [getattr(config, name) for name in names if getattr(config, name, None)]
    args.positions = [*found, sys.maxsize][0]
    return tokenizer


# Copied from generate_text/generate_text.py
def load_model(args, precision, tokenizer):
    """The model, quantised and with its adapter where asked for."""
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig
    from transformers.models.falcon import modeling_falcon

    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    remote = {"trust_remote_code": args.trust_remote_code}
    config, gpu = AutoConfig.from_pretrained(args.base, **remote), os.environ.get("LOCAL_RANK", 0)
    options = {"dtype": dtype, "config": config, "device_map": args.device_map, **remote}
    if torch.cuda.is_available() and not args.device_map:
        options["device_map"] = {"": int(gpu)}
    if args.recorded and hasattr(config, "quantization_config"):
        config.quantization_config["dequantize"] = True  # as it was when the adapter was trained
    is_quantised = args.load_in_8bit or args.load_in_4bit
    if is_quantised:
        modeling_falcon.FalconLinear = torch.nn.Linear  # the same; the quantiser skips subclasses
        bits = {"load_in_8bit": args.load_in_8bit, "load_in_4bit": args.load_in_4bit}
        bits |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=dtype)
    model, info = auto_class(config).from_pretrained(args.base, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])[:3]
    check(not missing, f"{args.base} lacks weights, they would be random: {missing}")
    args.quantised = sum(type(m).__module__ == "bitsandbytes.nn.modules" for m in model.modules())
    check(args.quantised or not is_quantised, "no layer was quantised. Leave --load_in_... out.")
    return add_adapter(args, model, len(tokenizer)) if args.recorded else model


# Copied from generate_text/generate_text.py
def auto_class(config):
    """AutoModelForCausalLM; for a model that sees, too, the class that keeps what it sees with."""
    import transformers

    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


# Copied from generate_text/generate_text.py
def add_adapter(args, model, tokens):
    """The model with its adapter on it."""
    from peft import PeftModel

    merge = f"merge_lora.py --adapter_name_or_path {args.model_name_or_path} --output_dir NEW"
    problem = f"it brings rows for new tokens. Type: python ../finetune_lora/{merge}, and use NEW."
    check(tokens <= model.get_input_embeddings().weight.shape[0], problem)
    warnings.simplefilter("ignore", FutureWarning)  # of one package about another
    warnings.filterwarnings("error", ".*missing adapter keys")  # peft would go on without them
    return PeftModel.from_pretrained(model, args.model_name_or_path)


# Copied from generate_text/generate_text.py
def choose_precision(args):
    """Return (precision, reason) for --precision on this machine."""
    import torch

    best, impossible, reason = "fp32", "fp16", "no GPU in use"
    visible, queue = (os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "PBS_QUEUE"))
    is_hidden = visible == "" or queue == "rt_HC"  # ABCI's queue without GPUs
    if torch.cuda.is_available() and args.device_map != "cpu":
        capability = torch.cuda.get_device_capability()
        best, impossible = ("bf16", None) if capability >= (8, 0) else ("fp16", "bf16")
        reason = "compute capability {}.{}".format(*capability)
    elif args.device_map != "cpu" and not is_hidden:
        problem = f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not see the GPU."
        check(not Path("/dev/nvidiactl").exists(), f"{problem} nvidia-smi? Or --device_map cpu.")
    precision = best if args.precision == "auto" else args.precision
    check(precision != impossible, f"--precision {precision} does not work here: {reason}.")
    return precision, reason


# ---- Small things ----


# Copied from generate_text/generate_text.py
def note(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", file=sys.stderr)  # stdout holds answers only


# Copied from generate_text/generate_text.py
def boolean(text):
    return ("false", "true").index(text.lower()) == 1
