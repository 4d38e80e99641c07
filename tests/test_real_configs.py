"""The seven real models, built from tiny_model/models.json without weights: sizes, what each way of
training picks on them, and the figures in the READMEs and in deepspeed_configs/draw.py.

    python tests/test_real_configs.py     # the READMEs' tables of jobs without memory, and qsub lines
"""

import functools
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script
from transformers import AutoConfig, AutoModelForCausalLM

MODELS = json.loads((ROOT / "tiny_model" / "models.json").read_text(encoding="utf-8"))["models"]
READMES = ("README.md", "README.en.md")
ALL = pytest.mark.parametrize("name", MODELS)
BOTH = pytest.mark.parametrize("readme", READMES)


def load(path):
    """A file as a module, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_real_configs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAW = load(ROOT / "deepspeed_configs" / "draw.py")

# ---- Counts by hand, from the configuration's sizes alone ----


def sizes(name):
    """Vocabulary, hidden, layers, inner size, tied, names of the blocks, for all architectures."""
    config = MODELS[name]["config"]
    hidden = config.get("n_embd") or config.get("d_model") or config["hidden_size"]
    layers = config.get("n_layer") or config.get("n_layers") or config["num_hidden_layers"]
    inner = config.get("n_inner") or config.get("intermediate_size") or 4 * hidden
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "falcon": "transformer.h"}
    blocks |= {"mpt": "transformer.blocks", "llama": "model.layers"}
    kind = config["model_type"]
    return SimpleNamespace(
        kind=kind, vocabulary=config["vocab_size"], hidden=hidden, layers=layers, inner=inner,
        blocks=blocks[kind],
        tied=kind in ("gpt2", "falcon", "mpt"), head=config["vocab_size"] * hidden,
    )  # fmt: skip


def linear_layers(name):
    """{name in a block: (inputs, outputs)} of the block's linear layers."""
    s = sizes(name)
    up_down = (s.hidden, s.inner), (s.inner, s.hidden)
    if s.kind == "gpt2":
        names = "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"
    elif s.kind == "gpt_neox":
        names = "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
    elif s.kind == "falcon":
        names = "self_attention.query_key_value self_attention.dense "
        names += "mlp.dense_h_to_4h mlp.dense_4h_to_h"
    elif s.kind == "mpt":
        names = "attn.Wqkv attn.out_proj ffn.up_proj ffn.down_proj"
    else:
        attention = {f"self_attn.{end}_proj": (s.hidden, s.hidden) for end in "qkvo"}
        return attention | {
            "mlp.gate_proj": up_down[0],
            "mlp.up_proj": up_down[0],
            "mlp.down_proj": up_down[1],
        }
    # Falcon's heads share one key and one value.
    qkv = (
        s.hidden + 2 * s.hidden // MODELS[name]["config"]["num_attention_heads"]
        if s.kind == "falcon"
        else 3 * s.hidden
    )
    return dict(zip(names.split(), ((s.hidden, qkv), (s.hidden, s.hidden), *up_down), strict=True))


def block_by_hand(name):
    """Parameters of one block."""
    s, linear = sizes(name), linear_layers(name).values()
    biases = sum(outputs for _, outputs in linear) if s.kind in ("gpt2", "gpt_neox") else 0
    norms = {"gpt2": 4, "gpt_neox": 4, "falcon": 2, "mpt": 2, "llama": 2}[
        s.kind
    ] * s.hidden  # weights, and biases
    return sum(inputs * outputs for inputs, outputs in linear) + biases + norms


def norm_by_hand(name):
    """Parameters of the norm behind the blocks."""
    return sizes(name).hidden * (1 if sizes(name).kind in ("mpt", "llama") else 2)


def total_by_hand(name):
    s = sizes(name)
    positions = 2048 * s.hidden if s.kind == "gpt2" else 0
    return (
        s.head * (1 if s.tied else 2)
        + positions
        + s.layers * block_by_hand(name)
        + norm_by_hand(name)
    )


# ---- The models ----


