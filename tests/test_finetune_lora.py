"""finetune_lora.py: LoRA against a calculation by hand, what is trained and what is not, quantised
bases, the last layer on one of them, and rows of new tokens.
"""

import gc
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import check_arguments
import pytest
import torch
import yaml
from conftest import CONFIGS, ROOT, ROWS, load_script, make_checkpoint, write_jsonl
from safetensors.torch import load_file, save_file
from test_finetune_full import expected_loss, launch, refused, results, run
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from transformers.pytorch_utils import Conv1D

SCRIPT = ROOT / "finetune_lora" / "finetune_lora.py"
ADD_TOKENS = ROOT / "finetune_lastlayer" / "add_tokens.py"
ZERO = ["--learning_rate", 0, "--num_train_epochs", 1, "--per_device_train_batch_size", 2]
FAST = ["--max_steps", 3, "--learning_rate", "1e-2", "--weight_decay", 0.1, "--logging_steps", 1]
TARGETS = {"gpt2": 4, "gpt_neox": 4, "falcon": 4, "falcon_alibi": 4, "mpt": 4, "llama": 7,
           "qwen3": 7}  # per block  # fmt: skip


@pytest.fixture(scope="module")
def script():
    gc.freeze()  # each run ends with a collection, which need not go through all modules again
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def with_tokens(checkpoints, tmp_path_factory):
    """{kind: a copy of the checkpoint whose tokenizer has the tokens of TOKENS, rows 300, 301}."""

    class Copies(dict):
        def __missing__(self, kind):
            directory = tmp_path_factory.mktemp("tokens") / kind
            self[kind] = add_tokens(checkpoints[kind], directory)
            return self[kind]

    return Copies()


def add_tokens(model, directory):
    load_script(ADD_TOKENS).main(["--model_name_or_path", str(model), *TOKENS,
                                  "--output_dir", str(directory)])  # fmt: skip
    return str(directory)


@pytest.fixture
def seen(script, monkeypatch):
    """A run inside: .model, and .gradients of each step as {name: largest entry}."""
    seen = SimpleNamespace(model=None, gradients=[])
    train = script.FineTuner.train

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            seen.gradients.append(
                {name: 0.0 if g is None else g.abs().max().item() for name, g in trained.items()}
            )

    def train_watched(trainer, *args, **options):
        seen.model = trainer.model
        trainer.add_callback(Watch())
        return train(trainer, *args, **options)

    monkeypatch.setattr(script.FineTuner, "train", train_watched)
    return seen


def fill_adapter(model):
    """B with std 0.1: at its initial 0 an adapter does nothing, and no mistake would show."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def by_hand(base, adapter):
    """The base with B A alpha / r added to every weight that the adapter names, without PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if "lora_A" in name]:
        layer = model.get_submodule(
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        )
        delta = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        delta *= config["lora_alpha"] / config["r"]
        layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta
    return model


def adapter_tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


