#!/usr/bin/env python3
"""Teach a causal language model which of two answers is better (DPO); LoRA, or --full true.

When     after finetune_full.py or finetune_lora.py, if you have pairs: rows of `prompt`, the better
         answer `chosen` and the worse one `rejected`, as text or messages. A format or knowledge
         is learned from answers alone, and for less.
Costs    about 3 times the computing of finetune_lora.py on the chosen answers (computed): both are
         looked at, and both by the reference model, too. With LoRA that is the base itself; with
         --full true it is a frozen copy: 20 bytes per parameter in place of 16.
Wrong    first: the margin rises since both answers become unlikely, the chosen one, too. Look at
         logps/chosen in trainer_state.json; lower --learning_rate, raise --beta, or stop earlier.

By hand  python finetune_dpo.py --model_name_or_path MODEL --train_file preferences.jsonl
GPUs     torchrun --standalone --nproc_per_node 8 finetune_dpo.py ...
As a job qsub -P GROUP job.sh
Follows  https://arxiv.org/abs/2305.18290 by https://huggingface.co/docs/trl/dpo_trainer
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset, Features, List, Value
from pyarrow import compute
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))
try:  # all that is not about preferences
    import keep_run
    from model_text import chat_pieces, encode, texts, turn_end_id
    from pair_trainer import FineTuner, without_dropout
    from run_common import check, fail, say
    from script_parts import ScriptArguments as LoraArguments
    from script_parts import (
        begin,
        choose_precision,
        load_tokenizer,
        read_model,
        read_rows,
        save_results,
    )
    from script_parts import load_model as load_adapted
except ModuleNotFoundError as error:
    remedy = "Put `jobs` beside this script's directory; install requirements.txt."
    print(f"error: {error}. {remedy}", file=sys.stderr)
    sys.exit(2)

# ---- 1. Settings ----


@dataclass
class ScriptArguments(LoraArguments):  # and all of finetune_lora.py's
    beta: float = HfArg(default=0.1, help="The higher, the closer it stays to the reference.")
    full: bool = HfArg(default=False, help="Train all parameters; takes 20 bytes for each.")


# Where we start from other values than Trainer; the command line wins.
DEFAULTS = {"output_dir": "output", "learning_rate": 5e-6, "logging_steps": 10}
DEFAULTS |= {"train_sampling_strategy": "group_by_length", "ddp_find_unused_parameters": False}
DEFAULTS |= {"log_level_replica": "error", "ddp_timeout": 6 * 3600}  # as in finetune_full.py
DEFAULTS |= {"dataloader_num_workers": 2 * torch.cuda.is_available()}


# ---- 2. Data: format yours here ----

IDS, NUMBER, TEXT = List(Value("int32")), Value("int32"), Value("string")
# Copied from finetune_full/finetune_full.py
COLUMNS = Features(input_ids=IDS, labels=IDS, length=NUMBER, form=TEXT, outcome=TEXT)
UNUSED = "system history tools thinking reasoning reasoning_content completion messages".split()


def format_row(row, tokenizer):
    """Return (form, pair) of a row: the better answer, the worse, as lists of (text, learned)."""
    if unused := [name for name in UNUSED if row.get(name)]:
        raise ValueError(f"{', '.join(unused)} would be left out: remove it, or make it text.")
    prompt, answers = row.get("prompt") or [], [row.get("chosen"), row.get("rejected")]
    if answers[0] == answers[1]:
        raise ValueError("chosen and rejected must be there and differ. Remove the row.")
    if not all(isinstance(answer, list) for answer in answers):
        prompt, *answers = texts(row, "prompt", "chosen", "rejected")
        eos = (tokenizer.eos_token, True)
        return "prompt", [[(prompt, False), (answer, True), eos] for answer in answers]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    pair = []
    for turns in answers:  # many data sets repeat the prompt at the beginning of both
        is_whole, is_answer = turns[: len(prompt)] == prompt, len(turns) == 1
        turns = turns if is_whole else [*prompt, *turns]
        if not (is_whole or is_answer) or not turns or turns[-1].get("role") != "assistant":
            raise ValueError("chosen, rejected: the prompt's answer, or the prompt and its answer.")
        *before, answer = chat_pieces(turns, tokenizer)[-1]
        pair.append([*((text, False) for text, _ in before), answer])
    return "messages", pair


def make_examples(source, tokenizer, max_length, form=None):
    """Yield all pairs, prompt + chosen + prompt + rejected, each with its outcome."""
    for place, row in read_rows(source):
        try:
            found, pair = format_row(*keep_run.plain(row, tokenizer))
            both = [encode(pieces, tokenizer) for pieces in pair]
        except Exception as error:  # a template can raise anything
            fail(f"{place}: {error if isinstance(error, ValueError) else repr(error)}")
        if not form and found == "messages" and turn_end_id(tokenizer) is None:
            fail("the template shows not all turns, or no special token to stop at.")
        form = form or found
        check(found == form, f"{place}: a row of another form ({found}) than before ({form}).")
        prompts = [[i for i, label in zip(*one, strict=True) if label == -100] for one in both]
        check(prompts[0] == prompts[1], f"{place}: the answers differ before their last turn.")
        check(prompts[0], f"{place}: the prompt is empty.")
        outcome = "kept" if max(len(ids) for ids, _ in both) <= max_length else "cut"
        parts = [(ids[:max_length], labels[:max_length]) for ids, labels in both]
        if parts[0] == parts[1] or any(set(p[1]) <= {-100, tokenizer.eos_token_id} for p in parts):
            outcome = "dropped"  # nothing, or nothing that differs, is left of the answers
        ids, labels = parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
        example = {"input_ids": ids, "labels": labels, "length": len(ids)}
        yield {**example, "form": form, "outcome": outcome}
    check(form, f"{' '.join(map(str, source))} has no rows.")


# Copied from finetune_full/finetune_full.py
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


def collate(pairs):
    """Right-padded rows: the chosen ones, then the rejected; what fills up has no answers."""
    rows, pad = [[], []], torch.nn.utils.rnn.pad_sequence
    for ids, labels in ((pair["input_ids"], pair["labels"]) for pair in pairs):
        learned = [label != -100 for label in labels]
        borders = [i for i in range(1, len(ids)) if learned[i - 1] and not learned[i]]
        cut = borders[0] if borders else len(ids)
        rows[0].append((ids[:cut], learned[:cut]))
        rows[1].append((ids[cut:] or ids, learned[cut:] or learned))
    ids, learned = zip(*rows[0], *rows[1], strict=True)
    batch = {"input_ids": pad([torch.tensor(row) for row in ids], batch_first=True)}
    batch["completion_mask"] = pad([torch.tensor(row).long() for row in learned], batch_first=True)
    # Causal attention never looks right: no mask is needed, and one of ones is none.
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    labels = torch.tensor([0 if max(pair["labels"]) >= 0 else -100 for pair in pairs])
    tokens = torch.tensor(sum(pair["length"] for pair in pairs))
    return {**batch, "labels": labels, "shift_labels": labels[labels == 0], "num_tokens": tokens}


# ---- 3. Model: what is trained ----

OUT_OF_MEMORY = """GPU memory is full. Try, in this order: --per_device_train_batch_size 1 with more
--gradient_accumulation_steps, --activation_checkpointing true, --load_in_4bit true, a shorter
--max_length, a lower --lora_r, --full false."""


def load_model(script, training, tokenizer, resume):
    """The model to train; with it, as `reference`, a frozen copy of what training starts from."""
    training.beta = script.beta
    if script.full:
        kept_in = getattr(training, "kept_in", torch.float32)  # as in finetune_full.py
        start = script.model_name_or_path
        model = read_model(script, tokenizer, resume or start, dtype=kept_in)
        reference = read_model(script, tokenizer, start, dtype=kept_in)
    else:  # an adapter, without which the model is the reference
        model, reference = load_adapted(script, training, tokenizer, resume), None
    training.reference = reference and without_dropout(reference).requires_grad_(False).eval()
    return without_dropout(model)


# ---- 4. Training ----


# Copied from finetune_full/finetune_full.py
def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        script, training, given = parse(argv)
        resume, run = find_run(script, training, given)
        tokenizer, max_length = load_tokenizer(script)
        data = load_data(script, training, tokenizer, max_length, run.get("data", os.urandom(8)))
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
    except torch.OutOfMemoryError:
        fail(OUT_OF_MEMORY, every_rank=True)
    generate = "python ../generate_text/generate_text.py --model_name_or_path"
    say("next", f"{generate} {training.output_dir} --prompt TEXT")


# ---- 5. Guard rails: no need to read (the others stand in ../jobs) ----


def find_run(script, training, given):
    return keep_run.find_run(script, training, given, __file__)


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