@functools.cache
def config_of(name, folder):
    """The configuration as transformers reads it from a config.json."""
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODELS[name]["config"]), encoding="utf-8")
    return AutoConfig.from_pretrained(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@pytest.fixture
def model(name, folder):
    """The model on the meta device: names and shapes, no memory."""
    config = config_of(name, folder)
    config.tie_word_embeddings = sizes(name).tied  # a test before may have untied it
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


@ALL
def test_parameters(name, model):
    entry = MODELS[name]
    assert count(model.parameters()) == entry["parameters"] == total_by_hand(name)
    digits = len(entry["published_size"].rstrip("B").partition(".")[2])
    published, real = float(entry["published_size"].rstrip("B")), entry["parameters"] / 1e9
    if name in ("mpt-7b", "open-calm-7b"):  # 6.65 is published as 6.7, and 6.87 as 6.8
        assert abs(published - real) < 0.1
    else:
        assert round(real, digits) == published


@ALL
def test_configuration_is_read_as_written(name, model):
    entry, config = MODELS[name], model.config
    assert config.model_type == entry["config"]["model_type"]
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, token) == entry["config"].get(token)
    assert str(config.dtype) == f"torch.{entry['published_dtype']}" and entry["config"][
        "torch_dtype"
    ] in str(config.dtype)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings == sizes(name).tied
    assert (config.hidden_size, config.num_hidden_layers) == (
        sizes(name).hidden,
        sizes(name).layers,
    )
    if "rotary_pct" in entry["config"]:
        assert config.rope_parameters["partial_rotary_factor"] == entry["config"]["rotary_pct"]
        assert config.rope_parameters["rope_theta"] == entry["config"]["rotary_emb_base"]
    dropouts = [
        getattr(module, "p", 0)
        for module in model.modules()
        if isinstance(module, torch.nn.Dropout)
    ]
    assert not any(dropouts)


@ALL
def test_published_files_have_the_size_of_these_parameters(name):
    """2 or 4 bytes each.

    GPT-2 and GPT-NeoX files of 2023 hold a mask per block too, and Falcon's its tied head.
    """
    entry, s = MODELS[name], sizes(name)
    if entry["weights_gb"] is None:
        pytest.skip("the size of the files was not seen")
    width = 4 if entry["published_dtype"] == "float32" else 2
    expected = width * entry["parameters"] + (
        s.layers * 2048**2 if s.kind in ("gpt2", "gpt_neox") else 0
    )
    expected += width * s.head if s.kind == "falcon" else 0
    assert abs(expected / 1e9 - entry["weights_gb"]) < 0.06


@ALL
def test_lora_on_all_linear_layers(name, model):
    """What finetune_lora.py adapts, by whole names, and how many parameters rank 16 makes of it."""
    script = load_script(ROOT / "finetune_lora" / "finetune_lora.py")
    arguments = {"model_name_or_path": name, "precision": "fp32", "lora_r": 16, "lora_alpha": 32}
    arguments |= {"lora_dropout": 0, "lora_target_modules": ["all-linear"], "modules_to_save": []}
    arguments |= {"new_tokens": [], "load_in_8bit": False, "load_in_4bit": False}
    tokenizer = SimpleNamespace(convert_tokens_to_ids=list)
    training = SimpleNamespace(seed=0, deepspeed=None)
    with torch.device("meta"):
        adapted = script.add_adapter(SimpleNamespace(**arguments), training, tokenizer, model)
    s, linear = sizes(name), linear_layers(name)
    names = {f"{s.blocks}.{number}.{layer}" for number in range(s.layers) for layer in linear}
    assert {*adapted.base_model.targeted_module_names} == names
    by_hand = 16 * s.layers * sum(inputs + outputs for inputs, outputs in linear.values())
    assert count(p for p in adapted.parameters() if p.requires_grad) == by_hand
    assert by_hand < 0.01 * MODELS[name]["parameters"], "draw.py allows 1 % for the adapter"


@ALL
def test_choices_of_the_last_layer(name, model):
    script = load_script(ROOT / "finetune_lastlayer" / "finetune_lastlayer.py")
    s = sizes(name)
    last = f"{s.blocks}.{s.layers - 1}."
    norm = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm",
            "falcon": "transformer.ln_f", "mpt": "transformer.norm_f",
            "llama": "model.norm"}[s.kind]  # fmt: skip
    embedding = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in",
                 "falcon": "transformer.word_embeddings", "mpt": "transformer.wte",
                 "llama": "model.embed_tokens"}[s.kind]  # fmt: skip
    parameters = dict(model.named_parameters(remove_duplicate=False))

    both = script.choose_parameters(model, "input_output")
    assert {*both} == {f"{embedding}.weight", "lm_head.weight"}
    note = script.untie(model, both)
    assert model.config.tie_word_embeddings == s.tied and ("stays so" in note) == s.tied
    assert count({id(parameters[n]): parameters[n] for n in both}.values()) == s.head * (
        1 if s.tied else 2
    )

    block = script.choose_parameters(model, "last_block")
    inside = [n for n in block if n.startswith(last)]
    assert {*block} - {*inside} == {
        "lm_head.weight",
        *(n for n in parameters if n.startswith(f"{norm}.")),
    }
    assert count(parameters[n] for n in inside) == block_by_hand(name)
    assert count(parameters[n] for n in block) == s.head + block_by_hand(name) + norm_by_hand(name)

    layer = script.choose_parameters(model, "last_layer")
    assert layer == ["lm_head.weight"]
    note = script.untie(model, layer)
    assert not model.config.tie_word_embeddings
    assert (f"{s.head:,} parameters more" in note) == s.tied
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert count(model.parameters()) == MODELS[name]["parameters"] + (s.head if s.tied else 0)


