#!/usr/bin/env python3
"""Write a copy of a model with new tokens: in its tokenizer, and as rows of its embeddings.

A new row, of the input and the output embeddings, is the mean of the rows of the pieces that the
token was split into until now: with one mean for all, the tokens would start alike. Nothing else
changes. Takes the model's size in memory and on the disk, and no GPU. The new rows have learned
nothing then: the command that is printed last trains them.

By hand  python add_tokens.py --model_name_or_path MODEL --new_tokens "<a>,<b>" --output_dir OUT
Follows  https://huggingface.co/docs/transformers/main_classes/model, "resize_token_embeddings"
"""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import transformers  # its classes, and torch, come when they are used: it takes seconds
from sentencepiece import SentencePieceProcessor


def main(argv=None):
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess and warn
    name, output = args.model_name_or_path, Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        free = os.access(output, os.W_OK) and not any(output.iterdir())
        check(free, f"--output_dir {output} must be empty, and yours to write. Choose another.")
        config, tokenizer = load_tokenizer(name)
        new_tokens = add_tokens(tokenizer, args.new_tokens)
        model = load_model(name, config)
        add_rows(model, new_tokens)
        save(name, model, tokenizer, output, new_tokens)
    except Exception as error:  # damaged files can raise anything
        why = error if " " in str(error) else repr(error)
        fail(f"{name} cannot be copied to {output}: {why}")
    say("next", f"python finetune_lastlayer.py --model_name_or_path {shlex.quote(args.output_dir)} "
                f"--train new_tokens --new_tokens {shlex.quote(','.join(args.new_tokens))} "
                "--train_file FILE")  # fmt: skip


