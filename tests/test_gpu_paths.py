"""What only a GPU takes, shown on a CPU: bitsandbytes' 8-bit product, autocast, compilation."""

import logging

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd import _functions as products
from conftest import ROOT, load_script, write_jsonl
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