@ALL
def test_sizes_of_the_deepspeed_counts(name):
    assert {*DRAW.MODELS} == {*MODELS}
    assert DRAW.MODELS[name] == (MODELS[name]["parameters"], sizes(name).head, sizes(name).tied)


# ---- The READMEs' tables ----


def rows(readme):
    """The cells of each row of each table, without the marks of links."""
    for line in (ROOT / readme).read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" |")]


def gigabytes_by_hand(name, method, config=None):
    """Decimal GB on each GPU, as in draw.py, from this file's counts."""
    p, head, tied = MODELS[name]["parameters"], sizes(name).head, sizes(name).tied
    full = {None: 16, "zero1": 4 + 4.5 + 1.5, "zero2": 4 + 1 + 1.5, "zero3": 0.5 + 0.5 + 1.5}
    ends = head if tied else 2 * head
    amount = {
        "full": full[config] * p,
        "last layer": 4 * (p + (head if tied else 0)) + 12 * head,
        "LoRA": 2.16 * p,
    }
    return {**amount, "QLoRA": 0.52 * (p - ends) + 2 * ends + 0.16 * p}[method] / 1e9


@BOTH
def test_table_of_the_models(readme):
    found = []
    for cells in rows(readme):
        match = re.fullmatch(r"\[(.+)\]\(https://huggingface\.co/(.+)\)", cells[0])
        if match and len(cells) == 6:  # today's have a test of their own
            name, entry = match[1], MODELS[match[1]]
            assert match[2] == entry["hub_id"]
            assert cells[1:4] == [
                entry["config"]["model_type"], f"{entry['parameters']:,}",
                f"{2 * entry['parameters'] / 1e9:.1f} GB",
            ], name  # fmt: skip
            assert cells[5].startswith(entry["licence"])
            found.append(name)
    assert found == [*MODELS]


@BOTH
def test_memory_in_the_tables(readme):
    """After a model's name, each number of GB is that of its method and configuration."""
    for page in (readme, f"deepspeed_configs/{readme}"):
        seen = set()
        for cells in rows(page):
            if cells[0] in MODELS and any("GB" in cell for cell in cells):
                check_memory(*cells)
                seen.add(cells[0])
        assert seen == {*MODELS}, page


def check_memory(name, *cells):
    is_plan = len(cells) == len(DRAW.METHODS) and all("rt_" in cell for cell in cells)
    pairs = zip(DRAW.METHODS, cells, strict=True) if is_plan else [("full", " ".join(cells))]
    for method, cell in pairs:
        config = re.search(r"`(zero\d)\.json`", cell)
        figures = [int(figure) for figure in re.findall(r"(\d+) GB", cell)]
        expected = [gigabytes_by_hand(name, method, config and config[1])]
        if not is_plan and config:  # on one GPU, and on each of eight
            expected.insert(0, gigabytes_by_hand(name, method))
        assert figures == [round(figure) for figure in expected], f"{name}, {method}: {cell}"


# ---- Jobs: 10,000 examples of 512 tokens, once; computed, not run ----

EXAMPLES, TOKENS = 10_000, 512
# An H200's advertised bf16 speed (dense), and what is assumed to be reached of it:
FLOPS, SHARE = 989e12, 0.3
START_MINUTES = 30  # Python, reading the weights, tokenising, saving
DIRECTORY = {
    "full": "finetune_full",
    "last layer": "finetune_lastlayer",
    "LoRA": "finetune_lora",
    "QLoRA": "finetune_lora",
}
# Operations per parameter and token: forward 2, gradients of the activations 2, of the weights 2.
# Recomputing the activations takes another 2; below the last layer nothing has gradients; LoRA's
# frozen weights have none.
OPERATIONS = {"full": 8, "last layer": 2, "LoRA": 4, "QLoRA": 4}
BATCH = {
    "full": {1: (4, 16), 8: (8, 1)},
    "last layer": {1: (16, 4)},
    "LoRA": {1: (4, 4)},
    "QLoRA": {1: (4, 4)},
}
EXTRA = {
    "full": " --activation_checkpointing true",
    "last layer": "",
    "LoRA": "",
    "QLoRA": " --load_in_4bit true",
}


