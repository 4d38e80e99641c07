"""convert_tokenizer.py against sentencepiece itself, on repositories laid out as rinna's and OpenLLaMA's are."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from conftest import ROOT, load_script
from test_runs import NAMES
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

# Spaces, line ends, full width, half width, rare characters, literal names of bytes: what the two could read apart.
HARD = [
    "鬱は難しい",
    "すごい😀です𠮷",
    " 前に空白",
    "後ろ  二つ ",
    "改\n行",
    "ＡＢＣ　１２ｱｲｳ",
    "a\tb",
    "",
    "東京 と 大阪",
    "é ü",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
KINDS = {  # file, settings of sentencepiece, tokenizer_config.json, whether BOS belongs before a text
    "rinna": ("spiece.model", {"model_type": "unigram", "byte_fallback": True, "add_dummy_prefix": False,
                               "remove_extra_whitespaces": False, "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3},
              {"tokenizer_class": "T5Tokenizer", "pad_token": "[PAD]", "extra_ids": 0, **SPECIAL}, False),
    "openllama": ("tokenizer.model", {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False,
                                      "normalization_rule_name": "identity"},
                  {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **SPECIAL}, True),
    "unigram llama": ("tokenizer.model", {"model_type": "unigram", "byte_fallback": True},
                      {"tokenizer_class": "LlamaTokenizer", **SPECIAL}, True),
    "no bos": ("tokenizer.model", {"model_type": "unigram"},
               {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, **SPECIAL}, False),
    "own pieces": ("spiece.model", {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": ["<NL>"]},
                   {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"}, False),
}  # fmt: skip


@pytest.fixture(scope="session")
def checker():
    return load_script(ROOT / "generate_text" / "check_tokenizer.py")


@pytest.fixture(scope="session")
def texts():
    rows = (ROOT / "jglue/sample/datasets").rglob("train*.json")
    found = [
        line for path in sorted(rows) for line in path.read_text(encoding="utf-8").splitlines()
    ]
    random.Random(0).shuffle(found)
    return found[:200]


@pytest.fixture(scope="session")
def repositories(tmp_path_factory, texts):
    """{kind: directory} with a sentencepiece file and a tokenizer_config.json, as the models' own."""
    made = {}
    for kind, (file, settings, config, _) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp("repository") / kind.replace(" ", "_")
        made[kind].mkdir()
        with (made[kind] / file).open("wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, vocab_size=700, character_coverage=0.98,
                num_threads=1, minloglevel=2, max_sentence_length=2**20, hard_vocab_limit=False, **settings,
            )  # fmt: skip
        (made[kind] / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="session")
def script():
    return load_script(ROOT / "generate_text" / "convert_tokenizer.py")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_same_ids_as_sentencepiece(script, repositories, texts, kind, tmp_path, capsys):
    file, _, _, bos = KINDS[kind]
    script.main(
        ["--model_name_or_path", str(repositories[kind]), "--output_dir", str(tmp_path / "new")]
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(repositories[kind] / file))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in [*texts, *HARD, *(["<NL>改行<NL>です", "a<NL> b"] if kind == "own pieces" else [])]:
        assert ids_of(tokenizer, text) == model.encode(text), text
        back = model.decode(model.encode(text)).replace(" ⁇ ", "<unk>")
        assert tokenizer.decode(model.encode(text)) == back, text
    assert len(tokenizer) == model.vocab_size(), "a token without a row in the embedding"
    assert tokenizer.eos_token_id == model.eos_id()
    assert tokenizer("東京")["input_ids"] == [model.bos_id()] * bos + model.encode("東京")
    elsewhere = Tokenizer.from_file(
        str(tmp_path / "new" / "tokenizer.json")
    )  # without transformers' own additions
    assert elsewhere.encode("東京").ids == [model.bos_id()] * bos + model.encode("東京")
    assert tokenizer.get_vocab() == {model.id_to_piece(i): i for i in range(model.vocab_size())}
    assert ("left out   pad_token [PAD]" in capsys.readouterr().out) == (kind == "rinna")
    assert (tmp_path / "new" / file).resolve() == (repositories[kind] / file).resolve(), (
        "other files become links"
    )


