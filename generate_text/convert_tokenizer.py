#!/usr/bin/env python3
"""Write a tokenizer.json that gives exactly the ids of a model's sentencepiece file (spiece.model, tokenizer.model).

transformers 5 reads such a file by rules of its own class for it, not by the file's settings: rare characters get lost,
spaces are merged, a unigram model is cut up as BPE, and nothing is said. The tokenizers are made here from the file's
own settings instead, and compared with sentencepiece itself. It takes seconds and needs no GPU.

A directory     python convert_tokenizer.py --model_name_or_path models/rinna          (written there, old files kept)
A hub model     python convert_tokenizer.py --model_name_or_path rinna/japanese-gpt-neox-3.6b --output_dir models/rinna
Is text lost?   python convert_tokenizer.py --model_name_or_path models/rinna --check train.jsonl
Follows         https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import argparse
import json
import sys
from pathlib import Path

SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.model")
# What is written new; other tokenizer files are left out of the result, since they would be read before it.
WRITTEN = ("tokenizer.json", "tokenizer_config.json")
REPLACED = (*WRITTEN, "special_tokens_map.json", "added_tokens.json")


def main(argv=None):
    args = parse(argv)
    directory = find_model(args.model_name_or_path)
    file = next((directory / name for name in SENTENCEPIECE if (directory / name).is_file()), None)
    if file is None:
        fail(f"{directory} holds none of {', '.join(SENTENCEPIECE)}: its tokenizer needs no conversion.")
    if args.check:
        check(args, directory, file)
        return
    tokenizer = convert(file, directory)
    compare(tokenizer, file, sample_texts(file))
    write(tokenizer, directory, Path(args.output_dir or directory), file)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="a directory, or a hub model that was fetched before")
    add("--output_dir", help="where the model with its new tokenizer goes; weights become links (default: in place)")
    add(
        "--check",
        metavar="FILE",
        help="only count the texts of FILE that change when encoded and decoded, as it is now",
    )
    args = parser.parse_args(argv)
    if args.check and not Path(args.check).is_file():
        fail(f"--check {args.check} is not there. Relative paths start at {Path.cwd()}.")
    if args.output_dir and not args.check:
        out = Path(args.output_dir)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            fail(f"--output_dir {out} is not empty. Name a new directory.")
    elif not args.check and not Path(args.model_name_or_path).is_dir():
        fail(f"{args.model_name_or_path} is no directory here. For a hub model give --output_dir too: the hub's own "
             "cache is not written to.")  # fmt: skip
    return args


def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def find_model(name):
    """The directory of a model: the path itself, or the hub's cache of it."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        fail(f"{name} is no directory, nor in the cache. Fetch it first: bash ../jobs/fetch_model.sh {name}")


