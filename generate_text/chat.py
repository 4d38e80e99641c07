#!/usr/bin/env python3
"""Talk to a causal language model, or to an adapter on top of one, through its chat template.

What was said before is part of each prompt, with the token ids it had in training; when the
model's positions are full, the oldest turns are forgotten. `exit` or Ctrl-D ends the chat.
Weights take 2 bytes per parameter (4 on a CPU, 1 in 8 bit, about 0.5 in 4 bit).

By hand  python chat.py --model_name_or_path MODEL
A node   qsub -I -P GROUP -q rt_HG -l select=1; there: source ../jobs/env.sh, and the same
Follows  https://huggingface.co/docs/transformers/chat_templating
"""

import argparse
import json
import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path

# ---- 1. Settings ----


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add, path = parser.add_argument, {"type": os.path.expanduser}
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False}
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
    add("--chat_template", **path, help="alpaca, or a Jinja file. Default: the tokenizer's own.")
    add("--chat_template_kwargs", default="{}", help='Like {"enable_thinking": false}.')
    add("--trust_remote_code", **switch, help="Run the repository's code. Read it first.")
    return parser.parse_args(argv)


# ---- 2. Prompts: the same ids as in training ----


# Copied from finetune_full/finetune_full.py
CHAT_TEMPLATE = r"""
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '### 応答:\n' + message.content + eos_token + '\n' }}
    {%- else %}
        {{- '### ' + ('指示' if message.role == 'user' else message.role) + ':\n' }}
        {{- message.content + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### 応答:\n' }}
{%- endif %}
"""


def encode_chat(turns, tokenizer):
    """The ids of a conversation as far as the next answer; its parts are tokenized apart."""
    parts = [tokenizer(text, add_special_tokens=False) for text in chat_texts(turns, tokenizer)]
    ids, first = [i for part in parts for i in part["input_ids"]], leading_ids(tokenizer)
    return ids if ids[: len(first)] == first else first + ids


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


# Copied from finetune_full/finetune_full.py
def leading_ids(tokenizer):
    """The ids (a BOS, or none) that this tokenizer puts before every text."""
    text, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return ids[: ids.index(text[0])]


# ---- 3. Model ----


# Copied from generate_text/generate_text.py, down to the next headline
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


def auto_class(config):
    """AutoModelForCausalLM; for a model that sees, too, the class that keeps what it sees with."""
    import transformers

    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def add_adapter(args, model, tokens):
    """The model with its adapter on it."""
    from peft import PeftModel

    merge = f"merge_lora.py --adapter_name_or_path {args.model_name_or_path} --output_dir NEW"
    problem = f"it brings rows for new tokens. Type: python ../finetune_lora/{merge}, and use NEW."
    check(tokens <= model.get_input_embeddings().weight.shape[0], problem)
    warnings.simplefilter("ignore", FutureWarning)  # of one package about another
    warnings.filterwarnings("error", ".*missing adapter keys")  # peft would go on without them
    return PeftModel.from_pretrained(model, args.model_name_or_path)


def set_generation(args, model, tokenizer, is_chat):
    """Say how to choose tokens and where to stop; of the model's own settings no more is kept."""
    from transformers import GenerationConfig

    ends = {tokenizer.eos_token_id, tokenizer.get_added_vocab().get("### End")}  # Dolly's
    if is_chat:  # what ends an answer in the template: the last special token behind the prompt
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        answer = tokenizer.apply_chat_template(turns, tokenize=False)
        answer = answer.removeprefix(chat_texts(turns, tokenizer)[0])
        # all_special_ids has only those with a role: not Gemma's <end_of_turn>.
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ends.update([i for i in ids if i in special.union(tokenizer.all_special_ids)][-1:])
    saved, name = model.generation_config, args.model_name_or_path
    if args.recorded and Path(name, "generation_config.json").is_file():  # an adapter's own
        saved = GenerationConfig.from_pretrained(name)
    ids, rows = saved.eos_token_id, model.config.get_text_config().vocab_size
    ends.update(ids if isinstance(ids, list) else [ids])
    ends = sorted(i for i in ends if i is not None and i < rows)
    config = GenerationConfig(do_sample=args.do_sample, eos_token_id=ends, pad_token_id=0)
    if args.do_sample:
        config.update(temperature=args.temperature, top_p=args.top_p, top_k=0)
    model.generation_config = config


# ---- 4. Chat ----


def main(argv=None):
    args = parse(argv)
    check_arguments(args)
    import torch  # from here on it takes seconds
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        precision, reason = choose_precision(args)
        tokenizer = load_tokenizer(args)
        model = load_model(args, precision, tokenizer)
        set_generation(args, model, tokenizer, is_chat=True)
    except Exception as error:  # damaged files can raise anything
        why = error if " " in str(error) else repr(error)
        fail(f"{args.model_name_or_path}{args.origin}: {why}")
    note("model", f"{args.model_name_or_path} ({model.config.model_type}){args.origin}")
    note("device", f"{model.device}, {precision} ({reason}); exit or Ctrl-D ends the chat")
    try:
        talk(args, model, tokenizer)
    except torch.OutOfMemoryError:
        fail("GPU memory is full. Try --load_in_8bit true, or --device_map auto on several GPUs.")


