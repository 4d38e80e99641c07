#!/usr/bin/env python3
"""Train an adapter (LoRA) on a frozen causal language model; QLoRA with --load_in_4bit true.

Learns plain text or answers only. The frozen base takes 2 bytes per parameter (4 on a CPU, 1 in
8 bit, about 0.5 in 4 bit), the adapter 16 for each of its own, often below 1 % of the model's.

By hand       python finetune_lora.py --model_name_or_path MODEL --train_file train.jsonl
Head alone    ... --lora_target_modules none --modules_to_save lm_head --load_in_8bit true
Several GPUs  torchrun --standalone --nproc_per_node 8 finetune_lora.py ...
As a job      qsub -P GROUP job.sh
Again         python finetune_lora.py output/run_args.yaml --output_dir output2
Follows       LoRA https://arxiv.org/abs/2106.09685 (4.1), QLoRA https://arxiv.org/abs/2305.14314
"""

import json
import math
import os
import re
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset, Features, List, Value
from pyarrow import compute, parquet
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_pt_utils import LengthGroupedSampler, get_model_param_count

JOBS = Path(__file__).resolve().parent.parent / "jobs"
keep_run = model_layers = None  # where this file was copied alone: it trains from start to end
if (JOBS / "keep_run.py").exists():  # what lets a run go on where it was cut off, and stop in time
    sys.path.insert(0, str(JOBS))  # before files of yours that are called alike
    import keep_run
    import model_layers

# ---- 1. Settings ----


@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="Directory or hub name of the model.")
    train_file: list[str] | None = HfArg(default=None, help="JSON Lines, JSON or Parquet files.")
    validation_file: list[str] | None = HfArg(default=None, help="The same, for evaluations.")
    dataset_name: str | None = HfArg(default=None, help="Hub data set instead of --train_file.")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration.")
    max_length: int | None = HfArg(default=None, help="Tokens per example. Default: up to 1024.")
    chat_template: str | None = HfArg(default=None, help="alpaca, or a Jinja file.")
    chat_template_kwargs: str = HfArg(default="{}", help='Like {"enable_thinking": false}.')
    precision: str = HfArg(default="auto", help="auto (what the GPU has), bf16, fp16 or fp32.")
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2.")
    early_stopping_patience: int | None = HfArg(default=None, help="Saves without a lower loss.")
    trust_remote_code: bool = HfArg(default=False, help="Run the repository's code. Read it first.")
    lora_r: int = HfArg(default=16, help="Rank: capacity and memory grow with it.")
    lora_alpha: float = HfArg(default=32, help="What the adapter adds is scaled by alpha / r.")
    lora_dropout: float = HfArg(default=0.0, help="Share of inputs left out; 0.05 for few data.")
    lora_target_modules: str = HfArg(default="all-linear", help="all-linear, NAME,NAME or none.")
    modules_to_save: str | None = HfArg(default=None, help="NAME,NAME of modules to train whole.")
    new_tokens: str | None = HfArg(default=None, help='"<a>,<b>": train their rows, too.')
    load_in_8bit: bool = HfArg(default=False, help="Base in 8 bit: half of 16 bit's memory.")
    load_in_4bit: bool = HfArg(default=False, help="Base in 4 bit (QLoRA): a quarter, slower.")
    allow_partly_quantized: bool = HfArg(default=False, help="Even if most of it stays in 16 bit.")

    def __post_init__(self):  # NAME,NAME becomes a list
        for option in ("lora_target_modules", "modules_to_save", "new_tokens"):
            names = (getattr(self, option) or "").split(",")
            setattr(self, option, [name.strip() for name in names if name.strip()])


# Where we start from other values than Trainer; the command line wins.
DEFAULTS = {"output_dir": "output", "learning_rate": 2e-4, "logging_steps": 10}
DEFAULTS |= {"train_sampling_strategy": "group_by_length", "ddp_find_unused_parameters": False}
DEFAULTS |= {"log_level_replica": "error", "ddp_timeout": 6 * 3600}  # one speaks, prepares data
DEFAULTS |= {"dataloader_num_workers": 2 * torch.cuda.is_available()}  # beside the GPU


