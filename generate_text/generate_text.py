#!/usr/bin/env python3
"""Let a causal language model, or an adapter on top of one, answer a prompt, a file of prompts, or a chat.

A prompt has exactly the token ids it had in training. Answers go to stdout or into the output file, the rest to stderr.
Weights take 2 bytes per parameter (4 on a CPU, 1 in 8 bit, about 0.5 in 4 bit); the cache grows with batch and length.
Answering a file, the same command after an interruption goes on where it stopped; other settings are refused.

By hand       python generate_text.py --model_name_or_path MODEL --prompt TEXT        (or --chat)
A file        python generate_text.py --model_name_or_path MODEL --prompt_file F.jsonl --output_file output/out.jsonl
Several GPUs  the same with --device_map auto, for a model that one GPU cannot hold
As a job      qsub -P GROUP job.sh
Follows       https://huggingface.co/docs/transformers/llm_tutorial
"""

import argparse
import hashlib
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path


def main(argv=None):
    args = parse(argv)
    check_arguments(args)
    import torch  # from here on it takes seconds
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line per layer and token
    warnings.simplefilter("ignore", FutureWarning)  # of one package about another
    precision, reason = choose_precision(args)
    tokenizer, config = load_tokenizer(args)
    shape, rows, prompts = ("messages", [], []) if args.chat else read_prompts(args, tokenizer, config)
    answers = find_answers(args, settings_of(args, config, precision)) if args.prompt_file else {}
    try:
        model = load_model(args, precision, len(tokenizer))
        set_generation(args, model, tokenizer, is_chat=shape != "prompt")
        print_banner(args, model, tokenizer, f"{precision} ({reason})", prompts)
        if args.chat:
            chat(args, model, tokenizer)
        elif args.prompt_file:
            answer_file(args, model, tokenizer, rows, prompts, answers)
        else:
            for name, text in generate(args, model, tokenizer, prompts)[0][0].items():
                print(f"--- {name}\n{text}" if args.compare_base else text)
    except torch.OutOfMemoryError as error:
        fail(f"GPU memory is full ({str(error)[:120]}). Try a smaller --batch_size, --load_in_8bit true, or "
             "--device_map auto on several GPUs. A file's answers so far are kept.")  # fmt: skip


# ---- Prompts: the same ids as in training ----

# Copied from finetune_full/finetune_full.py
CHAT_TEMPLATES = {
    "alpaca": "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### 応答:\n' + m.content + eos_token + '\n' }}"
    "{% else %}{{ '### ' + ('指示' if m.role == 'user' else m.role) + ':\n' + m.content + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### 応答:\n' }}{% endif %}",
    "dolly": "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\n' + m.content }}"
    "{{ '\n\n### End' }}{% else %}{{ '\n\n### Instruction:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    "rinna": "{% for m in messages %}{% set text = m.content | replace('\n', '<NL>') %}{% if m.role == 'assistant' %}"
    "{{ 'システム: ' + text + eos_token + '<NL>' }}{% else %}{{ 'ユーザー: ' + text + '<NL>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'システム: ' }}{% endif %}",
}

# Copied from finetune_full/finetune_full.py
SHAPES = {
    "messages": ["messages"],
    "prompt": ["prompt", "completion"],
    "instruction": ["instruction", "output"],
    "text": ["text"],
}


# Copied from finetune_full/finetune_full.py
def read_rows(path):
    """Yield (place, row) for every row of a JSON Lines, JSON (a list) or Parquet file."""
    number, is_list = 0, False
    try:
        if Path(path).suffix == ".parquet":
            table = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            for number, row in enumerate(table, 1):
                yield f"{path}, row {number}", row
            return
        with Path(path).open(encoding="utf-8-sig") as file:
            is_list = file.read(1000).lstrip().startswith("[")
            file.seek(0)
            for number, row in enumerate(json.load(file) if is_list else file, 1):
                if is_list or row.strip():
                    yield f"{path}, {'row' if is_list else 'line'} {number}", row if is_list else json.loads(row)
    except json.JSONDecodeError as error:
        fail(f"{path}, line {error.lineno if is_list else number}: malformed JSON ({error.msg}).")
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 (after line {number}). Convert it, for example with iconv -f CP932 -t UTF-8.")
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")