def talk(args, model, tokenizer):
    """Answer line after line until the end of the input."""
    import torch
    from transformers import TextStreamer

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
        answer = tokenizer.decode(new[:end], **plain)
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


# ---- 5. Guard rails: no need to read ----


# Copied from generate_text/generate_text.py
def note(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", file=sys.stderr)  # stdout holds answers only


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


# Copied from generate_text/generate_text.py
def boolean(text):
    return ("false", "true").index(text.lower()) == 1


def check_arguments(args):
    """Refuse what cannot work before anything is loaded; finds the base of an adapter."""
    check(args.max_new_tokens > 0, "--max_new_tokens must be 1 or more.")
    is_plain = args.temperature == args.top_p == 1
    check(args.do_sample or is_plain, "--temperature and --top_p do nothing without --do_sample.")
    fits = 0 < args.temperature < 1e9 and 0 < args.top_p <= 1 and 0 <= args.seed < 2**62
    check(fits, "--temperature must be above 0, --top_p above 0 and at most 1, --seed 0 or more.")
    name = args.model_name_or_path
    record, args.base, args.recorded, args.origin = Path(name, "adapter_config.json"), name, "", ""
    if record.is_file():
        with suppress(ValueError):
            args.recorded = json.loads(record.read_text("utf-8")).get("base_model_name_or_path")
        check(args.recorded, f"{record} names no base: put it there as base_model_name_or_path.")
        places = [Path(at, args.recorded) for at in (".", name, Path(name).absolute().parent)]
        args.base = next((str(place) for place in places if place.is_dir()), args.recorded)
        args.origin = f", adapter on {args.base}, trained on {args.recorded}"


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


# Copied from finetune_full/finetune_full.py
def choose_chat_template(name, tokenizer, values="{}"):
    """Set the template named, or ours where the tokenizer has none, with BOS where it adds one."""
    what, is_known = f"--chat_template {name}", name in (None, "alpaca")
    try:
        if name is not None or tokenizer.chat_template is None:
            template = CHAT_TEMPLATE if is_known else Path(name).read_text("utf-8-sig")
            tokenizer.chat_template, first = template, leading_ids(tokenizer)
            text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
            if tokenizer(text, add_special_tokens=False)["input_ids"][: len(first)] != first:
                tokenizer.chat_template = "{{ bos_token }}" + template
        what = f"--chat_template_kwargs {values}"
        for key, value in json.loads(values).items():  # in the template: generation has them, too
            template = tokenizer.get_chat_template()
            check(key in template, f"{what}: the template does not use {key}.")
            default = f"{{% if {key} is not defined %}}{{% set {key} = {value!r} %}}{{% endif %}}"
            tokenizer.chat_template = default + "{{ '' }}" + template
    except Exception as error:  # a template can raise anything
        fail(f"{what}: {error!r}. Two ready templates lie in ../chat_templates.")


# Copied from finetune_full/finetune_full.py
def exact_tokenizer(name, rows, say, grown=False, **remote):
    """The tokenizer with the ids of the model's own file, which AutoTokenizer may not give."""
    from sentencepiece import SentencePieceProcessor
    from transformers.models.auto import tokenization_auto as auto

    off = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    names, off = ("tokenizer.json", "spiece.model", "tokenizer.model"), dict.fromkeys(off, False)
    exact, *models = (auto.cached_file(name, file, **off) for file in names)
    text, wanted, plain = "", [], {"add_special_tokens": False, "verbose": False}
    if file := exact or next(filter(None, models), None):  # compared on a text of its own pieces
        own = auto.TokenizersBackend(tokenizer_file=file) if exact else SentencePieceProcessor(file)
        text = "It's WE'LL 1234567  e\u0301ＡＢ鬱😀\n\n\n\tｱ" + own.decode([*range(0, len(own), 7)])
        wanted = own.encode(text, **(plain if exact else {}))
    for load in (auto.AutoTokenizer, auto.TokenizersBackend)[: 2 if exact else 1]:
        with suppress(TypeError if exact else ()):  # a class may not even take in the file
            tokenizer = load.from_pretrained(name, **remote)
            if same := tokenizer(text, **plain)["input_ids"] == wanted:
                break
    command = f"python ../generate_text/convert_tokenizer.py --model_name_or_path {name}"
    remedy = f"Convert it once: {command} --output_dir NEW, and use NEW."
    check(same, f"the tokenizer of {name} gives other ids than {Path(file).name} itself. {remedy}")
    if load is auto.TokenizersBackend:
        say("tokenizer", f"PreTrainedTokenizerFast.from_pretrained({name!r}), not AutoTokenizer")
    last, given = max(tokenizer.get_vocab().values()), auto.get_tokenizer_config(name)
    past = f"{name}'s tokenizer gives ids up to {last}, past the end of the embedding's {rows} rows"
    check(last < max(rows, grown * len(tokenizer)), f"{past}. {remedy}")
    # transformers 4 put BOS before a text where a Llama tokenizer does not say; 5 does not.
    asked = given.get("add_bos_token", not exact and "Llama" in str(given.get("tokenizer_class")))
    has = not asked or leading_ids(tokenizer) == [tokenizer.bos_token_id]
    check(has, f"the tokenizer of {name} gives no BOS, which its files ask for. {remedy}")
    return tokenizer


if __name__ == "__main__":
    main()