# ---- 2. Data: format yours here ----

# For tokenizers without a chat template; saved with the model, so that generation has it too.
# Copied from finetune_full/finetune_full.py, down to the next headline
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
IDS, NUMBER, TEXT = List(Value("int32")), Value("int32"), Value("string")
COLUMNS = Features(input_ids=IDS, labels=IDS, length=NUMBER, form=TEXT, outcome=TEXT)
EMPTY_THOUGHT = r"(<think>|<\|channel>thought)\s*(</think>|<channel\|>)\s*$"
UNUSED = "system history tools chosen rejected thinking reasoning reasoning_content".split()


def format_row(row, tokenizer):
    """Return (form, examples) of a row: lists of (text, learned); learned ones carry the loss."""
    eos = (tokenizer.eos_token, True)
    if unused := [name for name in UNUSED if row.get(name)]:
        raise ValueError(f"{', '.join(unused)} would be left out: remove it, or make it text.")
    if isinstance(row.get("messages"), list):
        return "messages", chat_pieces(row["messages"], tokenizer)
    if "prompt" in row and "completion" in row:
        prompt, answer = texts(row, "prompt", "completion")
        return "prompt", [[(prompt, False), (answer, True), eos]]
    if "instruction" in row and "output" in row:
        question, answer = texts(row, "instruction", "output")
        if row.get("input"):
            question += "\n\n" + texts(row, "input")[0]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return "instruction", chat_pieces(turns, tokenizer)
    if "text" in row:
        return "text", [[(texts(row, "text")[0], True), eos]]
    known = "messages (a list), prompt+completion, instruction+output, text"
    raise ValueError(f"the columns {', '.join(row)} are of no known form. Known: {known}.")


def texts(row, *columns):
    """The texts in these columns of a row, or of a message."""
    for column in columns:
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise ValueError(f"{'+'.join(columns)} must hold text, found {str(row)[:60]}.")
    return [row[column] for column in columns]


def chat_pieces(messages, tokenizer):
    """A conversation as pieces: what stands before each assistant's turn, and the turn.

    Where a template rewrites earlier turns (Qwen3's drops their thoughts), the next answer begins
    an example of its own, with the prompt that generation will give.
    """
    examples, done, render = [[]], "", tokenizer.apply_chat_template
    for number, message in enumerate(messages):
        (role, content), answer = texts(message, "role", "content"), ""
        if role == "assistant":
            if number:
                before = render(messages[:number], tokenize=False, add_generation_prompt=True)
            else:  # a conversation may begin with an answer
                before = render([{**message, "content": "\0"}], tokenize=False).split("\0")[0]
            after = render(messages[: number + 1], tokenize=False)
            # What asks may end in an empty thought, without which the answer is written (Nemotron).
            thought = not after.startswith(before) and re.search(EMPTY_THOUGHT, before)
            start = before[: thought.start()] if thought else before
            answer = after[len(start) :]
            if not after.startswith(start) or (thought and answer.startswith(thought[1])):
                raise ValueError("the template rewrites its prompts. Edit it (--chat_template).")
            if not before.startswith(done):
                examples, done = [*examples, []], ""
            examples[-1] += [(before[len(done) :], False), (answer, content != "")]
            done = before + answer
        for name, value in message.items():  # a template may write an answer's thoughts, say
            is_used = isinstance(value, str) and value.strip() in answer
            if name not in ("role", "content") and value not in (None, "", [], {}) and not is_used:
                raise ValueError(f"a turn is role and content: its {name} would be left out.")
    return examples


def leading_ids(tokenizer):
    """The ids (a BOS, or none) that this tokenizer puts before every text."""
    text, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return ids[: ids.index(text[0])]


