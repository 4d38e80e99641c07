#!/usr/bin/env python3
"""Train an adapter (LoRA) on a frozen causal language model with the Hugging Face Trainer; QLoRA with --load_in_4bit.

Learns plain text (`text`) or answers only (`prompt`+`completion`, `instruction`+`input`+`output`, `messages`).
The frozen base takes 2 bytes per parameter (4 on a CPU, 1 in 8 bit, about 0.5 in 4 bit), the adapter 16 bytes for
each of its own, often less than 1 % of the model's; activations come on top. The result is the adapter alone:
generate_text.py answers with it as it is, merge_lora.py makes a plain model of it.

By hand       python finetune_lora.py --model_name_or_path MODEL --train_file train.jsonl --output_dir output
QLoRA         python finetune_lora.py ... --load_in_4bit true
Several GPUs  torchrun --standalone --nproc_per_node 8 finetune_lora.py ...
As a job      qsub -P GROUP job.sh
Again         python finetune_lora.py output/run_args.yaml --output_dir output2       (later arguments win)
Follows       LoRA https://arxiv.org/abs/2106.09685 (4.1), QLoRA https://arxiv.org/abs/2305.14314 (3),
              https://huggingface.co/docs/peft/package_reference/lora
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import time
import warnings
from bisect import bisect_left, insort
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
import yaml
from datasets import Dataset, Features, List, Value, concatenate_datasets, disable_progress_bars, load_dataset
from sentencepiece import SentencePieceProcessor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import cached_file, logging

# ---- The lesson: what is trained, and in which order things happen. Edit here. ----

# For tokenizers without a chat template; saved with the model, so that generation uses the same.
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
def argument(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Directory or hub name of the model to start from."})
    train_file: str | None = argument(None, "JSON Lines, JSON or Parquet file to learn from.")
    validation_file: str | None = argument(None, "The same for evaluation; each evaluation costs a pass over it.")
    dataset_name: str | None = argument(None, "Hub data set instead of --train_file.")
    dataset_config_name: str | None = argument(None, "Its configuration.")
    max_length: int | None = argument(None, "Tokens per example; memory grows with it. Default: 1024 at most.")
    packing: bool = argument(False, "Several examples share a row; exact or refused. Seldom faster than the default.")
    packing_length: int | None = argument(None, "Tokens per packed row. Default: --max_length.")
    attn_implementation: str | None = argument(None, "eager, sdpa, flash_attention_2 (to be installed), ...")
    early_stopping_patience: int | None = argument(
        None, "Stop after this many evaluations without a lower loss, and keep the best; evaluates at each save."
    )
    chat_template: str | None = argument(
        None, "alpaca, dolly, rinna or a Jinja file. Default: the tokenizer's own, or alpaca where it has none."
    )
    trust_remote_code: bool = argument(False, "Run code from the model's repository. Only if you have read it.")
    lora_r: int = argument(16, "Rank: r x (inputs + outputs) parameters per layer; capacity and memory grow with it.")
    lora_alpha: float = argument(32, "What the adapter adds is scaled by alpha / r.")
    lora_dropout: float = argument(0.0, "Share of the adapter's inputs left out in training; 0.05 or 0.1 for few data.")
    lora_target_modules: str = argument("all-linear", "all-linear, or NAME,NAME: fewer layers learn less, for less.")
    modules_to_save: str | None = argument(None, "NAME,NAME of modules to train whole; 16 bytes per parameter.")
    new_tokens: str | None = argument(None, '"<a>,<b>": tokens to add; of the embeddings only their rows are trained.')
    load_in_8bit: bool = argument(False, "Base in 8 bit: half the memory of 16 bit, slower. Compute capability 7.5.")
    load_in_4bit: bool = argument(False, "Base in 4 bit (QLoRA: nf4, double quantisation): a quarter, slower.")


@dataclass
class FineTuningArguments(TrainingArguments):
    output_dir: str = argument("output", "Where the result and the checkpoints go.")
    learning_rate: float = argument(2e-4, "Peak learning rate of AdamW.")
    logging_steps: float = argument(10, "One line per this many steps.")
    train_sampling_strategy: str = argument("group_by_length", "group_by_length pads least, random mixes most.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = argument(
        "auto", "What is computed in; trained weights stay fp32. auto: bf16 where the GPU has it, else fp16; CPU fp32."
    )

    def __post_init__(self):
        self.precision, self.precision_reason = choose_precision(self)
        super().__post_init__()
        self.disable_tqdm = True  # a batch log wants lines, not a redrawn bar
        self.remove_unused_columns = False  # the collator chooses
        self.dataloader_pin_memory &= torch.cuda.is_available()
        self.ddp_find_unused_parameters = bool(self.ddp_find_unused_parameters)


def main(argv=None):
    script, training, given = parse(argv)
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    check_arguments(script, training)
    check_lora(script, training)
    resume = find_resume_point(script, training, given)
    tokenizer, max_length = load_tokenizer(script)
    new_tokens = add_tokens(script, tokenizer)
    data = load_data(script, training, tokenizer, max_length)
    if new_tokens:
        check_tokens(tokenizer, new_tokens, data["train"])
    model = load_model(script, training, tokenizer, new_tokens, resume)

    row_length = (script.packing_length or max_length) if script.packing else None
    check_packing(script, model.get_base_model(), training.device)
    batch, eval_batch = (n * training.world_size for n in (training.train_batch_size, training.eval_batch_size))
    trainer = FineTuner(
        model=model,
        args=training,
        processing_class=tokenizer,
        data_collator=partial(collate, packed=script.packing),
        train_dataset=make_rows(data["train"], batch, row_length),
        eval_dataset=make_rows(data["validation"], eval_batch) if "validation" in data else None,
        callbacks=[Progress()],
    )
    if script.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(script.early_stopping_patience))
    trainer.remove_callback(PrinterCallback)
    print_banner(script, training, trainer, data["train"], tokenizer, resume)
    begin(trainer, given, resume)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except torch.OutOfMemoryError as error:
        fail(f"GPU memory is full ({str(error)[:120]}). Try, in this order: --per_device_train_batch_size 1 with more "
             "--gradient_accumulation_steps, --activation_checkpointing true, --load_in_4bit true, a shorter "
             "--max_length, a lower --lora_r.", every_rank=True)  # fmt: skip
    save_results(trainer)
    say("next", f"python ../generate_text/generate_text.py --model_name_or_path {training.output_dir} --prompt TEXT")
    say("merge", f"python merge_lora.py --adapter_name_or_path {training.output_dir} --output_dir {training.output_dir}"
              "/merged --verify")  # fmt: skip


def load_model(script, training, tokenizer, new_tokens, resume):
    """The frozen base, in the precision that is computed in or quantised, and on it the adapter, trained in fp32."""
    from peft import LoraConfig, get_peft_model

    base, facts = load_base(script, training, tokenizer, new_tokens, resume)
    targets, whole, token_rows = choose_modules(script, base, new_tokens)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=[*targets],  # whole names: PEFT matches parts of names too
        modules_to_save=[*whole] or None,
        trainable_token_indices=token_rows or None,
    )
    set_seed(training.seed)  # the adapter begins at random
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # DeepSpeed wants one precision for all, and keeps fp32 copies of what is trained
            parameter.data = parameter.data.to(base.dtype if training.deepspeed else torch.float32)
    model.save_pretrained = partial(save_adapter, model, facts)
    names = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
    also = f"; whole: {', '.join(whole)}" * bool(whole) + f"; rows of {script.new_tokens}" * bool(new_tokens)
    say("adapter", f"LoRA of rank {script.lora_r} on {len(targets)} layers ({names}){also}")
    return model


# ---- The adapter: on what base, on which layers, with what beside it ----


def load_base(script, training, tokenizer, new_tokens, resume):
    """Return (model, what an adapter has to tell of it); says what is really quantised, refuses it if nothing is."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[training.precision]
    options, bits = {}, 8 if script.load_in_8bit else 4 if script.load_in_4bit else None
    if bits:
        from transformers.models.falcon import modeling_falcon

        modeling_falcon.FalconLinear = torch.nn.Linear  # the same layer, but the quantiser passes over subclasses
        options["device_map"] = {"": str(training.device)}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    compare_whole_tensors()
    model, info = AutoModelForCausalLM.from_pretrained(
        script.model_name_or_path,
        dtype=dtype,
        attn_implementation=script.attn_implementation,
        trust_remote_code=script.trust_remote_code,
        output_loading_info=True,
        **options,
    )
    quantised = quantised_layers(model)
    if bits and not quantised:
        fail(f"no layer of this model ({model.config.model_type}) was quantised: it would take its full memory. Leave "
             f"--load_in_{bits}bit out.")  # fmt: skip
    for layer in quantised.values():
        layer.support_avx512bf16_for_cpu = False  # or an evaluation repacks the weights, and training goes on wrong
    # What is tied shows only now: a file may hold a head of its own in spite of its configuration (as Falcon's does).
    model.config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    add_rows(model, new_tokens)
    check_model(script, tokenizer, model, info)
    if Path(script.model_name_or_path).is_dir():
        model.name_or_path = str(Path(script.model_name_or_path).resolve())  # the adapter finds it from anywhere
    kind = f"{bits} bit" if bits else training.precision
    rest = f" in {len(quantised)} of {len(linear_layers(model))} linear layers, else {training.precision}"
    say("base", f"{kind}{rest if bits else ''}; frozen; {model.get_memory_footprint() / 2**20:,.1f} MiB")
    facts = {"base_model": model.name_or_path, "trained_on": kind, "fingerprint": fingerprint(model.name_or_path)}
    before = read_facts(resume) if resume else {}
    if before.get("fingerprint", facts["fingerprint"]) != facts["fingerprint"]:
        fail(f"{script.model_name_or_path} is not what {resume} was trained on: its weights have changed. Bring them "
             "back, or start anew with --resume_from_checkpoint false.")  # fmt: skip
    return model, facts