@pytest.mark.skipif(
    "JGLUE_DIR" not in os.environ, reason="JGLUE_DIR does not name a checkout of JGLUE"
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_paragraph_of_jsquad(script, kind, tmp_path):
    """As above with a vocabulary of 4,000 from the paragraphs themselves: the figures that README gives."""
    newest = max((Path(os.environ["JGLUE_DIR"]) / "datasets").glob("jsquad-v*/valid-*.json"))
    articles = json.loads(newest.read_text(encoding="utf-8"))["data"]
    paragraphs = list(
        dict.fromkeys(part["context"] for article in articles for part in article["paragraphs"])
    )
    file, settings, config, _ = KINDS[kind]
    (tmp_path / "old").mkdir()
    with (tmp_path / "old" / file).open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(paragraphs).split("\n")), model_writer=model, vocab_size=4000,
            character_coverage=0.98, num_threads=1, minloglevel=2, max_sentence_length=2**20, **settings,
        )  # fmt: skip
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config))
    script.main(
        ["--model_name_or_path", str(tmp_path / "old"), "--output_dir", str(tmp_path / "new")]
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "old" / file))
    wrong = {}
    for name in ("old", "new"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        wrong[name] = sum(ids_of(tokenizer, text) != model.encode(text) for text in paragraphs)
    print(
        f"{kind}: of {len(paragraphs)} paragraphs {wrong['old']} differ before, {wrong['new']} after"
    )
    assert wrong["new"] == 0
    assert (wrong["old"] == 0) == (kind == "openllama")


def test_in_place_and_check(script, checker, repositories, texts, tmp_path, capsys):
    """In place the old files are kept; check_tokenizer.py counts what is lost before, and nothing after."""
    for path in repositories["rinna"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("東京", "鬱😀", "二  つ"))
    )
    before, check = (
        (tmp_path / "tokenizer_config.json").read_text(),
        ["--text_file", str(tmp_path / "mine.jsonl")],
    )
    old = AutoTokenizer.from_pretrained(tmp_path)
    kept = sum(old.decode(ids_of(old, text)) == text for text in ("東京", "鬱😀", "二  つ"))
    gone = sum(
        c not in old.decode(ids_of(old, text)) for text in ("東京", "鬱😀", "二  つ") for c in text
    )
    checker.main(["--model_name_or_path", str(tmp_path), *check])
    out = capsys.readouterr().out
    assert kept < 3
    assert gone >= 2
    assert f"lost       {3 - kept} do not come back as they were; {gone} characters are gone" in out
    script.main(["--model_name_or_path", str(tmp_path)])
    assert (tmp_path / "tokenizer_config.json.before_conversion").read_text() == before
    capsys.readouterr()
    checker.main(["--model_name_or_path", str(tmp_path), *check])
    out = capsys.readouterr().out
    assert "ids        0 get other ids" in out
    assert "lost       0 do not come back" in out
    # Once more, it would replace the old files that were kept.
    with pytest.raises(SystemExit):
        script.main(["--model_name_or_path", str(tmp_path)])
    assert "was converted before" in capsys.readouterr().err
    assert (tmp_path / "tokenizer_config.json.before_conversion").read_text() == before