def encode(pieces, tokenizer, first=None):
    """Return (ids, labels) of pieces, with BOS once in front where the tokenizer adds it."""
    first = leading_ids(tokenizer) if first is None else first
    # Each piece is tokenized apart, so that a prompt has the same ids in generation.
    ids, labels, texts = [], [], [text for text, _ in pieces]
    "".join(texts).encode()  # raises on half a surrogate pair, which JSON can write
    found = texts and tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for (_, learned), new in zip(pieces, found, strict=True):
        if not ids and new[: len(first)] != first:
            ids, labels = list(first), [-100] * len(first)
        ids += new
        labels += new if learned else [-100] * len(new)
    return ids, labels


def make_examples(source, tokenizer, max_length, form=None):
    """Yield the examples of all rows, each with its outcome: kept, cut or dropped."""
    first, end = leading_ids(tokenizer), turn_end_id(tokenizer)
    for place, row in read_rows(source):
        try:
            row, asked = keep_run.plain(row, tokenizer) if keep_run else (row, tokenizer)  # tools
            found, examples = format_row(row, asked)
            encoded = [(pieces, *encode(pieces, tokenizer, first)) for pieces in examples]
        except Exception as error:  # a template can raise anything
            fail(f"{place}: {error if isinstance(error, ValueError) else repr(error)}")
        if found in ("messages", "instruction"):
            check(end is not None, "the template shows not all turns, or no token to stop at.")
            ends = [end in labels for *_, labels in encoded if {*labels} - {-100}]
            check(all(ends) or asked is not tokenizer, f"{place}: wrong end. Edit the template.")
        form = form or found
        check(found == form, f"{place}: a row of another form ({found}) than before ({form}).")
        for pieces, ids, labels in encoded:
            # Nothing is learned from an EOS behind an empty answer, nor without a label.
            is_empty = set(labels) <= {-100, tokenizer.eos_token_id}
            is_text = pieces and all(learned for _, learned in pieces)  # is split, others are cut
            for start in range(0, len(ids) if is_text else 1, max_length):
                part = labels[start : start + max_length]
                outcome = "kept" if is_text or len(ids) <= max_length else "cut"
                outcome = "dropped" if is_empty or set(part[1:]) <= {-100} else outcome
                example = {"input_ids": ids[start : start + max_length], "labels": part}
                yield {**example, "length": len(part), "form": form, "outcome": outcome}
    check(form, f"{' '.join(map(str, source))} has no rows.")


def load_data(script, training, tokenizer, max_length, files):
    """Return Trainer's data sets; one process per node prepares them, the others wait."""
    sources, sets = {"train": script.train_file, "validation": script.validation_file}, {}
    rows = {"train": training.train_batch_size, "validation": training.eval_batch_size}
    with training.main_process_first():
        if script.dataset_name:
            hub = datasets.load_dataset(script.dataset_name, script.dataset_config_name)
            check("train" in hub, f"{script.dataset_name} has only {', '.join(hub)}, no train.")
            sources |= {name: [hub[name]] for name in sources if name in hub and not sources[name]}
        for name, source in sources.items():
            if not source:
                continue
            args = {"source": tuple(source), "tokenizer": tokenizer, "max_length": max_length}
            # The cache must notice other contents, another tokenizer or template, an edit above.
            key = datasets.fingerprint.Hasher.hash([files, Path(__file__).read_bytes(), args])
            make = (keep_run or Dataset).from_generator  # jobs/prepare_data.py uses all cores
            data = make(make_examples, COLUMNS, gen_kwargs=args, fingerprint=key)
            cut, lost = (compute.equal(data.data["outcome"], how) for how in ("cut", "dropped"))
            data = data.select(compute.indices_nonzero(compute.invert(lost)))
            check(len(data), f"{name}: nothing to learn from within {max_length} tokens.")
            cut, lost = (compute.sum(column).as_py() for column in (cut, lost))
            counts = f"{len(data):,} examples, {sum(data['length'][:]):,} tokens; {cut:,} cut"
            say(name, f"{counts} at {max_length} tokens, {lost:,} dropped (no answer left)")
            # Up to what all ranks take at once: Trainer would let some rows count twice.
            gap = -len(data) % (rows[name] * training.world_size)
            empty = {"input_ids": [[0]] * gap, "labels": [[-100]] * gap, "length": [0] * gap}
            data = data.select_columns([*empty])
            empty = Dataset.from_dict(empty, data.features)
            sets[name] = datasets.concatenate_datasets([data, empty])
    check("validation" in sets or not training.do_eval, f"{script.dataset_name} has no validation.")
    return {"train_dataset": sets["train"], "eval_dataset": sets.get("validation")}


