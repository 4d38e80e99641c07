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

import sys
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))
try:  # all that is not about rewards
    import keep_run
    from chat_turns import plain
    from keep_grpo import RewardTrainer, TrainingArguments, begin, save_results
    from model_text import chat_pieces, encode, texts, turn_end_id
    from run_common import check, fail, say
    from script_parts import (
        ScriptArguments,
        choose_precision,
        load_model,
        load_tokenizer,
        read_model,
        read_rows,
    )
except ModuleNotFoundError as error:
    remedy = "Put `jobs` beside this script's directory; install requirements.txt."
    print(f"error: {error}. {remedy}", file=sys.stderr)
    sys.exit(2)

# ---- 1. Settings: the options are those of finetune_lora.py and of TRL ----


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
    the prompt. By default: a choice, by its number or as it stands, as ../jglue/prepare_jglue.py
    asks for it.
    """
    choices, said = row["choices"], answer.strip()
    numbers = [str(number) for number in range(len(choices))]
    choices = numbers if row["completion"] in numbers else choices
    begins = [c for c in choices if said.startswith(c) and not said[len(c) :][:1].isdigit()]
    return {
        "right": 1.0 if begins == [row["completion"]] else 0.0,  # 22 is not 2
        "form": 0.2 if said in choices else 0.0,  # the choice and no word more
    }


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
            found, ids = prompt_of(*plain(row, tokenizer))
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
        fail("the template shows not all turns, or no special token to stop at.")
    check(tokenizer.eos_token_id is not None, "the tokenizer has no EOS token for answers to end.")
    check(prompts, f"{', '.join(map(str, source))}: no prompt within {room} tokens.")
    tokens, limit = sum(len(p["prompt"]) for p in prompts), training.max_completion_length
    text = f"{len(prompts):,} prompts, {tokens:,} tokens; {lost:,} dropped (over {room} tokens, so"
    say("train", f"{text} that {limit} are left for an answer)")
    return {"rows": rows, "prompts": Dataset.from_list(prompts), "form": form}


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
    words = keep_run.read_words(words) if keep_run else words  # a file such as run_args.yaml, ~
    values = vars(parser.parse_args(words))
    defaults = vars(parser.parse_args(["--model_name_or_path", ""]))
    given = {name: value for name, value in values.items() if value != defaults[name]}
    reason = choose_precision(values)
    values.update(disable_tqdm=True, accelerator_config=None, remove_unused_columns=False)
    script, training = parser.parse_dict(keep_run.settle(values) if keep_run else values)
    script.reason = reason
    return script, training, given


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or a rank may end by SIGABRT
