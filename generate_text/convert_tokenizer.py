#!/usr/bin/env python3
"""Write a tokenizer.json with exactly the ids of a model's own file, and BOS where it belongs.

transformers 5 reads spiece.model or tokenizer.model by rules of its own class for it, not by the
file's settings: rare characters get lost, spaces are merged, a unigram model is cut up as BPE, and
nothing is said. The tokenizers are made here from the file's own settings instead, and compared
with sentencepiece itself. A tokenizer.json that is there already stays as it is, but for what
tokenizer_config.json asks for: BOS, tokens that have a row. It takes seconds and needs no GPU.

A directory  python convert_tokenizer.py --model_name_or_path DIR       (there; old files are kept)
A hub model  python convert_tokenizer.py --model_name_or_path rinna/NAME --output_dir output/rinna
Lost text?   python check_tokenizer.py --model_name_or_path DIR --text_file train.jsonl
Follows      https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.model")
# Written new. Other files of a tokenizer are left out of the result: they would be read first.
WRITTEN = ("tokenizer.json", "tokenizer_config.json")
REPLACED = (*WRITTEN, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
KEPT = ".before_conversion"  # the end of the old files' names, in place


def main(argv=None):
    args = parse(argv)
    check_arguments(args)
    directory = find_model(args.model_name_or_path)
    files = [directory / name for name in SENTENCEPIECE if Path(directory, name).is_file()]
    exact = directory / "tokenizer.json"
    wanted = ", ".join((*WRITTEN[:1], *SENTENCEPIECE))
    check(files or exact.is_file(), f"{directory} holds none of {wanted}: nothing to convert.")
    if exact.is_file():
        tokenizer = complete(exact, directory)
    else:
        tokenizer = convert(files[0], directory)
        compare(tokenizer, files[0])
    write(tokenizer, directory, Path(args.output_dir or directory))


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add, path = parser.add_argument, {"type": os.path.expanduser}
    add("--model_name_or_path", **path, required=True, help="A directory, or a fetched hub model.")
    add("--output_dir", **path, help="Where it goes; weights become links. Default: in place.")
    add("--check", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse what cannot work, and what would replace files that are kept."""
    name, out = args.model_name_or_path, Path(args.output_dir or "")
    check(args.check is None, "--check is gone. Type: python check_tokenizer.py --text_file FILE")
    if args.output_dir:
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        check(is_free, f"--output_dir {out} is not empty. Name a new directory.")
    else:
        hint = "For a hub model give --output_dir too: the hub's own cache is not written to"
        check(Path(name).is_dir(), f"{name} is no directory here. {hint}.")
        kept = [old + KEPT for old in REPLACED if Path(name, old + KEPT).exists()]
        check(not kept, f"{name} was converted before: move {', '.join(kept)} away.")


def check(condition, message):
    if not condition:
        fail(message)


def fail(message):
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def find_model(name):
    """The directory of a model: the path itself, or the hub's cache of it."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        fail(f"{name} is not here. Fetch it first: bash ../jobs/fetch_model.sh {name}")


# ---- The conversion ----


def convert(file, directory):
    """Return the tokenizer of a sentencepiece file, with the roles that the JSON files give."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own class moves between its versions
        fail(f"{file} is no sentencepiece model ({error}). A git-lfs pointer? Fetch the file.")
    kinds, trainer, names = proto.SentencePiece, proto.trainer_spec, [p.piece for p in proto.pieces]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN)
    is_unigram = trainer.model_type == trainer.UNIGRAM
    check(is_unigram or trainer.model_type == trainer.BPE, f"{file} is neither unigram nor BPE.")
    tokenizer = Tokenizer(make_model(proto, names, unknown))
    steps = add_rules(tokenizer, proto.normalizer_spec)
    for name, kind in zip(names, (piece.type for piece in proto.pieces), strict=True):
        # A unigram model finds its own pieces by their scores, where its rules leave them alone.
        is_left = all(step.normalize_str(name) in (name, "▁" + name) for step in steps)
        is_own = kind == kinds.USER_DEFINED
        if kind in (kinds.CONTROL, kinds.UNKNOWN) or (is_own and not (is_unigram and is_left)):
            tokenizer.add_tokens([AddedToken(name, normalized=False, special=not is_own)])
    default = {"bos_token": trainer.bos_piece, "eos_token": trainer.eos_piece}
    roles = {"unk_token": names[unknown]}
    roles, settings, reason = find_roles(directory, tokenizer, roles, default)
    if settings["add_bos_token"]:
        add_bos(tokenizer, roles["bos_token"])
    kind, has = "unigram" if is_unigram else "BPE", "with" if trainer.byte_fallback else "without"
    print(f"file       {file}: {kind}, {len(names):,} pieces, {has} bytes for rare characters")
    added = "put before every text" if settings["add_bos_token"] else "not added"
    print(f"roles      {', '.join(map(' '.join, roles.items()))}; BOS {added} ({reason})")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **settings)