def test_a_template_is_copied_not_written_through_a_link(script, repositories, tmp_path):
    for path in repositories["rinna"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}\n\n")
    before = template.stat().st_mtime_ns
    script.main(["--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "new")])
    assert template.stat().st_mtime_ns == before
    assert not (tmp_path / "new" / "chat_template.jinja").is_symlink()
    new = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert new.chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_any_path(script, checker, repositories, tmp_path, monkeypatch, capsys):
    """Every kind of name as model, output and text, absolute and relative, links and `~`."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        here = tmp_path / f"{name}.d" / f"{name}.model"
        shutil.copytree(repositories["rinna"], here)
        (here / f"{name}.JSONL").write_text(
            '{"a": ["\\u6771", {"b": "\\u2028"}]}\n\n{"c": "\u2028"}'
        )
        given = f"./{name}.d/{name}.model/"
        script.main(["--model_name_or_path", given, "--output_dir", f"./{name}.d/new/{name}/"])
        assert (tmp_path / f"{name}.d" / "new" / name / "tokenizer.json").is_file(), name
        capsys.readouterr()
        file = str(here / f"{name}.JSONL")
        checker.main(["--model_name_or_path", str(here), "--text_file", file])
        assert "texts      3 in" in capsys.readouterr().out
    (tmp_path / "home").symlink_to("日本語.d")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    script.main(["--model_name_or_path", "~/日本語.model", "--output_dir", "link"])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "tokenizer.json").is_file()
    monkeypatch.chdir(tmp_path / "home" / "日本語.model")
    script.main(["--model_name_or_path", "."])
    assert (tmp_path / "日本語.d" / "日本語.model" / "tokenizer.json").is_file()


CHAT = {"<|im_start|>": 0, "<|im_end|>": 1}  # as many places behind the vocabulary
LATE = {**CHAT, "<tool>": 2}


def add_to(directory, first, named, rows, flags=None):
    """Name tokens beside the vocabulary, as older repositories (or `flags`: newer ones) do."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}
    if flags:
        added = {first + i: {"content": text, **flags} for text, i in named.items()}
        config["added_tokens_decoder"] = added
    else:
        places = {text: first + i for text, i in named.items()}
        (directory / "added_tokens.json").write_text(json.dumps(places))
    path.write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"vocab_size": rows}))


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("kind", ["unigram llama", "openllama", "tokenizer.json"])
def test_tokens_of_other_files(script, repositories, kind, is_decoder, tmp_path, capsys):
    """Those with a row get their ids, and are one token each; the rest is named, with the reason."""
    old, new = shutil.copytree(repositories["openllama"], tmp_path / "old"), tmp_path / "new"
    if kind == "tokenizer.json":
        script.main(["--model_name_or_path", str(old), "--output_dir", str(tmp_path / "exact")])
        old = tmp_path / "exact"
    elif kind == "unigram llama":
        old = shutil.copytree(repositories[kind], tmp_path / "unigram")
    model = sentencepiece.SentencePieceProcessor(model_file=str(old / "tokenizer.model"))
    first = model.vocab_size()
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}
    add_to(old, first, LATE, first + 2, flags if is_decoder else None)
    capsys.readouterr()
    script.main(["--model_name_or_path", str(old), "--output_dir", str(new)])
    out = capsys.readouterr().out
    reason = f"its id {first + 2} is past the embedding's {first + 2:,} rows"
    assert [line for line in out.splitlines() if line.startswith("left out")] == [
        f"left out   <tool>: {reason}"
    ]
    tokenizer = AutoTokenizer.from_pretrained(new)
    assert len(tokenizer) == first + 2
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", first + 1)
    text = "<|im_start|>東京<|im_end|>"
    assert ids_of(tokenizer, text) == [first, *model.encode("東京"), first + 1]
    assert "<|im_end|>" not in tokenizer.decode(first + 1, skip_special_tokens=True)
    rest = ["<|im_start|>"] * (not is_decoder)  # special is what a role or a flag says
    assert tokenizer.batch_decode([[first]], skip_special_tokens=True) == (rest or [""])