def load_tokenizer(name):
    """Return (config, tokenizer) of a model that can be given rows."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    quantised = getattr(config, "quantization_config", None)
    check(not quantised, f"{name} is stored quantised. Take the model in full precision.")
    return config, exact_tokenizer(name, config.get_text_config().vocab_size, say)


def add_tokens(tokenizer, texts):
    """Add tokens to the tokenizer; return {id: ids of the pieces that stood for it until now}."""
    known, pieces = tokenizer.get_vocab(), {}
    for text in texts:
        ids = pieces[text] = tokenizer(text, add_special_tokens=False)["input_ids"]
        check(ids, f"--new_tokens: this tokenizer makes nothing of {text!r}. Choose another name.")
        is_one = text in known or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id)
        check(not is_one, f"--new_tokens: {text} is one token already. Leave out what is not new.")
    tokenizer.add_tokens([transformers.AddedToken(text, normalized=False) for text in texts])
    new_tokens = {tokenizer.convert_tokens_to_ids(text): pieces[text] for text in texts}
    free = len(new_tokens) == len(texts) and new_tokens.keys().isdisjoint(known.values())
    check(free, "this tokenizer's ids have gaps: a new token got the id of another.")
    for row, text in zip(new_tokens, texts, strict=True):
        parts = " ".join(repr(tokenizer.decode([i])) for i in pieces[text])
        say("new token", f"{text} = {row}, until now {len(pieces[text])} pieces: {parts}")
    return new_tokens


def load_model(name, config):
    """The model on the CPU, in the precision of its file."""
    config.dtype = None  # "auto" would believe it, whatever the file holds
    options = {"config": config, "dtype": "auto", "trust_remote_code": False}
    load = auto_class(config).from_pretrained
    model, info = load(name, output_loading_info=True, **options)
    lost = sorted(info["missing_keys"])[:3]
    check(not lost, f"{name} lacks weights that would be random: {lost}. Fetch it again.")
    return model


def add_rows(model, new_tokens):
    """Give each token its row. Rows beyond the tokens, as many models have, are used first."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # The file counts: it may hold a head of its own where the configuration ties it.
    tied = model.config.tie_word_embeddings = head.weight is embedding.weight
    before, needed = len(embedding.weight), max(new_tokens) + 1
    if needed > before:
        model.resize_token_embeddings(needed, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for parameter in {*embedding.parameters(), *head.parameters()}:  # a bias has rows too
        for row, pieces in new_tokens.items():
            parameter.data[row] = parameter.data[pieces].float().mean(0)
    say("rows", f"{before:,} before, {len(embedding.weight):,} now, {embedding.weight.dtype}; "
                f"output embeddings {'tied to the input' if tied else 'of their own'}")  # fmt: skip


def save(name, model, tokenizer, output, new_tokens):
    """Write the copy, whole or not at all. tokenizer.json alone: no .model file has the tokens."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial.") as partial:  # may be a link
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # What only some have: a template that the tokenizer does not read, what they see with.
        kinds = ("preprocessor_config", "processor_config", "video_preprocessor_config")
        for kind in ("chat_template", *kinds):
            with contextlib.suppress(OSError):
                file = transformers.utils.cached_file(name, f"{kind}.json")
                shutil.copy(file, partial)
        again = transformers.AutoTokenizer.from_pretrained(partial, trust_remote_code=False)
        for row in new_tokens:
            text = tokenizer.convert_ids_to_tokens(row)
            kept = again(text, add_special_tokens=False)["input_ids"] == [row]
            check(kept, f"this kind of tokenizer does not keep {text}. Nothing was written.")
        mode = Path(partial, "config.json").stat().st_mode
        for path in Path(partial).iterdir():
            if path.suffix == ".safetensors":
                path.chmod(mode)  # safetensors writes for the owner only
            path.rename(output / path.name)


# ---- Guard rails: no need to read ----


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, expand = parser.add_argument, os.path.expanduser
    add("--model_name_or_path", required=True, type=expand, help="Directory or hub name.")
    add("--new_tokens", required=True, help='"<a>,<b>": texts that become one token each.')
    add("--output_dir", required=True, type=expand, help="A new or empty directory for the copy.")
    args = parser.parse_args(argv)
    args.new_tokens = [text.strip() for text in args.new_tokens.split(",")]
    good = all(args.new_tokens) and len({*args.new_tokens}) == len(args.new_tokens)
    check(good, "--new_tokens: a name is empty, or there twice. Type them as <a>,<b>.")
    return args


# Copied from jobs/published.py
def auto_class(config):
    """AutoModelForCausalLM; for a model that sees, too, the class that keeps what it sees with."""
    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


# Copied from finetune_full/finetune_full.py
def exact_tokenizer(name, rows, say, grown=False, **remote):
    """The tokenizer with the ids of the model's own file, which AutoTokenizer may not give."""
    from transformers.models.auto import tokenization_auto as auto

    off = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    names, off = ("tokenizer.json", "spiece.model", "tokenizer.model"), dict.fromkeys(off, False)
    exact, *models = (auto.cached_file(name, file, **off) for file in names)
    text, wanted, plain = "", [], {"add_special_tokens": False, "verbose": False}
    if file := exact or next(filter(None, models), None):  # compared on a text of its own pieces
        own = auto.TokenizersBackend(tokenizer_file=file) if exact else SentencePieceProcessor(file)
        text = "It's WE'LL 1234567  e\u0301ＡＢ鬱😀\n\n\n\tｱ" + own.decode([*range(0, len(own), 7)])
        wanted = own.encode(text, **(plain if exact else {}))
    for load in (auto.AutoTokenizer, auto.TokenizersBackend)[: 2 if exact else 1]:
        with suppress(TypeError if exact else ()):  # a class may not even take in the file
            tokenizer = load.from_pretrained(name, **remote)
            if same := tokenizer(text, **plain)["input_ids"] == wanted:
                break
    command = f"python ../generate_text/convert_tokenizer.py --model_name_or_path {name}"
    remedy = f"Convert it once: {command} --output_dir NEW, and use NEW."
    check(same, f"the tokenizer of {name} gives other ids than {file} itself. {remedy}")
    if load is auto.TokenizersBackend:
        say("tokenizer", f"PreTrainedTokenizerFast.from_pretrained({name!r}), not AutoTokenizer")
    last, given = max(tokenizer.get_vocab().values()), auto.get_tokenizer_config(name)
    past = f"{name}'s tokenizer gives ids up to {last}, past the end of the embedding's {rows} rows"
    check(last < max(rows, grown * len(tokenizer)), f"{past}. {remedy}")
    # transformers 4 put BOS before a text where a Llama tokenizer does not say; 5 does not.
    asked = given.get("add_bos_token", not exact and "Llama" in str(given.get("tokenizer_class")))
    has = not asked or leading_ids(tokenizer) == [tokenizer.bos_token_id]
    check(has, f"the tokenizer of {name} gives no BOS, which its files ask for. {remedy}")
    return tokenizer


# Copied from finetune_full/finetune_full.py
def leading_ids(tokenizer):
    """The ids (a BOS, or none) that this tokenizer puts before every text."""
    text, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return ids[: ids.index(text[0])]


# Copied from finetune_full/finetune_full.py
def check(condition, message):
    if not condition:
        fail(message)


# Copied from finetune_full/finetune_full.py
def fail(message, every_rank=False):
    """One line on stderr and exit code 2; of several ranks the first one speaks."""
    text = " ".join(str(message).split())[:600]
    text += " Accept its licence there, then type: hf auth login" if "gated repo" in text else ""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print("error:", text, file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when one leaves
    raise SystemExit(2)


# Copied from finetune_full/finetune_full.py
def say(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", flush=True)


if __name__ == "__main__":
    main()