def quantised_layers(model):
    """{name: layer} of what bitsandbytes holds in 8 or 4 bit; where it passes a model over, it says nothing."""
    return {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")}


def linear_layers(model):
    """{name: layer} of all linear layers, GPT-2's Conv1D and the head included."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}


def choose_modules(script, model, new_tokens):
    """Return ({layers with LoRA}, {modules trained whole}, {embedding: rows of new tokens})."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    targets = {name: layer for name, layer in linear_layers(model).items() if layer is not head}
    if script.lora_target_modules != "all-linear":
        targets = find_modules("lora_target_modules", script.lora_target_modules, targets)
    named = {name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    whole = find_modules("modules_to_save", script.modules_to_save, named)
    taken = {*targets, *quantised_layers(model)}
    for name in whole:
        if name in taken or any(other.startswith(f"{name}.") for other in {*taken, *whole}):
            fail(f"--modules_to_save {name}: it has LoRA on it, is quantised, or holds such a layer. Leave it out, or "
                 "name other layers as --lora_target_modules, and load without quantisation.")  # fmt: skip
    tied, ends = model.config.tie_word_embeddings, [n for n, m in named.items() if m is embedding or m is head]
    if new_tokens and {*ends} & {*whole}:
        fail("--modules_to_save trains an embedding whole, --new_tokens only its new rows. Give one of the two.")
    if tied and {*ends} & {*whole}:
        say("untied", "input and output embedding are one tensor; the adapter's own copy replaces one end of it only")
    token_rows = {name: [*new_tokens] for name in ends if new_tokens and not (tied and named[name] is head)}
    return targets, whole, token_rows


def find_modules(option, names, modules):
    """The modules that NAME,NAME names, by their whole name or the end of it; a name without any is an error."""
    found = {}
    for name in split(names):
        matching = {full: module for full, module in modules.items() if f".{full}".endswith(f".{name}")}
        if not matching:
            there = sorted({full.rpartition(".")[2] for full in modules} - {str(i) for i in range(999)})
            fail(f"--{option} {name}: no module of that name, nothing would be trained there. This model has "
                 f"{', '.join(there)}.")  # fmt: skip
        found |= matching
    return found


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


def save_adapter(model, facts, directory, is_main_process=True, **options):
    """save_pretrained, but without the whole embeddings when they grew, and with what generation and merging need."""
    options |= {"save_embedding_layers": False, "is_main_process": is_main_process}
    type(model).save_pretrained(model, directory, **options)
    if is_main_process:
        model.generation_config.save_pretrained(directory)
        (Path(directory) / "base_model.json").write_text(json.dumps(facts, indent=1), "utf-8")


def read_facts(directory):
    """What save_adapter wrote about the base; empty where something else made the adapter."""
    path = Path(directory) / "base_model.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def check_lora(script, training):
    """Refuse what cannot work, or would only seem to, before anything is loaded."""
    for name in ("lora_target_modules", "modules_to_save", "new_tokens"):
        if getattr(script, name) is not None and not split(getattr(script, name)):
            fail(f"--{name} names nothing. Leave it out, or give NAME,NAME.")
    if script.lora_r < 1 or not 0 < script.lora_alpha < math.inf or not 0 <= script.lora_dropout < 1:
        fail("--lora_r must be 1 or more, --lora_alpha above 0, --lora_dropout at least 0 and below 1.")
    if script.load_in_8bit and script.load_in_4bit:
        fail("give one of --load_in_8bit and --load_in_4bit.")
    quantised = script.load_in_8bit or script.load_in_4bit
    for package in ["peft"] + ["bitsandbytes"] * quantised:
        if find_spec(package) is None:
            fail(f"this needs a package that is not installed. Type: pip install {package}")
    if script.load_in_8bit and training.device.type == "cuda":
        capability = torch.cuda.get_device_capability(training.device)
        if capability < (7, 5):
            fail("--load_in_8bit: this GPU (compute capability {}.{}) has no 8-bit matrix units, and training on 8 bit "
                 "went wrong on its like. Use --load_in_4bit true, or a base in fp16.".format(*capability))  # fmt: skip
    if is_deepspeed_zero3_enabled() and (quantised or script.new_tokens):
        fail("ZeRO-3 cannot partition a quantised base, nor --new_tokens. Use ../deepspeed_configs/zero2.json.")


# Copied from finetune_lastlayer/finetune_lastlayer.py
def split(names):
    """NAME,NAME as a list."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


# Copied from finetune_lastlayer/finetune_lastlayer.py
def add_tokens(script, tokenizer):
    """Add --new_tokens to the tokenizer; return {id: ids of the pieces that stood for the token until now}."""
    known = [token for token in split(script.new_tokens) if token in tokenizer.get_vocab()]
    if known:
        fail(f"--new_tokens: {', '.join(known)} is in the vocabulary already. Leave out what is not new.")
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in split(script.new_tokens)}
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in pieces])
    return {tokenizer.convert_tokens_to_ids(token): ids for token, ids in pieces.items()}


# Copied from finetune_lastlayer/finetune_lastlayer.py
def check_tokens(tokenizer, new_tokens, examples):
    """Say what the new tokens are; refuse one that the training data do not hold, since nothing would teach it."""
    counts = Counter(token for ids in examples["input_ids"] for token in ids if token in new_tokens)
    for token in new_tokens:
        text = tokenizer.convert_ids_to_tokens(token)
        if not counts[token]:
            fail(f"--new_tokens: {text} does not occur in the training data, so its row would learn nothing.")
        say("new token", f"{text} = {token}, {counts[token]:,} times in the data; starts as the mean of its pieces")


# Copied from finetune_lastlayer/finetune_lastlayer.py
def add_rows(model, new_tokens):
    """Give each new token a row, the mean of its pieces' rows: one mean for all would make them start identical."""
    rows = model.config.vocab_size
    if not new_tokens or min(new_tokens) > rows:
        return
    if max(new_tokens) >= rows:  # never to fewer rows: many models have spare ones
        model.resize_token_embeddings(max(new_tokens) + 1, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in module.parameters():
                with gathered(parameter):
                    for row, pieces in new_tokens.items():
                        parameter[row] = parameter[pieces].mean(0)


# ---- Data: file of examples -> token ids and labels -> rows -> batches ----

# The shapes of input: the first one whose columns are all there is used.
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


# Copied from finetune_full/finetune_full.py
def encode_row(tokenizer, place, row, shape, max_length):
    """Return the row's examples as [(input_ids, labels, outcome)]; outcome is "kept", "cut" or "dropped"."""
    if shape == "text":
        ids = encode(tokenizer, [(row["text"], True)])[0] + [tokenizer.eos_token_id]
        pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        return [(piece, piece, "kept" if row["text"] and len(piece) > 1 else "dropped") for piece in pieces]
    if shape == "prompt":
        answer, pieces = row["completion"], [(row["prompt"], False), (row["completion"], True)]
        ids, labels = ([*part, tokenizer.eos_token_id] for part in encode(tokenizer, pieces))
    else:
        messages = as_messages(row)
        answer = "".join(m["content"] for m in messages if m["role"] == "assistant")
        pieces = chat_pieces(tokenizer, messages)
        if pieces is None:
            fail(f"{place}: this chat template rewrites earlier turns when one is added, so an answer has no fixed "
                 "prefix. Split the conversation into rows with one answer each.")  # fmt: skip
        ids, labels = encode(tokenizer, pieces)
    lost = not answer or all(label == -100 for label in labels[1:max_length])
    return [(ids[:max_length], labels[:max_length], "dropped" if lost else "cut" if len(ids) > max_length else "kept")]


# Copied from finetune_full/finetune_full.py
def generate_examples(source, tokenizer, max_length, cache_key):
    """Generator for Dataset.from_generator; `cache_key` makes its cache notice a changed file or script."""
    shape, told = None, time.time()
    rows = read_rows(source) if isinstance(source, str) else ((f"row {i}", row) for i, row in enumerate(source, 1))
    for place, row in rows:
        found = find_shape(place, row)
        if shape is None and found in ("messages", "instruction") and turn_end_id(tokenizer) is None:
            fail("the chat template ends an assistant's turn with no special token, so the model would never learn to "
                 "stop. Put eos_token behind the answer in it, or take another --chat_template.")  # fmt: skip
        shape = shape or found
        if found != shape:
            fail(f"{place}: the columns {', '.join(row)} are of another shape than the rows before ({shape}).")
        for ids, labels, outcome in encode_row(tokenizer, place, row, shape, max_length):
            yield {"input_ids": ids, "labels": labels, "length": len(ids), "outcome": outcome, "shape": shape}
        if time.time() - told > 30:
            told = time.time()
            say("reading", place)
    if shape is None:
        fail(f"{source if isinstance(source, str) else 'the data set'} has no rows.")


# Copied from finetune_full/finetune_full.py
def load_examples(name, source, tokenizer, max_length):
    """Return a Dataset of input_ids, labels and length, and say what is in it: nothing is dropped in silence."""
    stat = Path(source).stat() if isinstance(source, str) else None
    key = f"{stat and (stat.st_mtime_ns, stat.st_size)} {Path(__file__).read_text(encoding='utf-8')}"  # a list = shards
    arguments = {"source": source, "tokenizer": tokenizer, "max_length": max_length, "cache_key": key}
    ids, text, number = List(Value("int32")), Value("string"), Value("int32")
    columns = {"input_ids": ids, "labels": ids, "length": number, "outcome": text, "shape": text}
    data = Dataset.from_generator(generate_examples, Features(columns), gen_kwargs=arguments)
    outcome = list(data["outcome"])
    kept = data.select([i for i, o in enumerate(outcome) if o != "dropped"])
    if not len(kept):
        fail(f"{name} data: nothing to learn from, none of {len(data)} examples has an answer in {max_length} tokens.")
    say(name, f"{source if stat else 'hub data set'} ({kept[0]['shape']}): {len(kept):,} examples, "
              f"{sum(kept['length']):,} tokens; {outcome.count('cut')} cut at {max_length} tokens, "
              f"{outcome.count('dropped')} dropped (no answer left)")  # fmt: skip
    return kept


# Copied from finetune_full/finetune_full.py
def load_data(script, training, tokenizer, max_length):
    """Return {"train": examples, "validation": examples}; one process per node prepares, the others read its cache."""
    sources = {"train": script.train_file, "validation": script.validation_file}
    with training.main_process_first(desc="preparing the data"):
        if script.dataset_name:
            try:
                hub = load_dataset(script.dataset_name, script.dataset_config_name)
            except (OSError, ValueError) as error:
                fail(f"--dataset_name {script.dataset_name} cannot be loaded: {error}")
            sources = {name: sources[name] or hub.get(name) for name in sources}
            if sources["train"] is None or (training.eval_strategy != "no" and sources["validation"] is None):
                fail(
                    f"--dataset_name {script.dataset_name} has only {', '.join(hub)}: train and validation are needed."
                )
        return {n: load_examples(n, s, tokenizer, max_length) for n, s in sources.items() if s is not None}


# Copied from finetune_full/finetune_full.py
FILLER = {"input_ids": [0], "labels": [-100], "length": 1}  # an example that teaches nothing


# Copied from finetune_full/finetune_full.py
class Rows(torch.utils.data.Dataset):
    """Packed rows: item i is the list of examples that share row i."""

    def __init__(self, examples, rows):
        self.examples, self.rows = examples, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return [FILLER if index is None else self.examples[index] for index in self.rows[i]]


# Copied from finetune_full/finetune_full.py
def make_rows(examples, multiple, row_length=None):
    """The data set that Trainer sees: one example per row, or packed into rows of row_length tokens.

    Filled up to a multiple of what all ranks take at once: Trainer would repeat rows, and they would count twice.
    """
    if row_length is None:
        examples, missing = examples.select_columns([*FILLER]), -len(examples) % multiple
        filler = [Dataset.from_list([FILLER] * missing, examples.features)] if missing else []
        return concatenate_datasets([examples, *filler])
    # The longest first, each into the fullest row that it fits in; `room` is the sorted list of (tokens left, row).
    lengths, rows, room = list(examples["length"]), [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = bisect_left(room, (lengths[index], 0))
        left, row = room.pop(fit) if fit < len(room) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return Rows(examples, rows + [[None]] * (-len(rows) % multiple))


# Copied from finetune_full/finetune_full.py
def collate(rows, packed=False):
    """Right-padded batch without attention mask (causal attention never looks right), logits only where loss is.

    `logits_to_keep` (rows x tokens, bool) marks the positions whose next token is learned, `shift_labels` (1-D) holds
    those tokens. In packed rows the positions start again with each example, which keeps the examples apart
    (the padding behind them is at position 0: a start of its own each).
    """
    rows = [row if isinstance(row, list) else [row] for row in rows]
    width = max(sum(len(example["input_ids"]) for example in row) for row in rows)
    input_ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width + 1), -100)
    for r, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example["input_ids"])
            input_ids[r, start:end] = torch.tensor(example["input_ids"])
            labels[r, start + 1 : end] = torch.tensor(example["labels"][1:])  # nothing predicts the first token
            positions[r, start:end] = torch.arange(end - start)
            start = end
    tokens = sum(len(example["input_ids"]) for row in rows for example in row if example["labels"] != [-100])
    shifted = labels[:, 1:]
    batch = {"input_ids": input_ids, "labels": labels[:, :-1], "num_tokens": torch.tensor(tokens)}
    batch |= {"logits_to_keep": shifted != -100, "shift_labels": shifted[shifted != -100]}
    return batch | ({"position_ids": positions} if packed else {})


# Copied from finetune_full/finetune_full.py
def packing_is_exact(model, device):
    """Whether packed examples do not see each other on this architecture and attention implementation.

    Measured, not looked up: short examples, together and apart, on a random twin of the model's configuration
    (two layers, or one of each kind; weights with std 0.15, since smaller ones attend evenly and would hide a leak).
    """
    config = deepcopy(model.config)
    examples = [{"input_ids": ids, "labels": ids} for ids in ([5, 9, 2, 7, 3], [11, 4, 6, 8, 21, 1, 13], [17, 10, 12])]
    # Flash attention has 16-bit kernels only; their rounding is far below what a leak changes (1 and more).
    dtype, tolerance = (torch.bfloat16, 0.1) if "flash" in config._attn_implementation else (torch.float32, 1e-4)
    try:
        for window in ("sliding_window", "attention_chunk_size"):  # shorter than the examples, or it would not matter
            if getattr(config, window, None):
                setattr(config, window, 4)
        if getattr(config, "layer_types", None):
            config.layer_types = [*dict.fromkeys(config.layer_types), config.layer_types[0]]
        config.num_hidden_layers = len(getattr(config, "layer_types", None) or [0, 0])
        config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 64, None, None, None
        twin = type(model)(config).to(device, dtype).eval()
        if kinds_of_layers(model) - kinds_of_layers(twin):
            return False  # a kind of layer that comes later in the model: not tried
        for parameter in twin.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        together = token_losses(twin, [examples], device)
        apart = torch.cat([token_losses(twin, [[example]], device) for example in examples])
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return False  # no twin, no proof
    return torch.allclose(together, apart, rtol=0, atol=tolerance)


# Copied from finetune_full/finetune_full.py
def kinds_of_layers(model):
    """The classes of modules that an architecture defines itself."""
    others = ("torch.", "bitsandbytes.", "peft.")
    return {type(module).__name__ for module in model.modules() if not type(module).__module__.startswith(others)}


# Copied from finetune_full/finetune_full.py
@torch.no_grad()
def token_losses(model, rows, device):
    """Cross-entropy of each learned token of packed rows, in order; shape (tokens,)."""
    batch = {name: value.to(device) for name, value in collate(rows, packed=True).items()}
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    logits = logits[batch["logits_to_keep"]].float()
    return torch.nn.functional.cross_entropy(logits, batch["shift_labels"], reduction="none")


# ---- Training: Hugging Face's Trainer, with losses that are true means over tokens ----


# Copied from finetune_full/finetune_full.py
class EpochSampler(LengthGroupedSampler):
    """Trainer's length-grouped order, but drawn from seed and epoch: the same on every rank and after a resume."""

    def __init__(self, trainer, lengths):
        super().__init__(trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps, lengths=lengths)
        self.trainer = trainer

    def __iter__(self):
        seed = self.trainer.args.seed if self.trainer.args.data_seed is None else self.trainer.args.data_seed
        self.generator = torch.Generator().manual_seed(seed + 1000 * int(self.trainer.state.epoch or 0))
        return super().__iter__()


# Copied from finetune_full/finetune_full.py
class FineTuner(Trainer):
    """Trainer whose losses are means over tokens: of the logged steps, of the whole run, and of an evaluation."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=self.args.device)  # eval, train: loss, labels, tokens
        self.tokens_seen = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens, labels = inputs.pop("num_tokens"), inputs["shift_labels"].numel()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        summed = loss.detach().double() * num_items_in_batch / self.args.world_size
        self.sums[int(model.training)] += torch.stack([summed, summed.new_tensor(labels), tokens.to(summed)])
        return (loss, outputs) if return_outputs else loss

    def take_sums(self, training):
        """Loss, learned tokens and tokens of all ranks since the last call."""
        sums = self.accelerator.reduce(self.sums[int(training)].clone(), "sum").tolist()
        self.sums[int(training)] = 0
        return sums

    def log(self, logs, start_time=None):
        if "loss" in logs:
            loss, labels, tokens = self.take_sums(training=True)
            before = next((e for e in reversed(self.state.log_history) if "num_labels" in e), {"num_labels": 0})
            logs |= {"loss": loss / labels, "num_tokens": tokens, "num_labels": before["num_labels"] + labels}
            whole_run = before.get("train_loss", 0) * before["num_labels"] + loss
            logs["train_loss"] = whole_run / logs["num_labels"]
            self.tokens_seen += tokens
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        loss, labels, _ = self.take_sums(training=False)
        output.metrics.update(eval_loss=loss / labels, eval_perplexity=math.exp(min(loss / labels, 700)))
        return output

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        packed = isinstance(self.train_dataset, Rows)  # packed rows are all alike: their order is random
        return EpochSampler(self, [1] * len(self.train_dataset) if packed else list(self.train_dataset["length"]))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Trainer compares names as they stand in the file, where gpt_neox's head has another: it would be left out."""
        if hasattr(self.model, "peft_config"):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        return self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self):
        if self.is_deepspeed_enabled or hasattr(self.model, "peft_config"):
            return super()._load_best_model()
        return self._load_from_checkpoint(self.state.best_model_checkpoint)

    def save_model(self, output_dir=None, _internal_call=False):
        self.model.config.use_cache = True  # switched off for training; whoever loads the result wants it
        super().save_model(output_dir, _internal_call)
        self.model.config.use_cache = False
        if self.args.should_save:
            mask = os.umask(0)
            os.umask(mask)
            for path in Path(output_dir or self.args.output_dir).glob("*.safetensors"):
                path.chmod(0o666 & ~mask)  # safetensors writes for the owner only


