"""The items of gpu_check.py: what is run, what is expected, within what.

An item's command is a lesson's script with a small model, or one of a real size, and the words
here. What is not for a CPU has other words for the dry run, in `on_cpu`.
"""

from dataclasses import dataclass

import gpu_kinds as kinds
from gpu_kinds import CHECKPOINTED, IN_4BIT, IN_8BIT, ROOT

BF16, FP16, FP32 = "--precision bf16", "--precision fp16", "--precision fp32"
SLOWLY = "--learning_rate 1e-6"  # the scaler of fp16 leaves out some first steps
ZERO2 = f"--deepspeed {ROOT}/deepspeed_configs/zero2.json"
ZERO3 = f"--deepspeed {ROOT}/deepspeed_configs/zero3.json"
HUB_KERNEL = "kernels-community/vllm-flash-attn3"
EAGER = "--torch_compile_backend eager"  # needs no compiler


@dataclass(frozen=True)
class Item:
    name: str
    what: str
    kind: object  # a function of (bench, item) that returns (is it as expected, what was measured)
    words: str  # lesson, model, arguments
    expected: str  # as the table shows it
    limit: float = 0.0  # the tolerance, or the least that is good
    more: str = ""  # arguments of the GPU's run, which the CPU's run does not get
    on_cpu: str | None = None  # in a dry run in place of `more`, which is not for a CPU
    needs: str = ""  # packages, as pip names them
    gpus: int = 1
    changes: str = "none"  # of gpu_inside.py


# ---- As on a CPU ----

# A loss in bf16 has three digits, in fp16 four. In 8 bit a GPU rounds the inputs too, a CPU does
# not. A gradient may be ten times as far off.
EXACT, FINE, ROUGH, ROUGHER = 1e-4, 0.002, 0.01, 0.03


def exact(name, words, limit, more, on_cpu=None, **others):
    what, expected = f"{words} {more}: losses of 4 steps", f"CPU's loss ± {limit:g}"
    return Item(name, what, kinds.exact, words, expected, limit, more, on_cpu, **others)


def attention(name, needs=""):
    kernel, on_cpu = {"hub_kernel": HUB_KERNEL}.get(name, name), BF16 if needs else None
    more = f"--attn_implementation {kernel} {BF16}"
    return exact(name, "full llama", ROUGH, more, on_cpu, needs=needs)


def saved(name, deepspeed):
    what = f"{deepspeed} at rate 0: the file that was read is the one that is saved, in fp32"
    words, more, on_cpu = (
        "full llama --learning_rate 0",
        f"{deepspeed} {BF16}",
        f"--launched {BF16}",
    )
    expected = "every tensor, bit by bit"
    return Item(name, what, kinds.saved, words, expected, 0.0, more, on_cpu, needs="deepspeed")


def answers(name, limit, more, on_cpu=None, expected="", **others):
    what = f"generate_text.py {more}: greedy answers to 24 prompts"
    expected = expected or f"≥ {limit:.0%} as the CPU's"
    return Item(name, what, kinds.answers, "llama", expected, limit, more, on_cpu, **others)


HEAD_ALONE = "--lora_target_modules none --modules_to_save lm_head"
AS_ON_A_CPU = [
    exact("full_fp32", "full llama", EXACT, FP32),
    exact("full_bf16", "full llama", ROUGH, BF16),
    exact("full_fp16", f"full llama {SLOWLY}", FINE, FP16, FP32),
    exact("gpt_neox_bf16", "full gpt_neox", ROUGH, BF16),
    exact("last_layer_bf16", "last llama", ROUGH, BF16),
    exact("lora_bf16", "lora llama", ROUGH, BF16),
    exact("lora_fp16", f"lora llama {SLOWLY}", FINE, FP16, FP32),
    exact("lora_8bit", f"lora llama {IN_8BIT}", ROUGHER, BF16, needs="bitsandbytes"),
    exact("head_8bit", f"lora llama {HEAD_ALONE} {IN_8BIT}", ROUGHER, BF16, needs="bitsandbytes"),
    exact("lora_4bit", f"lora llama {IN_4BIT}", ROUGH, BF16, needs="bitsandbytes"),
    attention("sdpa"),
    attention("eager"),
    attention("flash_attention_2", "flash-attn"),
    attention("flash_attention_3", "flash-attn-3"),
    attention("hub_kernel", "kernels"),
    exact("checkpointing", "full llama", ROUGH, f"{CHECKPOINTED} {BF16}"),
    exact("compile", "full llama", ROUGH, f"--torch_compile true {BF16}",
          f"--torch_compile true {EAGER} {BF16}"),
    exact("zero2", "full llama", ROUGH, f"{ZERO2} {BF16}", f"--launched {BF16}", needs="deepspeed"),
    exact("zero3", "full llama", ROUGH, f"{ZERO3} {BF16}", f"--launched {BF16}", needs="deepspeed"),
    saved("zero2_saved", ZERO2),
    saved("zero3_saved", ZERO3),
    saved("zero1_saved", ZERO2.replace("zero2", "zero1")),
    saved("zero2_offload_saved", ZERO2.replace("zero2", "zero2_offload")),
    saved("zero3_offload_saved", ZERO3.replace("zero3", "zero3_offload")),
    exact("ranks_2", "full llama", ROUGH, f"{BF16} --launched", gpus=2),
    answers("answers_fp32", 1.0, FP32),
    answers("answers_bf16", 0.5, BF16),
    answers("answers_fp16", 0.5, FP16, FP32),
    answers("answers_8bit", 0.0, f"{BF16} {IN_8BIT}", expected="their share", needs="bitsandbytes"),
    answers("answers_8bit_batch", 0.0, f"{BF16} {IN_8BIT} --batch_size 24", expected="their share",
            needs="bitsandbytes"),
    answers("answers_4bit", 0.0, f"{BF16} {IN_4BIT}", expected="their share", needs="bitsandbytes"),
    answers("answers_batch", 0.5, f"{BF16} --batch_size 24", expected="≥ 50% as one at a time"),
    answers("answers_ranks_2", 1.0, FP32, gpus=2),
]  # fmt: skip

