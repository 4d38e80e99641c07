"""add_tokens.py: new rows by an independent calculation, all else bit by bit; what is refused."""

import json
import os
import re
import shutil

import pytest
import sentencepiece
import torch
from conftest import CONFIGS, ROOT, ROWS, load_script, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
)

NEW = ["<a>", "<b>", "東京タワー"]
# Names in the file, by hand: input embeddings, and output embeddings where they are not tied.
ENDS = {
    "gpt2": ["transformer.wte.weight"],
    "gpt_neox": ["gpt_neox.embed_in.weight", "embed_out.weight"],
    "falcon": ["transformer.word_embeddings.weight"],
    "falcon_alibi": ["transformer.word_embeddings.weight"],
    "mpt": ["transformer.wte.weight"],
    "llama": ["model.embed_tokens.weight", "lm_head.weight"],
    "qwen3": ["model.embed_tokens.weight"],
}
TEXTS = [row["prompt"] + row["completion"] for row in ROWS] + ["", " a  b\n", "鬱😀", "<a", "a>"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script alone in a directory."""
    alone = tmp_path_factory.mktemp("alone") / "add_tokens.py"
    shutil.copy(ROOT / "finetune_lastlayer" / "add_tokens.py", alone)
    return load_script(alone)


def run(script, model, output, tokens=NEW):
    script.main(["--model_name_or_path", str(model), "--new_tokens", ",".join(tokens),
                 "--output_dir", str(output)])  # fmt: skip


def weights(directory):
    return load_file(f"{directory}/model.safetensors")


def ids_of(tokenizer, text, special=False):
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def expected_rows(directory, name, tokens=NEW):
    """What the new rows of a tensor must be: sums of rows divided by their number, one by one."""
    tokenizer, table, rows = AutoTokenizer.from_pretrained(directory), weights(directory)[name], []
    for token in tokens:
        pieces = ids_of(tokenizer, token)
        total = torch.zeros_like(table[0], dtype=torch.float64)
        for piece in pieces:
            total += table[piece].double()
        rows.append((total / len(pieces)).to(table.dtype))
    return torch.stack(rows)


def check_copy(base, copy, ends, tokens=NEW):
    """The rows, and that nothing else differs in the files; returns the old number of rows."""
    old, new = weights(base), weights(copy)
    assert old.keys() == new.keys()
    for name in old.keys() - set(ends):
        assert torch.equal(old[name], new[name]), name
    first = len(AutoTokenizer.from_pretrained(base))
    for name in ends:
        wanted = expected_rows(base, name, tokens)
        assert (wanted[0] - wanted[1]).abs().max() > 0.001
        found = new[name][first : first + len(tokens)]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 if wanted.dim() > 1 else 1e-5)
        assert torch.equal(new[name][:first], old[name][:first])
        assert torch.equal(new[name][first + len(tokens) :], old[name][first + len(tokens) :])
        assert new[name].dtype == old[name].dtype
    return len(old[ends[0]])


def check_tokenizers(base, copy, texts=TEXTS, tokens=NEW):
    """One id for each new token, wherever it stands; every other text as before."""
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(copy)
    first = len(old)
    for row, token in enumerate(tokens, first):
        assert ids_of(new, token) == [row]
        assert ids_of(new, f"水{token}空 {token}\n").count(row) == 2
        assert new.decode([row], skip_special_tokens=True) == token
    for text in texts:
        for special in (False, True):
            assert ids_of(old, text, special) == ids_of(new, text, special), text
    added = {token: row for row, token in enumerate(tokens, first)}
    assert new.get_vocab() == old.get_vocab() | added
    return new


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture(kind, script, checkpoints, tmp_path, capsys):
    base = checkpoints[kind]
    run(script, base, tmp_path)
    assert check_copy(base, tmp_path, ENDS[kind]) == 300
    check_tokenizers(base, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    first = AutoModelForCausalLM.from_pretrained(base).eval()
    tied = len(ENDS[kind]) == 1
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == model.config.tie_word_embeddings == tied
    assert model.config.vocab_size == model.get_output_embeddings().out_features == 303
    ids = torch.arange(3, 40)[None]
    logits, before = model(ids).logits, first(ids).logits
    torch.testing.assert_close(logits[..., :300], before, rtol=0, atol=1e-5)
    pieces = ids_of(AutoTokenizer.from_pretrained(base), "<b>")
    mean = before[..., pieces].mean(-1)  # a mean of rows gives the mean of their logits
    torch.testing.assert_close(logits[..., 301], mean, rtol=0, atol=1e-4)
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "new token  <b> = 301, until now 3 pieces: '<' 'b' '>'"
    how = "tied to the input" if tied else "of their own"
    assert out[3] == f"rows       300 before, 303 now, torch.float32; output embeddings {how}"
    assert out[4] == ("next       python finetune_lastlayer.py --model_name_or_path "
                      f"{tmp_path} --train new_tokens --new_tokens '<a>,<b>,東京タワー' "
                      "--train_file FILE")  # fmt: skip
    assert len(out) == 5


@pytest.mark.parametrize(("rows", "after"), [(320, 320), (301, 303), (303, 303)])
def test_spare_rows_come_first(rows, after, script, checkpoints, tmp_path, capsys):
    """Rows beyond the tokens are used, and those left over stay as they are."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path / "base")
    run(script, tmp_path / "base", tmp_path / "out")
    assert check_copy(tmp_path / "base", tmp_path / "out", ENDS["llama"]) == rows
    assert len(weights(tmp_path / "out")["lm_head.weight"]) == after
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == after
    assert f"rows       {rows} before, {after} now" in capsys.readouterr().out


@pytest.mark.parametrize("written", ["float32", "bfloat16", "float16", None])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_precision_is_the_file_s(stored, written, script, checkpoints, tmp_path):
    """Whatever config.json says; a mean is taken in fp32 and rounded once."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(checkpoints["llama"], base)
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    config |= {"dtype": written} if written else {}
    (base / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(stored) for name, tensor in weights(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run(script, base, out)
    check_copy(base, out, ENDS["llama"])
    saved = json.loads((out / "config.json").read_text())["dtype"]
    assert saved == str(stored).removeprefix("torch.")


def test_a_head_with_a_bias(script, tmp_path):
    """GPT-J's output embeddings have one: its entries are means too."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4
    )
    model = GPTJForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run(script, tmp_path / "base", tmp_path / "out")
    ends = ["transformer.wte.weight", "lm_head.weight", "lm_head.bias"]
    check_copy(tmp_path / "base", tmp_path / "out", ends)
    assert weights(tmp_path / "out")["lm_head.bias"].shape == (303,)