def load_dataset(*args, **kwargs):
    """Only Parquet files need the package, which takes a second to import."""
    from datasets import load_dataset

    return load_dataset(*args, **kwargs)


# Copied from finetune_full/finetune_full.py
def find_shape(place, row):
    """Return the name of the row's shape in SHAPES; refuse a row of none, or without text where text belongs."""
    if not isinstance(row, dict):
        fail(f'{place}: a row must be an object like {{"prompt": ..., "completion": ...}}, not {str(row)[:40]}.')
    shape = next((name for name, columns in SHAPES.items() if set(columns) <= set(row)), None)
    if shape is None:
        known = ", ".join("+".join(columns) for columns in SHAPES.values())
        fail(f"{place}: the columns {', '.join(row) or '(none)'} are of no known shape. Known: {known}.")
    texts = [row[column] for column in SHAPES[shape]] + [row.get("input") or ""] * (shape == "instruction")
    if shape == "messages":
        turns = row["messages"] if isinstance(row["messages"], list) and row["messages"] else [None]
        texts = [turn.get(key) if isinstance(turn, dict) else None for turn in turns for key in ("role", "content")]
    for text in texts:
        if not isinstance(text, str):
            fail(f"{place}: {'+'.join(SHAPES[shape])} must hold text, found {json.dumps(text, default=str)}.")
    return shape


# Copied from finetune_full/finetune_full.py
def as_messages(row):
    """The row's conversation; `instruction` and `input` become the user's turn, `output` the assistant's."""
    if "messages" in row:
        return row["messages"]
    question = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    answer = [{"role": "assistant", "content": row["output"]}] if "output" in row else []
    return [{"role": "user", "content": question}, *answer]


# Copied from finetune_full/finetune_full.py
def chat_pieces(tokenizer, messages, to_answer=False):
    """Return a conversation as (text, learned) pieces: what stands before each assistant's turn, and the turn.

    Pieces are tokenized apart, so that what precedes an answer has the same ids in training and, with to_answer=True,
    in generation. None: this template rewrites earlier turns when one is added, so there is no such prefix.
    """
    pieces, done = [], ""
    stops = [i for i, message in enumerate(messages) if message["role"] == "assistant"] + [len(messages)] * to_answer
    for stop in stops:
        before = tokenizer.apply_chat_template(messages[:stop], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: stop + 1], tokenize=False) if messages[stop:] else before
        if not (before.startswith(done) and after.startswith(before)):
            return None
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


# Copied from finetune_full/finetune_full.py
def leading_ids(tokenizer):
    """The ids (a BOS, or none) that this tokenizer puts before every text."""
    text, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return ids[: ids.index(text[0])]


# Copied from finetune_full/finetune_full.py
def encode(tokenizer, pieces):
    """Return (ids, labels) of (text, learned) pieces: BOS once where the tokenizer adds it, no EOS."""
    ids, labels, first = [], [], leading_ids(tokenizer)
    for text, learned in pieces:
        new = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids and new[: len(first)] != first:
            ids, labels = [*first], [-100] * len(first)
        ids += new
        labels += new if learned else [-100] * len(new)
    return ids, labels


