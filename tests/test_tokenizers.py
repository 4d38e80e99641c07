"""Tokenizers as they are published: what loads has the ids of tokenizer.json, whatever class is named.

tests/matrix.py runs the whole grid; here stands one of each kind.
"""

import contextlib
import io
import json
import shutil

import families
import pytest
import seven_grid
from conftest import ROOT, ROWS, load_script
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto as auto

TEXTS = [
    "12345 2024年12月31日 1,234,567円", "鬱は難しい😀𠮷", "二つ  の   空白", " 前", "後 ",
    "改\n\n\n行\r\n\tdef f(x):\n    return 'x'", "It's WE'RE don't", "Cafe\u0301 Café か\u3099",
    "ｱｲｳ ＡＢＣ ㌔ ﬁ", "<s>a</s> b", "[CLS]a", "", *(row["prompt"] for row in ROWS),
]  # fmt: skip
CORPUS = [*TEXTS, *(row["prompt"] + row["completion"] for row in ROWS)] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
ROLES = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT_ROLES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), BERT, strict=False))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BY_THREE = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CLASSES = ["GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer", "LlamaTokenizer",
           "LlamaTokenizerFast", "Qwen2Tokenizer", "T5Tokenizer", "BertJapaneseTokenizer",
           "PreTrainedTokenizerFast", "TokenizersBackend", None]  # fmt: skip
TYPES = ["llama", "qwen3", "gemma3_text", "gpt_neox", "gpt2", "gpt_oss", "mistral", "olmo2",
         "granite"]  # fmt: skip
OVERRIDDEN = sorted(auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)


def make(kind):
    """A small tokenizer of one kind, with BOS before every text, but for bytes."""
    alphabet, spaces = pre_tokenizers.ByteLevel.alphabet(), normalizers.Replace(" ", "▁")
    tail = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if kind in ("bytes", "digits by three"):
        made, steps = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "digits by three":
            split = pre_tokenizers.Split(Regex(BY_THREE), "isolated")
            steps = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
        made.pre_tokenizer, made.decoder = steps, decoders.ByteLevel()
        trainer = BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
        made.train_from_iterator(CORPUS, trainer)
    elif kind == "unigram":  # no space in front
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
        trainer = UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>")
        made.train_from_iterator(CORPUS, trainer)
        state = json.loads(made.to_str())
        state["model"] |= {"byte_fallback": True}
        state["model"]["vocab"] += [[byte, -20.0] for byte in BYTES]
        made = Tokenizer.from_str(json.dumps(state))
        made.decoder = decoders.Sequence(tail)
    elif kind == "byte fallback":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        special = SPECIAL + BYTES
        made.train_from_iterator(
            CORPUS, BpeTrainer(vocab_size=500, special_tokens=special, limit_alphabet=80)
        )
        state = json.loads(made.to_str())
        state["added_tokens"] = state["added_tokens"][:4]
        made = Tokenizer.from_str(json.dumps(state))
        made.decoder = decoders.Sequence([*tail, decoders.Strip(" ", 1, 0)])
    else:  # of the kind that Japanese BERTs have
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.decoder = normalizers.NFKC(), decoders.WordPiece()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.train_from_iterator(CORPUS, WordPieceTrainer(vocab_size=400, special_tokens=BERT))
        special = [("[CLS]", 2), ("[SEP]", 3)]
        bos = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    if kind != "bytes":
        made.post_processor = bos
    return made


@pytest.fixture(scope="session")
def made():
    kinds = ("bytes", "digits by three", "unigram", "byte fallback", "wordpiece")
    return {kind: make(kind) for kind in kinds}


@pytest.fixture(scope="session")
def script():
    return load_script(ROOT / "finetune_full" / "finetune_full.py")


