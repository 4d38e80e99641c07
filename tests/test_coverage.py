"""LoRA on experts, Mamba layers and routers, and bases that are published quantised: a handful of
the grid in coverage_grid.py, which matrix.py runs whole.
"""

import json
from types import SimpleNamespace

import check_arguments
import coverage_grid as grid
import families
import model_layers
import pytest
import seven_grid
import torch
from conftest import ROOT, ROWS, load_script, make_tokenizer, write_jsonl
from safetensors.torch import load_file
from test_finetune_full import refused
from test_finetune_lora import run
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

LORA = ROOT / "finetune_lora" / "finetune_lora.py"
FULL = ROOT / "finetune_full" / "finetune_full.py"
MERGE = ROOT / "finetune_lora" / "merge_lora.py"
SHOW = ROOT / "finetune_lastlayer" / "show_model.py"
BYPASSED = "out_proj: its weight is read past an adapter"
QUICK = {
    "qwen3_moe": ("98.97%", "not gate: chooses experts"),
    "deepseek_v3": ("99.46%", "not gate: chooses experts"),  # dense layers and shared experts, too
    "gpt_oss": ("97.30%", "not router: chooses experts"),
    "llama4_text": ("99.51%", "not router: chooses experts"),
    "nemotron_h": ("88.15%", f"not {BYPASSED}"),
    "granitemoehybrid": ("94.94%", f"not {BYPASSED}"),
    "phi3": ("100.00%", "weights\n"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coverage")
    for kind in QUICK:
        grid.make_checkpoint(folder / kind / "base", kind)
    return folder


@pytest.mark.parametrize("kind", QUICK)
def test_an_adapter_on_all_that_computes(kind, bases, train_file, capsys):
    """By hand, a gradient for each weight, reloaded, merged; show_model.py says the same before."""
    share, left = QUICK[kind]
    assert grid.cell(bases, kind, train_file) == f"ok {share}"
    capsys.readouterr()
    words = ["--model_name_or_path", str(bases / kind / "base"), "--method", "lora"]
    load_script(SHOW).main(words)
    shown = capsys.readouterr().out
    assert f"coverage   {share} of the layers' " in shown and left in shown
    marked = sum(line.startswith("*  ") and "expert" in line for line in shown.splitlines())
    assert bool(marked) == (kind != "phi3")


def test_only_experts_by_name(bases, train_file, tmp_path):
    base = str(bases / "qwen3_moe" / "base")
    more = ["--lora_target_modules", "experts.down_proj"]
    said, trainer, _, gradients = grid.train(base, train_file, str(tmp_path / "out"), *more)
    assert "not named" in said and "2 stacks (down_proj)" in said
    assert len(gradients) == 4 and all(gradients.values())
    names = [name for name, _ in grid.adapted(trainer.model)]
    assert names == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]


def test_what_is_refused_on_experts(bases, train_file, tmp_path, capsys):
    script, base = load_script(LORA), str(bases / "qwen3_moe" / "base")
    words = ["--model_name_or_path", base, "--train_file", train_file, "--output_dir", tmp_path]
    line = refused(script, capsys, [*words, "--lora_dropout", "0.1"])
    assert "--lora_dropout does not work on experts" in line and "k_proj, o_proj" in line
    line = refused(script, capsys, [*words, "--load_in_4bit", "true"])
    assert "only 24.7% of the layers' weights can be in 8 or 4 bit" in line
    line = refused(script, capsys, [*words, "--lora_target_modules", "gate"])
    assert "it can be down_proj, gate_up_proj, k_proj" in line
    more = ["--load_in_4bit", "true", "--allow_partly_quantized", "true"]
    said, *_, gradients = grid.train(base, train_file, str(tmp_path / "out"), *more)
    assert "8 layers in 4 bit, else fp32" in said and "24.7% of the layers' weights" in said
    assert len(gradients) == 24 and all(gradients.values())
    # Answers are no better: the same share, and the same refusal.
    words = ["--model_name_or_path", base, "--prompt", "a", "--max_new_tokens", "2"]
    script = load_script(ROOT / "generate_text" / "generate_text.py")
    line = refused(script, capsys, [*words, "--load_in_4bit"])
    assert "only 24.7% of the layers' weights can be in 8 or 4 bit" in line
    script.main([*words, *more])
    assert "8 layers quantised, 24.7% of the layers' weights\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method", ["mxfp4", "fp8", "compressed-tensors", "compressed-tensors in 4 bit"]
)
def test_published_quantised(method, train_file, tmp_path, capsys, monkeypatch):
    """What is trained, saved and merged is what the packed numbers mean, unpacked by hand here."""
    if method.startswith("compressed-tensors"):  # a package that is not among ours
        pytest.importorskip("compressed_tensors")
    stored, plain = grid.make_published(tmp_path / method, method)
    # As on a GPU that computes with them as they are; without one transformers unpacks them anyway.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *a, **k: None)
    losses = []
    for name, base in (("stored", stored), ("plain", plain)):
        out = tmp_path / f"{name}-lora"
        said, trainer, *_ = grid.train(base, train_file, str(out))
        assert (f"unpacked   the weights are published in {method.split()[0]};" in said) == (
            name == "stored"
        )
        steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append((steps, trainer.model))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    merged = tmp_path / "merged"
    words = ["--adapter_name_or_path", str(tmp_path / "stored-lora"), "--output_dir", str(merged)]
    load_script(MERGE).main(words)
    same_logits(merged, losses[1][1])
    whole = tmp_path / "full"
    run(load_script(FULL), stored, train_file, whole, "--max_steps", 1, "--learning_rate", 0)
    same_logits(whole, AutoModelForCausalLM.from_pretrained(plain))