# Copied from finetune_full/finetune_full.py
class Progress(TrainerCallback):
    """One line per logged step, always in the same order: `grep '^step'` finds them."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = self.last = time.time()
        self.first_step, self.first_seconds = state.global_step, None
        say("steps", f"{state.max_steps:,} in {state.num_train_epochs} epoch(s), from step {state.global_step:,} on")

    def on_step_end(self, args, state, control, **kwargs):
        self.first_seconds = self.first_seconds or time.time() - self.began
        # A checkpoint carries the sums logged so far: log before each one, and at the last step.
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            say("eval", f"{step}  loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.2f}")
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            fail(f"the loss is {logs['loss']} at step {state.global_step}, the weights are spoilt. Lower "
                 "--learning_rate or use --precision bf16, and go on from an earlier checkpoint.")  # fmt: skip
        now, seconds_a_step = time.time(), (time.time() - self.began) / (state.global_step - self.first_step)
        left = int((state.max_steps - state.global_step) * seconds_a_step)
        if state.is_world_process_zero:
            print(f"{step}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  grad {logs['grad_norm']:.3f}  "
                  f"{logs['num_tokens'] / (now - self.last):,.0f} tok/s  {peak_memory():.2f} GiB  "
                  f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}", flush=True)  # fmt: skip
        self.last = now


# Copied from finetune_full/finetune_full.py
def peak_memory():
    """Peak memory of this process so far in GiB: on its GPU where it has one, else on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20 if status.exists() else math.nan