# ---- What a GPU does that a CPU does not show ----


UNEVEN = "--train_file {uneven} --max_length 512 --max_steps 8"  # batches of many widths


def seen(name, words, more, expected, on_cpu=None, **others):
    what = f"{words} {more}"
    return Item(name, what, kinds.seen, words, expected, 0.0, more, on_cpu, **others)


EVALUATED = "--validation_file {data} --eval_strategy steps --eval_steps 2"


def out_of_memory(moment, words="full llama"):
    what, expected = f"memory is full at the {moment}: advice, no traceback", "status 2, advice"
    return Item(f"full_{moment}", what, kinds.full, words, expected, more=BF16, changes=moment)


ON_A_GPU = [
    Item("liger", "--use_liger_kernel true is refused", kinds.refused, "full llama",
         "status 2, one line", more="--use_liger_kernel true"),
    seen("8bit_warnings", f"lora gpt_neox {IN_8BIT}", BF16, "0 lines", needs="bitsandbytes"),
    seen("8bit_gradients", f"lora gpt_neox {IN_8BIT}", BF16, "bfloat16", needs="bitsandbytes"),
    seen("memory_told", "full llama", BF16, "as torch counts"),
    seen("workers", "full llama", BF16, "2 workers"),
    seen("ddp_timeout", "full llama", BF16, "≥ 21600 s"),
    seen("compile_widths", f"full llama {UNEVEN}", f"--torch_compile true {BF16}",
         "≤ 8 graphs for all widths", f"--torch_compile true {EAGER} {BF16}"),
    Item("hidden_gpu", "full llama in rt_HC: a driver, no GPU in use", kinds.hidden, "full llama",
         f"CPU's loss ± {EXACT:g}", EXACT),
    Item("merge_note", "merging says what bf16 rounded in training", kinds.merge_note, "lora llama",
         "a line", more=BF16),
    out_of_memory("load"),
    out_of_memory("step"),
    out_of_memory("eval", f"full llama {EVALUATED}"),
    out_of_memory("save"),
    Item("several_nodes", "on 2 nodes: qsub -P GROUP job_check_nodes.sh in abci_firststep",
         kinds.elsewhere, "", "equal variables on all nodes"),
]  # fmt: skip

# ---- Models of real sizes, with random weights ----

COMPUTED = "peak ≤ 1.1 x computed"
ROWS_4, ROWS_1 = (f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {parts}"
                  for rows, parts in ((4, 2), (1, 8)))  # fmt: skip


def real(name, words, more, limit=0.0, size=0, **others):
    """A training; with DeepSpeed the dry run has the launcher alone."""
    on_cpu = more.replace(ZERO2, "--launched").replace(ZERO3, "--launched")
    expected = f"MFU ≥ {limit:.0%}; {COMPUTED}" if limit else COMPUTED
    expected = f"{size} bytes a parameter besides activations; {COMPUTED}" if size else expected
    others = {"kind": kinds.real, "changes": "random"} | others
    return Item(name, f"{words} {more}", words=words, expected=expected, limit=limit, more=more,
                on_cpu=on_cpu if on_cpu != more else None, **others)  # fmt: skip


SMALL, RINNA = "full open-calm-7b_6", "lora japanese-gpt-neox-3.6b"  # _6: with 6 layers
SAVING = f"{ROWS_4} {CHECKPOINTED}"
REAL = [
    real("full_7b", "full open-calm-7b", SAVING, 0.5),
    real("full_7b_row", "full open-calm-7b", ROWS_1, 0.5),
    real("lora_13b", "lora open_llama_13b", ROWS_4, 0.45),
    real("qlora_13b", f"lora open_llama_13b {IN_4BIT}", ROWS_4, needs="bitsandbytes"),
    real("lora_3.6b", RINNA, SAVING),
    real("lora_3.6b_8bit", f"{RINNA} {IN_8BIT}", SAVING, needs="bitsandbytes"),
    real("lora_3.6b_4bit", f"{RINNA} {IN_4BIT}", SAVING, needs="bitsandbytes"),
    real("bytes", SMALL, ROWS_1, size=16),
    real("bytes_zero2", SMALL, f"{ROWS_1} {ZERO2}", size=24, needs="deepspeed"),
    real("bytes_zero3", SMALL, f"{ROWS_1} {ZERO3}", size=20, needs="deepspeed"),
    real("bytes_ranks_2", SMALL, ROWS_1.replace("steps 8", "steps 1"), size=16, gpus=2),
    Item("segments", "open-calm-7b_6 on rows of unequal lengths: memory reserved, not allocated",
         kinds.segments, SMALL, "no more than without", more=ROWS_1, changes="random"),
    Item("generate_7b", "open-calm-7b: answers of 64 tokens", kinds.generation, "open-calm-7b",
         "64 at once ≥ 7 x one at a time", 7.0, changes="random"),
]  # fmt: skip
ITEMS = [*AS_ON_A_CPU, *ON_A_GPU, *REAL]