def collate(examples):
    """Right-padded batch without attention mask: causal attention never looks right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    next_ids = [torch.tensor([*example["labels"][1:], -100]) for example in examples]
    next_ids = pad(next_ids, batch_first=True, padding_value=-100)
    learned, tokens = next_ids != -100, sum(example["length"] for example in examples)
    batch = {"input_ids": pad(ids, batch_first=True), "labels": next_ids}
    # Logits only where the next token is learned; no cache, but the saved configuration allows it.
    batch |= {"logits_to_keep": learned, "shift_labels": next_ids[learned], "use_cache": False}
    return {**batch, "num_tokens": torch.tensor(tokens)}


# ---- 3. Model: what is trained ----

OUT_OF_MEMORY = """GPU memory is full. Try, in this order: --per_device_train_batch_size 1 with more
--gradient_accumulation_steps, --activation_checkpointing true, --load_in_4bit true, a shorter
--max_length, a lower --lora_r."""


def load_model(script, training, tokenizer, resume):
    """The base, in the precision that is computed in or quantised, and the adapter on it."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    options = {"dtype": dtypes.get(script.precision, torch.float32)}
    if bits := 8 * script.load_in_8bit or 4 * script.load_in_4bit:
        # The quantiser passes over subclasses of Linear.
        transformers.models.falcon.modeling_falcon.FalconLinear = torch.nn.Linear
        options["device_map"] = {"": str(training.device)}
        kind = {f"load_in_{bits}bit": True, "bnb_4bit_compute_dtype": options["dtype"]}
        kind |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**kind)
    model = read_model(script, tokenizer, script.model_name_or_path, **options)
    done = [m for m in model.modules() if type(m).__module__ == "bitsandbytes.nn.modules"]
    for layer in done:
        layer.support_avx512bf16_for_cpu = False  # or an evaluation on a CPU spoils the training
    check(done or not bits, f"no layer was quantised: leave --load_in_{bits}bit out.")
    text = f"{len(done)} layers in {bits} bit, else " if bits else ""
    text += f"{script.precision}; frozen; {model.get_memory_footprint() / 2**20:,.1f} MiB"
    if bits and model_layers:
        text += f"; {model_layers.prepare_rounded(model, script, training)}"
    say("base", text)
    if Path(script.model_name_or_path).is_dir():  # so that the adapter finds it from anywhere
        model.name_or_path = str(Path(script.model_name_or_path).resolve())
    return add_adapter(script, training, tokenizer, model)