# Copied from finetune_full/finetune_full.py
def count_parameters(model):
    """(trainable, total) parameters, also where ZeRO-3 parts them, 4 bit packs them, or rows are trained."""
    sizes = [(p, getattr(p, "ds_numel", getattr(p, "quant_state", p).shape.numel())) for p in model.parameters()]
    return sum(getattr(p, "trained_numel", n) for p, n in sizes if p.requires_grad), sum(n for _, n in sizes)


# Copied from finetune_full/finetune_full.py
def print_banner(script, training, trainer, examples, tokenizer, resume):
    """What is it doing, and why: the questions that a reader of the log has first."""
    model, (trained, total) = trainer.model, count_parameters(trainer.model)
    batch, ranks, accumulated = training.train_batch_size, training.world_size, training.gradient_accumulation_steps
    tokens_per_row = sum(examples["length"]) / len(trainer.train_dataset)
    device = "CPU" if training.device.type == "cpu" else torch.cuda.get_device_name(training.device)
    rows = "packed; the examples of a row do not see each other (measured on this architecture)"
    say("model", f"{script.model_name_or_path} ({model.config.model_type}), {total:,} parameters, "
                 f"{trained:,} of them trained ({trained / total:.2%})")  # fmt: skip
    say("device", f"{ranks} x {device}, {training.precision} ({training.precision_reason}), trained weights in fp32")
    say("attention", f"{model.config._attn_implementation}; no mask")
    say("rows", rows if script.packing else f"one example each ({training.train_sampling_strategy}), right-padded")
    say("batch", f"{batch} rows x {ranks} device(s) x {accumulated} accumulated = about "
                 f"{batch * ranks * accumulated * tokens_per_row:,.0f} tokens a step")  # fmt: skip
    say("output", training.output_dir)
    say("resume", resume or "from the start (no checkpoint)")
    pairs, text = zip(examples[0]["input_ids"], examples[0]["labels"], strict=True), ""
    for learned, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        part = tokenizer.decode([token for token, _ in run])
        text += f"[[{part}]]" if learned else part
    text = text if len(text) < 300 else f"{text[:100]} ... {text[-190:]}"
    say("example", text.replace("\n", "\\n") + "    ([[ ]] carries loss)")