def minutes(name, method):
    """Computing time; unpacking 4-bit weights is assumed to halve the speed."""
    gpus = DRAW.plan(name, method)[1]
    operations = OPERATIONS[method] * MODELS[name]["parameters"]
    operations += 2 * sizes(name).head * (method == "last layer")  # its weights' gradient
    operations *= EXAMPLES * TOKENS
    return operations / (FLOPS * SHARE * (0.5 if method == "QLoRA" else 1) * gpus) / 60


def hours(name, method):
    """The walltime: twice what is expected, in whole hours."""
    return math.ceil(2 * (START_MINUTES + minutes(name, method)) / 60)


def learning_rate(name, method):
    """The makers' where one was found, else the script's default."""
    if method == "full" and MODELS[name]["full_fine_tuning"]:
        return MODELS[name]["full_fine_tuning"]["learning_rate"]
    return {"full": 2e-5, "last layer": 1e-4, "LoRA": 2e-4, "QLoRA": 2e-4}[method]


def rate(value):
    return f"{value:.0e}".replace("e-0", "e-")


# rinna's tokenizer is converted first, into the directory that README names.
EXAMPLE = "open-calm-7b"  # the model of the lessons' lines
DIRECTORY_OF = {"japanese-gpt-neox-3.6b": "../generate_text/output/rinna"}


def qsub_line(name, method):
    queue, gpus, config, _ = DRAW.plan(name, method)
    batch, accumulation = BATCH[method][gpus]
    output = f"output/{name}" + ("-4bit" if method == "QLoRA" else "")  # one for each method
    deepspeed = "" if config == "none" else f",DEEPSPEED=../deepspeed_configs/{config}.json"
    model = DIRECTORY_OF.get(name, MODELS[name]["hub_id"])
    return (
        f"qsub -P GROUP -q {queue} -l walltime={hours(name, method)}:00:00 "
        f"-v MODEL={model},TRAIN_FILE=my.jsonl,OUTPUT_DIR={output}{deepspeed},"
        f'ARGS="--num_train_epochs 1 --max_length {TOKENS} --per_device_train_batch_size {batch} '
        f"--gradient_accumulation_steps {accumulation} "
        f'--learning_rate {rate(learning_rate(name, method))}{EXTRA[method]}" job.sh'
    )


def job_rows(readme):
    """The lines of the READMEs' table of jobs."""
    unit, comma = ("分", "、") if readme == "README.md" else (" min", ", ")
    for name, entry in MODELS.items():
        queue, gpus, config, _ = DRAW.plan(name, "full")
        times = [f"{math.ceil(minutes(name, method))}{unit}" for method in DRAW.METHODS]
        where = comma.join([f"`{queue}`", *([f"`{config}.json`"] if gpus > 1 else []), times[0]])
        others = " | ".join(times[1:])
        yield f"| `{entry['hub_id']}` | {where} | {rate(learning_rate(name, 'full'))} | {others} |"


def activations_by_hand(name, method, batch):
    """GB of activations on a GPU, generously.

    Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198) count 34 bytes per token, layer and
    unit of width, here 100 because part of it is fp32; MPT keeps the scores as well.
    """
    s, tokens = sizes(name), batch * TOKENS
    scores = 16 * MODELS[name]["config"]["n_heads"] * TOKENS if s.kind == "mpt" else 0
    layer, logits = tokens * (100 * s.hidden + scores), 3 * 4 * tokens * s.vocabulary
    kept = {"full": 4 * s.hidden * tokens * s.layers + layer, "last layer": layer}
    total = kept.get(method, s.layers * layer) + logits
    if method == "full":
        total += 2 * MODELS[name]["parameters"]  # autocast's copies
    return total / 1e9


