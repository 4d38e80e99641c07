#!/usr/bin/env python3
"""Train a causal language model by rewards for its own answers (GRPO); LoRA, or --full true.

When     an answer is easier to check than to write down (a number, a format, a test that passes),
         and the model is sometimes right: what it never does is never rewarded. So SFT comes
         first (finetune_full.py, finetune_lora.py). The function to edit is `reward`, below.
Costs    --num_generations answers to each prompt, token by token, a pass without the adapter, and
         the training itself: many times an SFT step. The memory is LoRA's; --full true takes 20
         bytes per parameter. Longer answers cost the most.
Goes     wrong first: all answers to a prompt earn the same (`alike` near 1: nothing is learned);
wrong    the model finds what pays and is not meant (read the `answers`); it drifts away from
         language (`kl` rises: raise --beta, lower --learning_rate).

By hand  python finetune_grpo.py --model_name_or_path MODEL --train_file train.jsonl
GPUs     torchrun --standalone --nproc_per_node 8 finetune_grpo.py ...
As a job qsub -P GROUP job.sh
Follows  https://arxiv.org/abs/2402.03300 by https://huggingface.co/docs/trl/grpo_trainer
"""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.hf_argparser import HfArg

sys.path.append(str(Path(__file__).resolve().parent.parent / "jobs"))
try:
    import keep_run
    import model_layers
    from keep_grpo import RewardTrainer, TrainingArguments, begin, save_results
    from model_text import exact_tokenizer, leading_ids
    from run_common import check, fail, say
    from script_parts import add_adapter, choose_precision, read_rows
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: {error}. Put `jobs` beside this script's directory; pip install trl.\n"
    )
    sys.exit(2)

# ---- 1. Settings ----


# Copied from finetune_lora/finetune_lora.py
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


# Where we start from other values than TRL; the command line wins.
DEFAULTS = {"output_dir": "output", "learning_rate": 1e-5, "logging_steps": 10}
DEFAULTS |= {"beta": 0.04, "max_completion_length": 128}  # TRL's 0 has no reference, no KL
DEFAULTS |= {"gradient_checkpointing": None, "router_aux_loss_coef": 0.0}  # as in the others
DEFAULTS |= {"log_level_replica": "error", "ddp_timeout": 6 * 3600}  # as in finetune_full.py
DEFAULTS |= {"ddp_find_unused_parameters": False}


# ---- 2. Data: format yours here ----


def reward(row, answer):
    """What an answer earns, in parts by name; their sum counts. Edit this to train anything else.

    `row` is a row of the training file with all its fields, none of which the model has seen but
    the prompt. By default: a choice by its number, as ../jglue/prepare_jglue.py asks for it.
    """
    numbers = [str(number) for number in range(len(row["choices"]))]
    return {
        "right": 1.0 if answer.strip().startswith(row["completion"]) else 0.0,
        "form": 0.2 if answer.strip() in numbers else 0.0,  # the number and no word more
    }


# For tokenizers without a chat template; saved with the model, so that generation has it too.
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
# Copied from finetune_full/finetune_full.py
UNUSED = "system history tools chosen rejected thinking reasoning reasoning_content".split()


# Copied from finetune_full/finetune_full.py
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


# Copied from finetune_full/finetune_full.py
def texts(row, *columns):
    """The texts in these columns of a row, or of a message."""
    for column in columns:
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise ValueError(f"{'+'.join(columns)} must hold text, found {str(row)[:60]}.")
    return [row[column] for column in columns]


# Copied from finetune_full/finetune_full.py
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
            is_open = after.startswith(before) or not before.rstrip().endswith("</think>")
            start = before if is_open else before[: before.rindex("<think>")]
            answer = after[len(start) :]
            if not after.startswith(start) or (start < before and answer.startswith("<think>")):
                raise ValueError("the template rewrites earlier turns, or what begins an answer.")
            if not before.startswith(done):
                examples, done = [*examples, []], ""
            examples[-1] += [(before[len(done) :], False), (answer, content != "")]
            done = before + answer
        for name, value in message.items():  # a template may write an answer's thoughts, say
            is_used = isinstance(value, str) and value.strip() in answer
            if name not in ("role", "content") and value not in (None, "", [], {}) and not is_used:
                raise ValueError(f"a turn is role and content: its {name} would be left out.")
    return examples


# Copied from finetune_full/finetune_full.py
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


def prompt_of(row, tokenizer):
    """Return (form, ids) of what stands before a row's last answer; the row may have none."""
    turns = list(row["messages"]) if isinstance(row.get("messages"), list) else []
    while turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        turns.pop()
    if turns:
        row = {**row, "messages": [*turns, {"role": "assistant", "content": "-"}]}
    elif "prompt" in row and not {"instruction", "output"} <= set(row):
        row = {**row, "completion": "-"}
    elif "instruction" in row:
        row = {**row, "output": "-"}
    form, examples = format_row(row, tokenizer)
    if form == "text" or not (turns or form != "messages"):
        raise ValueError("there is nothing to answer: wanted messages, prompt or instruction.")
    return form, encode(examples[-1][: 1 if form == "prompt" else -1], tokenizer)[0]