def same_logits(directory, model):
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    found, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(grid.logits(found), grid.logits(model), atol=1e-4, rtol=0)


def test_a_form_that_cannot_be_unpacked(bases, train_file, tmp_path, capsys):
    base = bases / "phi3" / "gptq"
    grid.make_checkpoint(base, "phi3")
    config = AutoConfig.from_pretrained(base)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(base)
    for path in (LORA, FULL):
        words = ["--model_name_or_path", base, "--train_file", train_file, "--output_dir", tmp_path]
        line = refused(load_script(path), capsys, words)
        assert "is published in gptq, which cannot be trained so. Fetch it in bf16" in line
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(base)
    line = refused(load_script(LORA), capsys, [*words, "--load_in_4bit", "true"])
    assert "is published in fp8, which cannot be trained so. Leave --load_in_..." in line


# ---- What the published settings add to a loss, and what checkpointing takes from gradients ----


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_vl_moe", "bamba"])
@pytest.mark.parametrize("lesson", ["full", "lora"])
def test_no_loss_of_routers(lesson, kind, tmp_path):
    """Loss and evaluation are means over tokens, in whatever batches; the settings stay."""
    model, parts = families.make(kind, tmp_path / "model"), {}
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    text |= {"output_router_logits": True, "router_aux_loss_coef": 0.5, "z_loss_coefficient": 0.5}
    file.write_text(json.dumps(config))
    net, tokenizer = families.load(kind, model)[0], seven_grid.tokens(model)
    for part in (net.config, net.config.get_text_config()):
        part.output_router_logits = False
    wanted = seven_grid.token_mean(net, tokenizer)
    data = write_jsonl(tmp_path / "d.jsonl", ROWS)
    for size, count in ((2, 4), (7, 1)):
        out = tmp_path / f"{size}"
        words = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", count]
        words += ["--validation_file", data, "--eval_strategy", "steps", "--eval_steps", 1]
        words += ["--per_device_eval_batch_size", size, "--learning_rate", 0, "--max_steps", 1]
        run(load_script(FULL if lesson == "full" else LORA), model, data, out, *words)
        parts[size] = json.loads((out / "all_results.json").read_text())
        for name in ("train_loss", "eval_loss"):
            assert parts[size][name] == pytest.approx(wanted, abs=1e-4), (size, name)
    if lesson == "full":
        saved = json.loads((out / "config.json").read_text())
        saved = saved.get("text_config", saved)
        for name in ("output_router_logits", "router_aux_loss_coef", "z_loss_coefficient"):
            assert saved[name] == text[name], name


