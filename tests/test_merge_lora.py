"""merge_lora.py: the merged checkpoint against the same sum done by hand, and everything that must not be merged."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, ROOT, load_script, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from test_finetune_lora import by_hand, fill_adapter
from test_runs import NAMES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SCRIPT = ROOT / "finetune_lora" / "merge_lora.py"
ENDS = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in", "llama": "model.embed_tokens",
        "falcon": "transformer.word_embeddings"}  # fmt: skip
WRITTEN = {"config.json", "generation_config.json", "model.safetensors"}
IDS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def merge():
    gc.freeze()
    return load_script(SCRIPT)


def make_adapter(base, directory, tokens=0, **options):
    """An adapter as PEFT alone writes it, with B of std 0.1, and trained copies where it has some."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.tie_word_embeddings = is_tied(model)  # PEFT goes by it
    if tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    torch.manual_seed(3)
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4} | options
    model = get_peft_model(model, LoraConfig(**options))
    fill_adapter(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_" not in name or "lora_embedding_A" in name):
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(directory, save_embedding_layers=False)
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
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
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
    out = capsys.readouterr().out.splitlines()
    assert (
        out[0] == f"base       {checkpoints[kind]}; the adapter was trained on {checkpoints[kind]}"
    )
    lines = [line for line in out if line.startswith("verify")]
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == [
        "base + adapter against the base", "merged against base + adapter", "cast to fp32 against merged",
        "read back against cast"]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "merged"]
    assert not list((tmp_path / "merged").glob("partial-*"))


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
    assert (
        largest(logits(merged), logits(PeftModel.from_pretrained(load(checkpoints[kind]), adapter)))
        < 1e-5
    )
    assert is_tied(merged) == merged.config.tie_word_embeddings == tied
    assert AutoConfig.from_pretrained(out).tie_word_embeddings == tied  # as other tools read it
    names = options.get("modules_to_save", options.get("target_modules"))
    ends = {"head": (base.get_output_embeddings(), merged.get_output_embeddings()),
            "embedding": (base.get_input_embeddings(), merged.get_input_embeddings())}  # fmt: skip
    moved = {"head": "lm_head" in names, "embedding": bool({"wte", "embed_tokens"} & {*names})}
    for end, (old, new) in ends.items():
        assert torch.equal(old.weight, new.weight) != moved[end], end


@pytest.mark.parametrize("rows", [[300, 301], [70, 299]], ids=["new", "known"])
@pytest.mark.parametrize("kind", ENDS)
def test_rows_of_tokens(kind, rows, merge, checkpoints, tmp_path):
    """The merged model has the adapter's rows, the others bit by bit, and answers as base + adapter do.

    Falcon's file has a head of its own here in spite of its configuration, as the published one may.
    """
    source, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(checkpoints[kind], source)
    if kind == "falcon":
        state = load_file(source / "model.safetensors")
        state["lm_head.weight"] = torch.randn(300, 32) * 0.15
        save_file(state, source / "model.safetensors", {"format": "pt"})
    base, tokenizer = load(source), AutoTokenizer.from_pretrained(source)
    names, is_new = [ENDS[kind]] + ["lm_head"] * (not is_tied(base)), rows == [300, 301]
    tokenizer.add_tokens(["東京", "書店"] * is_new)
    indices = {name.rpartition(".")[2]: rows for name in names}
    make_adapter(source, adapter, 302 * is_new, trainable_token_indices=indices)
    tokenizer.save_pretrained(adapter)
    trained = load(source)
    trained.config.tie_word_embeddings = is_tied(trained)
    if is_new:
        trained.resize_token_embeddings(302, mean_resizing=False)
    trained = PeftModel.from_pretrained(trained, adapter)
    call(merge, adapter_name_or_path=adapter, output_dir=out)
    merged, ids = load(out), torch.cat([IDS, torch.tensor([rows] * 3)], 1)
    assert largest(logits(merged, ids), logits(trained, ids)) < 1e-5
    saved = load_file(adapter / "adapter_model.safetensors")
    others = [row for row in range(300) if row not in rows]
    for name in names:
        old, new = base.get_submodule(name).weight, merged.get_submodule(name).weight
        assert torch.equal(new[others], old[others])
        delta = saved[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
        assert torch.equal(new[rows], delta) and len(new) == (302 if is_new else 300)
    assert is_tied(merged) == merged.config.tie_word_embeddings == is_tied(base) == (kind == "gpt2")
    assert AutoTokenizer.from_pretrained(out)("東京")["input_ids"] == tokenizer("東京")["input_ids"]
    if not is_new:
        return
    # Without the rows in the adapter there is nothing to put where the new ids point.
    state = {name: tensor for name, tensor in saved.items() if "token_adapter" not in name}
    save_file(state, adapter / "adapter_model.safetensors")
    set_record(adapter, trainable_token_indices=None)
    with pytest.raises(SystemExit):
        call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())


