"""What DPO and GRPO take beside a training on one answer a row; for count_memory.py.

TRL multiplies the last hidden states by the head in tiles, so that the logits never stand whole:
https://github.com/huggingface/trl/blob/v1.16.0/trl/kernels/chunked_logprob.py
"""

TOKENS, COLUMNS = 4096, 32768  # a tile of logits


def sequences(plan, rows):
    """What is computed at once for this many rows: DPO's have two answers, each with its prompt."""
    return rows * (2 if plan.trainer == "dpo" else 1)


def reference_bytes(plan, total, held):
    """A frozen copy of the whole model; an adapter's reference is its base, which is there."""
    spread = plan.nodes * plan.gpus if plan.stage.startswith("zero3") else 1
    return held * total / spread if plan.trainer != "sft" and plan.method == "full" else 0


def head_bytes(plan, rows):
    """A tile, its columns of the head, and the gradients that are summed up in fp32."""
    if plan.trainer == "sft":
        return 0
    text, size = plan.config.get_text_config(), 4 if plan.precision == "fp32" else 2
    tokens = sequences(plan, rows) * plan.max_length
    tile = size * COLUMNS * min(tokens, TOKENS)  # whatever the vocabulary is
    tile += size * min(text.vocab_size, COLUMNS) * text.hidden_size
    trained = 4 * text.vocab_size * text.hidden_size if plan.method == "full" else 0
    return tile + 4 * tokens * text.hidden_size + trained


def cache_bytes(plan, rows):
    """Keys and values while GRPO writes its answers, before it trains; at most."""
    if plan.trainer != "grpo":
        return 0
    text, size = plan.config.get_text_config(), 4 if plan.precision == "fp32" else 2
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    width *= getattr(text, "num_key_value_heads", None) or heads
    tokens = rows * plan.gradient_accumulation_steps * plan.max_length
    return 2 * size * width * text.num_hidden_layers * tokens