def load_data(script, training, tokenizer, max_length):
    """The rows with their places, and the prompts as ids; what leaves no room is counted."""
    room, source = max_length - training.max_completion_length, script.train_file
    problem = f"--max_completion_length {training.max_completion_length} leaves no prompt room in"
    check(room > 0, f"{problem} the {max_length} tokens of --max_length.")
    if script.dataset_name:
        source = datasets.load_dataset(script.dataset_name, script.dataset_config_name)
        check("train" in source, f"{script.dataset_name} has only {', '.join(source)}, no train.")
        source = [source["train"]]
    rows, prompts, lost, form = [], [], 0, None
    for place, row in read_rows(source):
        try:
            found, ids = prompt_of(row, tokenizer)
        except Exception as error:  # a template can raise anything
            fail(f"{place}: {error if isinstance(error, ValueError) else repr(error)}")
        form = form or found
        check(found == form, f"{place}: a row of another form ({found}) than before ({form}).")
        check(ids, f"{place}: the prompt is empty, there is nothing to answer.")
        lost += len(ids) > room
        if len(ids) <= room:
            prompts.append({"prompt": ids, "number": len(rows)})
            rows.append((place, row))
    if form != "prompt" and turn_end_id(tokenizer) is None:
        fail("the chat template ends answers with no special token to stop at.")
    check(tokenizer.eos_token_id is not None, "the tokenizer has no EOS token for answers to end.")
    check(prompts, f"{', '.join(map(str, source))}: no prompt within {room} tokens.")
    tokens, limit = sum(len(p["prompt"]) for p in prompts), training.max_completion_length
    text = f"{len(prompts):,} prompts, {tokens:,} tokens; {lost:,} dropped (over {room} tokens, so"
    say("train", f"{text} that {limit} are left for an answer)")
    return {"rows": rows, "prompts": Dataset.from_list(prompts)}


# ---- 3. Model: what is trained ----

OUT_OF_MEMORY = """GPU memory is full. Try, in this order: --per_device_train_batch_size 1 with more
--gradient_accumulation_steps, a shorter --max_completion_length or --max_length,
--activation_checkpointing true, --load_in_4bit true, a lower --lora_r."""


def load_models(script, training, tokenizer, resume):
    """What is trained, and the reference: none for an adapter, whose base is it."""
    if not training.full:
        return load_model(script, training, tokenizer, resume), None
    start, kept_in = script.model_name_or_path, getattr(training, "kept_in", torch.float32)
    model = read_model(script, tokenizer, resume or start, dtype=kept_in)
    return model, read_model(script, tokenizer, start, dtype=kept_in) if training.beta else None