# Copied from finetune_full/finetune_full.py
def begin(trainer, given, resume):
    """Record the arguments; remove what an older run left that would pass for this one's."""
    trainer.accelerator.wait_for_everyone()
    output_dir = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        (output_dir / "all_results.json").unlink(missing_ok=True)
        for checkpoint in [] if resume else output_dir.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        record = {name: value for name, value in given.items() if name != "resume_from_checkpoint"}
        (output_dir / "run_args.yaml").write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), "utf-8")


# Copied from finetune_full/finetune_full.py
def save_results(trainer):
    """Model, tokenizer, trainer_state.json, loss.png; all_results.json comes last and marks the run as finished."""
    progress = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Progress))
    seconds, (trained, total) = time.time() - progress.began, count_parameters(trainer.model)
    trainer.save_model()
    evaluation = next((e for e in trainer.state.log_history[-2:] if "eval_loss" in e), {})  # done at the last step
    if trainer.eval_dataset is not None and (trainer.args.load_best_model_at_end or not evaluation):
        evaluation = trainer.evaluate()
    trainer.save_state()
    results = {
        "train_loss": next((e["train_loss"] for e in reversed(trainer.state.log_history) if "num_labels" in e), None),
        "train_runtime": seconds,
        "train_tokens_per_second": trainer.tokens_seen / seconds,
        "seconds_to_first_step": progress.first_seconds,
        "steps": trainer.state.global_step,
        "peak_memory_gib": peak_memory(),
        "trainable_parameters": trained,
        "total_parameters": total,
        **{name: evaluation[name] for name in ("eval_loss", "eval_perplexity") if name in evaluation},
    }
    if trainer.is_world_process_zero():
        draw_loss(trainer.state.log_history, Path(trainer.args.output_dir) / "loss.png")
        trainer.save_metrics("all", results, combined=False)
    say("done", f"loss {results['train_loss']:.4f}, {results['steps']:,} steps, {seconds:,.0f} s, "
                f"{trainer.tokens_seen / seconds:,.0f} tok/s, peak {results['peak_memory_gib']:.2f} GiB")  # fmt: skip