# Copied from finetune_full/finetune_full.py
def turn_end_id(tokenizer):
    """The special token that ends an assistant's turn in the chat template, where generation stops, or None."""
    turn = chat_pieces(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    # all_special_ids has only tokens with a role, such as eos_token; Gemma's <end_of_turn> has none.
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return next((label for label in reversed(encode(tokenizer, turn or [])[1]) if label in special), None)


def read_places(args):
    """Yield (place, row) of the prompts; a file that holds no JSON or Parquet is plain text, a prompt a line."""
    if args.prompt_file is None:
        yield "--prompt", {"prompt": args.prompt}
        return
    text, is_data = "", Path(args.prompt_file).suffix in (".jsonl", ".json", ".parquet")
    try:
        text = text if is_data else Path(args.prompt_file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        is_data = True  # read_rows says where
    if is_data or re.match(r'\s*\[?\s*{\s*"', text):
        yield from read_rows(args.prompt_file)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{args.prompt_file}, line {number}", {"prompt": line}


def read_prompts(args, tokenizer, config):
    """Return (shape, rows as given, token ids of each row's prompt); refuse what the model could not answer."""
    shape, rows, prompts = None, [], []
    for place, row in read_places(args):
        # Answers are not looked at, so they may be missing.
        question = set(row) & {"prompt", "instruction"} if isinstance(row, dict) else ()
        known = any(set(columns) <= set(row) for columns in SHAPES.values()) if question else True
        found = find_shape(place, row if known else {"completion": "", "output": "", **row})
        if found == "text":
            fail(f"{place}: rows of `text` ask nothing. Call the column prompt to have its text continued.")
        shape = shape or found
        if found != shape:
            fail(f"{place}: the columns {', '.join(row)} are of another shape than the rows before ({shape}).")
        ids = encode_prompt(tokenizer, place, shape, row)
        if not ids:
            fail(f"{place}: the prompt is empty, there is nothing to answer.")
        if len(ids) >= args.positions:
            fail(f"{place}: the prompt's {len(ids):,} tokens leave no room for an answer in the {args.positions:,} "
                 "positions of this model. Shorten it.")  # fmt: skip
        if max(ids) >= config.vocab_size and args.base == args.model_name_or_path:  # an adapter may bring new rows
            fail(f"{place}: the tokenizer makes the id {max(ids)}, but the embedding has {config.vocab_size} rows. "
                 "The tokenizer is of another model.")  # fmt: skip
        rows.append(row)
        prompts.append(ids)
    if not rows:
        fail(f"{args.prompt_file} has no prompts.")
    return shape, rows, prompts


def encode_prompt(tokenizer, place, shape, row):
    """The token ids that stand before the row's answer in training; of a conversation, before its last answer."""
    from jinja2 import TemplateError

    try:
        if shape == "prompt":
            return encode(tokenizer, [(row["prompt"], False)])[0]
        messages = list(as_messages(row))
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            fail(f"{place}: the conversation has no turn to answer.")
        pieces = chat_pieces(tokenizer, messages, to_answer=True)
        if pieces is None:  # the template rewrites earlier turns: training refuses it, so there is no prefix to match
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            pieces = [(text, False)]
        return encode(tokenizer, pieces)[0]
    except (TemplateError, TypeError, UnicodeError) as error:
        fail(f"{place}: the tokenizer or its chat template cannot take this: {error}")


# ---- The model: what it is loaded as, and how it chooses tokens ----


def load_tokenizer(args):
    """Return (tokenizer, model configuration) and set args.positions; an adapter may have a tokenizer of its own."""
    from transformers import AutoConfig, AutoTokenizer

    own = (Path(args.model_name_or_path) / "tokenizer_config.json").is_file()
    remote = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.base, **remote)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path if own else args.base, **remote)
    except (OSError, ValueError) as error:
        fail(f"--model_name_or_path {args.base} is no model here, nor could it be fetched: {error}"[:400])
    adapted = own and args.base != args.model_name_or_path  # an adapter may bring rows for new tokens
    check_tokenizer(args.model_name_or_path if own else args.base, tokenizer,
                    sys.maxsize if adapted else config.get_text_config().vocab_size)  # fmt: skip
    choose_chat_template(args.chat_template, tokenizer)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    args.positions = next((getattr(config, name) for name in names if getattr(config, name, None)), sys.maxsize)
    return tokenizer, config


def cached_file(*args, **kwargs):
    """Where a file of a model is; None where it has no such file."""
    from transformers.utils import cached_file

    return cached_file(*args, **kwargs)


