"""merge_lora.py: the merged checkpoint against the same sum done by hand, and everything that must not be merged."""

import gc
import json
import shutil

import pytest
import torch
from conftest import CONFIGS, ROOT, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_finetune_full import load_script
from test_finetune_lora import by_hand, fill_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SCRIPT = ROOT / "finetune_lora" / "merge_lora.py"
ENDS = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in", "llama": "model.embed_tokens",
        "falcon": "transformer.word_embeddings"}  # fmt: skip
IDS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def merge():
    gc.freeze()
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def lora():
    return load_script(SCRIPT.with_name("finetune_lora.py"))


def make_adapter(base, directory, **options):
    """An adapter as PEFT alone writes it, with B of std 0.1, and trained copies where it has some."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4} | options
    model = get_peft_model(model, LoraConfig(**options))
    fill_adapter(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_" not in name or "lora_embedding_A" in name):
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(directory)
    return directory


def call(script, **options):
    script.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


def refused(script, capsys, **options):
    """The one line on stderr of a merge that must end with exit code 2 and leave nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(script, **options)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def load(directory, **options):
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not info["missing_keys"]
    return model


def is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def largest(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_is_base_plus_adapter(kind, merge, checkpoints, tmp_path, capsys):
    adapter, out = make_adapter(checkpoints[kind], tmp_path / "a"), tmp_path / "merged"
    call(merge, adapter_name_or_path=adapter, output_dir=out, verify="true")
    base, merged = load(checkpoints[kind]), load(out)
    wanted = logits(PeftModel.from_pretrained(load(checkpoints[kind]), adapter))
    assert largest(wanted, logits(base)) > 1e-2
    assert largest(logits(merged), wanted) < 1e-5
    assert largest(logits(merged), logits(by_hand(checkpoints[kind], adapter))) < 1e-5
    assert is_tied(merged) == is_tied(base) == merged.config.tie_word_embeddings
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in base.parameters())
    assert load(out, dtype="auto").dtype == torch.float32
    assert (
        AutoTokenizer.from_pretrained(out)("東京")["input_ids"]
        == AutoTokenizer.from_pretrained(checkpoints[kind])("東京")["input_ids"]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verify")]
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == [
        "base + adapter against the base", "merged against base + adapter", "cast to fp32 against merged",
        "read back against cast"]  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))


WHOLE = {
    "tied head": ("gpt2", {"modules_to_save": ["lm_head"]}, False),
    "tied embedding": ("gpt2", {"modules_to_save": ["wte"]}, False),
    "tied, another module": ("gpt2", {"modules_to_save": ["ln_f"]}, True),
    "tied head with LoRA": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}, False),
    "tied embedding with LoRA": ("gpt2", {"target_modules": ["c_attn", "wte"]}, False),
    "untied head": ("gpt_neox", {"modules_to_save": ["lm_head"]}, False),
    "untied ends": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "untied head with LoRA": ("llama", {"target_modules": ["q_proj", "lm_head"]}, False),
}


@pytest.mark.parametrize("case", WHOLE)
def test_embeddings_and_head(case, merge, checkpoints, tmp_path):
    """What the adapter replaces is replaced at its own end alone; the other end is, bit by bit, the base's."""
    kind, options, tied = WHOLE[case]
    adapter, out = make_adapter(checkpoints[kind], tmp_path / "a", **options), tmp_path / "merged"
    call(merge, adapter_name_or_path=adapter, output_dir=out)
    base, merged = load(checkpoints[kind]), load(out)
    assert largest(logits(merged), logits(PeftModel.from_pretrained(load(checkpoints[kind]), adapter))) < 1e-5
    assert is_tied(merged) == merged.config.tie_word_embeddings == tied
    names = options.get("modules_to_save", options.get("target_modules"))
    ends = {"head": (base.get_output_embeddings(), merged.get_output_embeddings()),
            "embedding": (base.get_input_embeddings(), merged.get_input_embeddings())}  # fmt: skip
    moved = {"head": "lm_head" in names, "embedding": bool({"wte", "embed_tokens"} & {*names})}
    for end, (old, new) in ends.items():
        assert torch.equal(old.weight, new.weight) != moved[end], end


