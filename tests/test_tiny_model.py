"""The small checkpoints: their tokenizers against sentencepiece itself, their switches, sizes, bytes and refusals."""

import json
import runpy
import shutil
import subprocess
import sys
import unicodedata

import pytest
import sentencepiece
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SCRIPT = ROOT / "tiny_model" / "make_tiny_model.py"
MAIN = runpy.run_path(str(SCRIPT))["main"]
TYPES = ("gpt2", "gpt_neox", "falcon", "mpt", "llama", "qwen3")
WORDS = (
    "東京 大阪 駅前の市場 りんご 辞書 富士山 ノート を は が で 買った。 見た。 行った、 Tokyo ３月 5月18日 ＡＢＣ"
).split()
TEXTS = [
    "".join(WORDS[(i * j + j * j // 3) % len(WORDS)] for j in range(1, 9))
    + (" two  words" if i % 3 == 0 else "")
    for i in range(120)
]
# What a tokenizer may lose: characters it never saw, spaces, line breaks, width, text that looks like its own pieces.
HARD = [
    *("鬱は難しい", "𠮷野家", "龘と齉", "すごい😀です", "👨‍👩‍👧 家族", "々〆ヶ〇㍻①", "長い" * 300),
    *("一行目\n二行目\n\n四行目\n", "タブ\tと\r\n改行", "<0x0A>"),
    *(
        " 先頭",
        "  先頭に二つ",
        "末尾 ",
        "末尾  ",
        "二つ  三つ   空白",
        "　全角　空白　",
        "a",
        " ",
        "  ",
    ),
    *("ＡＢＣａｂｃ１２３", "ABCabc123", "ｶﾀｶﾅ と カタカナ", "％＆（）「」『』〜—…", "1234567890"),
    *("Ünïcödé naïve", "한국어 العربية ไทย"),
]
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VOCAB = 330


def make(*words, **options):
    """Run the script in this process; options become --name value."""
    arguments = [
        f"--{name}={value}" for name, value in (SIZE | {"vocab_size": VOCAB} | options).items()
    ]
    MAIN([*arguments, *map(str, words)])


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [
        {"id": n, "prompt": text[: n % 9 + 1], "completion": text, "answers": [text]}
        for n, text in enumerate(TEXTS)
    ]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_file):
    """Directory of the checkpoint of each type."""
    folders = {name: tmp_path_factory.mktemp("made") / name for name in TYPES}
    for name, folder in folders.items():
        make(model_type=name, text_file=text_file, output_dir=folder)
    return folders


def refusal(capsys, *words, **options):
    """Run with bad input and return the one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        make(*words, **options)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_llama_tokenizer_is_sentencepiece(made, tmp_path):
    folder = made["llama"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    assert reference.vocab_size() == len(tokenizer) == VOCAB
    for loaded in (
        tokenizer,
        AutoTokenizer.from_pretrained(tmp_path),
    ):  # fine-tuning saves it again
        for text in TEXTS + HARD:
            ids = loaded(text)["input_ids"]
            assert ids == [reference.bos_id(), *reference.encode(text)], text
            assert loaded(text, add_special_tokens=False)["input_ids"] == ids[1:], text
            assert loaded.decode(ids, skip_special_tokens=True) == reference.decode(ids[1:]) == text
    assert any(reference.is_byte(i) for i in reference.encode("鬱")), (
        "the rare kanji should have become bytes"
    )
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_byte_level_tokenizers_lose_nothing(made):
    for name in set(TYPES) - {"llama"}:
        tokenizer = AutoTokenizer.from_pretrained(made[name])
        for text in TEXTS + HARD:
            ids = tokenizer(text)["input_ids"]
            assert max(ids) < VOCAB
            composed = name in ("gpt_neox", "mpt", "qwen3")  # as the real ones: NFC first
            expected = unicodedata.normalize("NFC", text) if composed else text
            assert tokenizer.decode(ids) == expected, (name, text)
            assert not set(ids) & set(tokenizer.all_special_ids), (name, text)  # no BOS, no EOS


def test_special_tokens_stand_where_the_real_ones_do(made):
    expected = {  # bos, eos and pad of the tokenizer; bos, eos and pad of the config
        "gpt2": [VOCAB - 1, VOCAB - 1, None, VOCAB - 1, VOCAB - 1, None],
        "gpt_neox": [0, 0, 1, 0, 0, 1],
        "falcon": [None, 11, None, 11, 11, None],
        "mpt": [0, 0, 1, None, None, None],
        "llama": [1, 2, 0, 1, 2, 0],
        "qwen3": [None, VOCAB - 1, VOCAB - 3, None, VOCAB - 1, VOCAB - 3],
    }
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for model_type, folder in made.items():
        sources = (AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder))
        assert [getattr(source, name, None) for source in sources for name in names] == expected[
            model_type
        ], model_type
    tokenizer = AutoTokenizer.from_pretrained(made["qwen3"])
    turns = [{"role": "user", "content": "やあ"}, {"role": "assistant", "content": "はい"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\nやあ<|im_end|>\n<|im_start|>assistant\nはい<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("assistant\n")


def test_models_have_their_family_s_switches(made):
    h, layers, heads, positions = SIZE.values()
    gated = 88  # 8/3 of 32, rounded up to a multiple of 8
    expected = {  # parameters by hand, tied, names of the biases that are there
        "gpt2": (VOCAB * h + positions * h + layers * (12 * h * h + 13 * h) + 2 * h, True, True),
        "gpt_neox": (2 * VOCAB * h + layers * (12 * h * h + 13 * h) + 2 * h, False, True),
        "falcon": (
            VOCAB * h + layers * (h * (h + 2 * h // heads) + 9 * h * h + 2 * h) + 2 * h,
            True,
            False,
        ),
        "mpt": (VOCAB * h + layers * (12 * h * h + 2 * h) + h, True, False),
        "llama": (2 * VOCAB * h + layers * (4 * h * h + 3 * h * gated + 2 * h) + h, False, False),
        "qwen3": (
            VOCAB * h + layers * (3 * h * h + 9 * h * h + 2 * h + 2 * h // heads) + h,
            True,
            False,
        ),
    }
    for name, folder in made.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        parameters, tied, biased = expected[name]
        assert sum(weight.numel() for weight in model.parameters()) == parameters, name
        assert (
            model.get_input_embeddings().weight is model.get_output_embeddings().weight
        ) == tied, name
        modules = [
            module
            for module in model.modules()
            if type(module).__name__ in ("Linear", "FalconLinear", "Conv1D")
        ]
        linear = [module for module in modules if getattr(module, "bias", None) is not None]
        assert bool(linear) == biased, (name, linear)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert 0.015 < model.get_input_embeddings().weight.std() < 0.025, name
    config = AutoConfig.from_pretrained(made["falcon"])
    assert (config.multi_query, config.parallel_attn, config.alibi) == (True, True, False)
    assert AutoConfig.from_pretrained(made["mpt"]).attn_config.alibi
    assert AutoConfig.from_pretrained(made["qwen3"]).num_key_value_heads == 2


def test_models_learn_and_generate(made):
    for name, folder in made.items():
        tokenizer, model = (
            AutoTokenizer.from_pretrained(folder),
            AutoModelForCausalLM.from_pretrained(folder),
        )
        batch = torch.tensor(
            [tokenizer("東京でりんごを買った。")["input_ids"] + [tokenizer.eos_token_id]]
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2, (name, losses[0], losses[-1])
        config = model.generation_config
        stop = (
            config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        )
        assert tokenizer.eos_token_id in stop and config.pad_token_id is not None, name
        prompt = batch[:, :4]
        output = model.eval().generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20
        )
        assert output[0, -1] == tokenizer.eos_token_id and output.shape[1] < 24, (
            name,
            "did not stop at EOS",
        )


def test_same_arguments_give_the_same_bytes(made, text_file, tmp_path, capsys):
    for name in ("llama", "gpt_neox"):
        make(model_type=name, text_file=text_file, output_dir=tmp_path / name)
        files = sorted(path.name for path in made[name].iterdir())
        assert files == sorted(path.name for path in (tmp_path / name).iterdir())
        for file in files:
            assert (made[name] / file).read_bytes() == (tmp_path / name / file).read_bytes(), (
                name,
                file,
            )
    make(model_type="llama", text_file=text_file, output_dir=tmp_path / "other", seed=1)
    for file, same in (
        ("model.safetensors", False),
        ("tokenizer.json", True),
        ("tokenizer.model", True),
    ):
        assert (
            (made["llama"] / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
        ) == same, file
    make(
        model_type="llama",
        text_file=text_file,
        output_dir=tmp_path / "wide",
        initializer_range=0.15,
    )
    weight = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "wide").model.layers[0].mlp.up_proj.weight
    )
    assert weight.std().item() == pytest.approx(0.15, rel=0.05)
    shown = capsys.readouterr().out
    assert (
        f"{VOCAB} tokens" in shown
        and "next       python ../finetune_full/" in shown
        and "360 of its 360 texts" in shown
    )


def test_a_finished_directory_is_left_alone(made, text_file, capsys):
    folder = made["gpt2"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stop:
        make(model_type="gpt2", text_file=text_file, output_dir=folder)
    assert stop.value.code == 0 and "nothing to do" in capsys.readouterr().out
    assert "not empty" in refusal(
        capsys, model_type="gpt2", text_file=text_file, output_dir=folder, seed=3
    )
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["gpt2"], (
        "a half-made directory was left behind"
    )


def test_kinds_of_text(tmp_path):
    nested = tmp_path / "nested.json"
    nested.write_text(
        json.dumps({"data": [{"title": TEXTS[0], "more": TEXTS[1:60]}, {"n": 1, "x": None}]}),
        encoding="utf-8",
    )
    lines = tmp_path / "lines.json"  # JGLUE's own files are JSON Lines with this name
    lines.write_text(
        "".join(json.dumps({"a": {"b": text}}) + "\n" for text in TEXTS[:60]), encoding="utf-8"
    )
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(TEXTS[:60]) + "\n", encoding="utf-8")
    merges = []
    for number, path in enumerate((nested, lines, plain)):
        make(model_type="gpt2", text_file=path, output_dir=tmp_path / str(number), vocab_size=300)
        merges.append(
            json.loads((tmp_path / str(number) / "tokenizer.json").read_text())["model"]["merges"]
        )
    assert merges[0] == merges[1] == merges[2]


def test_refusals(text_file, tmp_path, capsys):
    good = {"model_type": "llama", "text_file": text_file, "output_dir": tmp_path / "out"}
    files = {
        "empty.txt": b"",
        "spaces.txt": b" \n\n",
        "sjis.txt": "東京".encode("cp932"),
        "rows.csv": b"a,b\n",
        "bad.jsonl": b'{"a": "b"}\n{"a": \n',
        "half.jsonl": b'{"a": "\\ud800"}\n',
        "numbers.jsonl": b"1\n2\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    cases = [
        ({"text_file": tmp_path / "missing.txt"}, "does not exist"),
        ({"text_file": tmp_path}, "does not exist"),
        ({"text_file": tmp_path / "empty.txt"}, "holds no text"),
        ({"text_file": tmp_path / "spaces.txt"}, "holds no text"),
        ({"text_file": tmp_path / "numbers.jsonl"}, "holds no text"),
        ({"text_file": tmp_path / "sjis.txt"}, "iconv"),
        ({"text_file": tmp_path / "rows.csv"}, ".jsonl"),
        ({"text_file": tmp_path / "bad.jsonl"}, "line 2"),
        ({"text_file": tmp_path / "half.jsonl"}, "half of a character"),
        ({"output_dir": tmp_path / "full"}, "not overwritten"),
        ({"output_dir": tmp_path / "empty.txt"}, "cannot be written"),
        ({"output_dir": tmp_path / "empty.txt" / "below"}, "cannot be written"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "Heads that fit: 1, 3, 5, 15"),
        ({"hidden_size": 32, "num_attention_heads": 32}, "Heads that fit: 1, 2, 4, 8, 16"),
        ({"hidden_size": 7, "num_attention_heads": 1}, "even --hidden_size"),
        ({"num_hidden_layers": 0}, "below 1"),
        ({"initializer_range": 0}, "positive"),
        ({"seed": -1}, "out of range"),
    ]
    for options, expected in cases:
        assert expected in refusal(capsys, **(good | options)), options
    assert (
        not (tmp_path / "out").exists() and (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    )
    for word in ("--voc=400", "--model_type=bert"):  # argparse's own form
        with pytest.raises(SystemExit) as stop:
            make(word, **good)
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "qwen3"])
def test_vocabulary_that_does_not_fit_names_one_that_does(model_type, text_file, tmp_path, capsys):
    for wrong, word in ((50, "need "), (100_000, "no more than ")):
        options = {
            "model_type": model_type,
            "text_file": text_file,
            "output_dir": tmp_path / word.strip(),
        }
        error = refusal(capsys, vocab_size=wrong, **options)
        fits = int(error.split(word)[1].split()[0].rstrip("."))
        assert (
            "too small" in refusal(capsys, vocab_size=fits - 1, **options)
            if wrong == 50
            else fits < wrong
        )
        make(vocab_size=fits, **options)
        assert len(AutoTokenizer.from_pretrained(tmp_path / word.strip())) == fits


def test_alone_in_an_empty_folder(text_file, tmp_path):
    """A copy of the script needs no other file of the project; --help loads none of the heavy packages."""
    copy = shutil.copy(SCRIPT, tmp_path)
    arguments = [
        "--model_type",
        "gpt2",
        "--text_file",
        str(text_file),
        "--output_dir",
        "new/deep",
        "--vocab_size",
        "300",
    ]
    done = subprocess.run(
        [sys.executable, copy, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        umask=0o027,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("model ") and len(done.stdout.splitlines()) == 5 and not done.stderr
    )
    for path in (
        tmp_path / "new" / "deep" / "model.safetensors",
        tmp_path / "new" / "deep" / "config.json",
    ):
        assert path.stat().st_mode & 0o777 == 0o640, (
            "the group must be able to read what a job writes"
        )
    heavy = {"torch", "transformers", "tokenizers", "sentencepiece"}
    look = f"import runpy, sys\nsys.argv = ['x', '--help']\ntry:\n runpy.run_path({copy!r}, run_name='__main__')\n"
    look += f"except SystemExit:\n print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.endswith("[]\n") and "--vocab_size" in done.stdout, done.stdout + done.stderr
