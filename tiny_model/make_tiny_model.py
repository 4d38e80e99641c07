#!/usr/bin/env python3
"""Make a small model to try things with: a tokenizer trained on your text and a checkpoint with random weights.

The seven models of this course have billions of weights. A checkpoint made here has the same architecture, the same
switches (tied embeddings, biases, special token ids) and the same kind of tokenizer, needs no network and is there in
seconds, so every other script can be tried on it first. It knows nothing until it is trained.

    python make_tiny_model.py --model_type llama --text_file ../jglue/output/jsquad_train.jsonl \
        --output_dir output/llama --vocab_size 520
    qsub -P GROUP job.sh

Costs about 15 s on two CPU cores, most of it imports. The same arguments give the same files, byte for byte.

Which model stands behind which type: gpt2 Cerebras-GPT; gpt_neox OpenCALM (also Dolly and rinna, whose blocks differ in
use_parallel_residual and rotary share); falcon Falcon-7B; mpt MPT-7B; llama OpenLLaMA, Swallow, llm-jp; qwen3 Qwen3.
Byte-level BPE: Radford et al. 2019. Sentencepiece: Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

MODEL_TYPES = ("gpt2", "gpt_neox", "falcon", "mpt", "llama", "qwen3")
RECORD = "tiny_model.json"  # the arguments a checkpoint was made with, beside it
FALCON_NAMES = "TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN PREFIX SUFFIX MIDDLE".split()
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_type", choices=MODEL_TYPES, required=True, help="architecture and kind of tokenizer")
    add("--text_file", type=Path, required=True, help="text for the tokenizer: .txt, or .jsonl/.json (all its strings)")
    add("--output_dir", type=Path, required=True, help="directory to write; must be new or empty")
    add("--vocab_size", type=int, default=1000, help="tokens. Larger: shorter sequences, more weights (default 1000)")
    add("--hidden_size", type=int, default=128, help="width. The weights grow with its square (default 128)")
    add("--num_hidden_layers", type=int, default=4, help="depth. Time and weights grow with it (default 4)")
    add("--num_attention_heads", type=int, default=4, help="must divide hidden_size into even heads (default 4)")
    add("--max_position_embeddings", type=int, default=1024, help="longest sequence in tokens (default 1024)")
    add("--initializer_range", type=float, help="std of the random weights (default: the architecture's own, 0.02)")
    add("--seed", type=int, default=0, help="of the random weights; the same seed gives the same files (default 0)")
    args = parser.parse_args(argv)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is below 1. Give a positive number.")
    if args.hidden_size % (2 * args.num_attention_heads):
        heads = [n for n in range(1, args.hidden_size + 1) if args.hidden_size % (2 * n) == 0]
        advice = f"Heads that fit: {', '.join(map(str, heads))}" if heads else "Take an even --hidden_size"
        fail(
            f"--hidden_size {args.hidden_size} cannot be split into {args.num_attention_heads} heads of even size, "
            f"which attention with rotary positions needs. {advice}."
        )
    if args.initializer_range is not None and args.initializer_range <= 0:
        fail(f"--initializer_range {args.initializer_range} would make every weight equal. Give a positive number.")
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


def read_texts(path):
    """Return the file's texts as a list of non-empty strings: lines of a .txt, string values of a .json or .jsonl."""
    if not path.is_file():
        fail(f"--text_file {path} does not exist. The tokenizer is trained on it: give a .txt, .jsonl or .json file.")
    if path.suffix not in (".txt", ".jsonl", ".json"):
        fail(f"--text_file {path} is none of .txt, .jsonl, .json. Its strings would be guessed: rename or convert it.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}). Convert it: iconv -f CP932 -t UTF-8 {path} > new{path.suffix}")
    texts = content.split("\n") if path.suffix == ".txt" else strings_in(parse_json(path, content))
    texts = [text for text in texts if text.strip()]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        fail(f"{path} holds half of a character ({error.object[error.start]!r}), which is no text. Remove it.")
    if not texts:
        fail(f"{path} holds no text. A tokenizer cannot be trained on nothing: give a file with text in it.")
    return texts


def parse_json(path, content):
    """Return one JSON document, or a list with one value per line (JGLUE's .json files are of that kind too)."""
    if path.suffix == ".json":
        try:
            return json.loads(content)
        except json.JSONDecodeError:
            pass
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        try:
            rows.append(json.loads(line) if line.strip() else None)
        except json.JSONDecodeError as error:
            fail(f"{path} line {number} is not JSON ({error.msg} at column {error.colno}). Mend or remove that line.")
    return rows


