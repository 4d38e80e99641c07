"""Nothing that comes with a model, a checkpoint or a settings file is executed; no secret is written down."""

import io
import json
import os
import pickle
import shutil
import signal
import sys

import pytest
import torch
import yaml
from conftest import ROOT, ROWS, load_script, write_jsonl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TRAINING = ("finetune_full", "finetune_lora", "finetune_lastlayer")
PATHS = {
    **{name: f"{name}/{name}.py" for name in TRAINING},
    "generate_text": "generate_text/generate_text.py",
    "chat": "generate_text/chat.py",
    "check_tokenizer": "generate_text/check_tokenizer.py",
    "merge_lora": "finetune_lora/merge_lora.py",
    "show_model": "finetune_lastlayer/show_model.py",
    "add_tokens": "finetune_lastlayer/add_tokens.py",
}
READERS = [name for name in PATHS if name not in ("show_model", "check_tokenizer")]  # of weights


@pytest.fixture
def sentinel(tmp_path):
    """A file that appears as soon as anything hidden in another one is executed."""
    return tmp_path / "executed"


class Bomb:
    """Its pickle, loaded, makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def base_adapter(tmp_path_factory, checkpoints):
    directory = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(directory)
    return directory


def call(name, *words, stdin=""):
    """main() of a script with words; returns its exit code."""
    kept, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        load_script(ROOT / PATHS[name]).main([str(word) for word in words])
    except SystemExit as leave:
        return leave.code or 0
    finally:
        sys.stdin = kept
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


def start(name, model, tmp_path, *more, adapter=None):
    """Have a script read a model (for merge_lora: the adapter's base); returns its exit code."""
    output = tmp_path / f"output_of_{name}"
    words = ["--model_name_or_path", model]
    if name in TRAINING:
        data = write_jsonl(tmp_path / "t.jsonl", ROWS)
        more = ("--max_steps", 1, *more, "--train_file", data, "--output_dir", output)
    if name == "generate_text":
        more = (*more, "--prompt", "a", "--max_new_tokens", 2)
    if name == "chat":
        more = (*more, "--max_new_tokens", 2)
    if name == "check_tokenizer":
        more = (*more, "--text_file", write_jsonl(tmp_path / "t.jsonl", ROWS))
    if name == "merge_lora":
        words = ["--adapter_name_or_path", adapter, "--base_model_name_or_path", model]
    if name == "add_tokens":
        more = (*more, "--new_tokens", "<a>,<b>")
    if name in ("merge_lora", "add_tokens"):
        more = (*more, "--output_dir", output)
    return call(name, *words, *more, stdin="y\n")


def error_of(capsys):
    """The only line on stderr that is no report of progress."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") or line[10:11] == " " for line in lines), lines
    (line,) = [line for line in lines if line.startswith("error: ")]
    return line


# ---- Code beside the weights ----

SOURCE = """
open({sentinel!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = {kind!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Tok(PreTrainedTokenizerFast):
    pass
def generate(model, *words, **options):
    return options["input_ids"]
"""


def plant(directory, sentinel, kind):
    """Put code beside a model, or an adapter, in every way that is known to have been executed."""
    (directory / "hidden.py").write_text(SOURCE.format(sentinel=str(sentinel), kind=kind))
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(SOURCE.format(sentinel=str(sentinel), kind=kind))  # fmt: skip
    maps = {"AutoConfig": "hidden.Config", "AutoModelForCausalLM": "hidden.Model"}
    changes = {
        "config.json": {"auto_map": maps, "model_type": kind},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "hidden.Tok"]}},
        "generation_config.json": {"custom_generate": str(directory)},
    }
    if (directory / "adapter_config.json").is_file():
        changes = {
            "adapter_config.json": {
                "auto_mapping": {"base_model_class": "Model", "parent_library": "hidden"},
                "megatron_config": {"a": 1}, "megatron_core": "hidden",
            }
        }  # fmt: skip
    for name, change in changes.items():
        path = directory / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(content | change))


@pytest.fixture(scope="module")
def with_sentencepiece(tmp_path_factory, checkpoints):
    """A model that check_tokenizer.py looks into."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("sp") / "model"
    shutil.copytree(checkpoints["llama"], directory)
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([row["prompt"] for row in ROWS] * 9), model_writer=file, vocab_size=99,
            hard_vocab_limit=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    return directory


@pytest.mark.parametrize("kind", ["llama", "hidden"])
@pytest.mark.parametrize("name", PATHS)
def test_code_beside_a_model(
    tmp_path, checkpoints, with_sentencepiece, base_adapter, sentinel, capsys, name, kind
):
    """Of a kind that transformers knows, the code is left alone; of another one, the model is refused."""
    source = with_sentencepiece if name == "check_tokenizer" else checkpoints["llama"]
    model = shutil.copytree(source, tmp_path / "model")
    plant(model, sentinel, kind)
    code = start(name, model, tmp_path, adapter=base_adapter)
    assert not sentinel.exists()
    if code:
        assert kind == "hidden" and "custom code" in error_of(capsys)
    else:
        assert kind == "llama" or name == "check_tokenizer"


@pytest.mark.parametrize("name", ["finetune_full", "generate_text", "show_model"])
def test_code_that_was_asked_for(tmp_path, checkpoints, sentinel, name):
    """With the option the same code runs: what is planted here would be seen to run."""
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    plant(model, sentinel, "hidden")
    start(name, model, tmp_path, "--trust_remote_code", "true")
    assert sentinel.exists()


@pytest.mark.parametrize("name", ["generate_text", "chat", "merge_lora", "finetune_lora"])
def test_code_beside_an_adapter(
    tmp_path, checkpoints, base_adapter, sentinel, capsys, monkeypatch, name
):
    adapter = shutil.copytree(base_adapter, tmp_path / "adapter")
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(adapter)
    plant(adapter, sentinel, "llama")
    monkeypatch.syspath_prepend(adapter)  # as for someone who works in this directory
    code = start(
        name, checkpoints["llama"] if name == "merge_lora" else adapter, tmp_path, adapter=adapter
    )
    assert not sentinel.exists()
    assert code == 0 or error_of(capsys)


JINJA = "{{ cycler.__init__.__globals__.os.system('touch SENTINEL') }}"
JINJA += "{{ ''.__class__.__base__.__subclasses__() }}"


@pytest.mark.parametrize("name", ["finetune_full", "generate_text", "chat"])
@pytest.mark.parametrize("own", [False, True])
def test_code_in_a_chat_template(tmp_path, checkpoints, sentinel, capsys, name, own):
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    template = model / "chat_template.jinja" if own else tmp_path / "t.jinja"
    template.write_text(JINJA.replace("SENTINEL", str(sentinel)))
    rows = [{"instruction": "a", "output": "b"}]
    words = ["--model_name_or_path", model] + ([] if own else ["--chat_template", template])
    if name == "finetune_full":
        words += [
            "--train_file",
            write_jsonl(tmp_path / "c.jsonl", rows),
            "--output_dir",
            tmp_path / "o",
        ]
    if name == "generate_text":
        words += [
            "--prompt_file",
            write_jsonl(tmp_path / "c.jsonl", rows),
            "--output_file",
            tmp_path / "o",
        ]
    assert call(name, *words, stdin="a\n") == 2
    assert not sentinel.exists() and "error: " in error_of(capsys)


# ---- Settings ----


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch SENTINEL']",
        "!!python/object/new:os.system [touch SENTINEL]",
        "seed: !!python/object/apply:builtins.open [SENTINEL, w]",
    ],
)
def test_code_in_a_settings_file(tmp_path, checkpoints, sentinel, capsys, text):
    """Given as such, or found as a run's record."""
    name, text = "finetune_full", text.replace("SENTINEL", str(sentinel))
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(text)
    with pytest.MonkeyPatch.context() as patch:  # would be executed, then
        patch.setattr(yaml, "safe_load", yaml.unsafe_load)
        yaml.safe_load(text)
        assert sentinel.exists()
        sentinel.unlink()
    settings = tmp_path / "s.yaml"
    settings.write_text(
        f"model_name_or_path: {checkpoints['llama']}\n{text}\n" if text[0] == "s" else text
    )
    assert call(name, settings) == 2
    assert "python/object" in error_of(capsys)
    (tmp_path / f"output_of_{name}").mkdir()
    (tmp_path / f"output_of_{name}" / "run_args.yaml").write_text(text)
    assert start(name, checkpoints["llama"], tmp_path) == 2
    assert "python/object" in error_of(capsys)
    assert not sentinel.exists()


def test_code_of_a_data_set(tmp_path, checkpoints, sentinel, capsys):
    """A loading script, as data sets on the hub had them."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.py").write_text(f"open({str(sentinel)!r}, 'w')")
    words = ["--model_name_or_path", checkpoints["llama"], "--output_dir", tmp_path / "o"]
    for place in (data, data / "data.py"):
        assert call("finetune_full", *words, "--dataset_name", place) == 2
        assert error_of(capsys) and not sentinel.exists()


# ---- Weights ----


def write_bin(path, weights, how="zip"):
    """Weights as torch.save had them, new and old, or any other pickle."""
    if how == "pickle":
        path.write_bytes(pickle.dumps(weights))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=how == "zip")


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "zip") for name in READERS), ("generate_text", "old"), ("finetune_full", "pickle")],
)
def test_a_malicious_bin(tmp_path, checkpoints, base_adapter, sentinel, capsys, name, how):
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    write_bin(model / "pytorch_model.bin", weights | {"lm_head.weight": Bomb(sentinel)}, how)
    assert start(name, model, tmp_path, adapter=base_adapter) == 2
    assert error_of(capsys) and not sentinel.exists()
    if how == "zip":
        torch.load(model / "pytorch_model.bin", weights_only=False)
        assert sentinel.exists()  # it would have been executed


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "zip") for name in READERS), ("generate_text", "old")]
)
def test_bin_weights_load(tmp_path, checkpoints, base_adapter, name, how):
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    write_bin(model / "pytorch_model.bin", load_file(model / "model.safetensors"), how)
    (model / "model.safetensors").unlink()
    assert start(name, model, tmp_path, adapter=base_adapter) == 0


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, how) for name in ("generate_text", "merge_lora") for how in ("zip", "good")),
     ("generate_text", "old"), ("chat", "pickle")],
)  # fmt: skip
def test_a_malicious_adapter(tmp_path, checkpoints, base_adapter, sentinel, capsys, name, how):
    adapter = shutil.copytree(base_adapter, tmp_path / "adapter")
    weights, file = load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin"
    (adapter / "adapter_model.safetensors").unlink()
    write_bin(file, weights if how == "good" else weights | {"bomb": Bomb(sentinel)}, how)
    model = checkpoints["llama"] if name == "merge_lora" else adapter
    assert start(name, model, tmp_path, adapter=adapter) == (0 if how == "good" else 2)
    assert (how == "good" or error_of(capsys)) and not sentinel.exists()


DAMAGE = {
    "cut": lambda content: content[:5000],
    "header": lambda content: content[:9],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "longer": lambda content: content + b"x",
    "nonsense": lambda content: content[:8] + b"{" * (len(content) - 8),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [*(("generate_text", damage) for damage in DAMAGE), *((name, "cut") for name in TRAINING),
     ("finetune_full", "text"), ("chat", "text"), ("merge_lora", "header"), ("add_tokens", "cut")],
)  # fmt: skip
def test_damaged_weights(tmp_path, checkpoints, base_adapter, capsys, name, damage):
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(DAMAGE[damage](weights.read_bytes()))
    assert start(name, model, tmp_path, adapter=base_adapter) == 2
    assert len(error_of(capsys)) > 30


CONFIGURATIONS = [b"", b"{", b"[]", b"{}", bytes(99), b'{"model_type": 3}']
WRONG_TYPE = b'{"model_type": "llama", "hidden_size": "x"}'


@pytest.mark.parametrize(
    ("name", "content"),
    [*(("generate_text", content) for content in (*CONFIGURATIONS, WRONG_TYPE)),
     *(("finetune_full", content) for content in CONFIGURATIONS),
     *((name, WRONG_TYPE) for name in ("chat", "merge_lora", "show_model", "add_tokens")),
     *((name, b"[]") for name in ("chat", "merge_lora", "show_model", "add_tokens"))],
)  # fmt: skip
def test_damaged_configuration(tmp_path, checkpoints, base_adapter, capsys, name, content):
    model = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    (model / "config.json").write_bytes(content)
    assert start(name, model, tmp_path, adapter=base_adapter) == 2
    assert len(error_of(capsys)) > 30


# ---- Checkpoints ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoints):
    """{training script: output directory of two steps with checkpoint-1}."""
    place = tmp_path_factory.mktemp("runs")
    for name in TRAINING:
        assert start(name, checkpoints["llama"], place, "--max_steps", 2, "--save_steps", 1) == 0
    return {name: place / f"output_of_{name}" for name in TRAINING}


@pytest.mark.parametrize(
    ("name", "file", "how"),
    [*(("finetune_full", file, "zip") for file in ("scheduler.pt", "rng_state.pth", "training_args.bin", "weights")),
     *((name, "optimizer.pt", how) for name, how in zip(TRAINING, ("zip", "old", "pickle"), strict=True)),
     ("finetune_lora", "weights", "old"), ("finetune_lastlayer", "rng_state.pth", "pickle")],
)  # fmt: skip
def test_a_malicious_checkpoint(tmp_path, checkpoints, runs, sentinel, capsys, name, file, how):
    """Taken over from somewhere, mark and all, and resumed from."""
    checkpoint = shutil.copytree(runs[name] / "checkpoint-1", tmp_path / "checkpoint-1")
    if file == "weights":
        (whole,) = checkpoint.glob("*model.safetensors")
        whole.unlink()
        file = {"model": "pytorch_model.bin"}.get(whole.stem, f"{whole.stem}.bin")
    write_bin(checkpoint / file, {"bomb": Bomb(sentinel)}, how)
    mark = checkpoint / "run_id"
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path != mark}
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"files": sizes}))
    more = ("--max_steps", 2, "--resume_from_checkpoint", checkpoint)
    code = start(name, checkpoints["llama"], tmp_path, *more)
    assert not sentinel.exists()
    if file == "training_args.bin":  # written only, never read
        assert code == 0
    else:
        assert code == 2 and error_of(capsys)


# ---- Secrets and modes ----


def test_no_secret_is_written_down(tmp_path, checkpoints, capsys, monkeypatch):
    """Neither what the environment holds nor what somebody types, in no file and in no line."""
    secrets = ["hf_sEcReTtOkEn", "wandbsecretkey0123", "typed_secret_token"]
    for name, value in zip(("HF_TOKEN", "WANDB_API_KEY"), secrets, strict=False):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", secrets[0])
    model = checkpoints["llama"]
    for name in TRAINING:
        more = ("--save_steps", 1, "--report_to", "tensorboard", "--logging_steps", 1)
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / f"output_of_{name}" / "logs"))
        assert start(name, model, tmp_path, *more) == 0
        assert start(name, model, tmp_path, "--hub_token", secrets[2]) == 2
    prompts = write_jsonl(tmp_path / "p.jsonl", ROWS)
    words = ["--model_name_or_path", model, "--prompt_file", prompts, "--max_new_tokens", 2]
    assert call("generate_text", *words, "--output_file", tmp_path / "answers") == 0
    assert start("add_tokens", model, tmp_path) == 0
    out, err = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = " ".join(path.name for path in files)
    for kind in ("tfevents", "training_args.bin", "run_args.yaml", "all_results.json",
                 "trainer_state.json", "answers.settings.json", "optimizer.pt"):  # fmt: skip
        assert kind in names
    for secret in secrets:
        assert secret not in out + err
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_files_follow_the_umask(tmp_path, checkpoints, base_adapter):
    mask = 0o027
    prompts, kept = write_jsonl(tmp_path / "p.jsonl", ROWS), os.umask(mask)
    place = tmp_path / "place"
    try:
        place.mkdir()
        words = [
            "--model_name_or_path",
            checkpoints["llama"],
            "--prompt_file",
            prompts,
            "--max_new_tokens",
            2,
        ]
        assert call("generate_text", *words, "--output_file", place / "new" / "answers") == 0
        for name in ("add_tokens", "merge_lora"):
            assert start(name, checkpoints["llama"], place, adapter=base_adapter) == 0
        for name in TRAINING:
            assert start(name, checkpoints["llama"], place, "--save_steps", 1) == 0
    finally:
        os.umask(kept)
    for path in place.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, path