@pytest.fixture(scope="module")
def sharing(tmp_path_factory):
    """{kind: checkpoint} whose last two of four layers take keys and values from those before."""
    made, tokenizer = {}, make_tokenizer()
    more = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    more |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    for kind in ("gemma3n_text", "gemma4_text"):
        sparse = {"activation_sparsity_pattern": [0.0] * 4} if kind == "gemma3n_text" else {}
        settings = families.text_config(kind, len(tokenizer), more | sparse)
        settings.pop("per_layer_config", None)
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and "norm" in name
            torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.15)
        made[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(made[kind])
        tokenizer.save_pretrained(made[kind])
    return made


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_checkpointing_in_8bit_where_layers_share(kind, sharing, tmp_path, capsys):
    """The gradients of keys and values that later layers take are those without checkpointing."""
    words = "--load_in_8bit true --max_steps 1 --logging_steps 1 --optim sgd --max_grad_norm 0"
    words += " --learning_rate 1 --lr_scheduler_type constant --per_device_train_batch_size 2"
    words, norms = [*words.split(), "--save_strategy", "no"], []
    data = write_jsonl(tmp_path / "d.jsonl", ROWS[:2])
    for on in ("false", "true"):
        more = [*words, "--activation_checkpointing", on]
        run(load_script(LORA), str(sharing[kind]), data, tmp_path / on, *more)
        note = "note       layers share keys and values: checkpointing saves little in 8 bit"
        assert (note in capsys.readouterr().out) == (on == "true")
        state = json.loads((tmp_path / on / "trainer_state.json").read_text())
        norms.append(state["log_history"][0]["grad_norm"])
    plain, again = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("false", "true")
    )
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    for name in [name for name in plain if "lora_B" in name]:
        assert (plain[name] - again[name]).norm() <= 0.02 * plain[name].norm(), name


@pytest.mark.parametrize("lesson", ["full", "lora", "lastlayer", "dpo", "grpo"])
def test_reentrant_checkpointing_where_layers_share(lesson, sharing, train_file, tmp_path, capsys):
    script = load_script(ROOT / f"finetune_{lesson}" / f"finetune_{lesson}.py")
    words = ["--model_name_or_path", sharing["gemma4_text"], "--train_file", train_file]
    words += ["--output_dir", tmp_path / "out", "--activation_checkpointing", "true"]
    for option in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        line = refused(script, capsys, [*words, f"--{option}", '{"use_reentrant": true}'])
        assert "share keys and values: use_reentrant loses their gradients. Leave it out." in line


def test_what_shares_keys_and_values(sharing, monkeypatch, capsys):
    """By its settings, within a composite, too; and where TRL asks for it by itself."""
    for kind in ("gemma4", "gemma4_unified"):
        config = AutoConfig.for_model(kind)
        assert not model_layers.shares_keys(config)
        config.get_text_config().num_kv_shared_layers = 2
        assert model_layers.shares_keys(config)
    assert model_layers.shares_keys(AutoConfig.for_model("gemma3n"))
    assert not model_layers.shares_keys(AutoConfig.for_model("llama"))
    script = SimpleNamespace(model_name_or_path=sharing["gemma4_text"], trust_remote_code=False)
    training = SimpleNamespace(activation_checkpointing=True, activation_checkpointing_kwargs=None)
    monkeypatch.setattr(check_arguments, "is_deepspeed_zero3_enabled", lambda: True)
    check_arguments.check_reentrant(script, training)
    script.beta, script.full = 0.1, True
    check_arguments.check_reentrant(script, training)
    script.full = False
    with pytest.raises(SystemExit):
        check_arguments.check_reentrant(script, training)
    assert "Take zero2.json, or no checkpointing." in capsys.readouterr().err
