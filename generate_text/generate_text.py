#!/usr/bin/env python3
"""Let a causal language model, or an adapter on top of one, answer a prompt or a file of prompts.

A prompt has exactly the ids it had in training. Weights take 2 bytes per parameter (4 on a CPU,
1 in 8 bit, about 0.5 in 4 bit). Interrupted, the same command goes on where it stopped: a file
STOP beside OUT, SIGTERM, or $DEADLINE coming near end it between two batches, with status 75.

By hand   python generate_text.py --model_name_or_path MODEL --prompt TEXT
A file    python generate_text.py --model_name_or_path MODEL --prompt_file FILE --output_file OUT
As a job  qsub -P GROUP job.sh
Follows   https://huggingface.co/docs/transformers/llm_tutorial
"""

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from pyarrow.parquet import ParquetFile
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.hf_argparser import string_to_bool
from transformers.models.falcon import modeling_falcon
from transformers.utils.logging import disable_progress_bar

JOBS, keep_answers = Path(__file__).resolve().parent.parent / "jobs", None  # None: copied alone
if (JOBS / "keep_answers.py").exists():  # what lets answers to a file go on, and stop in time
    sys.path.insert(0, str(JOBS))  # before files of yours that are called alike
    import keep_answers

# ---- 1. Settings ----


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add, path = parser.add_argument, {"type": os.path.expanduser}
    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    add("--model_name_or_path", **path, required=True, help="A model or an adapter, or a hub name.")
    add("--prompt", help="One prompt, taken as it is: no template, no separator.")
    add("--prompt_file", **path, help="JSON Lines, JSON, Parquet; or text, a prompt a line.")
    add("--output_file", **path, help="Where the rows go as JSON Lines, with generated_text.")
    add("--batch_size", type=int, help="Prompts at once. Default: 64 on a GPU, 8 on a CPU.")
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
    add("--compare_base", **switch, help="Answer without the adapter too; takes twice the time.")
    add("--chat_template", **path, help="alpaca, or a Jinja file. Default: the tokenizer's own.")
    add("--chat_template_kwargs", default="{}", help='Like {"enable_thinking": false}.')
    add("--trust_remote_code", **switch, help="Run the repository's code. Read it first.")
    add("--chat", nargs="?", default=False, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---- 2. Prompts: the same ids as in training ----


# Copied from finetune_full/finetune_full.py
UNUSED = "system history tools chosen rejected thinking reasoning reasoning_content".split()
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
        if not isinstance(turn, dict) or {type(turn.get(k)) for k in ("role", "content")} != {str}:
            raise ValueError(f"{form} must hold text, found {str(turn)[:60]}.")
        for name in turn.keys() - {"role", "content"}:
            if turn[name] not in (None, "", [], {}):
                raise ValueError(f"a turn is role and content: its {name} would be left out.")
    texts = chat_texts(turns, tokenizer) if form != "prompt" else [row["prompt"]]
    "".join(texts).encode()  # raises on half a surrogate pair, which JSON can write
    parts = [tokenizer(text, add_special_tokens=False, verbose=False) for text in texts]
    ids, first = [i for part in parts for i in part["input_ids"]], leading_ids(tokenizer)
    return form, ids if ids[: len(first)] == first else first + ids


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
        if not after.startswith(before):  # an empty thought, or training refuses it
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


def read_file(file):
    """The rows of JSON Lines (unread), JSON and Parquet; of other files, a prompt a line."""
    if file.lower().endswith(".parquet"):
        return ParquetFile(file).read().to_pylist()
    text = Path(file).read_text("utf-8-sig")
    start = "".join(text[:999].split())
    if file.lower().endswith((".jsonl", ".json")) or start.startswith(('{"', '[{"')):
        if not start.startswith("["):
            return text.split("\n")
        return [row if isinstance(row, dict) else [row] for row in json.loads(text)]
    return [{"prompt": line} if line.strip() else "" for line in text.split("\n")]


def read_prompts(args, tokenizer):
    """Return (form, rows as given, ids of each prompt); refuse what the model cannot answer."""
    place, form, rows, prompts, room = args.prompt_file, None, [], [], args.positions
    try:
        given = read_file(str(Path(place))) if place else [{"prompt": args.prompt}]
        for number, row in enumerate(given, 1):
            place = f"{args.prompt_file or '--prompt'}, row {number}"
            if isinstance(row, str) and not row.strip():
                continue
            row = json.loads(row) if isinstance(row, str) else row
            check(isinstance(row, dict), f"{place}: a row must be an object.")
            whole = keep_answers.plain(row, tokenizer) if keep_answers else (row, tokenizer)
            found, ids = encode_prompt(*whole)
            form = form or found
            check(found == form, f"{place}: another form ({found}) than the rows before ({form}).")
            check(ids, f"{place}: the prompt is empty, there is nothing to answer.")
            check(len(ids) < room, f"{place}: {len(ids):,} tokens, of {room:,} positions at most.")
            rows.append(row)
            prompts.append(ids)
    except Exception as error:  # a damaged file and a template can raise anything
        fail(f"{place}: {error if isinstance(error, ValueError) else repr(error)}")
    check(rows, f"{args.prompt_file} has no prompts.")
    return form, rows, prompts


# ---- 3. Model ----


def load_tokenizer(args):
    """Return the tokenizer, an adapter's own where it has one; sets args.positions."""
    name, remote = args.base, {"trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **remote)
    args.version, config = getattr(config, "_commit_hash", None), config.get_text_config()
    tokenizer = exact_tokenizer(name, config.vocab_size, note, **remote)
    if args.recorded and Path(args.model_name_or_path, "tokenizer_config.json").is_file():
        known, name = tokenizer.get_vocab().items(), args.model_name_or_path
        tokenizer = exact_tokenizer(name, config.vocab_size, note, grown=True, **remote)
        check(known <= tokenizer.get_vocab().items(), f"{args.base} has another vocabulary.")
    choose_chat_template(args.chat_template, tokenizer, args.chat_template_kwargs)
    if keep_answers:  # the template may stand in another file, or take lists of parts alone
        keep_answers.set_template(name, args, tokenizer, note, CHAT_TEMPLATE)
    limit = getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", 0)
    args.positions = limit or sys.maxsize
    return tokenizer


def load_model(args, precision, tokenizer):
    """The model, quantised and with its adapter where asked for."""
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    remote = {"trust_remote_code": args.trust_remote_code}
    config, gpu = AutoConfig.from_pretrained(args.base, **remote), os.environ.get("LOCAL_RANK", 0)
    options = {"dtype": dtype, "config": config, "device_map": args.device_map, **remote}
    if torch.cuda.is_available() and not args.device_map:
        options["device_map"] = {"": int(gpu)}
    if args.recorded and hasattr(config, "quantization_config"):
        config.quantization_config["dequantize"] = True  # as it was when the adapter was trained
    if is_quantised := args.load_in_8bit or args.load_in_4bit:
        modeling_falcon.FalconLinear = torch.nn.Linear  # the same; the quantiser skips subclasses
        bits = {"load_in_8bit": args.load_in_8bit, "load_in_4bit": args.load_in_4bit}
        bits |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=dtype)
    load = keep_answers.prepare(config, options) if keep_answers else AutoModelForCausalLM
    model, info = load.from_pretrained(args.base, output_loading_info=True, **options)
    wrong = [*info["missing_keys"], *(k for k in info["unexpected_keys"] if "weight_scale" in k)]
    check(not wrong, f"{args.base} lacks weights, or has packed ones: {sorted(wrong)[:3]}.")
    done = [n for n, m in model.named_modules() if type(m).__module__ == "bitsandbytes.nn.modules"]
    check(done or not is_quantised, "no layer was quantised. Leave --load_in_... out.")
    args.quantised = f"; {len(done)} layers quantised" if done else ""
    if done and keep_answers:
        args.quantised += keep_answers.share_quantised(args, model, done)
    return add_adapter(args, model, len(tokenizer)) if args.recorded else model


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
    ends = {tokenizer.eos_token_id, tokenizer.get_added_vocab().get("### End")}  # Dolly's
    if is_chat:  # what ends an answer in the template: the last special token behind the prompt
        turns = [{"role": "user", "content": "yes!"}, {"role": "assistant", "content": "yes!"}]
        answer = tokenizer.apply_chat_template(turns, tokenize=False)
        check(answer.count("yes!") == 2, "the chat template shows not all turns of a conversation.")
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
    drawing = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    options = {"do_sample": True, **drawing} if args.do_sample else {}
    model.generation_config = GenerationConfig(**options, eos_token_id=ends, pad_token_id=0)


# ---- 4. Answers ----


def main(argv=None):
    args = parse(argv)
    check_arguments(args)
    disable_progress_bar()
    logging.disable(logging.WARNING)
    full = "GPU memory is full. Try a smaller --batch_size, --load_in_4bit or --device_map auto."
    try:
        precision, reason = choose_precision(args)
        args.batch_size = args.batch_size or (8 if reason == "no GPU in use" else 64)
        tokenizer = load_tokenizer(args)
        args.form, rows, prompts = read_prompts(args, tokenizer)
        if args.prompt_file and keep_answers:
            keep_answers.claim_output(args, precision, prompts, __file__)
        elif args.prompt_file:
            found = [file for end in ("", ".tmp") if Path(file := args.output_file + end).exists()]
            check(not found, f"{', '.join(found)} would be replaced: move it, or choose another.")
            note("alone", "`jobs` is not beside this: once cut off, it cannot go on; one by one")
        model = load_model(args, precision, tokenizer)
        set_generation(args, model, tokenizer, is_chat=args.form != "prompt")
    except Exception as error:  # damaged files can raise anything
        why = str(error) if " " in str(error) else repr(error)
        why = f"{args.model_name_or_path}{args.origin}: {why}"
        fail(full if isinstance(error, torch.OutOfMemoryError) else why)
    print_banner(args, model, tokenizer, f"{precision} ({reason})", prompts)
    try:
        if args.prompt_file:
            answer_file(args, model, tokenizer, rows, prompts)
        else:
            for name, text in generate(args, model, tokenizer, prompts)[0][0].items():
                print(f"--- {name}\n{text}" if args.compare_base else text)
    except torch.OutOfMemoryError:
        fail(full)
    except OSError as error:  # a full disk, most often
        again = " The same command goes on from there." if keep_answers else ""
        fail(f"{error}: {args.output_file} is not finished.{again}")


def generate(args, model, tokenizer, prompts, draw=0):
    """Answer a batch of lists of ids: return (answers, new tokens, number of answers cut off)."""
    width, stops = max(map(len, prompts)), model.generation_config.eos_token_id
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = (torch.tensor(rows).to(model.device) for rows in (ids, mask))
    room = min(args.max_new_tokens, args.positions - width)
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    answers, tokens, cut = [{} for _ in prompts], 0, 0
    for name in ("generated_text", "base_generated_text")[: 1 + args.compare_base]:
        torch.manual_seed(args.seed + draw)
        with model.disable_adapter() if name.startswith("base") else nullcontext():
            output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room)
        for answer, new in zip(answers, output[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(new) if token in stops), len(new))
            tokens, cut = tokens + end, cut + (end == len(new))
            start = keep_answers.start_of_answer(args, tokenizer, new[:end]) if keep_answers else 0
            answer[name] = tokenizer.decode(new[start:end], **plain)
    return answers, tokens, cut


