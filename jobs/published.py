"""How a model is loaded as it is published: with sight, with packed weights, with code of its own.

The scripts reach it through keep_run.py and keep_answers.py.
"""

from copy import deepcopy

import torch
import transformers
from model_layers import READ_PAST, weigh_layers
from run_common import check, say
from torch.nn.functional import cross_entropy
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.base import get_keys_to_not_convert

UNPACKED = ("mxfp4", "fp8", "mxfp8", "compressed-tensors")


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
    return auto_class(config)


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
    remedy = "Leave --trust_remote_code out, or take a model that transformers knows."
    check(is_good, f"this repository's own code {problem}. {remedy}")
