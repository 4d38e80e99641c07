"""What only a GPU takes, shown on a CPU: bitsandbytes' 8-bit product, autocast, compilation."""

import json
import logging
import runpy
from pathlib import Path

import bitsandbytes
import check_arguments
import pytest
import seven_grid as grid
import torch
from accelerate import Accelerator
from bitsandbytes.autograd import _functions as products
from conftest import ROOT, ROWS, load_script, write_jsonl
from live_bytes import LikeCuda, Live

LORA = ROOT / "finetune_lora" / "finetune_lora.py"


def train_8bit(tmp_path, monkeypatch, model, name, *options):
    """A step on 8 bit as on a GPU; return (dtypes of the layers' inputs, bytes after the forward)."""
    script, inputs, kept = load_script(LORA), set(), []

    def as_on_a_gpu(x, weight, out=None, state=None, threshold=0.0, bias=None):
        inputs.add(x.dtype)
        state.threshold = threshold or state.threshold
        return products.MatMul8bitLt.apply(x, weight, out, bias, state)

    def compute_loss(trainer, network, *args, **kwargs):
        with Live(network) as live:
            loss = computed(trainer, network, *args, **kwargs)
            kept.append(live.bytes)
        return loss

    computed = script.FineTuner.compute_loss
    monkeypatch.setattr(bitsandbytes, "matmul", as_on_a_gpu)
    monkeypatch.setattr(script.FineTuner, "compute_loss", compute_loss)
    rows = [{"text": "東京から大阪まで新幹線で何時間 " * 5}] * 4
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = ["--model_name_or_path", model, "--train_file", data, "--max_steps", "1"]
    words += ["--load_in_8bit", "true", "--precision", "bf16", "--save_strategy", "no"]
    words += ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / name)]
    with LikeCuda():
        script.main([*words, *options])
    monkeypatch.undo()
    return inputs, kept[0]


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_8bit_layers_of_a_gpu(kind, tmp_path, monkeypatch, checkpoints, caplog):
    """In the base's precision, without a word for each call, and checkpointing saves memory."""
    caplog.set_level(logging.NOTSET)
    dtypes, plain = train_8bit(tmp_path, monkeypatch, checkpoints[kind], "plain")
    assert dtypes == {torch.bfloat16}
    words = ["--activation_checkpointing", "true"]
    dtypes, less = train_8bit(tmp_path, monkeypatch, checkpoints[kind], "less", *words)
    assert dtypes == {torch.bfloat16}
    assert less < plain / 2, (less, plain)
    assert not [r for r in caplog.records if "MatMul8bitLt" in r.getMessage()]


@pytest.mark.parametrize("lesson", ["dpo", "grpo"])
def test_recomputed_8bit_layers_stay_reentrant(lesson, tmp_path, monkeypatch, checkpoints):
    """TRL turns checkpointing off for the reference and on again, by the old name of the option."""
    script = load_script(ROOT / f"finetune_{lesson}" / f"finetune_{lesson}.py")
    trainer = script.FineTuner if lesson == "dpo" else script.RewardTrainer
    seen, step = [], trainer.training_step

    def training_step(self, model, *more, **options):
        result = step(self, model, *more, **options)
        layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        seen.append({m._gradient_checkpointing_func.keywords["use_reentrant"] for m in layers})
        return result

    monkeypatch.setattr(trainer, "training_step", training_step)
    rows = [{"prompt": r["prompt"], "completion": "1", "choices": ["a", "b"]} for r in ROWS[:4]]
    if lesson == "dpo":
        rows = [{"prompt": r["prompt"], "chosen": "a", "rejected": "b"} for r in ROWS[:4]]
    words = ["--model_name_or_path", checkpoints["llama"], "--output_dir", tmp_path / "out"]
    words += ["--train_file", write_jsonl(tmp_path / "t.jsonl", rows), "--max_steps", 2]
    words += "--load_in_8bit true --activation_checkpointing true --save_strategy no".split()
    if lesson == "grpo":
        words += "--num_generations 2 --per_device_train_batch_size 4".split()
        words += ["--max_completion_length", 4]
    script.main([str(word) for word in words])
    assert seen == [{True}, {True}]


def test_what_the_scripts_take_for_granted(monkeypatch):
    """Hours for whoever prepares the data; two workers, where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for lesson in ("full", "lora", "lastlayer", "dpo", "grpo"):
        path = ROOT / f"finetune_{lesson}" / f"finetune_{lesson}.py"
        defaults = runpy.run_path(str(path))["DEFAULTS"]
        assert defaults["ddp_timeout"] == 6 * 3600, lesson
        # GRPO's rows are short prompts: they are ready before an answer is.
        assert defaults.get("dataloader_num_workers") == (2 if lesson != "grpo" else None)


@pytest.mark.parametrize("queue", ["rt_HG", "rt_HC"])
def test_a_driver_without_a_gpu(queue, tmp_path, monkeypatch, checkpoints):
    """Refused, but in the queue without GPUs, whose nodes have the driver, too."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
    monkeypatch.setattr(check_arguments, "Trainer", None)  # as far as this: the rest costs seconds
    monkeypatch.setenv("PBS_QUEUE", queue)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, error = grid.train("full", checkpoints["gpt2"], tmp_path)
    assert ("does not see the GPU" in error) == (queue == "rt_HG")


def test_memory_is_the_most_of_any_process(tmp_path, monkeypatch, checkpoints):
    def gather(accelerator, tensor):
        more = torch.tensor([[2.0, 0.0]], dtype=tensor.dtype) * 1000
        return torch.cat([tensor, more]) if tensor.shape == (1, 2) else tensor

    monkeypatch.setattr(Accelerator, "gather", gather)
    out, error = grid.train("full", checkpoints["gpt2"], tmp_path)
    results = json.loads((out / "all_results.json").read_text())
    assert not error and results["peak_memory_gib"] == 2000
    assert 0 < results["peak_reserved_gib"] < 1000


def test_a_full_gpu_before_the_model_is_there(tmp_path, monkeypatch, checkpoints):
    """Somebody else's fault: the advice, and no word of an argument."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(check_arguments.Trainer, "create_optimizer_and_scheduler", full)
    _, error = grid.train("full", checkpoints["gpt2"], tmp_path)
    assert "GPU memory is full. Try, in this order" in error and "--optim adamw_torch" not in error
