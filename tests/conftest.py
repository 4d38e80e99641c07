"""Small checkpoints of each architecture, made once per test run, and rows to train on."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.falcon import modeling_falcon

ROOT = Path(__file__).resolve().parent.parent
# What the scripts import from jobs, or from what stands beside them, tests do, too.
sys.path += [str(ROOT / name) for name in ("jobs", "generate_text", "jglue")]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# The switches that differ between the families; dropout is 0 so that training and evaluation agree exactly.
CONFIGS = {
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                 resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu"),
    "gpt_neox": lambda v: GPTNeoXConfig(vocab_size=v, **SMALL, intermediate_size=64, max_position_embeddings=64,
                                        rotary_pct=0.25),
    "falcon": lambda v: FalconConfig(vocab_size=v, **SMALL, max_position_embeddings=64, alibi=False),
    "falcon_alibi": lambda v: FalconConfig(vocab_size=v, **SMALL, max_position_embeddings=64, alibi=True,
                                           multi_query=False, parallel_attn=False, bias=True),
    "mpt": lambda v: MptConfig(vocab_size=v, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "llama": lambda v: LlamaConfig(vocab_size=v, **SMALL, intermediate_size=64, max_position_embeddings=64),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8,
                                   max_position_embeddings=64, tie_word_embeddings=True),
}  # fmt: skip
ROWS = [
    {"prompt": "質問: 東京から大阪まで新幹線で何時間?\n答え: ", "completion": "約二時間半です。"},
    {"prompt": "質問: 富士山\n答え: ", "completion": "3776m"},
    {
        "prompt": "質問: 花子さんは昨日の午後、駅前の書店で何を買いましたか?\n答え: ",
        "completion": "辞書",
    },
    {
        "prompt": "質問: 空\n答え: ",
        "completion": "青いと言われることが多いが、夕方には赤くも見える。",
    },
    {"prompt": "質問: 猫と犬とではどちらが静かでしょうか?\n答え: ", "completion": "猫"},
    {"prompt": "質問: 水\n答え: ", "completion": "水素と酸素"},
    {"prompt": "質問: 二足す三はいくつですか?\n答え: ", "completion": "五"},
]


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    os.environ.update(
        HF_HOME=str(tmp_path_factory.mktemp("hf")),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(autouse=True)
def own_falcon():
    """Where a script quantises Falcon it puts an ordinary layer into transformers, which the next test must not see."""
    kept = modeling_falcon.FalconLinear
    yield
    modeling_falcon.FalconLinear = kept
    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)  # of a training with DeepSpeed


def make_tokenizer(bos=False):
    """A byte-level BPE tokenizer of 300 tokens; with bos=True it puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in ROWS], trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<s>"
    )


def make_checkpoint(directory, kind, bos=False):
    """A random model whose weights have std 0.15: at the usual 0.02 a leak between examples does not show."""
    tokenizer = make_tokenizer(bos)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](len(tokenizer)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write_jsonl(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{kind: directory} of all architectures."""
    root = tmp_path_factory.mktemp("models")
    return {kind: make_checkpoint(root / kind, kind, bos=kind == "llama") for kind in CONFIGS}


@pytest.fixture(scope="session")
def train_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", ROWS)


def load_script(path):
    """A script as a module; once per test run, since Trainer pickles its arguments by module name."""
    if getattr(sys.modules.get(path.stem), "__file__", None) != str(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[path.stem]