@pytest.mark.parametrize("kind", ENDS)
def test_new_tokens(kind, merge, lora, checkpoints, train_file, tmp_path, monkeypatch):
    """The merged model has the new rows as trained, the others bit by bit, and answers as the trained one did.

    Falcon's file has a head of its own here in spite of its configuration, as the published one may.
    """
    source = tmp_path / "base"
    shutil.copytree(checkpoints[kind], source)
    if kind == "falcon":
        state = load_file(source / "model.safetensors")
        state["lm_head.weight"] = torch.randn(300, 32) * 0.15
        save_file(state, source / "model.safetensors", {"format": "pt"})
    trained = {}
    original = lora.save_results
    monkeypatch.setattr(lora, "save_results", lambda trainer: (trained.update(model=trainer.model), original(trainer)))
    out, adapter = tmp_path / "merged", tmp_path / "adapter"
    call(lora, model_name_or_path=source, train_file=train_file, output_dir=adapter, max_steps=3,
         learning_rate="1e-2", new_tokens="東京,書店")  # fmt: skip
    call(merge, adapter_name_or_path=adapter / "checkpoint-3", output_dir=out)
    base, merged = load(source), load(out)
    ids = torch.cat([IDS, torch.tensor([[300, 301]] * 3)], 1)
    assert largest(logits(merged, ids), logits(trained["model"], ids)) < 1e-5
    saved = load_file(adapter / "adapter_model.safetensors")
    for name in [ENDS[kind]] + ["lm_head"] * (not is_tied(base)):
        old, new = base.get_submodule(name).weight, merged.get_submodule(name).weight
        assert torch.equal(new[:300], old)
        assert torch.equal(new[300:], saved[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"])
    assert is_tied(merged) == merged.config.tie_word_embeddings == is_tied(base) == (kind == "gpt2")
    assert AutoTokenizer.from_pretrained(out)("東京")["input_ids"][-1] == 300
    # without the rows in the adapter there is nothing to put where the new ids point
    state = {name: tensor for name, tensor in saved.items() if "token_adapter" not in name}
    save_file(state, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"trainable_token_indices": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / "again")


def test_dtype(merge, checkpoints, tmp_path):
    """Merged in fp32, cast once: bit by bit the hand-made sum, cast. auto stores what the base is stored in."""
    half = tmp_path / "half"
    load(checkpoints["llama"]).to(torch.float16).save_pretrained(half)
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(half)
    adapter = make_adapter(half, tmp_path / "a")
    exact = by_hand(half, adapter).state_dict()
    for name, dtype in {"auto": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.items():
        call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / name, dtype=name)
        state = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {dtype}
        assert load(tmp_path / name, dtype="auto").dtype == dtype
        for key, tensor in state.items():  # a last bit of fp32 may differ, and so turn a rounding
            assert (tensor != exact[key].to(dtype)).float().mean() < (1e-3 if name != "fp32" else 1)
            assert torch.allclose(tensor.float(), exact[key], rtol=1e-2 if name != "fp32" else 1e-5, atol=1e-6)


def test_an_adapter_of_a_quantised_base(merge, lora, checkpoints, train_file, tmp_path, capsys):
    """It is merged into the full precision, and that is said; the adapter of one bf16 run says nothing of it."""
    bases = {"4 bit": {"load_in_4bit": "true"}, "8 bit": {"load_in_8bit": "true"}, "bf16": {"precision": "bf16"}}
    for name, options in bases.items():
        adapter, out = tmp_path / name, tmp_path / f"{name} merged"
        call(lora, model_name_or_path=checkpoints["falcon"], train_file=train_file, output_dir=adapter, max_steps=2,
             learning_rate="1e-2", **options)  # fmt: skip
        capsys.readouterr()
        call(merge, adapter_name_or_path=adapter, output_dir=out)
        said = f"trained on the base in {name}, merged into it in full precision" in capsys.readouterr().out
        assert said == ("bit" in name)
        assert largest(logits(load(out)), logits(by_hand(checkpoints["falcon"], adapter))) < 1e-5
        assert GenerationConfig.from_pretrained(out).eos_token_id in (0, [0])


@pytest.fixture(scope="module")
def trained(lora, checkpoints, train_file, tmp_path_factory):
    """(base, adapter trained on it), the adapter knowing its base."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(checkpoints["llama"], root / "base")
    call(lora, model_name_or_path=root / "base", train_file=train_file, output_dir=root / "adapter", max_steps=2)
    return root / "base", root / "adapter"


def test_another_base_is_refused(merge, trained, checkpoints, tmp_path, capsys):
    """Told by its weights, also where the shapes agree; the same weights elsewhere, in another form, are the same."""
    base, adapter = trained
    options = {"adapter_name_or_path": adapter, "output_dir": tmp_path / "o"}
    state, other = load_file(base / "model.safetensors"), tmp_path / "other"
    shutil.copytree(base, other)
    for name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"):
        save_file(state | {name: state[name] * 1.001}, other / "model.safetensors", {"format": "pt"})
        message = refused(merge, capsys, **options, base_model_name_or_path=other)
        assert "is not what the adapter was trained on" in message
    gone = tmp_path / "gone"
    shutil.copytree(adapter, gone)
    record = json.loads((gone / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/no/such/base"}
    (gone / "adapter_config.json").write_text(json.dumps(record))
    options["adapter_name_or_path"] = gone
    message = refused(merge, capsys, **options)
    assert "base /no/such/base is not here" in message
    assert "--base_model_name_or_path" in message
    assert not list((tmp_path / "o").iterdir())
    (other / "model.safetensors").unlink()
    names, index = sorted(state), {}
    for part in (0, 1):
        file = f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: state[name] for name in names[part::2]}, other / file)
        index |= dict.fromkeys(names[part::2], file)
    (other / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    call(merge, **options, base_model_name_or_path=other)
    assert (tmp_path / "o" / "model.safetensors").is_file()


def test_an_adapter_of_unknown_origin(merge, checkpoints, tmp_path, capsys):
    """Without a record of the base only what does not fit is refused: shapes, layers that are missing or too many."""
    adapter = make_adapter(checkpoints["llama"], tmp_path / "a", target_modules=["k_proj", "down_proj"])
    call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / "o")
    assert "only names and shapes are compared" in capsys.readouterr().out
    options = {"adapter_name_or_path": adapter, "output_dir": tmp_path / "o2"}
    assert "does not fit on" in refused(merge, capsys, **options, base_model_name_or_path=checkpoints["qwen3"])
    assert "does not fit on" in refused(merge, capsys, **options, base_model_name_or_path=checkpoints["gpt2"])
    for layers in (1, 3):
        config = CONFIGS["llama"](300)
        config.num_hidden_layers = layers
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / f"{layers}")
        make_tokenizer().save_pretrained(tmp_path / f"{layers}")
        assert "does not fit on" in refused(merge, capsys, **options, base_model_name_or_path=tmp_path / f"{layers}")


def test_what_comes_along(merge, checkpoints, tmp_path, capsys):
    """The sentencepiece file, the chat template, the generation settings."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints["llama"], base)
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    generation = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 2]}
    (base / "generation_config.json").write_text(json.dumps(generation))
    adapter = make_adapter(base, tmp_path / "a")
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / "o")
    assert (tmp_path / "o" / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert AutoTokenizer.from_pretrained(tmp_path / "o").chat_template == "{{ messages[0].content }}"
    assert json.loads((tmp_path / "o" / "generation_config.json").read_text()).items() >= generation.items()
    modes = {(tmp_path / "o" / name).stat().st_mode & 0o777 for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1  # who may read the one may read the other
    # an adapter that was never trained gives the base, and that is said
    state = load_file(adapter / "adapter_model.safetensors")
    zero = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in state.items()}
    save_file(zero, adapter / "adapter_model.safetensors")
    capsys.readouterr()
    call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / "o2")
    assert "the adapter changes nothing" in capsys.readouterr().out


