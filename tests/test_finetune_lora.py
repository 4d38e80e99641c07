"""finetune_lora.py: LoRA against a calculation by hand, what is trained and what is not, quantised bases."""

import gc
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import CONFIGS, ROOT, ROWS, make_checkpoint, write_jsonl
from safetensors.torch import load_file, save_file
from test_finetune_full import PACKS, expected_loss, launch, load_script, refused, results, run
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

SCRIPT = ROOT / "finetune_lora" / "finetune_lora.py"
ZERO = ["--learning_rate", 0, "--num_train_epochs", 1, "--per_device_train_batch_size", 2]
FAST = ["--max_steps", 3, "--learning_rate", "1e-2", "--weight_decay", 0.1, "--logging_steps", 1]
TARGETS = {"gpt2": 4, "gpt_neox": 4, "falcon": 4, "falcon_alibi": 4, "mpt": 4, "llama": 7, "qwen3": 7}  # per block


@pytest.fixture(scope="module")
def script():
    gc.freeze()  # each run ends with a collection, which need not go through all modules again
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def no_pictures(script, monkeypatch, request):
    """Drawing the loss takes longer than training here; one test looks at it."""
    if "leaves" not in request.node.name:
        monkeypatch.setattr(script, "draw_loss", lambda history, path: None)


@pytest.fixture
def seen(script, monkeypatch):
    """What a run does inside: .model after training, .gradients of each step as {name: largest entry}."""
    seen = SimpleNamespace(model=None, gradients=[])
    original = script.save_results

    def save_results(trainer):
        seen.model = trainer.model
        original(trainer)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        seen.gradients.append({name: 0.0 if g is None else g.abs().max().item() for name, g in trained.items()})

    monkeypatch.setattr(script, "save_results", save_results)
    monkeypatch.setattr(script.Progress, "on_pre_optimizer_step", on_pre_optimizer_step)
    return seen


def fill_adapter(model):
    """B with std 0.1: at its initial 0 an adapter does nothing, and no mistake with it would show."""
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
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        delta = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * config["lora_alpha"] / config["r"]
        layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta
    return model


def adapter_tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


def same_adapter(one, other):
    one, other = adapter_tensors(one), adapter_tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_decided(source, directory):
    """The same model with a final norm 20 times as large: one without opinions has a loss that hardly notices LoRA."""
    model = AutoModelForCausalLM.from_pretrained(source)
    norms = [
        m for n, m in model.named_modules() if n.rpartition(".")[2] in ("ln_f", "norm_f", "norm", "final_layer_norm")
    ]
    norms[-1].weight.data *= 20
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_is_that_of_base_plus_adapter(kind, script, checkpoints, train_file, tmp_path, monkeypatch):
    """Nothing but every linear layer is adapted, scaled by alpha / r; the loss is the true mean over tokens."""
    original = script.load_model

    def load_model(*args):
        model = original(*args)
        fill_adapter(model)
        return model

    monkeypatch.setattr(script, "load_model", load_model)
    more = [*ZERO, "--validation_file", train_file, "--lora_r", 4, "--lora_alpha", 6]
    base = make_decided(checkpoints[kind], tmp_path / "base")
    found = run(script, base, train_file, tmp_path / "out", *more, "--gradient_accumulation_steps", 4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0)
    model = by_hand(base, tmp_path / "out")
    model.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    expected = expected_loss(tmp_path / "merged", ROWS)
    assert abs(expected - expected_loss(base, ROWS)) > 2e-3
    assert found["train_loss"] == pytest.approx(expected, abs=1e-4)
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-4)
    linear = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and n != "lm_head"]
    wanted = {f"base_model.model.{name}.lora_{part}.weight" for name in linear for part in "AB"}
    assert adapter_tensors(tmp_path / "out").keys() == wanted
    assert len(wanted) == 2 * 2 * TARGETS[kind]
    if PACKS[kind]:
        more += ["--packing", "true", "--packing_length", 100]
        assert run(script, base, train_file, tmp_path / "packed", *more)["train_loss"] == pytest.approx(
            expected, abs=1e-4
        )