def test_tokens_without_a_row_or_an_id(script, repositories, tmp_path, capsys):
    """What cannot be added is named with its own reason; wrong ids and gaps are refused."""
    source = repositories["openllama"]
    first = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model")).vocab_size()
    for number, (named, rows, line) in enumerate([
        (CHAT, first + 1, f"eos_token <|im_end|>: its id {first + 1} is past the embedding's"),
        (CHAT, 0, "<|im_start|>: config.json does not tell how many rows there are"),
        ({}, first + 2, "eos_token <|im_end|>: the model has no such piece, and no file gives"),
        ({"<|im_end|>": 1}, first + 2, f"give <|im_end|> the id {first + 1}, its vocabulary {first}"),
        ({"<s>": 1}, first + 2, f"give <s> the id {first + 1}, its vocabulary 1"),
    ]):  # fmt: skip
        old, new = tmp_path / f"old{number}", tmp_path / f"new{number}"
        shutil.copytree(source, old)
        add_to(old, first, named, rows)
        words = ["--model_name_or_path", str(old), "--output_dir", str(new)]
        if number < 3:
            script.main(words)
            assert f"left out   {line}" in capsys.readouterr().out
            assert AutoTokenizer.from_pretrained(new).eos_token == "</s>"
        else:
            with pytest.raises(SystemExit) as stopped:
                script.main(words)
            error = capsys.readouterr().err
            assert (stopped.value.code, error.count("\n")) == (2, 1) and line in error
            assert not new.exists()


def test_a_named_piece_of_a_tokenizer_json_is_one_token(script, repositories, tmp_path):
    """Its vocabulary holds the token already, but only tokenizer_config.json calls it one."""
    exact, new = tmp_path / "exact", tmp_path / "new"
    source = repositories["openllama"]
    script.main(["--model_name_or_path", str(source), "--output_dir", str(exact)])
    path = exact / "tokenizer.json"
    file = json.loads(path.read_text())
    first = len(file["model"]["vocab"])
    file["model"]["vocab"]["<|im_start|>"] = first
    path.write_text(json.dumps(file))
    add_to(exact, first, {"<|im_start|>": 0}, first + 1, {"special": False})
    script.main(["--model_name_or_path", str(exact), "--output_dir", str(new)])
    assert ids_of(AutoTokenizer.from_pretrained(new), "<|im_start|>") == [first]


def test_wrong_conversion_is_refused(script, repositories, monkeypatch, tmp_path, capsys):
    """The comparison is with sentencepiece itself: scores that are a little off are noticed, and nothing is written."""
    scores = script.unigram_scores
    monkeypatch.setattr(script, "unigram_scores", lambda *args: [-score for score in scores(*args)])
    with pytest.raises(SystemExit) as stopped:
        script.main(
            [
                "--model_name_or_path",
                str(repositories["rinna"]),
                "--output_dir",
                str(tmp_path / "new"),
            ]
        )
    assert stopped.value.code == 2
    assert "other ids than from sentencepiece" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


SCRIPTS = {
    "finetune_full": "finetune_full",
    "finetune_lastlayer": "finetune_lastlayer",
    "add_tokens": "finetune_lastlayer",
    "finetune_lora": "finetune_lora",
    "generate_text": "generate_text",
}


def read(name, directory, rows):
    """The tokenizer as a script reads it, and the lines that it said."""
    said, path = [], ROOT / SCRIPTS[name] / f"{name}.py"
    return load_script(path).exact_tokenizer(
        str(directory), rows, lambda *line: said.append(line)
    ), said