def same_adapter(one, other):
    one, other = adapter_tensors(one), adapter_tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_decided(source, directory):
    """The same model with a final norm 20 times as large.

    One without opinions has a loss that hardly notices LoRA.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    ends = ("ln_f", "norm_f", "norm", "final_layer_norm")
    norms = [m for n, m in model.named_modules() if n.rpartition(".")[2] in ends]
    norms[-1].weight.data *= 20
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_is_that_of_base_plus_adapter(
    kind, script, checkpoints, train_file, tmp_path, monkeypatch
):
    """Every linear layer is adapted, and nothing else, by alpha / r; the loss is the token mean."""
    original = script.load_model

    def load_model(*args):
        model = original(*args)
        fill_adapter(model)
        return model

    monkeypatch.setattr(script, "load_model", load_model)
    more = [*ZERO, "--validation_file", train_file, "--lora_r", 4, "--lora_alpha", 6]
    more += ["--gradient_accumulation_steps", 4]
    base = make_decided(checkpoints[kind], tmp_path / "base")
    found = run(script, base, train_file, tmp_path / "out", *more)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0)
    model = by_hand(base, tmp_path / "out")
    model.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    expected = expected_loss(tmp_path / "merged", ROWS)
    assert abs(expected - expected_loss(base, ROWS)) > 2e-3
    assert found["train_loss"] == pytest.approx(expected, abs=1e-4)
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-4)
    kinds = (torch.nn.Linear, Conv1D)
    linear = [n for n, m in model.named_modules() if isinstance(m, kinds) and n != "lm_head"]
    wanted = {f"base_model.model.{name}.lora_{part}.weight" for name in linear for part in "AB"}
    assert adapter_tensors(tmp_path / "out").keys() == wanted
    assert len(wanted) == 2 * 2 * TARGETS[kind]


BASES = {"fp32": [], "bf16": ["--precision", "bf16"], "8bit": ["--load_in_8bit", "true"],
         "4bit": ["--load_in_4bit", "true"]}  # fmt: skip


@pytest.mark.parametrize("base", ["bf16", "8bit", "4bit"])  # fp32 is what the other tests train on
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "falcon", "mpt", "llama", "qwen3"])
def test_every_matrix_gets_a_gradient(
    kind, base, script, checkpoints, train_file, tmp_path, seen, capsys
):
    """From the second step on (in the first B is zero, and A has none).

    What is quantised is said, Falcon included.
    """
    more = [*FAST, *BASES[base]]
    more += ["--activation_checkpointing", "true"] * (kind in ("gpt2", "llama"))
    found = run(script, checkpoints[kind], train_file, tmp_path / "o", *more)
    assert len(seen.gradients) == 3
    for step in seen.gradients[1:]:
        assert len(step) == 2 * 2 * TARGETS[kind]
        assert all(step.values()), [name for name, largest in step.items() if not largest]
    out, layers = capsys.readouterr().out, 2 * TARGETS[kind]
    quantised = [m for m in seen.model.modules() if type(m).__module__ == "bitsandbytes.nn.modules"]
    names = {"8bit": {"Linear8bitLt"}, "4bit": {"Linear4bit"}}.get(base, set())
    assert {type(m).__name__ for m in quantised} == names
    if "bit" in base:
        assert f"base       {layers} layers in {base[0]} bit, else fp32; frozen" in out
        assert len(quantised) == layers
    trained, frozen = set(), set()
    for name, parameter in seen.model.named_parameters():
        if parameter.requires_grad:
            trained.add(parameter.dtype)
        elif "base_layer.weight" not in name:
            frozen.add(parameter.dtype)
    assert trained == {torch.float32}
    assert frozen == {torch.bfloat16 if base == "bf16" else torch.float32}
    # counted as if they were not packed: every base gives the same numbers
    model = AutoModelForCausalLM.from_pretrained(checkpoints[kind])
    parameters = sum(p.numel() for p in model.parameters())
    assert found["total_parameters"] - found["trainable_parameters"] == parameters


def test_4_bit_is_what_it_should_be(script, checkpoints, train_file, tmp_path, seen):
    """nf4, double quantisation: the loss is that of the very weights that the 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    source = make_decided(checkpoints["gpt2"], tmp_path / "base")
    found = run(script, source, train_file, tmp_path / "o", *ZERO, *BASES["4bit"])
    plain = AutoModelForCausalLM.from_pretrained(source)
    for layer in plain.modules():
        if isinstance(layer, Conv1D):
            weight = layer.weight.data.T.contiguous()
            packed = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
            layer.weight.data = dequantize_4bit(*packed).T
    plain.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "plain")
    expected = expected_loss(tmp_path / "plain", ROWS)
    assert abs(found["train_loss"] - expected_loss(source, ROWS)) > 1e-3
    assert found["train_loss"] == pytest.approx(expected, abs=1e-4)
    weights = [getattr(module, "weight", None) for module in seen.model.modules()]
    states = [weight.quant_state for weight in weights if hasattr(weight, "quant_state")]
    assert states
    assert all(state.nested and state.quant_type == "nf4" for state in states)


def test_evaluation_leaves_4_bit_weights_alone(
    script, checkpoints, train_file, tmp_path, monkeypatch
):
    """On CPUs with bf16 instructions bitsandbytes repacks them at the first evaluation.

    Training then goes wrong.
    """
    from bitsandbytes.nn import modules

    repacked = []

    def repack(weight, quant_state):
        repacked.append(weight)
        return weight, quant_state  # undone: the real one needs the instructions

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    more = [*FAST, *BASES["4bit"]]
    run(script, checkpoints["llama"], train_file, tmp_path / "plain", *more)
    more += ["--validation_file", train_file, "--eval_strategy", "steps", "--eval_steps", 1]
    run(script, checkpoints["llama"], train_file, tmp_path / "evaluated", *more)
    assert not repacked
    assert same_adapter(tmp_path / "plain", tmp_path / "evaluated")


