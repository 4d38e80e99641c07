"""Small checkpoints laid out as the repositories of the seven models are, and of three of today's.

The switches come from ../tiny_model/models.json, only the sizes are small; tokenizers are trained
on the spot, of that model's own kind, with its special tokens at its places and in its files.
Weights have std 0.15 (see conftest.py) and the type of number that the makers published.
"""

import json
from io import BytesIO
from pathlib import Path

import sentencepiece
import torch
from conftest import ROOT, ROWS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

REAL = json.loads((ROOT / "tiny_model" / "models.json").read_text(encoding="utf-8"))["models"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128, "max_position_embeddings": 128, "n_embd": 32, "n_layer": 2,
         "n_head": 4, "n_inner": 128, "n_positions": 128, "d_model": 32, "n_layers": 2,
         "n_heads": 4, "max_seq_len": 128}  # fmt: skip
END, FAST, NEOX = "<|endoftext|>", "PreTrainedTokenizerFast", "GPTNeoXTokenizer"
FALCON = ["TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER", "QUESTION", "DOMAIN",
          "PREFIX", "SUFFIX", "MIDDLE"]  # fmt: skip
# special tokens before the others, behind them, and tokenizer_config.json
BYTE_LEVEL = {
    "Cerebras-GPT-13B": ([], [END], {"tokenizer_class": "GPT2Tokenizer", "bos_token": END,
                                     "eos_token": END, "unk_token": END}),
    "dolly-v2-12b": ([END], ["### End", "### Instruction:", "### Response:\n"],
                     {"tokenizer_class": NEOX, "eos_token": END, "bos_token": END,
                      "pad_token": END, "padding_side": "left"}),
    "falcon-7b": ([*(f">>{name}<<" for name in FALCON), END], [],
                  {"tokenizer_class": FAST, "eos_token": END}),
    "mpt-7b": ([END, "<|padding|>"], [],
               {"tokenizer_class": NEOX, "eos_token": END, "bos_token": END}),
    "open-calm-7b": ([END, "<|padding|>"], [],
                     {"tokenizer_class": NEOX, "eos_token": END, "bos_token": END,
                      "unk_token": END, "pad_token": "<|padding|>"}),
    "Qwen3": ([], [END, "<|im_start|>", "<|im_end|>"],
              {"tokenizer_class": FAST, "eos_token": "<|im_end|>", "pad_token": END}),
    "Gemma-3": (["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], [],
                {"tokenizer_class": FAST, "eos_token": "<eos>", "bos_token": "<bos>",
                 "pad_token": "<pad>"}),
}  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TODAY = {
    "LLM-jp": {"model_type": "llama", "tie_word_embeddings": False, "bos_token_id": 1,
               "eos_token_id": 2, "torch_dtype": "bfloat16", "rope_theta": 10000.0},
    "Qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "num_key_value_heads": 2,
              "head_dim": 8, "torch_dtype": "bfloat16"},
    "Gemma-3": {"model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 8,
                "sliding_window": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True,
                "torch_dtype": "bfloat16",
                "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
SENTENCEPIECE = {
    "japanese-gpt-neox-3.6b": (
        "spiece.model",
        {"model_type": "unigram", "add_dummy_prefix": False, "pad_id": 0, "unk_id": 1, "bos_id": 2,
         "eos_id": 3},
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "[PAD]",
         "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "open_llama_13b": (
        "tokenizer.model", {"model_type": "bpe", "normalization_rule_name": "identity"},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>",
         "eos_token": "</s>", "unk_token": "<unk>"}),
}  # fmt: skip
NAMES = [*REAL, *TODAY]


def texts():
    return [row["prompt"] + row["completion"] for row in ROWS]


def byte_level(name, folder):
    """Write tokenizer.json and tokenizer_config.json; return the number of tokens."""
    first, last, settings = BYTE_LEVEL[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts(),
        trainers.BpeTrainer(vocab_size=320, special_tokens=first, initial_alphabet=alphabet),
    )
    backend.add_special_tokens(last)
    if name == "Gemma-3":
        bos = [("<bos>", backend.token_to_id("<bos>"))]
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=bos
        )
    backend.save(str(folder / "tokenizer.json"))
    template = {"Qwen3": CHATML, "Gemma-3": GEMMA}.get(name)
    settings = settings | ({"chat_template": template} if template else {})
    more = {"additional_special_tokens": last} if name == "dolly-v2-12b" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | more))
    return backend.get_vocab_size()


def sentence_piece(name, folder):
    """Write the .model file and tokenizer_config.json; return the number of tokens."""
    file, settings, config = SENTENCEPIECE[name]
    written = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts() * 3), model_writer=written, vocab_size=400,
        hard_vocab_limit=False, byte_fallback=True, remove_extra_whitespaces=False,
        character_coverage=1.0, num_threads=1, minloglevel=2, **settings,
    )  # fmt: skip
    (folder / file).write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).vocab_size()


def llm_jp(folder):
    """A Llama with a tokenizer.json: BOS by its post-processor, as LLM-jp's and Swallow's do."""
    backend = Tokenizer(models.BPE(byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts(),
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make(name, folder):
    """Write a small checkpoint like that model's repository into folder; return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    if name in SENTENCEPIECE:
        tokens = sentence_piece(name, folder)
    else:
        tokens = llm_jp(folder) if name == "LLM-jp" else byte_level(name, folder)
    real = dict(REAL[name]["config"] if name in REAL else TODAY[name])
    rows = tokens
    if name in ("mpt-7b", "open-calm-7b"):  # more rows than tokens, as these have
        rows = (tokens + 15) // 16 * 16
    sizes = SMALL if name in TODAY else {key: value for key, value in SMALL.items() if key in real}
    ids = {key: min(value, tokens - 1) for key, value in real.items() if key.endswith("_token_id")}
    if name == "Cerebras-GPT-13B":
        ids = dict.fromkeys(ids, tokens - 1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**real | sizes | ids | {"vocab_size": rows})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.to(getattr(torch, real["torch_dtype"]))
    write_weights(name, model, folder)
    return str(folder)


def write_weights(name, model, folder):
    """config.json and the weights, under the names and in the files that the makers chose."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if name == "Cerebras-GPT-13B":  # saved from the bare GPT2Model
        del state["lm_head.weight"]
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
    elif model.config.model_type == "gpt_neox":
        state = {key.replace("lm_head.", "embed_out."): value for key, value in state.items()}
    elif name == "mpt-7b" or name in ("Qwen3", "Gemma-3"):
        state.pop("lm_head.weight", None)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if name == "Cerebras-GPT-13B":
        config["architectures"] = ["GPT2Model"]
    if name in REAL:  # the file as its maker wrote it, which older names and absent ids are part of
        own = REAL[name]["config"] | {"architectures": config["architectures"]}
        config = {key: config.get(key, value) for key, value in own.items()}
    config["torch_dtype"] = (REAL[name]["config"] if name in REAL else TODAY[name])["torch_dtype"]
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    if name in TODAY:
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    index = {"metadata": {}, "weight_map": {}}
    for number, half in enumerate(halves, 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(half, folder / file)
        index["weight_map"] |= dict.fromkeys(half, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
