"""show_model.py --method lora: what a run in 8 bit rounds. All else: test_finetune_lastlayer.py."""

import re

from conftest import ROOT, load_script
from transformers import AutoConfig

SIZES = {"vocab_size": 520, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}


def test_what_is_read_past_is_not_rounded(tmp_path, capsys):
    """Of Falcon-H1's blocks all but Mamba's last product, which a kernel takes, and its filter."""
    AutoConfig.for_model("falcon_h1", **SIZES, **HEADS, **MAMBA).save_pretrained(tmp_path)
    show = load_script(ROOT / "finetune_lastlayer" / "show_model.py")
    show.main(["--model_name_or_path", str(tmp_path), "--method", "lora"])
    rounded = re.search(r"^rounded +([\d.]+)% of them", capsys.readouterr().out, re.M)[1]
    wide = 64 + (64 + 2 * 16) + 4  # gate, what is filtered, a step for each head
    attention, mlp = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128
    within, out, conv = 64 * wide, 64 * 64, (64 + 2 * 16) * 4
    whole = attention + mlp + within
    assert float(rounded) == round(100 * whole / (whole + out + conv), 1)