def check_output_dir(args):
    """Return the record of this run; leave with 0 if output_dir already holds its result, with 2 if something else."""
    digest = hashlib.sha256(args.text_file.read_bytes()).hexdigest()
    record = {**vars(args), "text_file": args.text_file.name, "text_sha256": digest}
    del record["output_dir"]
    out = args.output_dir
    if out.is_dir() and any(out.iterdir()):
        kept = out / RECORD
        if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) == record:
            print(f"{out} already holds this model (same arguments, same text): nothing to do.")
            raise SystemExit(0)
        fail(f"--output_dir {out} is not empty and holds something else. It is not overwritten: name a new directory.")
    return record


def make_workspace(out):
    """Return a new directory beside `out`, renamed to `out` when everything is in it: a killed run leaves no half."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()  # fails on a file, and on a directory that was filled meanwhile
        return Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        fail(f"--output_dir {out} cannot be written ({error.strerror}). Name a directory you may write to.")


def vocab_error(args, smallest=None, largest=None):
    if smallest:
        fail(
            f"--vocab_size {args.vocab_size} is too small for {args.text_file}: the single characters, bytes and "
            f"special tokens alone need {smallest}. Give --vocab_size {smallest} or more."
        )
    fail(
        f"--vocab_size {args.vocab_size} is too large for {args.text_file}: its text gives no more than {largest} "
        f"tokens, and the others would never be trained. Give --vocab_size {largest} or less."
    )


def train_byte_level(args, texts):
    """Return a byte-level BPE tokenizer of the family's own class, its special tokens at the family's places."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer, GPTNeoXTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    end, pad, falcon = "<|endoftext|>", "<|padding|>", [f">>{name}<<" for name in FALCON_NAMES]
    family, first, last, names = {  # class, special tokens before and after the others, and their roles
        "gpt2": (GPT2Tokenizer, [], [end], {}),  # the last id (50256), no pad
        "gpt_neox": (GPTNeoXTokenizer, [end, pad], [], {}),
        "mpt": (GPTNeoXTokenizer, [end, pad], [], {}),
        "falcon": (PreTrainedTokenizerFast, [*falcon, end], [], {"eos_token": end}),  # id 11, no BOS, no pad
        "qwen3": (Qwen2Tokenizer, [], [end, "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
    }[args.model_type]
    smallest = len(first) + 256 + len(last)
    if args.vocab_size < smallest:
        vocab_error(args, smallest=smallest)
    if family is PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = family().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size - len(last),
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    trained = json.loads(backend.to_str())["model"]
    vocab = trained["vocab"] | {name: len(trained["vocab"]) + n for n, name in enumerate(last)}
    if len(vocab) < args.vocab_size:
        vocab_error(args, largest=len(vocab))
    if family is PreTrainedTokenizerFast:
        names["tokenizer_object"] = backend
    else:
        names.update(vocab=vocab, merges=[tuple(pair) for pair in trained["merges"]])
    tokenizer = family(model_max_length=args.max_position_embeddings, **names)
    tokenizer.add_tokens(first + last, special_tokens=True)
    if args.model_type == "qwen3":
        tokenizer.chat_template = CHATML
    return tokenizer


def train_sentencepiece(args, texts, folder):
    """Write folder/tokenizer.model (BPE, byte fallback, text kept as it is) and return the tokenizer made from it."""
    from io import BytesIO

    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    lines = [line for text in texts for line in text.split("\n")]
    written = BytesIO()  # a file name would be stored in the model and make two of them differ
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="bpe",
            vocab_size=args.vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # the usual value for Japanese; rarer characters become bytes
            normalization_rule_name="identity",  # the default would turn full-width into half-width
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # in bytes; longer lines would be left out without a word
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if match := re.search(r"\d+ vs (\d+)", str(error)):
            vocab_error(args, smallest=int(match.group(1)))
        if match := re.search(r"value <= (\d+)", str(error)):
            vocab_error(args, largest=int(match.group(1)))
        raise
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    # transformers' own reading of tokenizer.model drops a leading space, so tokenizer.json is written here, exactly
    ids = range(model.vocab_size())
    vocab = {model.id_to_piece(i): i for i in ids}
    merges = [pair for i in ids for pair in splits(model, vocab, i)]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",  # id 0, as in OpenLLaMA; byte fallback leaves <unk> without any other use
        add_bos_token=True,  # writes it into tokenizer.json
        model_max_length=args.max_position_embeddings,
    )


def splits(model, vocab, i):
    """Return the pairs of pieces that make piece `i`. Pieces are stored in the order in which they were merged."""
    piece = model.id_to_piece(i)
    if model.is_byte(i) or model.is_control(i) or model.is_unknown(i):
        return []
    pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
    return [(left, right) for left, right in pairs if left in vocab and right in vocab]


def make_config(args, tokenizer):
    """Return the family's config: the switches of the real models, the sizes asked for."""
    from transformers import AutoConfig

    hidden, heads = args.hidden_size, args.num_attention_heads
    size = {"hidden_size": hidden, "num_hidden_layers": args.num_hidden_layers, "num_attention_heads": heads}
    size["max_position_embeddings"] = args.max_position_embeddings
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    gated = (8 * hidden // 3 + 7) // 8 * 8  # three matrices instead of two: the same weights as 4 x hidden
    no_dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    special = {
        "gpt2": {"activation_function": "gelu", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        "gpt_neox": {"intermediate_size": 4 * hidden, "use_parallel_residual": False, "rotary_pct": 1.0, **no_dropout},
        "falcon": {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False,
                   "alibi": False, "tie_word_embeddings": True, **no_dropout},
        "mpt": {"no_bias": True, "tie_word_embeddings": True, "use_cache": False},
        "llama": {"intermediate_size": gated, "rms_norm_eps": 1e-6},
        "qwen3": {"intermediate_size": 3 * hidden, "head_dim": hidden // heads, "tie_word_embeddings": True,
                  "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads, "rms_norm_eps": 1e-6},
    }[args.model_type]  # fmt: skip
    if args.model_type == "falcon":
        ids["bos_token_id"] = tokenizer.eos_token_id
    if args.model_type == "mpt":  # its names differ, and the real config has no token ids at all
        size = {"d_model": hidden, "n_layers": args.num_hidden_layers, "n_heads": heads}
        size["max_seq_len"] = args.max_position_embeddings
        ids = {}
    if args.initializer_range is not None:
        special["initializer_range"] = args.initializer_range
    return AutoConfig.for_model(args.model_type, vocab_size=args.vocab_size, **size, **special, **ids)


def make_model(args, tokenizer):
    """Return the model in fp32 with seeded random weights and a generation_config that knows where to stop."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(make_config(args, tokenizer), dtype=torch.float32)
    eos = tokenizer.eos_token_id
    stop = [eos, tokenizer.pad_token_id] if args.model_type == "qwen3" else eos
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=pad)
    return model


def write_checkpoint(args, texts, record, folder):
    """Write model, tokenizer and record to `folder`, read the tokenizer back, return what the summary says."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.model_type == "llama":
        tokenizer = train_sentencepiece(args, texts, folder)
    else:
        tokenizer = train_byte_level(args, texts)
    model = make_model(args, tokenizer)
    tokenizer.save_pretrained(folder)
    if args.model_type == "llama":  # tokenizer.json adds BOS already; transformers 4 and other tools look here
        settings = folder / "tokenizer_config.json"
        content = json.loads(settings.read_text(encoding="utf-8")) | {"add_bos_token": True}
        settings.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    model.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if max(map(max, ids)) >= args.vocab_size:
        raise RuntimeError(f"the tokenizer gives id {max(map(max, ids))}, the model has {args.vocab_size} rows")
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "embedding": model.get_input_embeddings().weight.numel(),
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "characters_per_token": sum(map(len, texts)) / sum(map(len, ids)),
        "inexact": sum(tokenizer.decode(row) != text for row, text in zip(ids, texts, strict=True)),
    }


def print_summary(args, texts, made):
    """Print what was made, in five lines."""
    kind = "sentencepiece BPE with byte fallback" if args.model_type == "llama" else "byte-level BPE"
    tied = "the output embeddings are the same matrix" if made["tied"] else "the output embeddings another matrix"
    print(f"model      {args.model_type}, {args.num_hidden_layers} layers x {args.hidden_size}, "
          f"{args.num_attention_heads} heads, {made['parameters']:,} parameters, {made['embedding']:,} of them input "
          f"embeddings ({tied}); random weights, seed {args.seed}")  # fmt: skip
    print(f"tokenizer  {kind}, {args.vocab_size:,} tokens, {made['characters_per_token']:.2f} characters a token on "
          f"{args.text_file}")  # fmt: skip
    print(f"check      decode(encode(text)) gives {len(texts) - made['inexact']:,} of its {len(texts):,} texts back")
    sizes = {path.name: path.stat().st_size for path in sorted(args.output_dir.iterdir())}
    print(f"files      {', '.join(sizes)} ({sum(sizes.values()) / 1e6:.1f} MB) in {args.output_dir}")
    train_file = "FILE" if args.text_file.suffix == ".txt" else args.text_file
    print(f"next       python ../finetune_full/finetune_full.py --model_name_or_path {args.output_dir} "
          f"--train_file {train_file} --output_dir output/trained")  # fmt: skip


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, would guess and warn
    texts = read_texts(args.text_file)
    record = check_output_dir(args)
    folder = make_workspace(args.output_dir)
    try:
        made = write_checkpoint(args, texts, record, folder)
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)  # mkdtemp and safetensors write for the owner only
        for path in folder.iterdir():
            path.chmod(0o666 & ~mask)
        folder.rename(args.output_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_summary(args, texts, made)


if __name__ == "__main__":
    main()