HEAD = ["--lora_target_modules", "none", "--modules_to_save", "lm_head"]


def row_losses(model, tokenizer):
    """The losses of the learned tokens, one row at a time, as a list of tensors."""
    losses = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, tokenizer.eos_token_id][:64]
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        log_p = torch.log_softmax(logits, -1)
        losses += [-log_p[at - 1, ids[at]] for at in range(len(prompt), len(ids))]
    return losses


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "falcon"])
def test_the_last_layer_on_an_8_bit_base(kind, script, checkpoints, train_file, tmp_path, capsys):
    """The head alone is trained and saved, a tied one too.

    One step of SGD goes along the gradient of an independent calculation on the same 8-bit base;
    after three of AdamW the loss there is the one that training reports.
    """
    from peft import PeftModel

    def load():
        in_8bit = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        return AutoModelForCausalLM.from_pretrained(checkpoints[kind], dtype="float32", **in_8bit)

    more = [*HEAD, *BASES["8bit"], "--validation_file", train_file]
    found = run(script, checkpoints[kind], train_file, tmp_path / "adam", *more, *FAST)
    layers = 2 * TARGETS[kind]
    out = capsys.readouterr().out
    assert f"base       {layers} layers in 8 bit, else fp32; frozen" in out
    assert "adapter    LoRA of rank 16 on 0 layers (none)\nwhole      lm_head\n" in out
    # Falcon's layers are ordinary ones since the script ran: what is loaded here is in 8 bit, too.
    base, tokenizer = load().eval(), AutoTokenizer.from_pretrained(tmp_path / "adam")
    old = base.get_output_embeddings().weight.detach().clone()
    (head,) = adapter_tensors(tmp_path / "adam").values()
    assert head.shape == old.shape
    assert ((head - old).abs() > 1e-4).float().mean() > 0.99
    assert found["trainable_parameters"] == old.numel()
    assert not (tmp_path / "adam" / "model.safetensors").exists()
    model = PeftModel.from_pretrained(base, tmp_path / "adam").eval()
    assert torch.equal(model.get_output_embeddings()(torch.eye(32)), head.T.contiguous())
    assert (
        model.get_input_embeddings().weight.data_ptr()
        != model.get_output_embeddings().weight.data_ptr()
    )
    with torch.no_grad():
        expected = torch.stack(row_losses(model, tokenizer)).mean().item()
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-4)
    # One step along the gradient
    step = ["--optim", "sgd", "--learning_rate", 1, "--max_grad_norm", 0.01, "--max_steps", 1]
    run(script, checkpoints[kind], train_file, tmp_path / "sgd", *more, *step)
    base = load()
    for parameter in base.parameters():
        parameter.requires_grad = False
    weight = torch.nn.Parameter(old.clone())
    base.get_output_embeddings().weight = weight
    torch.stack(row_losses(base, tokenizer)).mean().backward()
    assert weight.grad.norm() > 0.05
    (head,) = adapter_tensors(tmp_path / "sgd").values()
    wanted = old - weight.grad * 0.01 / weight.grad.norm()
    torch.testing.assert_close(head, wanted, atol=1e-5, rtol=0)


def test_nothing_quantised_is_an_error(
    script, checkpoints, train_file, tmp_path, capsys, monkeypatch
):
    skip = {"llm_int8_skip_modules": ["transformer", "lm_head"]}
    monkeypatch.setattr(
        script.transformers,
        "BitsAndBytesConfig",
        lambda **options: BitsAndBytesConfig(**options, **skip),
    )
    base = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file]
    base += ["--output_dir", tmp_path / "o"]
    for bits in (4, 8):
        message = refused(script, capsys, [*base, f"--load_in_{bits}bit", "true"])
        assert f"no layer was quantised: leave --load_in_{bits}bit out" in message


METHOD = {"lora_target_modules": ["all-linear"], "modules_to_save": [], "new_tokens": [],
          "lora_r": 1, "lora_alpha": 1, "lora_dropout": 0, "load_in_8bit": False,
          "load_in_4bit": False}  # fmt: skip


