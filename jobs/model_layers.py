"""The matrices in a model's layers: how large they are, and which an adapter can stand beside.

finetune_lora.py imports this file where `jobs` lies beside its directory.
"""

import inspect
import math
import re
from functools import cache

import torch
import transformers
from run_common import check


def weigh_layers(model):
    """{name: (size, why no adapter can stand beside it, or "")} of the layers' matrices."""
    layers, modules, code = {}, dict(model.named_modules()), cache(inspect.getsource)
    beside = {*beside_text(model)}  # an image tower's, say
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        is_linear = isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        is_conv = isinstance(module, torch.nn.Conv1d)
        is_end = isinstance(module, torch.nn.Embedding) or module is model.get_output_embeddings()
        for key, weight in module.named_parameters(recurse=False):
            shape, why = getattr(weight, "ds_shape", weight.shape), ""  # ZeRO-3 empties weights
            if len(shape) < 2 or is_end or f"{name}.{key}" in beside:
                continue
            use = rf"self\.{own}\.weight\b(?!\.(dtype|device|shape)|\[)"
            if re.search(r"router|\b(shared_expert_)?gate\b", name):
                why = "chooses experts"
            elif is_linear and re.search(use, code(type(modules[parent]))):
                why = "its weight is read past an adapter"  # by fused kernels, Mamba's for example
            elif not is_linear and (len(shape) != 3 or min(shape) < 2 or is_conv):
                why = "not linear"
            if hasattr(module, "in_features"):  # 4 bit packs two numbers into one
                shape = module.in_features, module.out_features
            layers[name if is_linear else f"{name}.{key}"] = math.prod(shape), why
    return layers


def share_of(layers, names):
    """The share of the layers' weights that these hold."""
    held = sum(layers[name][0] for name in layers.keys() & names)
    return held / sum(size for size, _ in layers.values())


def fitting(model):
    """The names of what an adapter can stand beside."""
    return [name for name, (_, why) in weigh_layers(model).items() if not why]


def coverage(model, targets):
    """What share an adapter on these stands beside, and what it leaves out, as a text."""
    layers, left = weigh_layers(model), {}
    for name in layers.keys() - targets:
        left.setdefault(layers[name][1] or "not named", []).append(name)
    text = "".join(f"; not {ends_of(left[why])}: {why}" for why in sorted(left))
    return f"{share_of(layers, targets):.2%} of the layers' weights{text}"


def rounded(model, is_partly_allowed):
    """What share of the layers' weights is in 8 or 4 bit, as a text; refused if below a half."""
    done = [n for n, m in model.named_modules() if type(m).__module__ == "bitsandbytes.nn.modules"]
    share = share_of(weigh_layers(model), done)
    problem = f"only {share:.1%} of the layers' weights can be in 8 or 4 bit. Leave --load_in_..."
    good = share >= 0.5 or is_partly_allowed
    check(good, f"{problem} out, or add --allow_partly_quantized true.")
    return f"{share:.1%} of the layers' weights rounded"


# Copied from finetune_lora/finetune_lora.py
def ends_of(names):
    """How names end, each once."""
    return ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names}))


# Copied from finetune_full/finetune_full.py
def beside_text(model):
    """The names of the parameters that text does not pass: of image and audio towers."""
    ends = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    text = {weight for end in ends for weight in end.parameters()}
    return [name for name, weight in model.named_parameters() if weight not in text]