BASES = {"fp32": [], "bf16": ["--precision", "bf16"], "8bit": ["--load_in_8bit", "true"],
         "4bit": ["--load_in_4bit", "true"]}  # fmt: skip


@pytest.mark.parametrize("base", ["bf16", "8bit", "4bit"])  # fp32 is what the other tests train on
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "falcon", "mpt", "llama", "qwen3"])
def test_every_matrix_gets_a_gradient(kind, base, script, checkpoints, train_file, tmp_path, seen, capsys):
    """From the second step on (in the first B is zero, and A has none); what is quantised is said, Falcon included."""
    checkpointing = ["--activation_checkpointing", "true"] * (kind in ("gpt2", "llama"))
    found = run(script, checkpoints[kind], train_file, tmp_path / "o", *FAST, *BASES[base], *checkpointing)
    assert len(seen.gradients) == 3
    for step in seen.gradients[1:]:
        assert len(step) == 2 * 2 * TARGETS[kind]
        assert all(largest > 0 for largest in step.values()), [name for name, largest in step.items() if not largest]
    out, layers = capsys.readouterr().out, 2 * TARGETS[kind]
    quantised = [m for m in seen.model.modules() if type(m).__module__ == "bitsandbytes.nn.modules"]
    assert {type(m).__name__ for m in quantised} == {"8bit": {"Linear8bitLt"}, "4bit": {"Linear4bit"}}.get(base, set())
    if "bit" in base:
        assert f"base       {base[0]} bit in {layers} of {layers + 1} linear layers, else fp32; frozen" in out
        assert len(quantised) == layers
    trained = {p.dtype for p in seen.model.parameters() if p.requires_grad}
    frozen = {p.dtype for n, p in seen.model.named_parameters() if not p.requires_grad and "base_layer.weight" not in n}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16 if base == "bf16" else torch.float32})
    # counted as if they were not packed: every base gives the same numbers
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoints[kind]).parameters())
    assert found["total_parameters"] - found["trainable_parameters"] == parameters


def test_4_bit_is_what_it_should_be(script, checkpoints, train_file, tmp_path, seen):
    """nf4, double quantisation: the loss is that of a plain model with the very weights that the 4 bits stand for."""
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
    assert abs(found["train_loss"] - expected_loss(source, ROWS)) > 1e-3
    assert found["train_loss"] == pytest.approx(expected_loss(tmp_path / "plain", ROWS), abs=1e-4)
    states = [m.weight.quant_state for m in seen.model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    assert states
    assert all(state.nested and state.quant_type == "nf4" for state in states)


def test_evaluation_leaves_4_bit_weights_alone(script, checkpoints, train_file, tmp_path, monkeypatch):
    """On CPUs with bf16 instructions bitsandbytes repacks them at the first evaluation; training then goes wrong."""
    from bitsandbytes.nn import modules

    repacked = []

    def repack(weight, quant_state):
        repacked.append(weight)
        return weight, quant_state  # undone: the real one needs the instructions

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    more = [*FAST, *BASES["4bit"]]
    run(script, checkpoints["llama"], train_file, tmp_path / "plain", *more)
    evaluated = [*more, "--validation_file", train_file, "--eval_strategy", "steps", "--eval_steps", 1]
    run(script, checkpoints["llama"], train_file, tmp_path / "evaluated", *evaluated)
    assert not repacked
    assert same_adapter(tmp_path / "plain", tmp_path / "evaluated")


def test_nothing_quantised_is_an_error(script, checkpoints, train_file, tmp_path, capsys, monkeypatch):
    original = script.BitsAndBytesConfig
    skip = {"llm_int8_skip_modules": ["transformer", "lm_head"]}
    monkeypatch.setattr(script, "BitsAndBytesConfig", lambda **options: original(**options, **skip))
    base = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file, "--output_dir", tmp_path / "o"]
    for bits in (4, 8):
        assert f"Leave --load_in_{bits}bit out" in refused(script, capsys, [*base, f"--load_in_{bits}bit", "true"])