# Copied from finetune_full/finetune_full.py
def draw_loss(history, path):
    """Training and validation loss over steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", ".-"), ("eval_loss", "validation", "o--")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=label)
    axes.set(xlabel="step", ylabel="loss per learned token (nats)", title=f"{path.parent.resolve().name}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


# ---- Guard rails: arguments, errors, going on after an interruption ----


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


# Copied from finetune_full/finetune_full.py
def choose_precision(args):
    """Return (precision, reason) for --precision, --bf16, --fp16 on this machine, and set the latter two."""
    wanted = "bf16" if args.bf16 else "fp16" if args.fp16 else args.precision
    if (args.bf16 and args.fp16) or args.precision not in ("auto", wanted):
        fail("--precision, --bf16 and --fp16 contradict each other. Give only --precision.")
    if not args.use_cpu and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        reason, has_bf16 = "compute capability {}.{}".format(*capability), capability >= (8, 0)
        if wanted == "bf16" and not has_bf16:
            fail(f"--precision bf16 needs compute capability 8.0, this GPU has {reason}. Use fp16 or fp32.")
        precision = wanted if wanted != "auto" else "bf16" if has_bf16 else "fp16"
    else:
        if Path("/dev/nvidiactl").exists() and not args.use_cpu and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            fail(f"this node has an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no "
                 "GPU and would train on the CPU. See nvidia-smi; --use_cpu true asks for the CPU.")  # fmt: skip
        if wanted == "fp16":
            fail("--precision fp16 needs a GPU. On a CPU use fp32 or bf16.")
        precision, reason = ("bf16", "as asked") if wanted == "bf16" else ("fp32", "no GPU in use")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which Trainer imports, would guess and warn
        args.use_cpu |= not args.deepspeed  # without it Trainer takes several CPU processes for one, and refuses bf16
    args.bf16, args.fp16 = precision == "bf16", precision == "fp16"
    return precision, reason


# Copied from finetune_full/finetune_full.py
def parse(argv):
    """Return (script arguments, training arguments, dict of the arguments as given)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = read_settings(argv[0]) + argv[1:]
    parser = HfArgumentParser(
        (ScriptArguments, FineTuningArguments), description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.parse_args(argv)  # argparse's own one-line error for a misspelt name
    try:
        script, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, OSError) as error:
        fail(error)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return script, training, vars(parser.parse_args(argv))