def answer_file(args, model, tokenizer, rows, prompts):
    """Answer what has no answer yet, the longest first; of several processes each has its share."""
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    answers = keep_answers.read_answers(args) if keep_answers else {}
    places = {i: place for place, i in enumerate(order)}
    before, began, last, tokens, cut = len(answers), time.time(), 0, 0, 0
    # Padding spoils answers where a layer does not see the mask, as linear attention may not.
    args.batch_size = keep_answers.exact_batch(args, model, prompts) if keep_answers else 1
    # Nor must it take room from a shorter prompt.
    long = [i for i in order if len(prompts[i]) + args.max_new_tokens > args.positions]
    starts = range(len(long), len(order), args.batch_size)
    batches = [[i] for i in long] + [order[n : n + args.batch_size] for n in starts]
    for batch in batches[args.rank :: args.ranks]:
        numbers = [i for i in batch if i not in answers]
        if not numbers:
            continue
        if keep_answers:
            keep_answers.stop_if_asked(args, f"{len(answers):,} of {len(rows):,} rows are answered")
        ids = [prompts[i] for i in numbers]
        results, made, unended = generate(args, model, tokenizer, ids, places[numbers[0]])
        answers.update(zip(numbers, results, strict=True))
        if keep_answers:
            keep_answers.add_answers(args, numbers, results)
        tokens, cut, seconds = tokens + made, cut + unended, time.time() - began
        if seconds - last > 30:
            last, rest = seconds, (len(rows) - len(answers)) * seconds / (len(answers) - before)
            note("answer", f"{len(answers):,}/{len(rows):,}  left {rest / 60:,.0f} min")
    now, seconds = len(answers) - before, time.time() - began
    if keep_answers:
        keep_answers.finish(args, rows, answers)  # of all processes
    else:
        new = Path(f"{args.output_file}.tmp")
        answered = [row | answers[i] for i, row in enumerate(rows)]
        with new.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in answered)
        new.replace(args.output_file)
    done = f"{len(rows):,} rows in {args.output_file}; {now:,} answered now, in {seconds:,.0f} s"
    done += f", {tokens / seconds:,.0f} tok/s; {cut:,} answers cut off before a stop token"
    note("done", done)