# Copied from finetune_lora/finetune_lora.py
def load_model(script, training, tokenizer, resume):
    """The base, in the precision that is computed in or quantised, and the adapter on it."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    options = {"dtype": dtypes[script.precision]}
    if bits := 8 * script.load_in_8bit or 4 * script.load_in_4bit:
        # The quantiser passes over subclasses of Linear.
        transformers.models.falcon.modeling_falcon.FalconLinear = torch.nn.Linear
        options["device_map"] = {"": str(training.device)}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=script.load_in_8bit,
            load_in_4bit=script.load_in_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    model = read_model(script, tokenizer, script.model_name_or_path, **options)
    done = [m for m in model.modules() if type(m).__module__ == "bitsandbytes.nn.modules"]
    for layer in done:
        layer.support_avx512bf16_for_cpu = False  # or an evaluation on a CPU spoils the training
    check(done or not bits, f"no layer was quantised: leave --load_in_{bits}bit out.")
    kind = f"{len(done)} layers in {bits} bit, else " if bits else ""
    memory = f"{model.get_memory_footprint() / 2**20:,.1f} MiB"
    if bits and model_layers:
        memory += f"; {model_layers.prepare_rounded(model, script, training)}"
    say("base", f"{kind}{script.precision}; frozen; {memory}")
    if Path(script.model_name_or_path).is_dir():  # so that the adapter finds it from anywhere
        model.name_or_path = str(Path(script.model_name_or_path).resolve())
    return add_adapter(script, training, tokenizer, model)


# ---- 4. Training ----


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        script, training, given = parse(argv)
        resume, run = keep_run.find_run(script, training, given, __file__)
        tokenizer, max_length = load_tokenizer(script)
        data = load_data(script, training, tokenizer, max_length)
        model, reference = load_models(script, training, tokenizer, resume)
        trainer = RewardTrainer(model, training, reward, data, tokenizer, reference)
        begin(script, trainer, given, run, resume)
    except Exception as error:
        if isinstance(error, NameError | AttributeError | TypeError):
            raise  # of an edit: its place is of use
        full = isinstance(error, torch.OutOfMemoryError)
        fail(OUT_OF_MEMORY if full else error if " " in str(error) else repr(error), full)
    try:
        with keep_run.hold(training, run):
            trainer.train(resume_from_checkpoint=resume)
            save_results(trainer, run)
            model.generation_config.save_pretrained(training.output_dir)  # where an answer ends
    except torch.OutOfMemoryError:
        fail(OUT_OF_MEMORY, every_rank=True)
    generate = "python ../generate_text/generate_text.py --model_name_or_path"
    say("next", f"{generate} {training.output_dir} --prompt TEXT")


# ---- 5. Guard rails: no need to read ----


# Copied from finetune_full/finetune_full.py
def parse(argv):
    """Return (script arguments, Trainer's, {name: value} of those that are not the default)."""
    parser = transformers.HfArgumentParser([ScriptArguments, TrainingArguments], allow_abbrev=False)
    parser.description = __doc__
    parser.error = keep_run.refuse if keep_run else fail  # one line, not 200 of usage
    parser.set_defaults(**DEFAULTS, do_train=True)
    words = list(sys.argv[1:] if argv is None else argv)
    if keep_run:
        words = keep_run.read_words(words)  # a settings file such as run_args.yaml, ~
    values = vars(parser.parse_args(words))
    defaults = vars(parser.parse_args(["--model_name_or_path", ""]))
    given = {name: value for name, value in values.items() if value != defaults[name]}
    reason = choose_precision(values)
    values.update(disable_tqdm=True, accelerator_config=None, remove_unused_columns=False)
    if keep_run:
        keep_run.settle(values)
    script, training = parser.parse_dict(values)
    script.reason = reason
    if keep_run:
        keep_run.check_arguments(script, training, given)
    return script, training, given


# Copied from finetune_full/finetune_full.py
def load_tokenizer(script):
    """Return (tokenizer with a chat template, tokens per example at most)."""
    name, remote = script.model_name_or_path, {"trust_remote_code": script.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(name, **remote).get_text_config()
    tokenizer = exact_tokenizer(name, config.vocab_size, say, **remote)
    choose_chat_template(script.chat_template, tokenizer, script.chat_template_kwargs)
    limit = getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", 10**9)
    length = min(1024, limit) if script.max_length is None else script.max_length
    check(2 <= length <= limit, f"--max_length {length} does not fit the {limit} positions.")
    return tokenizer, length


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
def turn_end_id(tokenizer):
    """The special token that ends an assistant's turn in the chat template, or None."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    labels = []
    with suppress(Exception):  # a template may not take these turns, and rows may need none
        labels = encode(chat_pieces(turns, tokenizer)[0], tokenizer)[1]
    # all_special_ids has only those with a role, such as eos_token; Gemma's <end_of_turn> has none.
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids)
    return next((label for label in reversed(labels) if label in special), None)


# Copied from finetune_full/finetune_full.py
def read_model(script, tokenizer, source, **options):
    """The model, frozen where text does not pass; refused if weights are missing."""
    remote = {"trust_remote_code": script.trust_remote_code}
    config, load = transformers.AutoConfig.from_pretrained(source, **remote), AutoModelForCausalLM
    if keep_run:  # a model that sees, too, and weights that are published quantised
        load = keep_run.prepare(config, source, options)
    is_plain, packed = config.get_text_config() is config, hasattr(config, "quantization_config")
    check(keep_run or is_plain, "a model that sees needs `jobs` beside this script's directory.")
    options |= {"attn_implementation": script.attn_implementation, "output_loading_info": True}
    model, info = load.from_pretrained(source, config=config, **options, **remote)
    missing = sorted(info["missing_keys"])[:3]
    check(not missing, f"{source} lacks weights: {missing} would be random.")
    if keep_run and (parts := keep_run.freeze_beside_text(model)):
        say("frozen", f"{', '.join(parts)}: text does not pass there")
    if packed:
        model._weight_conversions = None  # it would be saved packed again, or by other names
    model.loss_type = "ForCausalLM"  # gpt2 names none and divides by a wrong number of tokens
    model.accepts_loss_kwargs = True  # the number of tokens, which composites seem to refuse
    ends = {tokenizer.eos_token_id, turn_end_id(tokenizer)} - {None}
    model.generation_config.eos_token_id = sorted(ends)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature or the like without do_sample: nothing could be saved
        model.generation_config.do_sample = True
    return model


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or a rank may end by SIGABRT