def complete(file, directory):
    """Return the tokenizer of a tokenizer.json as it stands, with its roles; BOS if asked for."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(file))
    roles, settings, reason = find_roles(directory, tokenizer, {}, {})
    as_it_stands = PreTrainedTokenizerFast.from_pretrained(directory).backend_tokenizer
    if getattr(as_it_stands, "fix_mistral_regex", None) is False:  # transformers found it wrong
        mended = PreTrainedTokenizerFast.from_pretrained(directory, fix_mistral_regex=True)
        tokenizer.pre_tokenizer = mended.backend_tokenizer.pre_tokenizer
        settings["fix_mistral_regex"] = True
        print("numbers    are split as their makers do, not as tokenizer.json says")
    first, bos = tokenizer.encode("a").ids[:1], roles.get("bos_token")
    if settings.pop("add_bos_token") and first != [tokenizer.token_to_id(bos)]:
        add_bos(tokenizer, bos)
    kept = "all else kept" if "fix_mistral_regex" in settings else "kept as it is"
    print(f"file       {file}: {kept}, {tokenizer.get_vocab_size():,} tokens")
    print(f"roles      {', '.join(map(' '.join, roles.items()))}; BOS {reason}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **settings)


def add_bos(tokenizer, bos):
    rule = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}
    rule["special_tokens"] = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(**rule)


def make_model(proto, names, unknown):
    """The model with its pieces: their scores, or the merges in the order of their scores."""
    kinds, trainer = proto.SentencePiece, proto.trainer_spec
    options = {"byte_fallback": trainer.byte_fallback}
    if trainer.model_type == trainer.UNIGRAM:
        scores = unigram_scores(proto, kinds)
        return models.Unigram(list(zip(names, scores, strict=True)), unknown, **options)
    known, merges = set(names), []
    pieces = [p for p in proto.pieces if p.type in (kinds.NORMAL, kinds.USER_DEFINED)]
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        pairs = [(piece.piece[:n], piece.piece[n:]) for n in range(1, len(piece.piece))]
        merges += [pair for pair in pairs if known.issuperset(pair)]
    vocab = {name: i for i, name in enumerate(names)}
    return models.BPE(vocab, merges, unk_token=names[unknown], fuse_unk=True, **options)


def add_rules(tokenizer, rules):
    """Give the tokenizer the file's normalizer and decoder; return the steps of the former."""
    steps, tail = [], []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
        tail.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + tail)
    return steps


def unigram_scores(proto, kinds):
    """Log probabilities; user-defined pieces get sentencepiece's own score: they always win."""
    best = max(piece.score for piece in proto.pieces if piece.type == kinds.NORMAL)
    own = kinds.USER_DEFINED
    return [len(p.piece) * best - 0.1 if p.type == own else p.score for p in proto.pieces]


def add_tokens(tokenizer, directory, special, is_exact):
    """Add the tokens of other files that have rows, at their ids; return {those left out: why}."""
    config, left = read_json(directory / "config.json"), {}
    rows = (config.get("text_config") or config).get("vocab_size", 0)
    found = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {
        place: {"content": text, "normalized": False}
        for text, place in read_json(directory / "added_tokens.json").items()
    }
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for place, token in sorted((int(place), token) for place, token in found.items()):
        text, here = token["content"], tokenizer.token_to_id(token["content"])
        if here is None and place >= rows:
            past = f"its id {place} is past the embedding's {rows:,} rows"
            left[text] = past if rows else "config.json does not tell how many rows there are"
            print(f"left out   {text}: {left[text]}")
        elif here is None or (is_exact and text not in known):
            flags = {} if is_exact else {"normalized": False}  # sentencepiece's rules come later
            flags |= {"special": True} if text in special else {}
            tokenizer.add_tokens([AddedToken(**token | flags)])
            print(f"added      {text}, id {place}")
        here = tokenizer.token_to_id(text)
        problem = f"the files of {directory} give {text} the id {place}, its vocabulary {here}"
        check(here == place or text in left, f"{problem}. Correct what is wrong.")
    return left