def set_record(adapter, **changed):
    record = adapter / "adapter_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changed))


def test_dtype(merge, checkpoints, tmp_path):
    """Merged in fp32, cast once: bit by bit the hand-made sum, cast. auto stores what the base is stored in."""
    half = tmp_path / "half"
    load(checkpoints["llama"]).to(torch.float16).save_pretrained(half)
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(half)
    adapter = make_adapter(half, tmp_path / "a")
    exact = by_hand(half, adapter).state_dict()
    for name, dtype in {
        "auto": torch.float16,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
    }.items():
        call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / name, dtype=name)
        state = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {dtype}
        assert load(tmp_path / name, dtype="auto").dtype == dtype
        for key, tensor in state.items():  # a last bit of fp32 may differ, and so turn a rounding
            assert (tensor != exact[key].to(dtype)).float().mean() < (1e-3 if name != "fp32" else 1)
            assert torch.allclose(
                tensor.float(), exact[key], rtol=1e-2 if name != "fp32" else 1e-5, atol=1e-6
            )


def test_what_rounding_takes_away_is_said(merge, checkpoints, tmp_path, capsys):
    """A bf16 step of a weight is larger than what a low learning rate adds to it."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints["llama"], base)
    load(base).bfloat16().save_pretrained(base)
    for size, is_lost in ((1e-5, True), (1.0, False)):
        adapter = make_adapter(base, tmp_path / f"a{size}")
        weights = load_file(adapter / "adapter_model.safetensors")
        weights = {n: w * size if "lora_B" in n else w for n, w in weights.items()}
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        for dtype, is_said in (("auto", is_lost), ("fp32", False)):
            place = tmp_path / f"{size}{dtype}"
            call(merge, adapter_name_or_path=adapter, output_dir=place, dtype=dtype)
            said = capsys.readouterr().out
            assert ("is rounded away: take --dtype fp32" in said) == is_said, (size, dtype, said)
            assert ("answers as base + adapter" in said) != is_said


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_that_loading_keeps_in_fp32(dtype, merge, tmp_path):
    """Ernie's routers: an adapter that adds nothing merges into the base's file, bit for bit."""
    tokenizer, kind = make_tokenizer(), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"intermediate_size": 48, "moe_num_experts": 4, "moe_intermediate_size": 16}
    sizes |= {"moe_k": 2, "moe_layer_start_index": 0, "moe_layer_interval": 1}
    config = AutoConfig.for_model("ernie4_5_moe", vocab_size=len(tokenizer), **sizes)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.15)
        if "gate.weight" not in name and "moe_statics" not in name:
            weight.data = weight.data.to(kind)
    model.config.dtype = kind
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    paths = {"adapter_name_or_path": tmp_path / "adapter", "output_dir": tmp_path / "merged"}
    call(merge, **paths, base_model_name_or_path=tmp_path / "base")
    base, merged = (load_file(tmp_path / at / "model.safetensors") for at in ("base", "merged"))
    assert base.keys() == merged.keys()
    assert {weight.dtype for weight in base.values()} == {kind, torch.float32}
    for name, weight in base.items():
        assert weight.dtype == merged[name].dtype, name
        assert torch.equal(weight, merged[name]), name


def test_an_adapter_of_a_quantised_base(merge, trained, tmp_path, capsys):
    """It is merged into the full precision, and that is said; one of another run says nothing of it."""
    for said, place in {"load_in_4bit": ".", "load_in_8bit": "checkpoint-3", "bf16": "."}.items():
        adapter, out = tmp_path / said / place, tmp_path / f"{said} merged"
        shutil.copytree(trained[1], adapter)
        record = f"output_dir: o\n{said}: true\nrun:\n  id: 1\n"
        (tmp_path / said / "run_args.yaml").write_text(record)
        call(merge, adapter_name_or_path=adapter, output_dir=out)
        is_said = f"trained on the base in {said[8:9]} bit" in capsys.readouterr().out
        assert is_said == ("bit" in said)
        assert largest(logits(load(out)), logits(by_hand(trained[0], adapter))) < 1e-5


PUBLISHED = [("fp32", "bf16", True), ("fp32", "fp16", True), ("fp16", "bf16", True),
             ("bf16", "bf16", False)]  # fmt: skip


@pytest.mark.parametrize(("published", "precision", "is_rounded"), PUBLISHED)
def test_an_adapter_of_a_rounded_base(
    published, precision, is_rounded, merge, trained, tmp_path, capsys
):
    """Published in more bits than were computed in: that is said; as many, and nothing is said."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[published]
    load(trained[0], dtype=dtype).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(trained[0]).save_pretrained(tmp_path / "base")
    shutil.copytree(trained[1], tmp_path / "adapter")
    record = f"output_dir: o\nrun:\n  id: 1\n  precision: {precision}\n"
    (tmp_path / "adapter" / "run_args.yaml").write_text(record)
    places = {"adapter_name_or_path": "adapter", "base_model_name_or_path": "base"}
    places = {name: tmp_path / place for name, place in {**places, "output_dir": "out"}.items()}
    call(merge, **places)
    text = f"trained on the base in {precision}, whose rounding is gone now"
    assert (text in capsys.readouterr().out) == is_rounded


