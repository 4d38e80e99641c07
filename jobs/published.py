"""How a model is loaded as it is published: with sight, with packed weights, with code of its own.

The scripts reach it through keep_run.py and keep_answers.py.
"""

from copy import deepcopy
from types import SimpleNamespace

import torch
import transformers
from accelerate import init_empty_weights
from keep_model import tell_tokenizer  # noqa: F401 -- for merge_lora.py
from model_layers import READ_PAST, say_rounding, weigh_layers  # noqa: F401 -- for merge_lora.py
from run_common import check, fail, say
from torch.nn.functional import cross_entropy
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.base import get_keys_to_not_convert

UNPACKED = ("mxfp4", "fp8", "mxfp8", "compressed-tensors")
REMEDY = "Leave --trust_remote_code out, or take a model that transformers knows."


def prepare(config, path, options):
    """Return the class to train by; weights that are published quantised are to be unpacked.

    A model that sees keeps what it sees with. `options` are those of from_pretrained.
    """
    if stored := getattr(config, "quantization_config", None):
        kind, rounds = stored.get("quant_method"), "quantization_config" in options
        remedy = "Leave --load_in_... out." if rounds else "Fetch it in bf16 or fp16."
        is_good = kind in UNPACKED and not rounds
        check(is_good, f"{path} is published in {kind}, which cannot be trained so. {remedy}")
        say("unpacked", f"the weights are published in {kind}; what is saved is not")
        stored["dequantize"] = True
    keep_read_past(config, options)
    return loader(config)


def loader(config):
    """What loads a model: its class; for a repository's own code, with tables made again."""
    load = auto_class(config)
    if not hasattr(config, "auto_map"):
        return load

    def from_pretrained(*args, **options):
        model, info = load.from_pretrained(*args, **options)
        remake_tables(model)
        return model, info

    return SimpleNamespace(from_pretrained=from_pretrained, from_config=load.from_config)


def remake_tables(model):
    """Compute anew what a repository's own code computes at its start, such as rotary angles.

    Of tables that no file holds, from_pretrained of transformers 5 keeps the shape alone: what
    stands in memory there would be taken for numbers (transformers#48892).
    """
    tables = dict(model.named_non_persistent_buffers())
    is_own = type(model).__module__.startswith("transformers_modules")
    if not (is_own and tables) or is_deepspeed_zero3_enabled():  # that computes them itself
        return
    try:  # weights that take no memory, but real tables; no random number is used up
        with torch.random.fork_rng([]), init_empty_weights(include_buffers=False):
            twin = type(model)._from_config(deepcopy(model.config))
        for name, table in twin.named_non_persistent_buffers():
            if name in tables:  # a quantiser may have put another module there
                tables[name].copy_(table)
        away = [name for name, table in tables.items() if table.is_meta]
        check(not away, f"has {away} on no device.")
    except Exception as error:  # of a repository's code, anything
        problem = f"cannot compute {', '.join(tables)} again ({error!r})"
        fail(f"this repository's own code {problem}. {REMEDY}")


def auto_class(config):
    """AutoModelForCausalLM; for a model that sees, too, the class that keeps what it sees with."""
    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def keep_read_past(config, options):
    """Keep in 16 bit what code reads past its layer: it would find packed numbers there."""
    rounding, load = options.get("quantization_config"), auto_class(config)
    is_known = type(config) in load._model_mapping  # not of a repository's own code
    if is_known and hasattr(rounding, "llm_int8_skip_modules"):
        with torch.device("meta"):
            model = load.from_config(deepcopy(config))
        past = [name for name, (_, why) in weigh_layers(model).items() if why == READ_PAST]
        if past:
            rounding.llm_int8_skip_modules = [*get_keys_to_not_convert(model), *past]


def check_own_code(trainer):
    """Refuse a repository's own code that computes another loss than is asked for.

    It may pass over which tokens are learned, and by how many the sum is divided. TRL's trainers
    compute their losses themselves.
    """
    model = trainer.model
    base = getattr(model, "get_base_model", lambda: model)()
    is_own = type(base).__module__.startswith("transformers_modules")
    if not is_own or type(trainer).__mro__[1] is not transformers.Trainer:
        return
    unseen = is_deepspeed_zero3_enabled()
    check(not unseen, "a repository's own code is not tried under ZeRO-3. Use zero2.json.")
    ids = torch.arange(3, 11, device=base.device)[None]
    following, learned = ids.roll(-1), torch.zeros_like(ids, dtype=torch.bool)
    learned[0, 2:6] = True
    batch = {"labels": following, "shift_labels": following[learned], "logits_to_keep": learned}
    was_training, problem = model.training, "computes another loss than is asked for"
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits = model(input_ids=ids, use_cache=False).logits.float()
            loss = model(input_ids=ids, use_cache=False, num_items_in_batch=8, **batch).loss.float()
        wanted = cross_entropy(logits[learned], following[learned], reduction="sum") / 8
        is_good = (loss - wanted).abs() < 0.02 * wanted
    except Exception as error:  # of a repository's code, anything
        is_good, problem = False, f"does not take what is needed here ({error!r})"
    model.train(was_training)
    check(is_good, f"this repository's own code {problem}. {REMEDY}")