# Copied from finetune_full/finetune_full.py
def read_settings(path):
    """A YAML or JSON file of `name: value` as the words of a command line."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        fail(f"the settings file {path} cannot be read: {error}")
    if not isinstance(settings, dict):
        fail(f"the settings file {path} must hold lines of `name: value`.")
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        if value is not None:
            words += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return words


# Copied from finetune_full/finetune_full.py
def check_arguments(script, training):
    """Refuse what cannot work before anything is loaded."""
    if (script.train_file is None) == (script.dataset_name is None):
        fail("give exactly one of --train_file and --dataset_name.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            fail(f"--{name} must be 1 or more, not {getattr(training, name)}.")
    if Path(script.model_name_or_path).resolve() == Path(training.output_dir).resolve():
        fail("--output_dir is the directory of --model_name_or_path: the model would be overwritten. Choose another.")
    for path in (script.train_file, script.validation_file):
        if path is not None and not Path(path).is_file():
            fail(f"{path} is not there. Relative paths start at {Path.cwd()}.")
    for package in training.report_to:
        if find_spec(package) is None:
            fail(f"--report_to {package}: the package is not installed. Type: pip install {package}")
    if training.label_smoothing_factor:
        fail("--label_smoothing_factor does not work with logits computed only where the loss is. Leave it out.")
    if script.early_stopping_patience is not None:
        if training.save_strategy == "no":
            fail("--early_stopping_patience keeps the best checkpoint: it needs --save_strategy steps or epoch.")
        training.eval_strategy, training.eval_steps = training.save_strategy, training.save_steps
        training.load_best_model_at_end, training.metric_for_best_model = True, "loss"
        training.greater_is_better = False
    if training.eval_strategy != "no" and script.validation_file is None and script.dataset_name is None:
        fail("an evaluation during training (--eval_strategy, --early_stopping_patience) needs --validation_file.")
    if training.n_gpu > 1:
        fail(f"one process but {training.n_gpu} GPUs. Type: torchrun --standalone --nproc_per_node {training.n_gpu} "
             f"{sys.argv[0]} ..., or put CUDA_VISIBLE_DEVICES=0 before python for one GPU.")  # fmt: skip
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if training.deepspeed and is_deepspeed_zero3_enabled() and not training.hf_deepspeed_config.get_value(gather):
        fail(f"under ZeRO-3 no model would be saved. Set {gather} to true in {training.deepspeed}.")
    if training.deepspeed and int(os.environ.get("WORLD_SIZE", "0")) != training.world_size:
        fail(
            f"--deepspeed needs a launcher, and GPUs. Type: torchrun --standalone --nproc_per_node 1 {sys.argv[0]} ..."
        )
    try:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        writable = os.access(training.output_dir, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        fail(f"--output_dir {training.output_dir} cannot be written. Choose another directory.")


# Copied from finetune_full/finetune_full.py
def check_packing(script, model, device):
    """Refuse --packing where it would not be exact."""
    if script.packing and not packing_is_exact(model, device):
        fail(f"--packing true: the examples of a row would see each other on {model.config.model_type} "
             f"({model.config._attn_implementation} attention). Leave it out: the default is exact.")  # fmt: skip


# Copied from finetune_full/finetune_full.py
def load_tokenizer(script):
    """Return (tokenizer, tokens per example at most)."""
    try:
        config = AutoConfig.from_pretrained(script.model_name_or_path, trust_remote_code=script.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path, trust_remote_code=script.trust_remote_code)
    except (OSError, ValueError) as error:
        fail(
            f"--model_name_or_path {script.model_name_or_path} is no model here, nor could it be fetched: {error}"[:400]
        )
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {script.model_name_or_path} has no EOS token, so the model could not learn to stop. "
             "Set eos_token in its tokenizer_config.json.")  # fmt: skip
    check_tokenizer(script.model_name_or_path, tokenizer, config.get_text_config().vocab_size)
    choose_chat_template(script.chat_template, tokenizer)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    positions = next((getattr(config, name) for name in names if getattr(config, name, None)), 1024)
    max_length = min(1024, positions) if script.max_length is None else script.max_length
    if not 2 <= max_length <= positions:
        fail(f"--max_length {max_length} does not fit the {positions} positions of this model.")
    if script.packing_length is not None and script.packing_length < max_length:
        fail(
            f"--packing_length {script.packing_length} is shorter than --max_length {max_length}: a row must hold one."
        )
    return tokenizer, max_length


# Copied from finetune_full/finetune_full.py
def gathered(*parameters):
    """A context in which parameters that ZeRO-3 parts are whole; what changes in them is kept."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0)