def publish(folder, tokenizer, name, model_type, **more):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = BERT_ROLES if tokenizer.token_to_id("[CLS]") is not None else ROLES
    config = roles | {"model_max_length": 128, "chat_template": "{{ messages[0].content }}"} | more
    config |= {"tokenizer_class": name} if name else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    config = {"model_type": model_type, "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config))


def is_right(found, wanted):
    """The ids of the file as the tokenizers library reads it, its texts, and nothing besides."""
    rows = [wanted.encode(text, add_special_tokens=False).ids for text in TEXTS]
    plain = {"clean_up_tokenization_spaces": False}
    return (
        found(TEXTS, add_special_tokens=False)["input_ids"] == rows
        and found(TEXTS)["input_ids"] == [wanted.encode(text).ids for text in TEXTS]
        and [found.decode(ids, **plain) for ids in rows]
        == [wanted.decode(ids, skip_special_tokens=False) for ids in rows]
        and len(found) == wanted.get_vocab_size()
    )


def read(script, folder, rows=10**6):
    said = []
    return script.exact_tokenizer(str(folder), rows, lambda *line: said.append(line)), said


def check_one(script, folder, wanted, name, model_type):
    """Right as published and as saved, and a line exactly where AutoTokenizer is wrong."""
    publish(folder, wanted, name, model_type)
    found, said = read(script, folder, wanted.get_vocab_size())
    case = (name, model_type, type(found).__name__)
    assert is_right(found, wanted), case
    assert found.model_max_length == 128 and found.chat_template, case
    try:
        plain = is_right(AutoTokenizer.from_pretrained(folder), wanted)
    except TypeError:
        plain = False
    assert len(said) <= 1 and (plain or said), case
    saved = folder / "saved"
    found.save_pretrained(saved)
    shutil.copy(folder / "config.json", saved)
    again, said = read(script, saved, wanted.get_vocab_size())
    assert is_right(again, wanted) and again.chat_template == found.chat_template, case
    assert again.special_tokens_map == found.special_tokens_map, case
    plain = is_right(AutoTokenizer.from_pretrained(saved), wanted)
    registered = auto.TOKENIZER_MAPPING_NAMES.get(model_type)
    is_lost = model_type in OVERRIDDEN and registered != "TokenizersBackend"
    assert plain or (is_lost and said), case
    shutil.rmtree(folder)
    return not plain


def test_one_of_each_kind_class_and_type(script, made, tmp_path):
    """Each class and each type is seen with a kind that it reads wrongly, if there is one."""
    for number, name in enumerate(CLASSES):
        kind = list(made)[number % 5]
        check_one(script, tmp_path / "a", made[kind], name, TYPES[number % len(TYPES)])
        check_one(script, tmp_path / "b", made["unigram"], name, "llama")
    for number, kind in enumerate(TYPES):
        name = CLASSES[number]
        check_one(script, tmp_path / "c", made["digits by three"], name, kind)


def test_every_type_that_transformers_overrides(script, made, tmp_path):
    """PreTrainedTokenizerFast in the file does not help with these; what is told to type does."""
    lost = set()
    for kind in OVERRIDDEN:
        if check_one(
            script, tmp_path / kind, made["digits by three"], "PreTrainedTokenizerFast", kind
        ):
            lost.add(kind)
        publish(tmp_path / kind, made["unigram"], None, kind)
        plain = PreTrainedTokenizerFast.from_pretrained(tmp_path / kind)
        assert is_right(plain, made["unigram"]), kind
    assert {"qwen2", "qwen3_5", "qwen3_5_moe"} <= lost and len(lost) < 10, lost


@pytest.mark.parametrize(
    ("kind", "method", "is_told"),
    [("qwen2", "full", True), ("qwen3_5_text", "full", False), ("qwen2", "lora", False)],
)
def test_what_the_readme_says(kind, method, is_told, made, tmp_path):
    """It names what reads the ids, exactly where AutoTokenizer would not."""
    publish(tmp_path / "base", made["digits by three"], "PreTrainedTokenizerFast", kind)
    if method == "lora":  # a class that finds no such role adds a token of its own
        file = tmp_path / "base" / "tokenizer_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in config.items() if k != "unk_token"}))
    model = families.families()[kind](made["digits by three"].get_vocab_size())
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path / "base")
    out, error = seven_grid.train(method, tmp_path / "base", tmp_path / "run")
    assert not error, error
    text = (out / "README.md").read_text() if (out / "README.md").exists() else ""
    assert text.count("PreTrainedTokenizerFast.from_pretrained(DIR)") == is_told
    loads = (AutoTokenizer, PreTrainedTokenizerFast)
    right = [is_right(load.from_pretrained(out), made["digits by three"]) for load in loads]
    assert right == [not is_told, True]
    assert (method == "lora") == ("library_name: peft" in text)
    if method == "lora":  # merged, it is a model of that type again
        words = ["--adapter_name_or_path", str(out), "--output_dir", str(tmp_path / "merged")]
        load_script(ROOT / "finetune_lora" / "merge_lora.py").main(words)
        text = (tmp_path / "merged" / "README.md").read_text()
        assert text.count("PreTrainedTokenizerFast.from_pretrained(DIR)") == 1
        right = [
            is_right(load.from_pretrained(tmp_path / "merged"), made["digits by three"])
            for load in loads
        ]
        assert right == [False, True]