def refusal(name, directory, rows, capsys):
    """What a script refuses a directory with: one line that tells what to type."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        read(name, directory, rows)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert f"convert_tokenizer.py --model_name_or_path {directory} --output_dir NEW" in error
    return error.split(" gives ")[1].split(". Convert")[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_refuses_what_it_would_read_wrongly(name, repositories, tmp_path, capsys):
    """Each repository as it is published is exact or refused, and what the refusal tells to type makes it exact."""
    exact = set()
    for kind, directory in repositories.items():
        file, _, _, bos = KINDS[kind]
        model = sentencepiece.SentencePieceProcessor(model_file=str(directory / file))
        new = directory
        try:
            tokenizer, said = read(name, directory, model.vocab_size())
            exact.add(kind)
        except SystemExit:
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            command = error.split("convert_tokenizer.py ")[1].split(", and use")[0]
            new = tmp_path / directory.name
            words = command.replace(" NEW", f" {new}").split()
            load_script(ROOT / "generate_text" / "convert_tokenizer.py").main(words)
            tokenizer, said = read(name, new, model.vocab_size())
        for text in HARD:
            if new != directory or not text.startswith(" "):
                assert ids_of(tokenizer, text) == model.encode(text), (kind, text)
        assert (tokenizer("a")["input_ids"][0] == model.bos_id()) == bos
        assert new == directory or not said
    assert "openllama" in exact and "rinna" not in exact, "both sides of the guard are seen"


def test_each_fault_alone_is_refused(repositories, tmp_path, capsys):
    """A missing BOS, ids past the embedding, other ids: each by itself, and named."""
    convert = load_script(ROOT / "generate_text" / "convert_tokenizer.py")
    new = tmp_path / "new"
    convert.main(["--model_name_or_path", str(repositories["openllama"]), "--output_dir", str(new)])
    tokenizer, said = read("finetune_full", new, 700)
    rows = len(tokenizer)
    assert not said and rows <= 700
    read("finetune_full", new, rows)
    past = refusal("finetune_full", new, rows - 1, capsys)
    assert past.startswith(f"ids up to {rows - 1}, past the end of the embedding's {rows - 1} rows")
    own = (new / "tokenizer.json").read_text()
    backend = Tokenizer.from_str(own)
    backend.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    backend.save(str(new / "tokenizer.json"))
    config = new / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": True}))
    assert refusal("finetune_full", new, rows, capsys) == "no BOS, which its files ask for"
    # A class that reads a sentencepiece file by other rules, and no tokenizer.json.
    other = tmp_path / "other"
    shutil.copytree(repositories["rinna"], other)
    line = refusal("finetune_full", other, 800, capsys)
    assert line == f"other ids than {other}/spiece.model itself"


def test_a_llama_tokenizer_that_does_not_speak_of_bos(repositories, tmp_path, capsys):
    """transformers 4 added BOS then, 5 does not: with all ids right, only BOS is missing."""
    (tmp_path / "tokenizer.model").write_bytes(
        (repositories["openllama"] / "tokenizer.model").read_bytes()
    )
    config = {
        name: value for name, value in KINDS["openllama"][2].items() if name != "add_bos_token"
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    read("finetune_full", tmp_path, 700)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    problem = "no BOS, which its files ask for"
    assert refusal("finetune_full", tmp_path, 700, capsys) == problem


def test_bad_input(script, checker, repositories, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pointer").mkdir()
    (tmp_path / "pointer/spiece.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    rinna = str(repositories["rinna"])
    (tmp_path / "latin").write_bytes(b"\xe9")
    cases = {
        "holds none of": [str(tmp_path / "empty")],
        "is no sentencepiece model": [str(tmp_path / "pointer")],
        "give --output_dir too": ["somebody/model"],
        "Fetch it first": ["somebody/model", "--output_dir", str(tmp_path / "new")],
        "is not empty": [rinna, "--output_dir", str(tmp_path)],
        "Type: python check_tokenizer.py": [rinna, "--check", "a.jsonl"],
        "is not there": [rinna, "--text_file", "nowhere.txt"],
        "is not UTF-8": [rinna, "--text_file", str(tmp_path / "latin")],
        "nothing to compare with": [
            str(tmp_path / "empty"),
            "--text_file",
            str(tmp_path / "latin"),
        ],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as stopped:
            tool = checker if "--text_file" in arguments else script
            tool.main(["--model_name_or_path", *arguments])
        captured = capsys.readouterr()
        assert stopped.value.code == 2, message
        assert message in captured.err, captured.err
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