# ---- 5. Guard rails: no need to read ----


def note(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", file=sys.stderr)  # stdout holds answers only


def fail(message):
    text = " ".join(str(message).split())[:600]
    text += " Accept its licence there, then type: hf auth login" if "gated repo" in text else ""
    print("error:", text, file=sys.stderr)
    raise SystemExit(2)


# Copied from finetune_full/finetune_full.py
def check(condition, message):
    if not condition:
        fail(message)


def check_arguments(args):
    """Refuse what cannot work before anything is loaded; finds the base of an adapter."""
    file, name = args.prompt_file, args.model_name_or_path
    check(keep_answers or not args.trust_remote_code, "--trust_remote_code needs ../jobs.")
    check(args.chat is False, "--chat is gone. Type: python chat.py --model_name_or_path MODEL")
    check((file is None) != (args.prompt is None), "give one of --prompt and --prompt_file.")
    check((file is None) == (args.output_file is None), "--prompt_file needs an --output_file.")
    check(file is None or Path(file).is_file(), f"{file} is no file, seen from {Path.cwd()}.")
    is_same = file and Path(file).resolve() == Path(args.output_file).resolve()
    check(not is_same, "--output_file is the --prompt_file. Choose another.")
    check(args.batch_size in (None, *range(1, 2**20)), "--batch_size must be 1 or more.")
    args.rank, args.ranks = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    can = args.ranks == 1 or (file and keep_answers and not args.device_map)
    check(can, "several processes need a --prompt_file, ../jobs, and no --device_map.")
    check(args.max_new_tokens > 0, "--max_new_tokens must be 1 or more.")
    is_plain = args.temperature == args.top_p == 1
    check(args.do_sample or is_plain, "--temperature and --top_p do nothing without --do_sample.")
    fits = 0 < args.temperature < 1e9 and 0 < args.top_p <= 1 and 0 <= args.seed < 2**62
    check(fits, "--temperature must be above 0, --top_p above 0 and at most 1, --seed 0 or more.")
    record, args.base, args.recorded, args.origin = Path(name, "adapter_config.json"), name, "", ""
    if record.is_file():
        with suppress(ValueError):
            args.recorded = json.loads(record.read_text("utf-8")).get("base_model_name_or_path")
        check(args.recorded, f"{record} names no base: put it there as base_model_name_or_path.")
        places = [Path(at, args.recorded) for at in (".", name, Path(name).absolute().parent)]
        args.base = next((str(place) for place in places if place.is_dir()), args.recorded)
        args.origin = f", adapter on {args.base}, trained on {args.recorded}"
    check(args.recorded or not args.compare_base, "--compare_base needs an adapter.")


def choose_precision(args):
    """Return (precision, reason) for --precision on this machine."""
    best, impossible, reason = "fp32", "fp16", "no GPU in use"
    if torch.cuda.is_available() and args.device_map != "cpu":
        capability = torch.cuda.get_device_capability()
        best, impossible = ("bf16", None) if capability >= (8, 0) else ("fp16", "bf16")
        reason = "compute capability {}.{}".format(*capability)
    elif args.device_map != "cpu" and keep_answers:
        keep_answers.check_gpu()
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
            text = tokenizer.get_chat_template()  # not ns.KEY, nor namespace(KEY=true)
            check(re.search(rf"[^.\w]{key}\b(?!\s*=[^=])", text), f"{what}: not in the template.")
            default = f"{{% if {key} is not defined %}}{{% set {key} = {value!r} %}}{{% endif %}}"
            tokenizer.chat_template = default + "{{ '' }}" + text
    except Exception as error:  # a template can raise anything
        fail(f"{what}: {error!r}. Two ready templates lie in ../chat_templates.")


# Copied from finetune_full/finetune_full.py
def exact_tokenizer(name, rows, say, grown=False, **remote):
    """The tokenizer with the ids of the model's own file, which AutoTokenizer may not give."""
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
    check(same, f"the tokenizer of {name} gives other ids than {file} itself. {remedy}")
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


def print_banner(args, model, tokenizer, precision, prompts):
    size = f"{model.num_parameters():,} parameters{args.origin}"
    note("model", f"{args.model_name_or_path} ({model.config.model_type}), {size}")
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    used = dict.fromkeys(map(str, getattr(model, "hf_device_map", {"": model.device}).values()))
    used = f"used: {', '.join(used)}; GPUs here: {torch.cuda.device_count()}"
    note("device", f"{name} ({used}), {precision}{args.quantised}")
    note("prompts", f"{len(prompts):,}, of {max(map(len, prompts)):,} tokens at most")
    text = tokenizer.decode(prompts[0]).replace("\n", "\\n")
    note("example", text if len(text) < 300 else f"{text[:140]} ... {text[-140:]}")
    drawn = f"drawn at temperature {args.temperature}, top_p {args.top_p}, seed {args.seed}"
    how = f"{drawn if args.do_sample else 'greedy'}; at most {args.max_new_tokens:,}"
    ends = [f"{tokenizer.decode(i)} ({i})" for i in model.generation_config.eos_token_id]
    note("tokens", f"{how}; stop: {', '.join(ends)}")


if __name__ == "__main__":
    main()