# Copied from finetune_full/finetune_full.py
def compare_whole_tensors():
    """Under ZeRO-3 transformers compares emptied tensors: a head of its own, as Falcon's may be, would be lost."""
    import transformers.modeling_utils as library

    plain = library._tied_params_are_equal  # private: should it be gone one day, better an error than a lost head
    plain = getattr(plain, "plain", plain)  # set before, by another run in this process

    def equal(one, other):
        with gathered(one, other):
            return plain(one, other)

    equal.plain = plain
    library._tied_params_are_equal = equal


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


# Copied from finetune_full/finetune_full.py
def check_model(script, tokenizer, model, info):
    """Refuse a checkpoint that would train with random weights, and set what its class leaves open."""
    if info["missing_keys"]:
        fail(
            f"{script.model_name_or_path} lacks weights that would start at random: {sorted(info['missing_keys'])[:3]}"
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        fail(f"{type(model).__name__} takes no `logits_to_keep`, which this script's loss needs.")
    model.loss_type = "ForCausalLM"  # gpt2 names none, and its loss would be divided by the wrong number of tokens
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, turn_end_id(tokenizer)} - {None})
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature or the like without do_sample: nothing could be saved
        model.generation_config.do_sample = True


# Copied from finetune_full/finetune_full.py
def find_resume_point(script, training, given):
    """Return the checkpoint to go on from (None: start anew); a finished run ends here with exit code 0."""
    output_dir, wanted = Path(training.output_dir), training.resume_from_checkpoint
    if wanted is not None and wanted.lower() not in ("true", "false"):
        if not (Path(wanted) / "trainer_state.json").is_file():
            fail(f"--resume_from_checkpoint {wanted} is no complete checkpoint (it has no trainer_state.json).")
        return wanted  # named by the user: other arguments are allowed
    complete = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json")]
    last = max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)
    finished, record = (output_dir / "all_results.json").is_file(), output_dir / "run_args.yaml"
    if not (finished or last) or (wanted or "").lower() == "false":
        return None
    before = yaml.safe_load(record.read_text(encoding="utf-8")) if record.is_file() else {}
    names = sorted((set(before) | set(given)) - {"resume_from_checkpoint", "ddp_timeout"})  # they change no result
    changed = [f"--{n} {before.get(n)}, now {given.get(n)}" for n in names if before.get(n) != given.get(n)]
    for path in filter(None, (script.train_file, script.validation_file)):
        if record.is_file() and Path(path).stat().st_mtime > record.stat().st_mtime:
            changed.append(f"{path} was written after the run began")
    if changed:
        fail(f"{output_dir} holds {'the result' if finished else 'checkpoints'} of another run ({'; '.join(changed)}). "
             "Choose another --output_dir, or start anew with --resume_from_checkpoint false.")  # fmt: skip
    if finished:
        say("finished", f"{output_dir} holds this run's result; --resume_from_checkpoint false would start it anew")
        raise SystemExit(0)
    ranks = len([*last.glob("rng_state*.pth")])
    if ranks not in (0, training.world_size):
        fail(f"{last} is of a run with {ranks} process(es), this one has {training.world_size}: the batches would be "
             "others. Use as many, or start anew with --resume_from_checkpoint false.")  # fmt: skip
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] >= state["max_steps"]:  # trained to the end, then cut off: Trainer would add a step
        training.max_steps, training.num_train_epochs = -1, int(state["epoch"])
    return str(last)


if __name__ == "__main__":
    main()
