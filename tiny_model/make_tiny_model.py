#!/usr/bin/env python3
"""Make a small model to try things with: a tokenizer trained on your text, and random weights.

A checkpoint made here has the architecture, the switches (tied embeddings, biases, special tokens)
and the kind of tokenizer of a real model, needs no network and is there in seconds, so every other
script can be tried on it first. It knows nothing until it is trained.

    python make_tiny_model.py --model_type llama --text_file ../jglue/output/jsquad_train.jsonl \
        --output_dir output/llama --vocab_size 520
    qsub -P GROUP job.sh

Costs about 15 s on two CPU cores. The same arguments give the same files, byte for byte. The types:
gpt2 Cerebras-GPT; gpt_neox OpenCALM (Dolly and rinna have other switches); falcon Falcon-7B; mpt
MPT-7B; llama OpenLLaMA, Swallow, llm-jp; qwen3 Qwen3. Byte-level BPE: Radford et al. 2019;
sentencepiece: Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

MODEL_TYPES = ("gpt2", "gpt_neox", "falcon", "mpt", "llama", "qwen3")
SIZES = "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings"
RECORD = "tiny_model.json"  # the arguments a checkpoint was made with, beside it
FALCON = "TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN PREFIX SUFFIX MIDDLE"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model_type", choices=MODEL_TYPES, required=True, help="architecture and tokenizer")
    add("--text_file", type=Path, required=True, help=".txt, or .jsonl/.json (all its strings)")
    add("--output_dir", type=Path, required=True, help="directory to write; must be new or empty")
    add("--vocab_size", type=int, default=1000, help="more: shorter sequences (default 1000)")
    add("--hidden_size", type=int, default=128, help="weights: with its square (default 128)")
    add("--num_hidden_layers", type=int, default=4, help="time and weights: with it (default 4)")
    add("--num_attention_heads", type=int, default=4, help="even parts of the width (default 4)")
    add("--max_position_embeddings", type=int, default=1024, help="longest input (default 1024)")
    add("--initializer_range", type=float, help="std of the weights (default: the type's, 0.02)")
    add("--seed", type=int, default=0, help="of the random weights (default 0)")
    args = parser.parse_args(argv)
    for name in SIZES.split():
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is below 1. Give a positive number.")
    width, heads, std = args.hidden_size, args.num_attention_heads, args.initializer_range
    if width % (2 * heads):
        fits = ", ".join(str(n) for n in range(1, width + 1) if width % (2 * n) == 0)
        advice = f"Heads that fit: {fits or 'none; take an even --hidden_size'}"
        fail(f"--hidden_size {width} cannot be split into {heads} heads of even size. {advice}.")
    if std is not None and std <= 0:
        fail(f"--initializer_range {std} would make all weights equal. Give a positive number.")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed {args.seed} is out of range. Give a number from 0 to {2**32 - 1}.")
    return args


def strings_in(value):
    """Yield every string value in a JSON value, at any depth (not the keys)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def parse_json(lines):
    """Return one JSON document, or a list with one value per line (as in JGLUE's .json files)."""
    try:
        return json.loads("\n".join(lines))
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines if line.strip()]


def read_texts(path):
    """Return the file's texts that are not empty: lines of a .txt, strings of a .json or .jsonl."""
    if not path.is_file() or path.suffix not in (".txt", ".jsonl", ".json"):
        fail(f"--text_file {path} does not exist, or is none of .txt, .jsonl, .json. Name another.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        values = lines if path.suffix == ".txt" else parse_json(lines)
        texts = [text for text in strings_in(values) if text.strip()]
        "".join(texts).encode()
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}). Type: iconv -f CP932 -t UTF-8 {path} >new")
    except UnicodeEncodeError as error:
        fail(f"{path} holds half of a character ({error.object[error.start]!r}). Remove it.")
    except json.JSONDecodeError as error:
        place = f"{path} line {lines.index(error.doc) + 1}"
        fail(f"{place} is not JSON ({error.msg}, column {error.colno}). Mend that line.")
    return texts or fail(f"{path} holds no text. Give a file with text in it.")


