"""Today's models of the READMEs, built from todays_models.json without weights.

python tests/test_todays_models.py     # the READMEs' rows; 4 minutes for jobs/estimate.py
"""

import json
import sys
from functools import cache

import pytest
import torch
from conftest import ROOT
from test_real_configs import READMES, rows
from transformers import AutoConfig

sys.path.append(str(ROOT / "jobs"))
import count_memory
import estimate
import model_layers
import published

MODELS = json.loads((ROOT / "tests" / "todays_models.json").read_text("utf-8"))["models"]
METHODS = ("full", "last_layer", "lora", "qlora")


@cache
def build(name):
    """On the meta device, in the class that it is trained in."""
    config = {**MODELS[name]["config"]}
    config.pop("quantization_config", None)
    config = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return published.auto_class(config).from_config(config)


def count(name):
    return sum(weight.numel() for weight in build(name).parameters())


def by_hand(config):
    """Parameters of a decoder with a gated MLP, from the sizes alone."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    wide = config.get("head_dim", hidden // heads)
    attention = hidden * wide * 2 * (heads + config["num_key_value_heads"])
    norms = 2 * hidden + (2 * wide if config["model_type"] == "qwen3" else 0)
    layer = attention + 3 * hidden * config["intermediate_size"] + norms
    ends = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return config["num_hidden_layers"] * layer + ends + hidden


def rounded(name):
    """The share of the layers' weights that is rounded: those of nn.Linear, but what is read past."""
    model = build(name)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    linear -= {n for n in linear if n.endswith("mixer.out_proj") and "nemotron" in name.lower()}
    return model_layers.share_of(model_layers.weigh_layers(model), linear)


def works(name):
    """How many methods of the grid "families" are right with its type, of how many."""
    grid = (ROOT / "tests" / "matrix.md").read_text("utf-8").split("## families")[1].split("## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in grid.splitlines()]
    table = {cells[0]: cells[1:] for cells in lines if cells}
    kind = MODELS[name]["config"]["model_type"]
    with_experts = f"{kind} experts" if rounded(name) < 0.5 else kind  # of types that may have none
    found = dict(zip(table[""], table.get(with_experts, table[kind]), strict=True))
    if rounded(name) < 0.5:  # unlike the small model's, most of its weights are experts'
        found["4 bit"] = "refused"
    return f"{sum(cell.startswith('ok') for cell in found.values())}/{len(found)}"


def start_of_row(name):
    """The cells of the table that need no estimate."""
    entry = MODELS[name]
    share = rounded(name)
    four = "100 %" if share > 0.9995 else f"{share:.1%}".replace("%", " %")
    link = f"[{name}](https://huggingface.co/{entry['hub_id']})"
    cells = [link, entry["config"]["model_type"], f"{count(name):,}", works(name), four]
    return cells, entry["licence"]


def places(name):
    """Where each method runs by jobs/estimate.py, with the rows of the READMEs' table of jobs."""
    config = AutoConfig.for_model(**MODELS[name]["config"])
    load, estimate.load_config = estimate.load_config, lambda _: (config, name)
    try:
        for method in METHODS[: 4 if rounded(name) >= 0.5 else 3]:
            alone, several = estimate.ROWS[method]
            for where, batch in (("--gpus 1 --zero_stage none", alone), ("", several)):
                words = f"--model_name_or_path {name} --method {method} --max_length 512 {where} "
                words += f"--per_device_train_batch_size {batch}"
                words += " --activation_checkpointing" if method == "full" else ""
                plan = count_memory.fit(estimate.complete(estimate.parse(words.split())))
                if plan.fits:
                    break
            stage = "" if plan.stage == "none" else f" `{plan.stage}`"
            size = f"`{plan.queue}`{stage} {plan.need / 1e9:.0f} GB"
            yield size if plan.fits else "—"
        if rounded(name) < 0.5:
            yield "—"  # refused
    finally:
        estimate.load_config = load


@pytest.mark.parametrize("readme", READMES)
def test_table(readme):
    """Names, types, parameters, shares and licences are those of the configurations."""
    found = [cells for cells in rows(readme) if len(cells) == 10 and "huggingface.co" in cells[0]]
    assert [cells[0].partition("]")[0][1:] for cells in found] == [*MODELS]
    for name, cells in zip(MODELS, found, strict=True):
        start, licence = start_of_row(name)
        assert cells[:5] == start and cells[9] == licence, name


def test_parameters_by_hand():
    plain = {n: e["config"] for n, e in MODELS.items()}
    plain = {n: c for n, c in plain.items() if c["model_type"] in ("llama", "qwen3", "phi3")}
    assert len(plain) == 8
    for name, config in plain.items():
        assert count(name) == by_hand(config), name


def test_sources():
    """Each configuration says where it is from, and none is a whole copied file."""
    for name, entry in MODELS.items():
        assert entry["source"].startswith(("github.com/", "huggingface.co/")), name
        assert not {"architectures", "transformers_version", "auto_map"} & entry["config"].keys()


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        start, licence = start_of_row(name)
        print(f"| {' | '.join([*start, *places(name), licence])} |", flush=True)