@ALL
@pytest.mark.parametrize("method", DRAW.METHODS)
def test_jobs_fit(name, method):
    queue, gpus, config, size = DRAW.plan(name, method)
    assert (queue, gpus, config) in (("rt_HG", 1, "none"), ("rt_HF", 8, "zero2"))
    assert size == pytest.approx(gigabytes_by_hand(name, method, None if gpus == 1 else config))
    assert size <= DRAW.GPU_GB - DRAW.RESERVE_GB
    batch, accumulation = BATCH[method][gpus]
    assert batch * accumulation * gpus == (16 if "LoRA" in method else 64)
    activations = activations_by_hand(name, method, batch)
    assert size + activations < DRAW.GPU_GB
    buckets = 4 if gpus > 1 else 0  # ZeRO's
    if method == "full":
        assert activations + buckets < DRAW.GPU_GB - size
        assert gpus > 1 or activations < DRAW.RESERVE_GB
    # Each process reads the weights as fp32.
    assert DRAW.HOST_GB[gpus] > 4 * gpus * MODELS[name]["parameters"] / 1e9
    needed = START_MINUTES + minutes(name, method)
    assert TOKENS <= 2048 and 2 * needed <= 60 * hours(name, method)


def test_learning_rates_are_the_scripts_defaults():
    for method, directory in DIRECTORY.items():
        script = load_script(ROOT / directory / f"{directory}.py")
        rates = {name: learning_rate(name, method) for name in MODELS}
        own = {name for name in MODELS if rates[name] != script.DEFAULTS["learning_rate"]}
        assert own == ({"dolly-v2-12b", "mpt-7b"} if method == "full" else set())


def test_minutes_by_hand():
    """6.9 billion x 5.12 million x 8 = 2.8e17 operations at 2.97e14 a second, and others so."""
    assert minutes("falcon-7b", "full") == pytest.approx(15.93, abs=0.01)
    assert minutes("open_llama_13b", "full") == pytest.approx(3.74, abs=0.01)
    assert minutes("open_llama_13b", "LoRA") == pytest.approx(14.97, abs=0.01)
    assert minutes("open_llama_13b", "QLoRA") == pytest.approx(29.95, abs=0.01)
    assert {hours(name, method) for name in MODELS for method in DRAW.METHODS} == {2}


@BOTH
def test_jobs_in_the_readme(readme):
    """The table in the first README, an example of it in each lesson's."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    without_memory = re.sub(r"\d+ GB(, |、)", "", text)  # those of tests/test_estimate.py
    assert "\n".join(job_rows(readme)) in without_memory
    for directory in {*DIRECTORY.values()}:
        methods = [method for method in DRAW.METHODS if DIRECTORY[method] == directory]
        ours = [qsub_line(EXAMPLE, method) for method in methods]
        lines = (ROOT / directory / readme).read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if line.startswith("qsub ")]
        assert ours == [line for line in lines if "--gradient_accumulation_steps" in line]
    for method in DRAW.METHODS:
        named = [cells for cells in rows(readme) if f"`{DIRECTORY[method]}/`" in cells]
        named = [" ".join(cells) for cells in named if len(cells) == 5]
        pairs = [f"{batch} × {accumulation}" for batch, accumulation in BATCH[method].values()]
        assert any(all(pair in line for pair in pairs) for line in named), method
        learning_rates = {rate(learning_rate(name, method)) for name in MODELS}
        wanted = [EXTRA[method].strip(), *(learning_rates if len(learning_rates) == 1 else [])]
        assert any(all(word in line for word in wanted) for line in named), method
    steps = math.ceil(EXAMPLES / 64)
    job = (ROOT / "finetune_full" / "job.sh").read_text(encoding="utf-8")
    assert steps < 200 and "--save_steps 200" in job
    assert re.search(rf"{steps}(ステップ| steps)", text)
    assert f"{FLOPS / 1e12:.0f} TFLOP/s" in text and f"{SHARE * 100:.0f} %" in text


def test_the_lines_are_split_as_meant():
    for name in MODELS:
        for method in DRAW.METHODS:
            words = shlex.split(qsub_line(name, method))
            value = words[words.index("-v") + 1]
            names = [item.partition("=")[0] for item in value.split(",")]
            assert names[:3] == ["MODEL", "TRAIN_FILE", "OUTPUT_DIR"]
            assert value.rpartition(",")[2].startswith("ARGS=--") and words[-1] == "job.sh"
            assert (Path(ROOT) / DIRECTORY[method] / "job.sh").is_file()


if __name__ == "__main__":
    for language in READMES:
        print(*job_rows(language), "", sep="\n")
    for method in DRAW.METHODS:
        lines = [qsub_line(name, method) for name in MODELS]
        print(f"# {method}: cd {DIRECTORY[method]}", *lines, "", sep="\n")
    sys.exit()