def find_roles(directory, tokenizer, roles, default):
    """Return ({role: token}, other settings, why BOS is added or not) from the JSON files."""
    config = read_json(directory / "tokenizer_config.json")
    given = read_json(directory / "special_tokens_map.json") | config
    kinds = [f"{kind}_token" for kind in ("unk", "bos", "eos", "pad", "cls", "sep", "mask")]
    more = given.get("additional_special_tokens") or given.get("extra_special_tokens") or []
    more = {f"special {i}": t for i, t in enumerate(more)} if isinstance(more, list) else more
    more = {kind: given.get(kind) for kind in kinds if kind not in roles} | more
    more = {kind: t.get("content") if isinstance(t, dict) else t for kind, t in more.items()}
    left = add_tokens(tokenizer, directory, more.values(), is_exact=not default)
    known = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    names = tokenizer.get_vocab()
    for kind, token in more.items():
        if token in names:
            roles |= {kind: token} if kind in kinds else {}
            tokenizer.add_special_tokens([token] if not (default or token in known) else [])
        elif token:
            why = left.get(token, "the model has no such piece, and no file gives it an id")
            print(f"left out   {kind} {token}: {why}")
    roles |= {kind: t for kind, t in default.items() if kind not in roles and t in names}
    asked, reason = config.get("add_bos_token"), "as tokenizer_config.json says"
    if asked is None:
        # transformers 4 added BOS for a Llama tokenizer that does not say; 5 does not.
        asked = default and str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        reason = "a Llama tokenizer's default" if asked else "not asked for"
    settings = {"add_bos_token": bool(asked) and "bos_token" in roles}
    if isinstance(config.get("model_max_length"), int) and config["model_max_length"] < 10**9:
        settings["model_max_length"] = config["model_max_length"]
    settings |= {"chat_template": config["chat_template"]} if config.get("chat_template") else {}
    if (directory / "chat_template.jinja").is_file():
        settings["chat_template"] = (directory / "chat_template.jinja").read_text("utf-8")
    return roles, settings, reason


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def compare(tokenizer, file):
    """Refuse a conversion whose ids are not sentencepiece's."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    # What shows differences: the file's own pieces in a row, rare characters, spaces, line ends.
    kinds = (model.is_control, model.is_byte, model.is_unknown)
    pieces = [model.id_to_piece(i) for i in range(len(model)) if not any(k(i) for k in kinds)]
    texts = ["".join(pieces[n : n + 50]).replace("▁", " ") for n in range(0, len(pieces), 50)]
    texts += ["鬱は難しい😀𠮷", "ＡＢＣ　１２３ｱｲｳ", "二つ  の空白", "改\n行\t字下げ"]
    texts += [" 前", "後 ", "a b  c"]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bad = [text[:80] for text, ids in zip(texts, encoded, strict=True) if ids != model.encode(text)]
    # A few may differ: the two libraries cut combining characters apart differently.
    problem = f"{len(bad)} of {len(texts)} texts get other ids than from sentencepiece: {bad[:1]}"
    check(len(bad) <= len(texts) // 100, f"{problem}. Nothing was written: it is not supported.")
    print(f"check      {len(texts) - len(bad):,} of {len(texts):,} texts have sentencepiece's ids")


def write(tokenizer, directory, out):
    """Write the tokenizer into out; from another directory, link everything else there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if out.resolve() == directory.resolve():
            for path in (out / name for name in REPLACED if (out / name).is_file()):
                path.rename(path.with_name(path.name + KEPT))
        else:
            for path in sorted(directory.iterdir()):
                if path.name not in REPLACED and not path.name.startswith("."):
                    (out / path.name).symlink_to(path.resolve())
        tokenizer.save_pretrained(out)
    except OSError as error:
        fail(f"{out} cannot be written ({error.strerror}). Name another --output_dir.")
    print(f"written    {', '.join(WRITTEN)} in {out}")
    command = f"python generate_text.py --model_name_or_path {shlex.quote(str(out))}"
    print(f"next       {command} --prompt TEXT")


if __name__ == "__main__":
    main()
