#!/usr/bin/env python3
"""Two ways in which models are often fine-tuned otherwise; against_peers.py measures them.

    python peers.py padded --model_name_or_path MODEL --train_file train.jsonl ...
    python peers.py trl    --model_name_or_path MODEL --train_file train.jsonl --packing true ...

`padded` is a plain Trainer script as tutorials of 2023 have it: every row is padded to --max_length
and attends under a mask, and logits are computed everywhere. `trl` is TRL's SFTTrainer. Rows are
prompt + completion, loss on the completion. All other arguments are the library's own.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class ScriptArguments:
    model_name_or_path: str
    train_file: str
    lora_r: int = 0
    block: int = 512  # padded: tokens of every row


class Lines(TrainerCallback):
    """The lines by which against_peers.py takes the time, like those of our own scripts."""

    def on_train_begin(self, args, state, control, **kwargs):
        print("begin", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step}/{state.max_steps}", flush=True)


def padded(script, training):
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        script.model_name_or_path, dtype=torch.float32, attn_implementation="sdpa"
    )

    def encode(row):
        text = row["prompt"] + row["completion"] + tokenizer.eos_token
        options = {"truncation": True, "max_length": script.block}
        batch = tokenizer(text, padding="max_length", **options)
        start = len(tokenizer(row["prompt"])["input_ids"])
        end = sum(batch["attention_mask"])
        ids = batch["input_ids"]
        labels = [-100] * start + ids[start:end] + [-100] * (len(ids) - end)
        return {**batch, "labels": labels, "tokens": end}

    data = load_dataset("json", data_files=script.train_file, split="train")
    data = data.map(encode, remove_columns=data.column_names)
    tokens = sum(data["tokens"])
    data = data.remove_columns("tokens")
    trainer = Trainer(model, training, default_data_collator, data, processing_class=tokenizer)
    return trainer, tokens


def trl(script, training):
    from peft import LoraConfig
    from trl import SFTTrainer

    is_16_bit = training.bf16 and script.lora_r  # a frozen base, as finetune_lora.py has it
    training.model_init_kwargs = {"dtype": "bfloat16" if is_16_bit else "float32"}
    training.model_init_kwargs |= {"attn_implementation": "sdpa"}
    data = load_dataset("json", data_files=script.train_file, split="train")
    adapter = None
    if script.lora_r:
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=script.lora_r,
            lora_alpha=32,
            target_modules="all-linear",
        )
    trainer = SFTTrainer(
        script.model_name_or_path,
        training,
        train_dataset=data.select_columns(["prompt", "completion"]),
        peft_config=adapter,
    )
    return trainer, sum(len(ids) for ids in trainer.train_dataset["input_ids"])


def main(argv=None):
    way, *words = argv or sys.argv[1:]
    kind = TrainingArguments
    if way == "trl":
        from trl import SFTConfig as kind
    parser = HfArgumentParser([ScriptArguments, kind], allow_abbrev=False)
    script, training = parser.parse_args_into_dataclasses(words)
    training.disable_tqdm = True
    trainer, tokens = {"padded": padded, "trl": trl}[way](script, training)
    trainer.add_callback(Lines())
    trainer.train()
    trainer.save_model()
    peak = torch.cuda.max_memory_reserved() / 2**30
    results = {"num_tokens": tokens, "peak_reserved_gib": peak}
    Path(training.output_dir, "all_results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