def test_a_wrong_result_is_not_left(merge, trained, tmp_path, capsys, monkeypatch):
    """One entry wrong in the merged model, or in what was written: refused, and nothing is there."""
    adapter = trained[1]
    options, original = {"adapter_name_or_path": adapter, "output_dir": tmp_path / "o"}, merge.merge

    def wrong(args, model):
        model = original(args, model)
        model.lm_head.weight.data[5] *= 1.1
        return model

    monkeypatch.setattr(merge, "merge", wrong)
    assert "the merged model does not answer as it should" in refused(merge, capsys, **options)
    monkeypatch.setattr(merge, "merge", original)
    save = merge.save

    def corrupt(*arguments):
        written = save(*arguments)
        state = load_file(written / "model.safetensors")
        state["lm_head.weight"][5] *= 1.1
        save_file(state, written / "model.safetensors", {"format": "pt"})
        return written

    monkeypatch.setattr(merge, "save", corrupt)
    assert "what was written does not answer as it should" in refused(merge, capsys, **options)
    monkeypatch.setattr(merge, "save", save)
    state = load_file(adapter / "adapter_model.safetensors")
    large = tmp_path / "large"
    shutil.copytree(adapter, large)
    name = next(name for name in state if "up_proj.lora_B" in name)
    save_file(state | {name: state[name] + 1e6}, large / "adapter_model.safetensors")
    options["adapter_name_or_path"] = large
    assert "Try --dtype bf16" in refused(merge, capsys, **options, dtype="fp16")
    assert not list((tmp_path / "o").iterdir())
    assert not list(tmp_path.glob("*.partial"))
    save_file(state | {name: state[name] * torch.nan}, large / "adapter_model.safetensors")
    with pytest.raises(SystemExit):
        call(merge, **options)