def convert(file, directory):
    """Return the tokenizer of a sentencepiece file, with the roles that the repository's JSON files give to tokens."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own class moves between its versions
        fail(f"{file} is no sentencepiece model ({error}). A git-lfs pointer in its place? Fetch the file itself.")
    kinds, trainer, rules = proto.SentencePiece, proto.trainer_spec, proto.normalizer_spec
    names = [piece.piece for piece in proto.pieces]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN)
    if trainer.model_type == trainer.UNIGRAM:
        scores = unigram_scores(proto, kinds)
        model = models.Unigram(list(zip(names, scores, strict=True)), unknown, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        merges = [pair for piece in sorted_pieces(proto, kinds) for pair in splits(piece, set(names))]
        vocab = {name: i for i, name in enumerate(names)}
        model = models.BPE(vocab, merges, unk_token=names[unknown], fuse_unk=True, byte_fallback=trainer.byte_fallback)
    else:
        fail(f"{file} is neither a unigram nor a BPE model, and other kinds have no tokenizer.json.")
    tokenizer = Tokenizer(model)

    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    steps += [normalizers.Prepend("▁")] if rules.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    for piece in proto.pieces:
        # A unigram model finds user-defined pieces itself, by their scores, where its normalizer leaves them alone.
        own = trainer.model_type == trainer.UNIGRAM and steps_keep(steps, piece.piece)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN) or (piece.type == kinds.USER_DEFINED and not own):
            special = piece.type != kinds.USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])

    roles, settings = find_roles(directory, set(names), names[unknown], trainer)
    if settings["add_bos_token"]:
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, names.index(bos))]
        )
    kind = "unigram" if trainer.model_type == trainer.UNIGRAM else "BPE"
    print(f"file       {file}: {kind}, {len(names):,} pieces, "
          f"{'with' if trainer.byte_fallback else 'without'} bytes for rare characters")  # fmt: skip
    bos = "put before every text" if settings["add_bos_token"] else "not added"
    print(f"roles      {', '.join(' '.join(item) for item in roles.items())}; BOS {bos} ({settings.pop('reason')})")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **settings)


def steps_keep(steps, piece):
    """Whether the normalizers leave a piece as it is, but for what is put before a text."""
    for step in steps:
        changed = step.normalize_str(piece)
        if changed not in (piece, "▁" + piece):
            return False
    return True


def unigram_scores(proto, kinds):
    """Log probabilities; user-defined pieces get the score that sentencepiece itself gives them: they always win."""
    best = max(piece.score for piece in proto.pieces if piece.type == kinds.NORMAL)
    own = kinds.USER_DEFINED
    return [len(p.piece) * best - 0.1 if p.type == own else p.score for p in proto.pieces]


def sorted_pieces(proto, kinds):
    """The pieces of a BPE model in the order of their merges: the highest score first."""
    pieces = [piece for piece in proto.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)]
    return [piece.piece for piece in sorted(pieces, key=lambda piece: -piece.score)]


def splits(piece, names):
    """The pairs of pieces that make a piece."""
    pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
    return [(left, right) for left, right in pairs if left in names and right in names]


def find_roles(directory, names, unknown, trainer):
    """Return ({role: token}, other settings) from the repository's JSON files; tokens without an id are left out."""
    config = read_json(directory / "tokenizer_config.json")
    given = read_json(directory / "special_tokens_map.json") | config
    roles = {"unk_token": unknown}
    for role in ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token"):
        token = given.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token in names:
            roles[role] = token
        elif token:
            print(f"left out   {role} {token}: the model has no such piece, its id would point past the embedding")
    for role, piece in (("bos_token", trainer.bos_piece), ("eos_token", trainer.eos_piece)):
        if role not in roles and piece in names:
            roles[role] = piece
    # transformers 4 added BOS for a Llama tokenizer that does not say; 5 does not.
    is_llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
    asked = config.get("add_bos_token")
    add = bool(is_llama if asked is None else asked) and "bos_token" in roles
    reason = (
        "as tokenizer_config.json says"
        if asked is not None
        else "a Llama tokenizer's default"
        if is_llama
        else "not asked for"
    )
    settings = {"add_bos_token": add, "reason": reason}
    if isinstance(config.get("model_max_length"), int) and config["model_max_length"] < 10**9:
        settings["model_max_length"] = config["model_max_length"]
    template = directory / "chat_template.jinja"
    chat_template = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    return roles, settings | ({"chat_template": chat_template} if chat_template else {})


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def sample_texts(file):
    """Texts that show differences: the file's own pieces in a row, rare characters, spaces, line ends."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = [i for i in range(model.vocab_size()) if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))]
    pieces = [model.id_to_piece(i).replace("▁", " ") for i in ids]
    rows = ["".join(pieces[start : start + 50]) for start in range(0, len(pieces), 50)]
    return [*rows, "鬱は難しい😀𠮷", "ＡＢＣ　１２３ｱｲｳ", "二つ  の空白", "改\n行\t字下げ", " 前", "後 ", "a b  c"]


def compare(tokenizer, file, texts):
    """Refuse a conversion whose ids are not sentencepiece's."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    wrong = [text for text in texts if tokenizer(text, add_special_tokens=False)["input_ids"] != model.encode(text)]
    if len(wrong) > len(texts) // 100:  # combining characters, which the two libraries cut apart differently
        fail(f"{len(wrong)} of {len(texts)} texts get other ids than from sentencepiece, the first: {wrong[0][:80]!r}. "
             "Nothing was written: this kind of model is not supported.")  # fmt: skip
    print(f"check      {len(texts) - len(wrong):,} of {len(texts):,} texts have sentencepiece's ids")


def write(tokenizer, directory, out, file):
    """Write the tokenizer into out; from another directory, link everything else there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if out.resolve() == directory.resolve():
            for name in REPLACED:
                if (out / name).is_file():
                    (out / name).replace(out / f"{name}.before_conversion")
        else:
            for path in sorted(directory.iterdir()):
                if path.name not in REPLACED and not path.name.startswith("."):
                    (out / path.name).symlink_to(path.resolve())
        tokenizer.save_pretrained(out)
    except OSError as error:
        fail(f"{out} cannot be written ({error.strerror}). Name another --output_dir.")
    print(f"written    {', '.join(WRITTEN)} in {out}")
    print(f"next       python generate_text.py --model_name_or_path {out} --prompt TEXT")


def check(args, directory, file):
    """Count what the tokenizer, as it is now, loses of a file's texts, and where sentencepiece gives other ids."""
    import sentencepiece
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    texts = read_texts(Path(args.check))
    lost, other, characters, example = 0, 0, 0, None
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=False)
        other += ids != model.encode(text)
        if back != text:
            lost += 1
            gone = [c for c in text if c not in back]
            characters += len(gone)
            example = example or (text, back)
    print(f"texts      {len(texts):,} in {args.check}")
    print(f"ids        {other:,} get other ids than from sentencepiece itself")
    print(f"lost       {lost:,} do not come back as they were; {characters:,} characters are gone")
    if example:
        print(f"example    {example[0][:60]!r} came back as {example[1][:60]!r}")


def read_texts(path):
    """Every string in a JSON Lines or JSON file; of another file, every line."""

    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix not in (".json", ".jsonl"):
            texts = content.splitlines()
        elif path.suffix == ".json":
            texts = [*strings(json.loads(content))]
        else:
            texts = [text for line in content.splitlines() if line.strip() for text in strings(json.loads(line))]
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8. Convert it, for example with iconv -f CP932 -t UTF-8.")
    except json.JSONDecodeError as error:
        fail(f"{path}: malformed JSON ({error.msg}).")
    texts = [text for text in texts if text]
    if not texts:
        fail(f"{path} holds no text.")
    return texts


if __name__ == "__main__":
    main()