def test_8_bit_needs_a_gpu_that_can(script, capsys, monkeypatch):
    """V100 has compute capability 7.0; T4, with 7.5, is the oldest that can."""
    options = {"lora_target_modules": "all-linear", "modules_to_save": None, "new_tokens": None, "lora_r": 1}
    options |= {"lora_alpha": 1, "lora_dropout": 0}
    gpu = SimpleNamespace(device=torch.device("cuda"), deepspeed=None)
    for capability, bits, message in (((7, 0), 8, "Use --load_in_4bit true"), ((7, 0), 4, ""), ((7, 5), 8, "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, value=capability: value)
        asked = SimpleNamespace(**options, load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        if message:
            with pytest.raises(SystemExit):
                script.check_lora(asked, gpu)
        else:
            script.check_lora(asked, gpu)
        assert message in capsys.readouterr().err


def test_zero3_and_missing_packages(script, checkpoints, train_file, tmp_path, capsys, monkeypatch):
    """Partitioned weights are neither quantised nor given rows; a package that is not there is named."""
    base = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file, "--output_dir", tmp_path / "o"]
    with monkeypatch.context() as patch:
        patch.setattr(script, "is_deepspeed_zero3_enabled", lambda: True)
        for more in (BASES["8bit"], BASES["4bit"], TOKENS):
            assert "ZeRO-3 cannot partition" in refused(script, capsys, [*base, *more])
    find = script.find_spec
    for package, more in (("peft", []), ("bitsandbytes", BASES["4bit"])):
        monkeypatch.setattr(script, "find_spec", lambda name, gone=package: None if name == gone else find(name))
        assert f"pip install {package}" in refused(script, capsys, [*base, *more])


TOKENS = ["--new_tokens", "東京,書店"]
ADAPTERS = {
    "gpt2 tokens": ("gpt2", TOKENS, {"transformer.wte"}),
    "gpt2 head": ("gpt2", ["--modules_to_save", "lm_head"], {"lm_head"}),
    "gpt2 embedding": ("gpt2", ["--modules_to_save", "wte,ln_f"], {"transformer.wte", "transformer.ln_f"}),
    "llama tokens": ("llama", TOKENS, {"model.embed_tokens", "lm_head"}),
    "llama tokens 4bit": ("llama", [*TOKENS, *BASES["4bit"]], {"model.embed_tokens", "lm_head"}),
    "llama ends": ("llama", ["--modules_to_save", "lm_head,embed_tokens", *BASES["bf16"]],
                   {"model.embed_tokens", "lm_head"}),
    "gpt_neox norm": ("gpt_neox", ["--modules_to_save", "final_layer_norm,lm_head", *BASES["8bit"]],
                      {"gpt_neox.final_layer_norm", "lm_head"}),
    "llama norm": ("llama", ["--modules_to_save", "norm", "--lora_target_modules", "q_proj,down_proj"], {"model.norm"}),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_frozen_is_frozen(case, script, checkpoints, train_file, tmp_path, seen):
    """After three steps with weight decay the base is bit by bit what it was; what is trained moved, and is saved."""
    kind, more, beside = ADAPTERS[case]
    out = tmp_path / "o"
    run(script, checkpoints[kind], train_file, out, *FAST, *more)
    base = AutoModelForCausalLM.from_pretrained(
        checkpoints[kind], dtype=torch.bfloat16 if "bf16" in more else torch.float32
    )
    old = dict(base.named_parameters(remove_duplicate=False))
    rows, compared = len(base.get_input_embeddings().weight), set()
    for name, parameter in seen.model.named_parameters(remove_duplicate=False):
        plain = name.removeprefix("base_model.model.")
        for part in ("base_layer.", "original_module.", "token_adapter."):
            plain = plain.replace(part, "")
        if plain in old and parameter.dtype.is_floating_point:
            assert torch.equal(parameter[:rows] if parameter.shape != old[plain].shape else parameter, old[plain]), name
            assert not parameter.requires_grad
            compared.add(plain)
    linear = {f"{n}.weight" for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert compared == set(old) - (linear if "bit" in str(more) else set())
    saved = adapter_tensors(out)
    lora = {name for name in saved if ".lora_" in name}
    assert {n.removeprefix("base_model.model.").rpartition(".")[0].removesuffix(".token_adapter")
            for n in set(saved) - lora} == beside  # fmt: skip
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    for name in set(saved) - lora:
        if "token_adapter" in name:
            assert saved[name].shape == (2, 32)
            assert not torch.equal(saved[name][0], saved[name][1])
        else:
            plain = name.removeprefix("base_model.model.")
            moved = (saved[name] != old[plain].float()).float().mean()
            assert moved > 0.5, name
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer("東京")["input_ids"][-1] >= 300) == ("--new_tokens" in more)


def test_new_tokens_start_apart_and_learn_at_both_ends(script, checkpoints, train_file, tmp_path):
    """Each row starts as the mean of its pieces' rows; also in a file with a head of its own that its config denies."""
    falcon = tmp_path / "falcon"
    shutil.copytree(checkpoints["falcon"], falcon)
    state = load_file(falcon / "model.safetensors")
    state["lm_head.weight"] = torch.randn(300, 32) * 0.15
    save_file(state, falcon / "model.safetensors", {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(falcon)
    pieces = tokenizer("書店", add_special_tokens=False)["input_ids"]
    embedding = "base_model.model.transformer.word_embeddings.token_adapter.trainable_tokens_delta"
    head = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    for name, rate in {"start": "0", "trained": "1e-2"}.items():
        run(script, str(falcon), train_file, tmp_path / name, *FAST, *TOKENS, "--learning_rate", rate)
    start, trained = adapter_tensors(tmp_path / "start"), adapter_tensors(tmp_path / "trained")
    for name, weight in {embedding: "transformer.word_embeddings.weight", head: "lm_head.weight"}.items():
        assert torch.allclose(start[name][1], state[weight][pieces].mean(0), atol=1e-7)
        assert ((trained[name] - start[name]).abs() > 1e-3).all(0).any()


def test_rows_that_are_there_are_used(script, tmp_path, train_file, capsys):
    """A model with more rows than its tokenizer has tokens (MPT, OpenCALM) is not made smaller."""
    directory = tmp_path / "m"
    make_checkpoint(directory, "llama")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(310, mean_resizing=False)
    model.save_pretrained(directory)
    run(script, str(directory), train_file, tmp_path / "o", *FAST, *TOKENS)
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [300, 301], "lm_head": [300, 301]}
    frozen = results(tmp_path / "o")["total_parameters"] - results(tmp_path / "o")["trainable_parameters"]
    assert frozen == sum(p.numel() for p in model.parameters())


RESUMED = {
    "llama": TOKENS,
    "gpt_neox": ["--modules_to_save", "lm_head", *BASES["bf16"]],
    "qwen3": [*BASES["4bit"], "--lora_dropout", 0.1],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_interrupted_equals_uninterrupted(kind, script, checkpoints, train_file, tmp_path, capsys):
    """The first steps train B, so it is what counts here; the seed gives the same A, whatever was drawn before."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints[kind], base)
    common = ["--model_name_or_path", base, "--train_file", train_file, "--learning_rate", "1e-2", "--max_steps", 5,
              "--per_device_train_batch_size", 2, "--save_steps", 2, *RESUMED[kind]]  # fmt: skip
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
    if kind == "llama":
        state = load_file(base / "model.safetensors")
        state["model.layers.1.mlp.up_proj.weight"] *= 1.01
        save_file(state, base / "model.safetensors", {"format": "pt"})
        (cut / "all_results.json").unlink()
        assert "its weights have changed" in refused(script, capsys, [*common, "--output_dir", cut])


def test_what_a_run_leaves(script, checkpoints, train_file, tmp_path, monkeypatch, capsys):
    """A plain PEFT adapter that finds its base from anywhere, and what generation needs; the same seed, the same."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoints["llama"], "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.6}')  # cannot be saved as it is
    for name, more in {"one": [], "two": [], "other": ["--seed", 1]}.items():
        run(script, "base", train_file, tmp_path / name, "--max_steps", 1, "--learning_rate", 0, *more)
    out = capsys.readouterr().out
    assert "14 layers (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)" in out
    assert f"merge      python merge_lora.py --adapter_name_or_path {tmp_path / 'one'} " in out
    assert same_adapter(tmp_path / "one", tmp_path / "two")
    assert not same_adapter(tmp_path / "one", tmp_path / "other")
    names = {"adapter_model.safetensors", "adapter_config.json", "base_model.json", "generation_config.json",
             "tokenizer.json", "chat_template.jinja", "trainer_state.json", "all_results.json", "run_args.yaml",
             "loss.png"}  # fmt: skip
    assert names <= {path.name for path in (tmp_path / "one").iterdir()}
    assert not (tmp_path / "one" / "model.safetensors").exists()
    for name, key in {"adapter_config.json": "base_model_name_or_path", "base_model.json": "base_model"}.items():
        assert json.loads((tmp_path / "one" / name).read_text())[key] == str(tmp_path / "base")
    assert json.loads((tmp_path / "one" / "generation_config.json").read_text())["eos_token_id"] in (0, [0])
    weights = [path.stat().st_mode & 0o777 for path in (tmp_path / "one").glob("*.safetensors")]
    assert weights == [(tmp_path / "one" / "tokenizer.json").stat().st_mode & 0o777]  # others of the group read it
    script.main([str(tmp_path / "one" / "run_args.yaml"), "--output_dir", "again"])
    assert same_adapter(tmp_path / "one", tmp_path / "again")


def test_the_best_adapter_is_kept(script, checkpoints, train_file, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "甲", "completion": "乙丙丁"}])
    script.main(["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file, "--validation_file", other,
                 "--output_dir", str(tmp_path / "early"), "--early_stopping_patience", "1", "--save_steps", "1",
                 "--max_steps", "40", "--learning_rate", "0.05", "--modules_to_save", "lm_head"])  # fmt: skip
    losses = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines() if line.startswith("eval ")]
    assert results(tmp_path / "early")["steps"] == len(losses) - 1 < 40  # the last is of the best, loaded again
    best = 1 + losses.index(min(losses))
    assert best < len(losses) - 1
    assert same_adapter(tmp_path / "early", tmp_path / "early" / f"checkpoint-{best}")


def test_two_processes(script, checkpoints, tmp_path):
    """7 rows on 2 ranks: every row counts once, and two ranks learn what one does; also on a quantised base."""
    train_file = write_jsonl(tmp_path / "train.jsonl", ROWS)
    cases = {"plain": ("llama", []), "packed": ("gpt2", ["--packing", "true", "--packing_length", 100]),
             "4bit": ("gpt_neox", [*BASES["4bit"], *TOKENS])}  # fmt: skip
    runs, common = [], ["--max_steps", 2, "--learning_rate", "1e-3", "--save_strategy", "no", "--logging_steps", 1]
    common += ["--train_sampling_strategy", "sequential", "--train_file", train_file]
    for name, (kind, more) in cases.items():
        words = ["--model_name_or_path", checkpoints[kind], *common, *more]
        one = [*words, "--output_dir", tmp_path / f"{name}1", "--per_device_train_batch_size", 8]
        script.main([str(word) for word in one])
        runs.append([*words, "--output_dir", tmp_path / name, "--per_device_train_batch_size", 4])
    assert "device     2 x CPU" in launch(runs, tmp_path, script=SCRIPT).stdout
    for name in cases:
        one, two = adapter_tensors(tmp_path / f"{name}1"), adapter_tensors(tmp_path / name)
        assert all(torch.allclose(one[key], two[key], atol=2e-5) for key in one), name
        assert results(tmp_path / name)["train_loss"] == pytest.approx(results(tmp_path / f"{name}1")["train_loss"])


BAD = {
    "target": (["--lora_target_modules", "query_key_value"], "This model has down_proj, gate_proj, k_proj, o_proj"),
    "one of two": (["--lora_target_modules", "q_proj,qproj"], "--lora_target_modules qproj: no module of that name"),
    "part of a name": (["--lora_target_modules", "proj"], "--lora_target_modules proj: no module"),
    "head": (["--lora_target_modules", "lm_head"], "--lora_target_modules lm_head: no module"),
    "embedding": (["--lora_target_modules", "embed_tokens"], "--lora_target_modules embed_tokens: no module"),
    "no target": (["--lora_target_modules", ","], "--lora_target_modules names nothing"),
    "save": (["--modules_to_save", "embed_out"], "lm_head, mlp, model, norm"),
    "save part of a name": (["--modules_to_save", "head"], "--modules_to_save head: no module"),
    "save nothing": (["--modules_to_save", ""], "--modules_to_save names nothing"),
    "save LoRA": (["--modules_to_save", "q_proj"], "it has LoRA on it"),
    "save what holds LoRA": (["--modules_to_save", "mlp"], "holds such a layer"),
    "save quantised": (["--modules_to_save", "v_proj", "--lora_target_modules", "q_proj", "--load_in_4bit", "true"],
                       "is quantised"),
    "save twice": (["--modules_to_save", "self_attn,v_proj", "--lora_target_modules", "up_proj"], "holds such a layer"),
    "known token": (["--new_tokens", "<s>"], "<s> is in the vocabulary already"),
    "no token": (["--new_tokens", " , "], "--new_tokens names nothing"),
    "unseen token": (["--new_tokens", "東京,<nowhere>"], "<nowhere> does not occur in the training data"),
    "rows and whole": (["--new_tokens", "東京", "--modules_to_save", "lm_head"], "Give one of the two"),
    "rank": (["--lora_r", "0"], "--lora_r must be 1 or more"),
    "alpha": (["--lora_alpha", "0"], "--lora_alpha above 0"),
    "dropout": (["--lora_dropout", "1"], "below 1"),
    "both": (["--load_in_8bit", "true", "--load_in_4bit", "true"], "give one of --load_in_8bit and --load_in_4bit"),
    "misspelt": (["--lora_rank", "8"], "unrecognized arguments: --lora_rank"),
    "model": (["--model_name_or_path", "no/such/model"], "is no model here, nor could it be fetched"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, script, checkpoints, train_file, tmp_path, capsys):
    more, message = BAD[case]
    base = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file, "--output_dir", tmp_path / "o"]
    assert message in refused(script, capsys, [*base, *more])
    assert not list((tmp_path / "o").glob("*adapter*"))


def test_alone_in_an_empty_directory(checkpoints, train_file, tmp_path):
    """Copied away both scripts run, without a word on stderr; nothing heavy is imported before it is needed."""
    for name in ("finetune_lora.py", "merge_lora.py"):
        shutil.copy(SCRIPT.with_name(name), tmp_path)
    code = f"""
import sys
import merge_lora
try:
    merge_lora.main(["--help"])
except SystemExit:
    print("light", not {{"torch", "transformers", "peft"}} & set(sys.modules))
import datasets, yaml
from transformers import TrainingArguments
before = set(sys.modules)
import finetune_lora
try:
    finetune_lora.main(["--help"])
except SystemExit:
    print("light", not {{"deepspeed", "peft", "bitsandbytes", "matplotlib"}} & (set(sys.modules) - before))
arguments = ["--model_name_or_path", {checkpoints["gpt2"]!r}, "--train_file", {train_file!r}]
finetune_lora.main([*arguments, "--max_steps", "1"])
merge_lora.main(["--adapter_name_or_path", "output", "--output_dir", "output/merged"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("light True") == 2
    assert (tmp_path / "output" / "merged" / "model.safetensors").is_file()