def test_bad_arguments(merge, trained, checkpoints, tmp_path, capsys):
    base, adapter = trained
    good = {"adapter_name_or_path": adapter, "output_dir": tmp_path / "o"}
    full, broken, prompt, half = (tmp_path / name for name in ("full", "broken", "prompt", "half"))
    full.mkdir()
    (full / "kept").write_text("")
    for directory, text in {broken: "{", prompt: '{"peft_type": "PROMPT_TUNING"}'}.items():
        directory.mkdir()
        (directory / "adapter_config.json").write_text(text)
    shutil.copytree(adapter, half)
    (half / "adapter_model.safetensors").unlink()
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (quantised / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | gptq))
    lacking = tmp_path / "lacking"
    shutil.copytree(base, lacking)
    state = {n: t for n, t in load_file(base / "model.safetensors").items() if n != "model.norm.weight"}
    save_file(state, lacking / "model.safetensors", {"format": "pt"})
    unknown = make_adapter(base, tmp_path / "unknown")
    cases = [
        ({"output_dir": full}, "holds something already"),
        ({"output_dir": full / "kept"}, "holds something already"),
        ({"output_dir": "/dev/null/x"}, "cannot be written"),
        ({"output_dir": adapter}, "holds something already"),
        ({"adapter_name_or_path": tmp_path / "nowhere"}, "is no adapter here, nor could it be fetched"),
        ({"adapter_name_or_path": "no/such-adapter"}, "is no adapter here, nor could it be fetched"),
        ({"adapter_name_or_path": base}, "is no adapter here"),
        ({"adapter_name_or_path": broken}, "is no adapter here"),
        ({"adapter_name_or_path": prompt}, "is of the kind PROMPT_TUNING"),
        ({"adapter_name_or_path": half}, "does not fit on"),
        ({"base_model_name_or_path": tmp_path / "nowhere"}, "is not here, nor could it be fetched"),
        ({"base_model_name_or_path": quantised}, "is stored quantised"),
        ({"base_model_name_or_path": lacking, "adapter_name_or_path": unknown}, "lacks weights"),
        ({"dtype": "fp8"}, "argument --dtype"),
        ({"verify": "maybe"}, "argument --verify"),
        ({"verfy": "true"}, "unrecognized arguments: --verfy"),
    ]
    for changed, message in cases:
        assert message in refused(merge, capsys, **good | changed), changed
    assert not list((tmp_path / "o").iterdir())
    assert (full / "kept").is_file()