def method_error(script, capsys, device="cpu", **options):
    """The line with which these options are refused before anything is loaded, or ""."""
    training = SimpleNamespace(device=torch.device(device), deepspeed=None)
    try:
        check_arguments.check_lora(SimpleNamespace(**METHOD | options), training, {})
    except SystemExit as stop:
        assert stop.code == 2
    return capsys.readouterr().err


def test_8_bit_needs_a_gpu_that_can(script, capsys, monkeypatch):
    """V100 has compute capability 7.0; T4, with 7.5, is the oldest that can."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    error = method_error(script, capsys, "cuda", load_in_8bit=True)
    assert "use --load_in_4bit true" in error
    assert not method_error(script, capsys, "cuda", load_in_4bit=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert not method_error(script, capsys, "cuda", load_in_8bit=True)


def test_zero3_and_missing_packages(script, capsys, monkeypatch):
    """Parted weights are neither quantised nor given rows; a package that is not there is named."""
    bad = {"load_in_8bit": True}, {"load_in_4bit": True}, {"new_tokens": ["東京"]}
    assert not any(method_error(script, capsys, **options) for options in bad)
    with monkeypatch.context() as patch:
        patch.setattr(check_arguments, "is_deepspeed_zero3_enabled", lambda: True)
        assert not method_error(script, capsys)
        for options in bad:
            assert "ZeRO-3 parts no" in method_error(script, capsys, **options)
    find = check_arguments.find_spec
    for package, options in (("peft", {}), ("bitsandbytes", {"load_in_4bit": True})):
        monkeypatch.setattr(
            check_arguments,
            "find_spec",
            lambda name, gone=package: None if name == gone else find(name),
        )
        assert f"pip install {package}" in method_error(script, capsys, **options)


TOKENS = ["--new_tokens", "東京,書店"]
ENDS = {"model.embed_tokens", "lm_head"}
ADAPTERS = {
    "gpt2 tokens": ("gpt2", TOKENS, {"transformer.wte"}),
    "gpt2 head": ("gpt2", ["--modules_to_save", "lm_head"], {"lm_head"}),
    "gpt2 embedding": ("gpt2", ["--modules_to_save", "wte,ln_f"],
                       {"transformer.wte", "transformer.ln_f"}),
    "gpt2 mlp": ("gpt2", ["--modules_to_save", "1.mlp"],
                 {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"}),
    "llama tokens": ("llama", TOKENS, ENDS),
    "llama tokens alone": ("llama", [*TOKENS, "--lora_target_modules", "none"], ENDS),
    "llama tokens 4bit": ("llama", [*TOKENS, *BASES["4bit"], "--optim", "adamw_bnb_8bit"], ENDS),
    "llama ends": ("llama", ["--modules_to_save", "lm_head,embed_tokens", *BASES["bf16"]], ENDS),
    "gpt_neox norm": ("gpt_neox", ["--modules_to_save", "final_layer_norm,lm_head", *BASES["8bit"]],
                      {"gpt_neox.final_layer_norm", "lm_head"}),
    "llama norm": ("llama", ["--modules_to_save", "norm", "--lora_target_modules",
                             "q_proj,down_proj"], {"model.norm"}),
    "llama q_proj": ("llama", ["--modules_to_save", "q_proj"],
                     {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_frozen_is_frozen(case, script, checkpoints, with_tokens, train_file, tmp_path, seen):
    """After three steps with weight decay the base is bit by bit what it was.

    What is trained moved, and is saved.
    """
    kind, more, beside = ADAPTERS[case]
    out, source = tmp_path / "o", checkpoints[kind]
    if "--new_tokens" in more:
        source = with_tokens[kind]
    run(script, source, train_file, out, *FAST, *more)
    dtype = torch.bfloat16 if "bf16" in more else torch.float32
    base = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    old, compared = dict(base.named_parameters(remove_duplicate=False)), set()
    for name, parameter in seen.model.named_parameters(remove_duplicate=False):
        plain = name.removeprefix("base_model.model.")
        for part in ("base_layer.", "original_module.", "token_adapter."):
            plain = plain.replace(part, "")
        if plain in old and parameter.dtype.is_floating_point:
            assert torch.equal(parameter, old[plain]), name
            assert not parameter.requires_grad
            compared.add(plain)
    quantised = set()
    if "load_in" in str(more):
        for name, module in base.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                quantised.add(f"{name}.weight")
    assert compared == set(old) - quantised
    saved = adapter_tensors(out)
    whole = {name: tensor for name, tensor in saved.items() if ".lora_" not in name}
    places = {name.removeprefix("base_model.model.").rpartition(".")[0] for name in whole}
    assert {place.removesuffix(".token_adapter") for place in places} == beside
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    for name, tensor in whole.items():
        plain = name.removeprefix("base_model.model.")
        if "token_adapter" in name:
            start = old[plain.replace("token_adapter.trainable_tokens_delta", "weight")][300:]
            assert tensor.shape == (2, 32)
            assert not torch.equal(tensor[0], tensor[1])
            assert ((tensor - start).abs() > 1e-3).float().mean() > 0.5
        else:
            assert (tensor != old[plain].float()).float().mean() > 0.5, name
    lora = {name for name in saved if ".lora_" in name}
    assert not {name for name in lora if any(f".{place}." in name for place in beside)}
    assert bool(lora) == ("none" not in more)


def test_new_tokens_learn_at_both_ends(script, checkpoints, train_file, tmp_path):
    """From add_tokens.py on; also in a file with a head of its own that its config denies."""
    falcon = tmp_path / "falcon"
    shutil.copytree(checkpoints["falcon"], falcon)
    state = load_file(falcon / "model.safetensors")
    state["lm_head.weight"] = torch.randn(300, 32) * 0.15
    save_file(state, falcon / "model.safetensors", {"format": "pt"})
    pieces = AutoTokenizer.from_pretrained(falcon)("書店", add_special_tokens=False)["input_ids"]
    source = add_tokens(falcon, tmp_path / "source")
    for name, rate in {"start": "0", "trained": "1e-2"}.items():
        more = [*FAST, *TOKENS, "--learning_rate", rate]
        run(script, source, train_file, tmp_path / name, *more)
    start, trained = adapter_tensors(tmp_path / "start"), adapter_tensors(tmp_path / "trained")
    for module in ("transformer.word_embeddings", "lm_head"):
        name = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
        expected = state[f"{module}.weight"][pieces].mean(0)
        assert torch.allclose(start[name][1], expected, atol=1e-7)
        assert ((trained[name] - start[name]).abs() > 1e-3).all(0).any()


def test_rows_that_are_there_are_used(script, tmp_path, train_file):
    """A model with more rows than its tokenizer has tokens (MPT, OpenCALM) is not made smaller."""
    directory = tmp_path / "m"
    make_checkpoint(directory, "llama")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(310, mean_resizing=False)
    model.save_pretrained(directory)
    found = run(script, add_tokens(directory, tmp_path / "more"), train_file, tmp_path / "o",
                *FAST, *TOKENS)  # fmt: skip
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    rows = [300, 301]
    assert config["trainable_token_indices"] == {"model.embed_tokens": rows, "lm_head": rows}
    frozen = found["total_parameters"] - found["trainable_parameters"]
    assert frozen == sum(p.numel() for p in model.parameters())


RESUMED = {
    "llama": TOKENS,
    "gpt_neox": ["--modules_to_save", "lm_head", *BASES["bf16"]],
    "qwen3": [*BASES["4bit"], "--lora_dropout", 0.1],
    "gpt2": [*HEAD, *BASES["8bit"], "--weight_decay", 0.1],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_interrupted_equals_uninterrupted(
    kind, script, checkpoints, with_tokens, train_file, tmp_path, capsys
):
    """The first steps train B, so it is what counts here.

    The seed gives the same A, whatever was drawn before.
    """
    source = with_tokens[kind] if "--new_tokens" in RESUMED[kind] else checkpoints[kind]
    common = ["--model_name_or_path", source, "--train_file", train_file, "--max_steps", 5,
              "--learning_rate", "1e-2", "--per_device_train_batch_size", 2, "--save_steps", 2,
              *RESUMED[kind]]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script.main([str(word) for word in [*common, "--output_dir", whole]])
    cut.mkdir()
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    arguments = yaml.safe_load((whole / "run_args.yaml").read_text()) | {"output_dir": str(cut)}
    (cut / "run_args.yaml").write_text(yaml.safe_dump(arguments))
    script.main([str(word) for word in [*common, "--output_dir", cut]])
    assert f"resume     {cut / 'checkpoint-2'}" in capsys.readouterr().out
    assert same_adapter(whole, cut)
    assert not same_adapter(whole, whole / "checkpoint-2")
    assert results(cut)["train_loss"] == pytest.approx(results(whole)["train_loss"], abs=1e-9)


def test_what_a_run_leaves(script, checkpoints, train_file, tmp_path, monkeypatch, capsys):
    """A plain PEFT adapter that finds its base from anywhere, and what generation needs.

    The same seed gives the same.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoints["llama"], "base")
    unsavable = '{"temperature": 0.6}'  # it cannot be saved as it is
    (tmp_path / "base" / "generation_config.json").write_text(unsavable)
    for name, more in {"one": [], "two": [], "other": ["--seed", 1]}.items():
        out = tmp_path / name
        run(script, "base", train_file, out, "--max_steps", 1, "--learning_rate", 0, *more)
    out = capsys.readouterr().out
    assert "14 layers (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)" in out
    assert f"merge      python merge_lora.py --adapter_name_or_path {tmp_path / 'one'} " in out
    assert same_adapter(tmp_path / "one", tmp_path / "two")
    assert not same_adapter(tmp_path / "one", tmp_path / "other")
    names = {"adapter_model.safetensors", "adapter_config.json", "generation_config.json",
             "tokenizer.json", "chat_template.jinja", "trainer_state.json", "all_results.json",
             "run_args.yaml"}  # fmt: skip
    assert names <= {path.name for path in (tmp_path / "one").iterdir()}
    assert not (tmp_path / "one" / "model.safetensors").exists()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    generation = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert generation["eos_token_id"] in (0, [0])
    weights = [path.stat().st_mode & 0o777 for path in (tmp_path / "one").glob("*.safetensors")]
    mode = (tmp_path / "one" / "tokenizer.json").stat().st_mode & 0o777
    assert weights == [mode]  # others of the group read it
    script.main([str(tmp_path / "one" / "run_args.yaml"), "--output_dir", "again"])
    assert same_adapter(tmp_path / "one", tmp_path / "again")