def grid(folder, wanted):
    """{class: {kind: text}} of every combination, for tests/matrix.py (see there)."""
    script, table = load_script(ROOT / "finetune_full" / "finetune_full.py"), {}
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("bytes", "digits by three", "unigram", "byte fallback", "wordpiece")
    for name in CLASSES:
        for kind in filter(lambda kind: wanted(f"{name} {kind}"), kinds):
            text = check_types(script, folder, make(kind), name)
            table.setdefault(str(name), {})[kind] = text
            print(f"{name}, {kind}: {text}", flush=True)
    return table


def check_types(script, folder, wanted, name):
    """A cell: this tokenizer and this class, under every type of model."""
    lost, wrong = 0, []
    for model_type in TYPES + OVERRIDDEN:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                lost += check_one(script, folder / "cell", wanted, name, model_type)
        except (AssertionError, SystemExit) as error:
            wrong.append(f"{model_type}: {said.getvalue().strip() or error!r}")
            shutil.rmtree(folder / "cell")
    return "; ".join(wrong) or (f"ok {lost}" if lost else "ok")


def test_what_a_file_asks_for(script, made, tmp_path, capsys):
    """Ids past the rows and a BOS that does not come are refused; the command that is told helps."""
    folder, new = tmp_path / "old", tmp_path / "new"
    size = made["bytes"].get_vocab_size()
    convert = load_script(ROOT / "generate_text" / "convert_tokenizer.py")
    for problem, more in {
        "no BOS, which its files ask for": {"add_bos_token": True},
        f"ids up to {size}, past the end": {"pad_token": "<new>"},
    }.items():
        for name, kind in (("GPT2Tokenizer", "llama"), ("TokenizersBackend", "qwen2")):
            publish(folder, made["bytes"], name, kind, **more)
            with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()):
                read(script, folder, size)
            error = capsys.readouterr().err
            assert problem in error and error.count("\n") == 1
            words = error.split("convert_tokenizer.py ")[1].split(", and use")[0]
            convert.main(words.replace(" NEW", f" {new}").split())
            found, _ = read(script, new, size)
            wanted = [made["bytes"].encode(text).ids for text in TEXTS]
            bos = [1] if "add_bos_token" in more else []
            assert found(TEXTS)["input_ids"] == [bos + ids for ids in wanted]
            assert found.chat_template and found.eos_token == "</s>"
            shutil.rmtree(new)


def test_what_is_after_a_special_token(script, made, tmp_path):
    """A Llama class puts no space after one where the file does: told apart by special tokens alone."""
    wanted = Tokenizer.from_str(made["byte fallback"].to_str())
    wanted.normalizer, split = None, "always"
    wanted.pre_tokenizer = pre_tokenizers.Metaspace("▁", split, split=False)
    publish(tmp_path, wanted, "LlamaTokenizer", "llama")
    found, _ = read(script, tmp_path)
    for text in ("<s>東京</s>大阪", "a<s>b"):
        assert found(text)["input_ids"] == wanted.encode(text).ids


def test_tokens_of_a_role_without_a_place(script, made, tmp_path):
    """special_tokens_map.json, a token of no role, a template of its own: all are kept."""
    wanted = Tokenizer.from_str(made["digits by three"].to_str())
    wanted.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    publish(tmp_path, wanted, "Qwen2Tokenizer", "qwen2")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if key != "eos_token"}
    config |= {"additional_special_tokens": ["<|im_end|>"], "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    found, said = read(script, tmp_path, wanted.get_vocab_size())
    assert said and is_right(found, wanted)
    assert (found.eos_token, found.padding_side) == ("<|im_end|>", "left")
    assert (
        found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        == "<|im_end|>"
    )
    assert "<|im_end|>" in found.all_special_tokens