def add_adapter(script, training, tokenizer, model):
    """Freeze the model and put on it what is trained, in fp32."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    whole, weights, modules = script.modules_to_save, [], script.lora_target_modules
    if model_layers:  # experts, too, and nothing that passes an adapter by
        modules, weights, whole = model_layers.find_targets(model, script)
    else:
        plain = not (whole or script.load_in_8bit) and all(w.dim() < 3 for w in model.parameters())
        check(plain, "--modules_to_save, 8 bit, experts, Mamba layers need `jobs` beside this.")
        lost = {*modules} - {n.rpartition(".")[2] for n, _ in model.named_modules()}
        check(not lost or modules in (["all-linear"], ["none"]), f"no layer is named {lost}.")
        modules = {"all-linear": "all-linear", "none": []}.get(",".join(modules), modules)
    # A file may hold a head of its own in spite of its configuration, as Falcon's does.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.config.tie_word_embeddings = is_tied = head.weight is embedding.weight
    ends = [n for n, m in model.named_modules() if m is embedding or (m is head and not is_tied)]
    rows = [tokenizer.get_vocab()[token] for token in script.new_tokens]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=modules or DUMMY_TARGET_MODULES,  # which match no layer
        target_parameters=weights or None,
        modules_to_save=whole or None,
        trainable_token_indices=dict.fromkeys(ends, rows) if rows else None,
    )
    warnings.filterwarnings("ignore", module="peft|transformers")  # of what PEFT mends itself
    transformers.set_seed(training.seed)  # the adapter begins at random
    model = get_peft_model(model, config)
    for parameter in (p for p in model.parameters() if p.requires_grad):  # 16 bit for DeepSpeed
        parameter.data = parameter.data.to(getattr(training, "kept_in", torch.float32))
    if model_layers:
        model_layers.check_targets(model, modules)
    return model


# ---- 4. Training ----


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        script, training, given = parse(argv)
        resume, run = find_run(script, training, given)
        tokenizer, max_length = load_tokenizer(script)
        data = load_data(script, training, tokenizer, max_length, run.get("data", os.urandom(8)))
        if keep_run:
            keep_run.check_tokens(script.new_tokens, tokenizer, data["train_dataset"])
        model = load_model(script, training, tokenizer, resume)
        trainer = FineTuner(model, training, collate, **data, processing_class=tokenizer)
        begin(script, trainer, given, run, resume)
    except Exception as error:
        if isinstance(error, NameError | AttributeError | TypeError):
            raise  # of an edit: its place is of use
        full = isinstance(error, torch.OutOfMemoryError)
        fail(OUT_OF_MEMORY if full else error if " " in str(error) else repr(error), full)
    try:
        with keep_run.hold(training, run) if keep_run else nullcontext():
            trainer.train(resume_from_checkpoint=resume)
            save_results(trainer, run)
            model.generation_config.save_pretrained(training.output_dir)  # where an answer ends
    except torch.OutOfMemoryError:
        fail(OUT_OF_MEMORY, every_rank=True)
    generate = "python ../generate_text/generate_text.py --model_name_or_path"
    say("next", f"{generate} {training.output_dir} --prompt TEXT")
    merge = f"python merge_lora.py --adapter_name_or_path {training.output_dir} --output_dir"
    say("merge", f"{merge} {training.output_dir}/merged --verify")


# Copied from finetune_full/finetune_full.py, down to the next headline
class EpochSampler(LengthGroupedSampler):
    """Trainer's order, but drawn from seed and epoch: the same on all ranks and after a resume."""

    def __iter__(self):
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        seed = args.seed if args.data_seed is None else args.data_seed
        self.generator = torch.Generator().manual_seed(seed + 1000 * epoch)
        return super().__iter__()