def prepare_output_dir(args):
    """Return the record of this run and a directory beside output_dir, which must be empty."""
    record = {**vars(args), "text_file": args.text_file.name}
    record["text_sha256"] = hashlib.sha256(args.text_file.read_bytes()).hexdigest()
    out = record.pop("output_dir")
    record = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    kept, folder = out / RECORD, out.absolute().with_name(f".{out.name}-{os.getpid()}")
    try:
        if kept.is_file() and kept.read_text(encoding="utf-8") == record:
            print(f"{out} already holds this model (same arguments, same text): nothing to do.")
            raise SystemExit(0)
        if out.exists():
            out.rmdir()  # fails on a file, and on a directory that holds anything
        folder.mkdir(parents=True)
    except OSError as error:
        fail(f"{out} cannot be written ({error.strerror}) and is not overwritten. Name another.")
    return record, folder


def train_byte_level(args, texts, folder):
    """Write a byte-level BPE tokenizer of the family's class, special tokens at their places."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end, pad, turns = "<|endoftext|>", "<|padding|>", ["<|im_start|>", "<|im_end|>"]
    falcon = [f">>{name}<<" for name in FALCON.split()]  # its end has id 11; no BOS, no pad
    family, first, last, options = {  # class, special tokens before and after the others, options
        "gpt2": (transformers.GPT2Tokenizer, [], [end], {}),  # the last id (50256), no pad
        "gpt_neox": (transformers.GPTNeoXTokenizer, [end, pad], [], {}),
        "mpt": (transformers.GPTNeoXTokenizer, [end, pad], [], {}),
        "falcon": (transformers.PreTrainedTokenizerFast, [*falcon, end], [], {"eos_token": end}),
        "qwen3": (transformers.Qwen2Tokenizer, [], [end, *turns], {"eos_token": turns[1]}),
    }[args.model_type]
    least = 256 + len(first + last)
    if args.vocab_size < least:
        fail(f"--vocab_size is too small: bytes and special tokens need {least}. Give {least}.")
    if args.model_type == "falcon":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = family().backend_tokenizer
    size, alphabet = args.vocab_size - len(last), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    trained = json.loads(backend.to_str())["model"]
    vocab = trained["vocab"] | {name: len(trained["vocab"]) + n for n, name in enumerate(last)}
    if args.vocab_size > len(vocab):
        fail(f"--vocab_size is too large: no more than {len(vocab)} tokens. Give {len(vocab)}.")
    if args.model_type == "falcon":
        options["tokenizer_object"] = backend
    else:
        options |= {"vocab": vocab, "merges": [tuple(pair) for pair in trained["merges"]]}
    tokenizer = family(model_max_length=args.max_position_embeddings, **options)
    tokenizer.add_tokens(first + last, special_tokens=True)
    if args.model_type == "qwen3":
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def train_sentencepiece(args, texts, folder):
    """Write a sentencepiece model (BPE, byte fallback) and a tokenizer that does the same."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    options = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "num_threads": 1}
    options |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
    options["normalization_rule_name"] = "identity"  # the default turns full-width into half-width
    options["character_coverage"] = 0.9995  # usual for Japanese; rarer characters become bytes
    options["max_sentence_length"] = 2**30  # bytes; longer lines would be left out without a word
    options |= {"vocab_size": args.vocab_size, "minloglevel": 2}
    lines = (line for text in texts for line in text.split("\n"))
    written = BytesIO()  # a file name would be stored in the model and make two of them differ
    try:
        SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **options)
    except RuntimeError as error:
        if match := re.search(r"\d+ vs (\d+)", str(error)):
            fail(f"--vocab_size is too small: characters, bytes need {match[1]}. Give {match[1]}.")
        if match := re.search(r"value <= (\d+)", str(error)):
            fail(f"--vocab_size is too large: no more than {match[1]} tokens. Give {match[1]}.")
        raise
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    model = SentencePieceProcessor(model_proto=written.getvalue())
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, i in vocab.items():  # in the order in which they were merged
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i)):
            pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
            merges += [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(bpe)
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    names |= {"add_bos_token": True, "model_max_length": args.max_position_embeddings}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # transformers 4 and other tools look here for BOS
    content = json.loads(settings.read_text(encoding="utf-8")) | {"add_bos_token": True}
    settings.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def make_model(args, tokenizer):
    """Return the model in fp32 with seeded random weights and the switches of the real ones."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    kind, width, heads = args.model_type, args.hidden_size, args.num_attention_heads
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    setup = {name: getattr(args, name) for name in SIZES.split()}
    setup |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    if kind == "gpt2":
        setup |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        setup["activation_function"] = "gelu"
    elif kind == "gpt_neox":
        setup |= {"use_parallel_residual": False, "rotary_pct": 1.0, "intermediate_size": 4 * width}
    elif kind == "falcon":  # all else is transformers' default
        setup["bos_token_id"] = eos
    elif kind == "mpt":  # the real config has no token ids at all
        setup |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        setup |= {"max_seq_len": setup.pop("max_position_embeddings"), "use_cache": False}
    elif kind == "llama":  # three matrices instead of two: the same weights as 4 x width
        setup["intermediate_size"] = (8 * width // 3 + 7) // 8 * 8
    else:
        setup |= {"intermediate_size": 3 * width, "head_dim": width // heads}
        setup["num_key_value_heads"] = heads // 2 if heads % 2 == 0 else heads
        setup["tie_word_embeddings"] = True
    if args.initializer_range is not None:
        setup["initializer_range"] = args.initializer_range
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(kind, **setup)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stop = {"eos_token_id": [eos, pad] if kind == "qwen3" else eos}
    stop["pad_token_id"] = eos if pad is None else pad
    model.generation_config = GenerationConfig(bos_token_id=bos, **stop)
    return model


def print_summary(args, texts, model, tokenizer):
    """Print what was made, in five lines."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kind, out, embedding = args.model_type, args.output_dir, model.get_input_embeddings().weight
    tied = "are the same" if embedding is model.get_output_embeddings().weight else "another"
    size = f"{args.num_hidden_layers} layers x {args.hidden_size}, {args.num_attention_heads} heads"
    count = f"{model.num_parameters():,} parameters, {embedding.numel():,} of them input embeddings"
    print(f"model      {kind}, {size}, {count}", end=" ")
    print(f"(the output embeddings {tied} matrix); random weights, seed {args.seed}")
    name = "sentencepiece BPE with byte fallback" if kind == "llama" else "byte-level BPE"
    rate = f"{sum(map(len, texts)) / sum(map(len, ids)):.2f} characters a token on {args.text_file}"
    print(f"tokenizer  {name}, {args.vocab_size:,} tokens, {rate}")
    same = sum(tokenizer.decode(row) == text for row, text in zip(ids, texts, strict=True))
    print(f"check      decode(encode(text)) gives {same:,} of its {len(texts):,} texts back")
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    print(f"files      {', '.join(files)} ({sum(files.values()) / 1e6:.1f} MB) in {out}")
    data = "FILE" if args.text_file.suffix == ".txt" else args.text_file
    command = f"python ../finetune_full/finetune_full.py --model_name_or_path {out}"
    print(f"next       {command} --train_file {data} --output_dir output/trained")


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess and warn
    texts = read_texts(args.text_file)
    record, folder = prepare_output_dir(args)
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    train_tokenizer = train_sentencepiece if args.model_type == "llama" else train_byte_level
    try:
        train_tokenizer(args, texts, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert max(tokenizer.get_vocab().values()) < args.vocab_size
        model = make_model(args, tokenizer)
        model.save_pretrained(folder)
        (folder / RECORD).write_text(record, encoding="utf-8")
        for path in folder.iterdir():  # safetensors writes for the owner only
            path.chmod(folder.stat().st_mode & 0o666)
        folder.rename(args.output_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_summary(args, texts, model, tokenizer)


if __name__ == "__main__":
    main()