def SentencePieceProcessor(**kwargs):
    """The package's own class, which only some tokenizers need."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(**kwargs)


# Copied from finetune_full/finetune_full.py
def check_tokenizer(name, tokenizer, rows):
    """Refuse a tokenizer with other ids than the model was trained with."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    files = ("tokenizer_config.json", "tokenizer.json", "spiece.model", "tokenizer.model")
    settings, exact, *models = (cached_file(name, file, **quiet) for file in files)
    settings, faults = json.loads(Path(settings).read_text(encoding="utf-8")) if settings else {}, []
    if model := next(filter(None, models), None):  # read as sentencepiece reads it? A text of its pieces tells
        sp = SentencePieceProcessor(model_file=model)
        kinds = (sp.is_control, sp.is_byte, sp.is_unknown, sp.is_unused)
        ids = [i for i in range(sp.vocab_size()) if not any(kind(i) for kind in kinds)]
        text = "あ" + "".join(sp.id_to_piece(ids[:: len(ids) // 500 + 1])).replace("▁", " ") + "鬱😀  ＡＢ\nｱ"
        if sp.encode(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            faults.append(f"other ids than {Path(model).name} itself")
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        faults.append(f"ids up to {last}, past the end of the embedding with its {rows} rows")
    # transformers 4 put BOS before a text where a Llama tokenizer does not say; 5 does not.
    is_llama = not exact and str(settings.get("tokenizer_class")).startswith("LlamaTokenizer")
    if settings.get("add_bos_token", is_llama) and leading_ids(tokenizer) != [tokenizer.bos_token_id]:
        faults.append("no BOS, which its files ask for")
    convert = f"python ../generate_text/convert_tokenizer.py --model_name_or_path {name} --output_dir NEW, and use NEW"
    help_text = f"Convert it once: {convert}" if model else "Take the files that this model was published with"
    if faults:
        fail(f"the tokenizer of {name} gives {' and '.join(faults)}. {help_text}.")


# Copied from finetune_full/finetune_full.py
def choose_chat_template(name, tokenizer):
    """Set the template named, or ours where the tokenizer has none."""
    if name is None and tokenizer.chat_template is not None:
        return
    template = CHAT_TEMPLATES.get(name or "alpaca")
    if template is None:
        try:
            template = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(
                f"--chat_template {name} is none of {', '.join(CHAT_TEMPLATES)}, and no file of it can be read: {error}"
            )
    else:
        template = ("{{ bos_token }}" if leading_ids(tokenizer) else "") + template
    tokenizer.chat_template = template


def load_model(args, precision, tokens):
    """The model, quantised and with its adapter where asked for; refuse one that would answer at random.

    `tokens` is the size of the tokenizer: an adapter may have brought new ones.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.falcon import modeling_falcon

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    device_map = args.device_map or ({"": 0} if torch.cuda.is_available() else None)
    options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": args.trust_remote_code}
    if args.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,  # as finetune_lora.py trains on it
            bnb_4bit_compute_dtype=dtype,
        )
    if "quantization_config" in options:
        modeling_falcon.FalconLinear = torch.nn.Linear  # the same layer, but the quantiser passes over subclasses
    try:
        model, info = AutoModelForCausalLM.from_pretrained(args.base, output_loading_info=True, **options)
        model = model if args.base == args.model_name_or_path else add_adapter(args, model, tokens)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, UserWarning) as error:
        fail(f"{args.model_name_or_path} cannot be loaded: {error}"[:400])
    if info["missing_keys"]:
        fail(f"{args.base} lacks weights that would be random: {sorted(info['missing_keys'])[:3]}. Fetch it again.")
    if "quantization_config" in options and not count_quantised(model):
        fail(f"no layer of {args.base} ({model.config.model_type}) was quantised: it would take the full memory. "
             "Leave --load_in_8bit and --load_in_4bit out.")  # fmt: skip
    return model


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


def add_adapter(args, model, tokens):
    """The model with its adapter and, where that brings new tokens, rows for them."""
    import torch
    from peft import PeftModel

    facts = read_facts(args.model_name_or_path)
    if facts.get("fingerprint") not in (None, fingerprint(args.base)):
        fail(f"{args.base} is not what the adapter was trained on ({facts['base_model']}), or that has changed: "
             "the answers would be nonsense. Put the right one into its adapter_config.json.")  # fmt: skip
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    ends = [model.get_input_embeddings().weight.data[rows:], model.get_output_embeddings().weight.data[rows:]]
    for weight in ends:
        weight.fill_(torch.nan)  # so that a row that the adapter does not bring shows
    warnings.filterwarnings("error", ".*missing adapter keys")  # peft would go on without them
    model = PeftModel.from_pretrained(model, args.model_name_or_path)
    new = torch.arange(tokens, device=model.device)[rows:][-16:]
    if tokens > rows and model(input_ids=new[None]).logits.isnan().any():
        raise ValueError(f"its tokenizer has {tokens - rows} tokens that neither it nor {args.base} has weights for")
    for weight in ends:
        weight.zero_()  # what the base makes of them, for --compare_base
    return model


def count_quantised(model):
    """The number of layers that bitsandbytes holds in 8 or 4 bit."""
    return sum(type(module).__module__ == "bitsandbytes.nn.modules" for module in model.modules())


def set_generation(args, model, tokenizer, is_chat):
    """Tell the model how to choose tokens, and which ones end an answer.

    Nothing else of its own generation settings is kept: a repetition penalty, for one, would count the padding.
    """
    from transformers import GenerationConfig

    ends, saved = [tokenizer.eos_token_id], [model.generation_config]
    if (Path(args.model_name_or_path) / "generation_config.json").is_file():  # an adapter's own
        saved.append(GenerationConfig.from_pretrained(args.model_name_or_path))
    for config in saved:
        ends += config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends.append(tokenizer.get_added_vocab().get("### End"))  # Dolly's answers end with it, not with EOS
    if is_chat:
        ends.append(turn_end_id(tokenizer))
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if args.do_sample else {}
    ends = sorted(i for i in {*ends} if i is not None and i < model.config.vocab_size)
    model.generation_config = GenerationConfig(
        do_sample=args.do_sample, eos_token_id=ends or None, pad_token_id=pad, use_cache=True, **sampling
    )


# ---- Answers: one batch, a file of them, a chat ----


def room(args, prompt):
    """The most tokens that the answer to this prompt may have."""
    return min(args.max_new_tokens, args.positions - len(prompt))


def generate(args, model, tokenizer, prompts, draw=0, streamer=None):
    """Answer prompts (lists of ids with the same room) in one batch, padded on the left and masked.

    Returns ([{"generated_text": ...}], new tokens, answers cut off before a stop token). With --compare_base the
    dictionaries hold base_generated_text too. The same seed, draw and batch give the same answers.
    """
    import torch

    config, width, results = model.generation_config, max(map(len, prompts)), [{} for _ in prompts]
    ids = [[config.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask, tokens, cut = torch.tensor(ids).to(model.device), torch.tensor(mask).to(model.device), 0, 0
    for name in ("generated_text", "base_generated_text")[: 1 + args.compare_base]:
        is_base = name.startswith("base")
        torch.manual_seed(args.seed + draw)
        with model.disable_adapter() if is_base else nullcontext():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=room(args, prompts[0]),
                use_cache=True,
                streamer=None if is_base else streamer,
            )
        for result, new in zip(results, output[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(new) if token in (config.eos_token_id or [])), len(new))
            result[name] = tokenizer.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            tokens, cut = tokens + end, cut + (end == len(new))
    return results, tokens, cut


def make_batches(args, prompts):
    """Lists of row indices, longest prompt first: too little memory shows at once, and padding is short.

    Rows share a batch only if their answers have the same room: padding would take room from a shorter prompt.
    """
    order, batches = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), []
    for _, group in groupby(order, key=lambda i: room(args, prompts[i])):
        group = list(group)
        batches += [group[i : i + args.batch_size] for i in range(0, len(group), args.batch_size)]
    return batches


def answer_file(args, model, tokenizer, rows, prompts, answers):
    """Answer the rows that have no answer yet, keep each batch's as they come, and write them all in order."""
    output, partial = Path(args.output_file), Path(args.output_file + ".partial")
    todo, before, tokens, cut, done = {}, len(answers), 0, 0, 0
    for number, batch in enumerate(make_batches(args, prompts)):
        left = [i for i in batch if i not in answers]
        if left:
            todo[number] = batch if args.do_sample else left  # what is drawn depends on the whole batch
    work = {number: sum(len(prompts[i]) + args.max_new_tokens for i in batch) for number, batch in todo.items()}
    began = last = time.time()
    with partial.open("a", encoding="utf-8") as file:
        for number, batch in todo.items():
            results, new, unended = generate(args, model, tokenizer, [prompts[i] for i in batch], number)
            answers |= zip(batch, results, strict=True)
            file.write("".join(json.dumps([i, answers[i]]) + "\n" for i in batch))
            file.flush()
            tokens, cut, done, now = tokens + new, cut + unended, done + work[number], time.time()
            if now - last > 30:
                last, rate = now, (len(answers) - before) / (now - began)
                left = int((now - began) * (sum(work.values()) - done) / done)
                note("answer", f"{len(answers):,}/{len(rows):,}  {rate:,.1f} answers/s  left "
                               f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}")  # fmt: skip
    seconds = time.time() - began
    with Path(f"{output}.tmp").open("w", encoding="utf-8", errors="backslashreplace") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps(row | answers[i], ensure_ascii=False, default=str) + "\n")
    Path(f"{output}.tmp").replace(output)
    partial.unlink()
    note("done", f"{len(rows):,} rows in {output}; {len(rows) - before:,} answered now, in {seconds:,.0f} s, "
                 f"{tokens / seconds:,.0f} tok/s; {cut:,} answers cut off before a stop token")  # fmt: skip


def settings_of(args, config, precision):
    """What decides the answers: arguments, prompt file, and the model's files (or its version on the hub)."""
    unimportant = ["prompt", "prompt_file", "output_file", "chat", "device_map", "base", "positions"]
    unimportant += [] if args.do_sample else ["batch_size", "seed", "temperature", "top_p"]
    settings = {name: value for name, value in vars(args).items() if name not in unimportant}
    settings |= {
        "precision": precision,
        "prompts": hashlib.sha256(Path(args.prompt_file).read_bytes()).hexdigest()[:12],
    }
    for directory in (args.base, args.model_name_or_path):
        names = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.model", "vocab*", "*.jinja", "merges.txt")
        stats = {path.name: path.stat() for name in names for path in Path(directory).glob(name)}
        stamp = json.dumps(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))
        version = hashlib.sha256(stamp.encode()).hexdigest()[:12] if stats else config._commit_hash
        settings["files of " + directory] = version
    return settings


def find_answers(args, settings):
    """Return {row: answer} of an interrupted run with these settings; a finished one ends here with exit code 0.

    OUTPUT_FILE appears when all is done; until then OUTPUT_FILE.partial holds a line for each answer, and
    OUTPUT_FILE.settings.json what they were made with.
    """
    output, partial, record = (Path(args.output_file + suffix) for suffix in ("", ".partial", ".settings.json"))
    answers, good = {}, 0
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed and (output.exists() or partial.exists()):
        details = ", ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in changed)
        details = details if before else f"{record.name} does not say which"
        fail(f"{output} or {partial.name} holds other answers ({details}). Choose another --output_file, or remove it.")
    if output.exists():
        note("finished", f"{output} holds these answers; remove it to have them made again")
        raise SystemExit(0)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{record}.tmp").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
        Path(f"{record}.tmp").replace(record)
        partial.touch()
    except OSError as error:
        fail(f"--output_file {output} cannot be written: {error}")
    for line in partial.read_bytes().split(b"\n")[:-1]:  # behind the last newline stands what a kill cut off
        row, answer = json.loads(line)
        answers[row], good = answer, good + len(line) + 1
    os.truncate(partial, good)
    return answers


def chat(args, model, tokenizer):
    """Answer line after line until the end of the input; what was said before is part of each prompt."""
    from transformers import TextStreamer

    options = {"skip_prompt": True, "skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    streamer = TextStreamer(tokenizer, **options) if sys.stdout.isatty() else None
    if sys.stdin.isatty():
        import readline  # noqa: F401 -- gives input() line editing that knows wide characters
    messages = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            line = "exit"
        if line == "exit":
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        prompt = encode_prompt(tokenizer, "chat", "messages", {"messages": messages})
        while len(prompt) + args.max_new_tokens > args.positions and len(messages) > 1:
            note("forgotten", messages[0]["content"])
            del messages[:2]
            prompt = encode_prompt(tokenizer, "chat", "messages", {"messages": messages})
        if len(prompt) >= args.positions:
            note("too long", f"{len(prompt):,} tokens do not fit into the model's {args.positions:,} positions")
            messages.clear()
            continue
        (result,), _, _ = generate(args, model, tokenizer, [prompt], len(messages), streamer)
        if streamer is None:
            print(result["generated_text"], flush=True)
        if args.compare_base:
            print(f"--- without the adapter\n{result['base_generated_text']}\n---", flush=True)
        messages.append({"role": "assistant", "content": result["generated_text"]})


# ---- Arguments, the report, errors ----


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, switch = parser.add_argument, {"type": boolean, "nargs": "?", "const": True, "default": False}
    add("--model_name_or_path", required=True, help="Directory or hub name of a model, or directory of an adapter.")
    add("--prompt", help="One prompt, taken as it is: no template, no separator.")
    add("--prompt_file", help="JSON Lines, JSON, Parquet of prompt, instruction or messages; or text, a prompt a line.")
    add("--output_file", help="Where the rows go, as JSON Lines with generated_text added.")
    add("--chat", **switch, help="Talk to the model through its chat template; exit or Ctrl-D ends it.")
    add("--batch_size", type=int, default=8, help="Prompts at once: faster, and memory grows with it.")
    add("--max_new_tokens", type=int, default=128, help="Longest answer in tokens; time grows with it.")
    add("--do_sample", **switch, help="Draw the tokens instead of taking the likeliest.")
    add("--temperature", type=float, help="With --do_sample: below 1 tamer, above 1 wilder. Default: 1.")
    add("--top_p", type=float, help="With --do_sample: draw from the likeliest tokens of this total. Default: 1.")
    add("--seed", type=int, default=42, help="The same seed draws the same answers.")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="Of the weights. auto: bf16 where the GPU has it, else fp16; fp32 on a CPU.")  # fmt: skip
    add("--device_map", help="auto spreads the model over all GPUs, cpu asks for the CPU. Default: one GPU.")
    add("--load_in_8bit", **switch, help="Weights in 8 bit: half the memory, slower, slightly other answers.")
    add("--load_in_4bit", **switch, help="Weights in 4 bit (NF4): a quarter of the memory, answers differ more.")
    add("--compare_base", **switch, help="Answer without the adapter as well; takes twice the time.")
    add("--chat_template", help="alpaca, dolly, rinna or a Jinja file. Default: the tokenizer's own, else alpaca.")
    add("--trust_remote_code", **switch, help="Run code from the model's repository. Only if you have read it.")
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse what cannot work before anything is loaded; sets args.base, which is another model for adapters."""
    if (args.prompt is not None) + (args.prompt_file is not None) + args.chat != 1:
        fail("give exactly one of --prompt, --prompt_file and --chat.")
    if (args.prompt_file is None) != (args.output_file is None):
        fail("--prompt_file and --output_file go together.")
    if args.prompt_file and not Path(args.prompt_file).is_file():
        fail(f"{args.prompt_file} is not there. Relative paths start at {Path.cwd()}.")
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be 1 or more, not {getattr(args, name)}.")
    if not args.do_sample and not args.temperature is args.top_p is None:
        fail("--temperature and --top_p do nothing without --do_sample true: the likeliest token is taken.")
    args.temperature, args.top_p = (1.0 if value is None else value for value in (args.temperature, args.top_p))
    if not (0 < args.temperature < math.inf and 0 < args.top_p <= 1 and 0 <= args.seed < 2**62):
        fail("--temperature must be above 0, --top_p above 0 and at most 1, --seed 0 or more.")
    if args.load_in_8bit and args.load_in_4bit:
        fail("give one of --load_in_8bit and --load_in_4bit.")
    args.base = find_base(args.model_name_or_path)
    is_adapter, quantised = args.base != args.model_name_or_path, args.load_in_8bit or args.load_in_4bit
    for package, needed in (("peft", is_adapter), ("bitsandbytes", quantised)):
        if needed and find_spec(package) is None:
            fail(f"this needs a package that is not installed. Type: pip install {package}")
    if args.compare_base and not is_adapter:
        fail(f"--compare_base needs an adapter, and {args.model_name_or_path} has no adapter_config.json.")


def find_base(name):
    """The model below an adapter directory, as its adapter_config.json names it; a model is its own base."""
    record = Path(name) / "adapter_config.json"
    if not record.is_file():
        return name
    try:
        base = json.loads(record.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        fail(f"{record} does not say what the adapter belongs on. Put a model there as base_model_name_or_path.")
    tried = [Path(base), Path(name, base), Path(name).parent / base]
    found = next((str(path) for path in tried if path.is_dir()), None)
    if found is None and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        fail(f"the adapter's base model {base} is not there, looked for {', '.join(map(str, tried))}. Correct "
             f"base_model_name_or_path in {record}.")  # fmt: skip
    return found or base


def choose_precision(args):
    """Return (precision, reason) for --precision on this machine."""
    import torch

    wanted, on_cpu = args.precision, args.device_map == "cpu"
    if torch.cuda.is_available() and not on_cpu:
        capability = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        reason, has_bf16 = "compute capability {}.{}".format(*capability), capability >= (8, 0)
        if wanted == "bf16" and not has_bf16:
            fail(f"--precision bf16 needs compute capability 8.0, this GPU has {reason}. Use fp16 or fp32.")
        return (wanted if wanted != "auto" else "bf16" if has_bf16 else "fp16"), reason
    if Path("/dev/nvidiactl").exists() and not on_cpu and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        fail(f"this node has an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU "
             "and would compute on the CPU. See nvidia-smi; --device_map cpu asks for the CPU.")  # fmt: skip
    if wanted == "fp16":
        fail("--precision fp16 needs a GPU. On a CPU use fp32 or bf16.")
    return ("bf16", "as asked") if wanted == "bf16" else ("fp32", "no GPU in use")


def print_banner(args, model, tokenizer, precision, prompts):
    """What is it doing, and why."""
    import torch

    adapter = "" if args.base == args.model_name_or_path else f", adapter on {args.base}"
    note(
        "model",
        f"{args.model_name_or_path} ({model.config.model_type}), {model.num_parameters():,} parameters{adapter}",
    )
    gpu = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    places = ", ".join({str(place): 0 for place in getattr(model, "hf_device_map", {"": model.device}).values()})
    quantised = f"; {count_quantised(model)} layers quantised" if args.load_in_8bit or args.load_in_4bit else ""
    note("device", f"{gpu} (used: {places}; GPUs here: {torch.cuda.device_count()}), {precision}{quantised}")
    if prompts:
        short = sum(room(args, prompt) < args.max_new_tokens for prompt in prompts)
        warning = f"; {short:,} so long that the model's {args.positions:,} positions cut the answer short"
        note("prompts", f"{len(prompts):,}, of {max(map(len, prompts)):,} tokens at most{warning if short else ''}")
        example = tokenizer.decode(prompts[0]).replace("\n", "\\n")
        note("example", example if len(example) < 300 else f"{example[:140]} ... {example[-140:]}")
    drawn = f"drawn at temperature {args.temperature}, top_p {args.top_p}, seed {args.seed}"
    stops = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in model.generation_config.eos_token_id or []]
    note(
        "tokens", f"{drawn if args.do_sample else 'greedy'}; at most {args.max_new_tokens:,}; stop: {', '.join(stops)}"
    )


def note(name, text):
    """One line of the report; on stderr, so that stdout holds answers only."""
    print(f"{name:<11}{text}", file=sys.stderr, flush=True)


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


# Copied from finetune_full/finetune_full.py
def fail(message, every_rank=False):
    """Print one line on stderr and leave with exit code 2; of several ranks only the first speaks."""
    if every_rank or int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when one leaves: let the first one speak
    raise SystemExit(2)


if __name__ == "__main__":
    main()