class FineTuner(Trainer):
    """Trainer whose losses are means over learned tokens."""

    sums, tokens_seen, first_step = 0, 0, 0

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = EpochSampler(sampler.batch_size, lengths=sampler.lengths[:])
            sampler.trainer = self
        return sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens, learned = inputs.pop("num_tokens"), inputs["shift_labels"].numel()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        summed = loss.detach().double() * num_items_in_batch / self.args.world_size
        self.sums += torch.stack([summed, summed.new_tensor(learned), tokens.to(summed)])
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # What is summed up must not reach into an evaluation, nor be lost to a resume.
        control, is_last = self.control, self.state.global_step >= self.state.max_steps
        control.should_log |= control.should_save or control.should_evaluate or is_last
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        """Losses as means over tokens, not over batches; a line for each: `grep '^step'`."""
        for name in {"loss", "eval_loss"} & set(logs):
            loss, learned, tokens = self.accelerator.reduce(self.sums, "sum").tolist()
            loss, self.sums = loss / learned, 0
            logs.update({name: loss, "num_learned": learned, "num_tokens": tokens})
            done, total, now = self.state.global_step, self.state.max_steps, time.time()
            check(math.isfinite(loss), f"the loss is {loss} at step {done}. Lower --learning_rate.")
            text = f"step {done}/{total}  loss {loss:.4f}"
            if name == "eval_loss":
                logs["eval_perplexity"] = math.exp(min(loss, 700))
                say("eval", f"{text}  perplexity {logs['eval_perplexity']:.2f}")
                continue
            lr, grad = logs["learning_rate"], logs["grad_norm"]
            logs["tokens_per_second"] = speed = tokens / (now - self.last)
            text += f"  lr {lr:.2e}  grad {grad:.3f}  {speed:,.0f} tok/s  {peak_memory():.2f} GiB"
            left = int((total - done) * (now - self.began) / (done - self.first_step))
            say(text, f"  left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
            self.last, self.tokens_seen = now, self.tokens_seen + tokens
        super().log(logs, start_time)


# ---- 5. Guard rails: no need to read ----


# Copied from finetune_full/finetune_full.py, down to the next headline
def say(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", flush=True)


def fail(message, every_rank=False):
    """One line on stderr and exit code 2; of several ranks the first one speaks."""
    text = " ".join(str(message).split())[:600]
    text += " Accept its licence there, then type: hf auth login" if "gated repo" in text else ""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print("error:", text, file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when one leaves
    raise SystemExit(2)


def check(condition, message):
    if not condition:
        fail(message)


def parse(argv):
    """Return (script arguments, Trainer's, {name: value} of those that are not the default)."""
    parser = transformers.HfArgumentParser([ScriptArguments, TrainingArguments], allow_abbrev=False)
    parser.description = __doc__
    parser.error = keep_run.refuse if keep_run else fail  # one line, not 200 of usage
    parser.set_defaults(**DEFAULTS, do_train=True)
    words = list(sys.argv[1:] if argv is None else argv)
    words = keep_run.read_words(words) if keep_run else words  # a file such as run_args.yaml, ~
    values = vars(parser.parse_args(words))
    defaults = vars(parser.parse_args(["--model_name_or_path", ""]))
    given = {name: value for name, value in values.items() if value != defaults[name]}
    reason = choose_precision(values)
    values.update(disable_tqdm=True, accelerator_config=None, remove_unused_columns=False)
    script, training = parser.parse_dict(keep_run.settle(values) if keep_run else values)
    script.reason = reason
    return script, training, given


def choose_precision(values):
    """Set the precision that the GPU has, or refuse what it has not; return the reason."""
    asked = {name for name in ("bf16", "fp16") if values[name]} | {values["precision"]} - {"auto"}
    known = asked <= {"bf16", "fp16", "fp32"} and len(asked) < 2
    check(known, "--precision is auto, bf16, fp16 or fp32, and must not contradict --bf16, --fp16.")
    best, reason, impossible = "fp32", "no GPU in use", "fp16"
    if torch.cuda.is_available() and not values["use_cpu"]:
        capability = torch.cuda.get_device_capability()
        best, impossible = ("bf16", None) if capability >= (8, 0) else ("fp16", "bf16")
        reason = "compute capability {}.{}".format(*capability)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess and warn
        values["use_cpu"] |= not values["deepspeed"]  # or Trainer takes several processes for one
    values["precision"] = precision = min(asked, default=best)
    check(precision != impossible, f"--precision {precision} does not work here: {reason}.")
    values.update(bf16=precision == "bf16", fp16=precision == "fp16")
    return reason


def find_run(script, training, given):
    """Return (checkpoint to go on from or None, record of this run)."""
    if keep_run:
        return keep_run.find_run(script, training, given, __file__)
    output_dir, remedy = Path(training.output_dir), "put `jobs` beside this script's directory"
    asked = training.resume_from_checkpoint or training.deepspeed or training.load_best_model_at_end
    is_new = not output_dir.exists() or not [*output_dir.iterdir()]
    check(is_new, f"{output_dir} is not empty. Choose another --output_dir; to go on, {remedy}.")
    asked = asked or script.early_stopping_patience
    check(not asked, f"to resume, to keep the best model, or for DeepSpeed, {remedy}.")
    say("alone", f"once cut off, it cannot go on; no stop in time, no check of arguments: {remedy}")
    return None, {}


def read_rows(source):
    """Yield (place, row) of JSON Lines, JSON (a list) and Parquet files, or of a data set."""
    for file, start, stop in (s if isinstance(s, tuple) else (s, 0, None) for s in source):
        place, rows, is_lines = str(file), file, False
        try:
            if place.lower().endswith(".parquet"):
                rows = (r for b in parquet.ParquetFile(file).iter_batches() for r in b.to_pylist())
            elif isinstance(file, str):
                rows = Path(file).open(encoding="utf-8-sig")  # noqa: SIM115 -- the loop reads it
                is_lines = not rows.read(1000).lstrip().startswith("[")
                rows.seek(0)
                rows = rows if is_lines else json.load(rows)
            for number, row in enumerate(islice(rows, start, stop), start + 1):
                place = f"{file}, row {number}"
                if not is_lines or row.strip():
                    row = json.loads(row) if is_lines else row
                    check(isinstance(row, dict), f"{place}: a row must be an object.")
                    yield place, row
        except Exception as error:  # of a damaged file, anything
            place = str(file) if isinstance(error, UnicodeError) else place
            fail(f"{place}: {error} (wanted: objects, one a line or in a list, in UTF-8; Parquet)")


def load_tokenizer(script):
    """Return (tokenizer with a chat template, tokens per example at most)."""
    name, remote = script.model_name_or_path, {"trust_remote_code": script.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(name, **remote).get_text_config()
    tokenizer = exact_tokenizer(name, config.vocab_size, say, **remote)
    choose_chat_template(script.chat_template, tokenizer, script.chat_template_kwargs)
    if keep_run:  # the template may stand in another file, or take lists of parts alone
        keep_run.find_template(name, script.chat_template, tokenizer, say, CHAT_TEMPLATE)
    limit = getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", 10**9)
    length = min(1024, limit) if script.max_length is None else script.max_length
    check(2 <= length <= limit, f"--max_length {length} does not fit the {limit} positions.")
    return tokenizer, length


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


def turn_end_id(tokenizer):
    """The special token that ends an assistant's turn in the chat template, or None."""
    turns, text = [{"role": r, "content": "yes!"} for r in ("user", "assistant")], ""
    with suppress(Exception):  # a template may not take these turns, and rows may need none
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text.rpartition("yes!")[2], add_special_tokens=False)["input_ids"]
    # all_special_ids has only those with a role, such as eos_token; Gemma's <end_of_turn> has none.
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids)
    return next((i for i in reversed(ids) if i in special and text.count("yes!") == 2), None)


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


def read_model(script, tokenizer, source, **options):
    """The model, frozen where text does not pass; refused if weights are missing."""
    remote = {"trust_remote_code": script.trust_remote_code}
    config, load = transformers.AutoConfig.from_pretrained(source, **remote), AutoModelForCausalLM
    if keep_run:  # a model that sees, too, and weights that are published quantised
        load = keep_run.prepare(config, source, options)
    is_plain = config.get_text_config() is config and not hasattr(config, "quantization_config")
    is_plain &= not (script.trust_remote_code and hasattr(config, "auto_map"))
    check(keep_run or is_plain, "own code, images, weights published quantised need ../jobs.")
    options |= {"attn_implementation": script.attn_implementation, "output_loading_info": True}
    model, info = load.from_pretrained(source, config=config, **options, **remote)
    wrong = [*info["missing_keys"], *(k for k in info["unexpected_keys"] if "weight_scale" in k)]
    check(not wrong, f"{source} lacks or packs weights: {sorted(wrong)[:3]} would be random.")
    if keep_run and (parts := keep_run.freeze_beside_text(model, source)):
        say("frozen", f"{', '.join(parts)}: text does not pass there")
    model.loss_type = "ForCausalLM"  # gpt2 names none and divides by a wrong number of tokens
    model.accepts_loss_kwargs = True  # the number of tokens, which composites seem to refuse
    ends = {tokenizer.eos_token_id, turn_end_id(tokenizer)} - {None}
    model.generation_config.eos_token_id = sorted(ends)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature or the like without do_sample: nothing could be saved
        model.generation_config.do_sample = True
    return model


def peak_memory(of=torch.cuda.max_memory_allocated):
    """Peak memory in GiB: of this process's GPU where it uses one, else of the process."""
    host = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return of() / 2**30 or host


def print_banner(script, trainer, run, resume):
    """Say what is done and why, and show an example with the part that carries loss."""
    args, model, rows = trainer.args, trainer.model, trainer.train_dataset
    total, trained = run["total_parameters"], run["trainable_parameters"]
    counts = f"{total:,} parameters, {trained:,} of them trained ({trained / total:.2%})"
    kept = next(str(p.dtype)[6:] for p in model.parameters() if p.requires_grad)
    say("model", f"{script.model_name_or_path} ({model.config.model_type}), {counts} in {kept}")
    say("device", f"{args.world_size} x {run['device']}, {script.precision} ({script.reason})")
    say("attention", f"{model.config._attn_implementation}; no mask, rows right-padded")
    size, parts = args.train_batch_size * args.world_size, args.gradient_accumulation_steps
    tokens = size * parts * sum(rows["length"][:]) / len(rows)
    say("batch", f"{size} rows x {parts} accumulated, about {tokens:,.0f} tokens a step")
    say("output", args.output_dir)
    say("resume", resume or "from the start (no checkpoint)")
    text, pairs = "", zip(rows[0]["input_ids"], rows[0]["labels"], strict=True)
    for learned, part in groupby(pairs, key=lambda pair: pair[1] != -100):
        piece = trainer.processing_class.decode([token for token, _ in part])
        text += f"[[{piece}]]" if learned else piece
    text = text if len(text) < 300 else f"{text[:100]} ... {text[-190:]}"
    say("example", text.replace("\n", "\\n") + "    ([[ ]] carries loss)")


def begin(script, trainer, given, run, resume):
    """Say what is done, and hand the run to what keeps it."""
    args, model = trainer.args, trainer.model
    count = getattr(model, "get_nb_trainable_parameters", None)  # PEFT knows packed and single rows
    trained, total = count() if count else [get_model_param_count(model, t) for t in (True, False)]
    check(trained, "nothing is trained: no parameter has requires_grad.")
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    run |= {"trainable_parameters": trained, "total_parameters": total, "device": device}
    print_banner(script, trainer, run, resume)
    model.config.use_cache = True  # for whoever loads the result; batches say False
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # gradients once, not twice
    trainer.remove_callback(transformers.PrinterCallback)
    if keep_run:
        trainer.add_callback(keep_run.KeepRun(trainer, given, run, resume))
    trainer.began = trainer.last = time.time()


def save_results(trainer, run):
    """Model, tokenizer, trainer_state.json; all_results.json last: it marks the run as finished."""
    trainer.save_model()
    history = trainer.state.log_history
    evaluation = {} if trainer.args.load_best_model_at_end or len(history) < 2 else history[-2]
    if trainer.eval_dataset is not None and "eval_loss" not in evaluation:
        evaluation = trainer.evaluate()
    trainer.save_state()
    seconds, steps = time.time() - trainer.began, [entry for entry in history if "loss" in entry]
    learned = sum(entry["num_learned"] for entry in steps)
    loss = sum(entry["loss"] * entry["num_learned"] for entry in steps) / learned
    speed, count = trainer.tokens_seen / seconds, trainer.state.global_step
    peaks = [peak_memory(), peak_memory(torch.cuda.max_memory_reserved)]  # the most of any process
    peaks = trainer.accelerator.gather(torch.tensor([peaks], device=trainer.args.device)).amax(0)
    memory, reserved = peaks.tolist()
    results = run | {"train_loss": loss, "train_runtime": seconds, "train_tokens_per_second": speed}
    results |= {"steps": count, "peak_memory_gib": memory, "peak_reserved_gib": reserved}
    results |= {name: value for name, value in evaluation.items() if name.startswith("eval_")}
    trainer.save_metrics("all", results, combined=False)
    speed = f"{count:,} steps, {seconds:,.0f} s, {speed:,.0f} tok/s"
    more = f" ({reserved:.2f} reserved)" if reserved != memory else ""
    say("done", f"loss {loss:.4f}, {speed}, peak {memory:.2f} GiB{more}")


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or a rank may end by SIGABRT