def test_a_head_that_only_the_configuration_ties(script, checkpoints, tmp_path):
    """Falcon's published files hold a head of their own: it gets rows of its own."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(checkpoints["falcon"], base)
    tensors = weights(base)
    tensors["lm_head.weight"] = tensors[ENDS["falcon"][0]].flip(0).contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    run(script, base, out)
    check_copy(base, out, [*ENDS["falcon"], "lm_head.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_goes_with_the_model_is_kept(script, checkpoints, tmp_path):
    """Chat template, generation settings (also ones that transformers finds odd), BOS; umask."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(checkpoints["llama"], base)
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    settings = {"temperature": 0.3, "max_new_tokens": 7, "eos_token_id": [0, 2], "bos_token_id": 1}
    (base / "generation_config.json").write_text(json.dumps(settings))
    run(script, base, out)
    found = json.loads((out / "generation_config.json").read_text())
    assert settings.items() <= found.items()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == template
    assert ids_of(tokenizer, "水<a>", special=True)[0] == tokenizer.bos_token_id == 1
    mask = os.umask(0)
    os.umask(mask)
    for path in out.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip


def test_a_template_beside_the_tokenizer_is_kept(script, checkpoints, tmp_path):
    """Of a processor, in its own file: the tokenizer neither reads nor writes it."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(checkpoints["llama"], base)
    template = json.dumps({"chat_template": "{{ messages[0].content }}"})
    (base / "chat_template.json").write_text(template)
    run(script, base, out)
    assert (out / "chat_template.json").read_text() == template


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def make_sentencepiece(directory, file, settings, **training):
    """A repository with a sentencepiece file, as published Llama and rinna models have it."""
    directory.mkdir()
    with (directory / file).open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=400, num_threads=1,
            minloglevel=2, byte_fallback=True, hard_vocab_limit=False,
            remove_extra_whitespaces=False, normalization_rule_name="identity", **training,
        )  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | SPECIAL))
    rows = sentencepiece.SentencePieceProcessor(model_file=str(directory / file)).vocab_size()
    config = LlamaConfig(vocab_size=rows, hidden_size=32, num_hidden_layers=1,
                         num_attention_heads=4, intermediate_size=64)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def test_sentencepiece_files(script, tmp_path, capsys):
    """tokenizer.json is what transformers reads; the file without the tokens is left out."""
    llama, rinna, converted = tmp_path / "llama", tmp_path / "rinna", tmp_path / "converted"
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    make_sentencepiece(llama, "tokenizer.model", settings, model_type="bpe")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    make_sentencepiece(
        rinna, "spiece.model", settings, model_type="unigram", add_dummy_prefix=False
    )
    assert "convert_tokenizer.py" in refused(script, capsys, rinna, tmp_path / "no")
    convert = load_script(ROOT / "generate_text" / "convert_tokenizer.py")
    convert.main(["--model_name_or_path", str(rinna), "--output_dir", str(converted)])
    for base in (llama, converted):
        out = base.with_name(base.name + "_out")
        run(script, base, out)
        assert not list(out.glob("*.model"))
        check_copy(base, out, ENDS["llama"])
        tokenizer = check_tokenizers(base, out)
        script.exact_tokenizer(str(out), len(tokenizer), print)
        with pytest.raises(SystemExit):
            script.exact_tokenizer(str(out), len(tokenizer) - 1, print)
        # Even beside the new tokenizer.json the old file changes nothing.
        for file in base.glob("*.model"):
            shutil.copy(file, out / file.name)
        check_tokenizers(base, out)


def refused(script, capsys, model, output, tokens=NEW):
    """The one line on stderr; nothing is left in the output directory."""
    capsys.readouterr()
    before = sorted(output.rglob("*")) if output.is_dir() else []
    with pytest.raises(SystemExit) as stop:
        run(script, model, output, tokens)
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n"), err[:7]) == (2, 1, "error: ")
    assert (sorted(output.rglob("*")) if output.is_dir() else []) == before
    return err


BAD_TOKENS = {
    "known": (["<s>", "<a>"], "<s> is one token already"),
    "known as bytes": (["a"], "a is one token already"),
    "known by its text": (["質問"], "質問 is one token already"),
    "empty": (["<a>", "", "<b>"], "a name is empty"),
    "blank": ([" "], "a name is empty"),
    "twice": (["<a>", " <a>"], "there twice"),
}


def test_refused_before_the_weights_are_loaded(script, checkpoints, tmp_path, capsys, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(checkpoints["llama"], base)
    monkeypatch.setattr(script, "load_model", None)
    for tokens, message in BAD_TOKENS.values():
        assert message in refused(script, capsys, base, out, tokens)
    assert "must be empty" in refused(script, capsys, base, base)
    (tmp_path / "link").symlink_to(base)
    assert "must be empty" in refused(script, capsys, base, tmp_path / "link")
    assert "must be empty" in refused(script, capsys, base, tmp_path)
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/x"):
        assert "file" in refused(script, capsys, base, tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"
    for name in ("no/such/model", "no//name", tmp_path / "nowhere", tmp_path / "file", out):
        assert str(name) in refused(script, capsys, name, tmp_path / "new")
    config = json.loads((base / "config.json").read_text())
    gap = tmp_path / "gap"  # ids 0 to 298 and 300: the tokenizers library would give 300 again
    shutil.copytree(base, gap)
    tokenizer = json.loads((gap / "tokenizer.json").read_text())
    (last,) = (token for token, row in tokenizer["model"]["vocab"].items() if row == 299)
    tokenizer["model"]["vocab"][last] = 300
    (gap / "tokenizer.json").write_text(json.dumps(tokenizer))
    (gap / "config.json").write_text(json.dumps(config | {"vocab_size": 301}))
    assert "ids have gaps" in refused(script, capsys, gap, out)
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (base / "config.json").write_text(json.dumps(quantised))
    assert "is stored quantised" in refused(script, capsys, base, out)
    (base / "config.json").write_text("{")
    refused(script, capsys, base, out)
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 299}))
    assert "past the end of the embedding" in refused(script, capsys, base, out)


def test_refused_while_reading_or_writing(script, checkpoints, tmp_path, capsys, monkeypatch):
    """Weights that are cut off or missing, a full disk: no half of a model stays."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(checkpoints["llama"], base)
    tensors = weights(base)
    with monkeypatch.context() as patch:

        def full(self, directory, **_):
            raise OSError(28, "No space left on device")

        patch.setattr(type(AutoTokenizer.from_pretrained(base)), "save_pretrained", full)
        assert "No space left" in refused(script, capsys, base, out)
    with monkeypatch.context() as patch:  # a tokenizer that loses what was added
        lost, loads = make_tokenizer(), AutoTokenizer.from_pretrained

        def load(name, **_):
            return lost if ".partial." in str(name) else loads(name)

        patch.setattr(AutoTokenizer, "from_pretrained", load)
        assert "does not keep <a>" in refused(script, capsys, base, out)
    part = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(part, base / "model.safetensors", {"format": "pt"})
    message = refused(script, capsys, base, out)
    assert re.search(r"lacks weights .*model\.norm\.weight", message)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    assert str(base) in refused(script, capsys, base, out)
    (base / "model.safetensors").unlink()
    assert str(base) in refused(script, capsys, base, out)


NAMES = ["[1]*?", "a$\\x$b", "100%_#", "two words", "日本語の出力", "UPPER.JSONL"]


def test_any_path(script, checkpoints, tmp_path, monkeypatch, capsys):
    """A model in, and a copy into, directories of these names; a link, a slash at the end, ., ~."""
    base = checkpoints["qwen3"]
    for name in ("empty", "here", "dot"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    outputs = [*NAMES, "~/home/x", f"{tmp_path}/slash/", "../link"]
    for number, name in enumerate(outputs):
        run(script, base, name, [f"<{number}>"])
        base = name
    monkeypatch.chdir(tmp_path / "dot")
    run(script, base, ".", ["<dot>"])
    made = [*(f"here/{name}" for name in NAMES), "home/x", "slash", "empty", "dot"]
    for number, name in enumerate(made, 301):
        assert len(weights(tmp_path / name)[ENDS["qwen3"][0]]) == number
    assert (tmp_path / "link").is_symlink()
    assert "--model_name_or_path '日本語の出力' --train" in capsys.readouterr().out