def test_the_best_adapter_is_kept(script, checkpoints, train_file, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "甲", "completion": "乙丙丁"}])
    script.main(["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file,
                 "--validation_file", other, "--output_dir", str(tmp_path / "early"),
                 "--early_stopping_patience", "1", "--save_steps", "1", "--max_steps", "40",
                 "--learning_rate", "0.05", "--modules_to_save", "lm_head"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[4]) for line in lines if line.startswith("eval ")]
    # the last is of the best, loaded again
    assert results(tmp_path / "early")["steps"] == len(losses) - 1 < 40
    best = 1 + losses.index(min(losses))
    assert best < len(losses) - 1
    assert same_adapter(tmp_path / "early", tmp_path / "early" / f"checkpoint-{best}")


def test_two_processes(script, checkpoints, with_tokens, tmp_path):
    """7 rows on 2 ranks: every row counts once, and two ranks learn what one does.

    Also on a quantised base.
    """
    train_file = write_jsonl(tmp_path / "train.jsonl", ROWS)
    cases = {"plain": (checkpoints["llama"], []),
             "head": (checkpoints["gpt2"], [*HEAD, *BASES["8bit"]]),
             "4bit": (with_tokens["gpt_neox"], [*BASES["4bit"], *TOKENS])}  # fmt: skip
    runs, common = [], ["--max_steps", 2, "--learning_rate", "1e-3", "--save_strategy", "no"]
    common += ["--logging_steps", 1, "--train_sampling_strategy", "sequential"]
    for name, (source, more) in cases.items():
        words = ["--model_name_or_path", source, "--train_file", train_file, *common, *more]
        one = [*words, "--output_dir", tmp_path / f"{name}1", "--per_device_train_batch_size", 8]
        script.main([str(word) for word in one])
        runs.append([*words, "--output_dir", tmp_path / name, "--per_device_train_batch_size", 4])
    assert "device     2 x CPU" in launch(runs, tmp_path, script=SCRIPT).stdout
    for name in cases:
        one, two = adapter_tensors(tmp_path / f"{name}1"), adapter_tensors(tmp_path / name)
        assert all(torch.allclose(one[key], two[key], atol=2e-5) for key in one), name
        loss = results(tmp_path / f"{name}1")["train_loss"]
        assert results(tmp_path / name)["train_loss"] == pytest.approx(loss)


LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
BAD = {
    "target": ("--lora_target_modules query_key_value", LINEAR),
    "one of two": ("--lora_target_modules q_proj,qproj", "--lora_target_modules qproj: "),
    "part of a name": ("--lora_target_modules proj", "--lora_target_modules proj: "),
    "head": ("--lora_target_modules lm_head", "--lora_target_modules lm_head: "),
    "embedding": ("--lora_target_modules embed_tokens", "target_modules embed_tokens: "),
    "not linear": ("--lora_target_modules mlp", f"--lora_target_modules mlp: it can be {LINEAR}"),
    "no target": ("--lora_target_modules ,", "--lora_target_modules names nothing"),
    "nothing at all": ("--lora_target_modules none", "trains nothing without --modules_to_save"),
    "save": ("--modules_to_save embed_out", "lm_head, mlp, model, norm"),
    "save part of a name": ("--modules_to_save head", "--modules_to_save head: "),
    "save nothing": ("--modules_to_save=", "--modules_to_save names nothing"),
    "save the only target": ("--modules_to_save mlp --lora_target_modules up_proj", "to_save"),
    "save quantised": ("--modules_to_save v_proj --load_in_4bit true", "modules_to_save v_proj: "),
    "save twice": (
        "--modules_to_save v_proj,self_attn",
        "1.self_attn.v_proj stands inside another",
    ),
    "unknown token": ("--new_tokens <a>", "<a>: ../finetune_lastlayer/add_tokens"),
    "no token": ("--new_tokens ,", "--new_tokens names nothing"),
    "unseen token": ("--new_tokens <|pad|>", "<|pad|>: it does not occur in the training data"),
    "rows and whole": ("--new_tokens <s> --modules_to_save lm_head", "not both"),
    "rank": ("--lora_r 0", "--lora_r, --lora_alpha: above 0"),
    "alpha": ("--lora_alpha 0", "--lora_alpha: above 0"),
    "endless alpha": ("--lora_alpha inf", "--lora_alpha cannot be inf"),
    "dropout": ("--lora_dropout 1", "below 1"),
    "both": ("--load_in_8bit true --load_in_4bit true", "--load_in_8bit or --load_in_4bit"),
    "misspelt": ("--lora_rank 8", "unrecognized arguments: --lora_rank"),
    "packing": ("--packing true", "--packing is gone: leave it out"),
    "packing length": ("--packing_length=99", "--packing_length is gone: leave it out"),
    "model": ("--model_name_or_path no/such/model", "is not here, nor a hub name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, script, checkpoints, train_file, tmp_path, capsys):
    more, message = BAD[case]
    base = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file]
    assert message in refused(
        script, capsys, [*base, "--output_dir", tmp_path / "o", *more.split()]
    )
    assert not list((tmp_path / "o").glob("*adapter*"))


def test_alone_in_an_empty_directory(checkpoints, train_file, tmp_path):
    """Copied away it runs, and so does merge_lora.py, without a word on stderr.

    Nothing heavy is imported before it is needed.
    """
    for name in ("finetune_lora.py", "merge_lora.py"):
        shutil.copy(SCRIPT.with_name(name), tmp_path)
    code = f"""
import sys
import datasets, yaml
from transformers import TrainingArguments
before = set(sys.modules)
import finetune_lora
try:
    finetune_lora.main(["--help"])
except SystemExit:
    heavy = {{"deepspeed", "peft", "bitsandbytes", "matplotlib"}}
    print("light", not heavy & (set(sys.modules) - before))
arguments = ["--model_name_or_path", {checkpoints["gpt2"]!r}, "--train_file", {train_file!r}]
finetune_lora.main([*arguments, "--max_steps", "1"])
import merge_lora
merge_lora.main(["--adapter_name_or_path", "output", "--output_dir", "output/merged"])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "light True" in done.stdout and "alone      once cut off" in done.stdout
    assert "embeddings tied; answers as base + adapter" in done.stdout
    assert (tmp_path / "output" / "merged" / "model.safetensors").is_file()