@pytest.fixture(scope="module")
def trained(checkpoints, tmp_path_factory):
    """(base, adapter on it with a tokenizer and generation settings)."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(checkpoints["llama"], root / "base")
    make_adapter(root / "base", root / "adapter")
    AutoTokenizer.from_pretrained(root / "base").save_pretrained(root / "adapter")
    GenerationConfig(eos_token_id=[0, 1]).save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


def test_a_base_that_moved(merge, trained, tmp_path, capsys, monkeypatch):
    """Named by hand, in another form; a relative record is looked for from here and from the adapter."""
    base, adapter = trained
    other, gone = tmp_path / "other", tmp_path / "gone"
    shutil.copytree(base, other)
    shutil.copytree(adapter, gone)
    set_record(gone, base_model_name_or_path="/no/such/base")
    options = {"adapter_name_or_path": gone, "output_dir": tmp_path / "o"}
    message = refused(merge, capsys, **options)
    assert "base /no/such/base is not here" in message and "--base_model_name_or_path" in message
    assert not list((tmp_path / "o").iterdir())
    state = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    names, index = sorted(state), {}
    for part in (0, 1):
        file = f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: state[name] for name in names[part::2]}, other / file)
        index |= dict.fromkeys(names[part::2], file)
    (other / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    call(merge, **options, base_model_name_or_path=other)
    assert (
        f"base       {other}; the adapter was trained on /no/such/base" in capsys.readouterr().out
    )
    assert largest(logits(load(tmp_path / "o")), logits(by_hand(base, adapter))) < 1e-5
    for number, (record, start) in enumerate(
        [("../other", "gone"), ("other", "gone"), ("other", ".")]
    ):
        set_record(gone, base_model_name_or_path=record)
        monkeypatch.chdir(tmp_path / start)
        name = "." if start == "gone" else gone
        call(merge, adapter_name_or_path=name, output_dir=tmp_path / f"{number}")


def test_another_base_is_refused(merge, trained, checkpoints, tmp_path, capsys):
    """Other shapes, another vocabulary, layers that are missing or too many. Other weights are not noticed."""
    base, with_tokenizer = trained
    adapter = make_adapter(base, tmp_path / "a", target_modules=["k_proj", "down_proj"])
    options = {"adapter_name_or_path": adapter, "output_dir": tmp_path / "o2"}
    message = refused(merge, capsys, **options, base_model_name_or_path=checkpoints["qwen3"])
    assert "size mismatch" in message
    message = refused(merge, capsys, **options, base_model_name_or_path=checkpoints["gpt2"])
    assert "not found in the base model" in message
    for layers, wanted in ((1, "not found in the base model"), (3, "missing adapter keys")):
        config = CONFIGS["llama"](300)
        config.num_hidden_layers = layers
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / f"{layers}")
        make_tokenizer().save_pretrained(tmp_path / f"{layers}")
        other = {"base_model_name_or_path": tmp_path / f"{layers}"}
        message = refused(merge, capsys, **options, **other)
        assert wanted in message or "which lacks" in message
    options["adapter_name_or_path"] = with_tokenizer
    shutil.copytree(base, tmp_path / "words")
    tokenizer = (tmp_path / "words" / "tokenizer.json").read_text()
    (tmp_path / "words" / "tokenizer.json").write_text(tokenizer.replace("<|pad|>", "<|new|>"))
    message = refused(merge, capsys, **options, base_model_name_or_path=tmp_path / "words")
    assert "another vocabulary" in message
    assert not list((tmp_path / "o2").iterdir())


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
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "o").chat_template == "{{ messages[0].content }}"
    )
    assert (
        json.loads((tmp_path / "o" / "generation_config.json").read_text()).items()
        >= generation.items()
    )
    modes = {
        (tmp_path / "o" / name).stat().st_mode & 0o777
        for name in ("model.safetensors", "config.json")
    }
    assert len(modes) == 1  # who may read the one may read the other
    # an adapter without a tokenizer: the base's files as they stand
    (tmp_path / "bare").mkdir()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(adapter / file, tmp_path / "bare")
    (base / "preprocessor_config.json").write_text("{}")
    (base / "notes.txt").write_text("not the model's")
    (tmp_path / "bare" / "chat_template.jinja").write_text("alone it is no tokenizer")
    (tmp_path / "bare" / "hf_token").write_text("secret")
    call(merge, adapter_name_or_path=tmp_path / "bare", output_dir=tmp_path / "o3")
    came = {file.name for file in (tmp_path / "o3").iterdir()}
    wanted = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert came - {"README.md"} == wanted | {"preprocessor_config.json"} | WRITTEN
    for name in wanted | {"preprocessor_config.json"}:
        assert (tmp_path / "o3" / name).read_bytes() == (base / name).read_bytes(), name
    # named templates of an adapter's tokenizer; and a base with more tokens than rows
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(adapter)
    call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / "o4")
    assert AutoTokenizer.from_pretrained(tmp_path / "o4").chat_template == tokenizer.chat_template
    more = make_tokenizer()
    more.add_tokens(["<a>", "<b>"])
    shutil.copytree(base, tmp_path / "more")
    more.save_pretrained(tmp_path / "more")
    options = {"adapter_name_or_path": tmp_path / "bare", "output_dir": tmp_path / "o5"}
    line = refused(merge, capsys, **options, base_model_name_or_path=tmp_path / "more")
    assert "more tokens than rows" in line and "convert_tokenizer.py" in line
    # an adapter that was never trained gives the base, and that is said
    state = load_file(adapter / "adapter_model.safetensors")
    zero = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in state.items()}
    save_file(zero, adapter / "adapter_model.safetensors")
    capsys.readouterr()
    call(merge, adapter_name_or_path=adapter, output_dir=tmp_path / "o2")
    assert "the adapter changes nothing" in capsys.readouterr().out


def test_a_wrong_result_is_not_left(merge, trained, tmp_path, capsys, monkeypatch):
    """One entry wrong in the merged model, or in what was written: refused, and nothing is there."""
    adapter, original = trained[1], LoraModel.merge_and_unload
    options = {"adapter_name_or_path": adapter, "output_dir": tmp_path / "o"}

    def wrong(self, *args, **kwargs):
        model = original(self, *args, **kwargs)
        model.lm_head.weight.data[5] *= 1.1
        return model

    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "merge_and_unload", wrong)
        assert "the merged model does not answer as it should" in refused(merge, capsys, **options)
    load_base = merge.load_base

    def corrupt(args, name):
        file = Path(name) / "model.safetensors"
        if "partial-" in str(name):
            state = load_file(file)
            state["lm_head.weight"][5] *= 1.1
            save_file(state, file, {"format": "pt"})
        return load_base(args, name)

    with monkeypatch.context() as patch:
        patch.setattr(merge, "load_base", corrupt)
        assert "what was written does not answer as it should" in refused(merge, capsys, **options)
    state = load_file(adapter / "adapter_model.safetensors")
    large = tmp_path / "large"
    shutil.copytree(adapter, large)
    name = next(name for name in state if "up_proj.lora_B" in name)
    save_file(state | {name: state[name] + 1e6}, large / "adapter_model.safetensors")
    options["adapter_name_or_path"] = large
    assert "Try --dtype bf16" in refused(merge, capsys, **options, dtype="fp16")
    save_file(state | {name: state[name] * torch.nan}, large / "adapter_model.safetensors")
    with pytest.raises(SystemExit):
        call(merge, **options)
    assert not list((tmp_path / "o").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "o"]


def test_any_path(merge, trained, tmp_path, monkeypatch):
    """Every kind of name as base, adapter and output, absolute and relative, links and `~`."""
    base, adapter = trained
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in NAMES:
        here = tmp_path / f"{name}.d"
        shutil.copytree(base, here / f"{name}.base")
        shutil.copytree(adapter, here / f"{name}.adapter")
        set_record(here / f"{name}.adapter", base_model_name_or_path=f"./{here.name}/{name}.base/")
        given = f"./{here.name}/{name}.adapter/"
        call(merge, adapter_name_or_path=given, output_dir=f"./{here.name}/out/{name}/")
        assert (here / "out" / name / "config.json").is_file(), name
    (tmp_path / "home").symlink_to("日本語.d")
    outputs = {"link": tmp_path / "far", "empty": tmp_path / "empty", ".": tmp_path / "here",
               "~/~": tmp_path / "home" / "~"}  # fmt: skip
    for name in ("far", "empty", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    (tmp_path / "home" / "lora").symlink_to("日本語.adapter")
    (tmp_path / "empty").chmod(0o750)
    for given, output in outputs.items():
        monkeypatch.chdir(tmp_path / "here" if given == "." else tmp_path)
        words = {"adapter_name_or_path": "~/lora", "base_model_name_or_path": "~/日本語.base"}
        call(merge, **words, output_dir=given)
        assert load(output) and not list(output.glob("partial-*"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty").stat().st_mode & 0o777 == 0o750
    assert str((tmp_path / "home" / "lora").readlink()) == "日本語.adapter"


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
    (quantised / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | gptq)
    )
    lacking = tmp_path / "lacking"
    shutil.copytree(base, lacking)
    state = {
        n: t for n, t in load_file(base / "model.safetensors").items() if n != "model.norm.weight"
    }
    save_file(state, lacking / "model.safetensors", {"format": "pt"})
    unknown = make_adapter(base, tmp_path / "unknown")
    cases = [
        ({"output_dir": full}, "must be empty, and yours to write"),
        ({"output_dir": full / "kept"}, "must be empty, and yours to write"),
        ({"output_dir": "/dev/null/x"}, "must be empty, and yours to write"),
        ({"output_dir": adapter}, "must be empty, and yours to write"),
        ({"adapter_name_or_path": tmp_path / "nowhere"}, "nowhere cannot be merged: "),
        ({"adapter_name_or_path": "no/such-adapter"}, "no/such-adapter cannot be merged: "),
        ({"adapter_name_or_path": base}, "adapter_config.json"),
        ({"adapter_name_or_path": broken}, f"{broken} cannot be merged: "),
        ({"adapter_name_or_path": prompt}, "is of the kind PROMPT_TUNING"),
        ({"adapter_name_or_path": half}, f"{half} cannot be merged: "),
        ({"base_model_name_or_path": tmp_path / "nowhere"}, "nowhere is not here. Say where"),
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
