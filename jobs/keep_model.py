"""What a training would change in a published model in silence: its ends, its padding, its loss.

KeepRun and TRL's trainers call this; tell_tokenizer writes a note beside the result.
"""

import inspect
from contextlib import suppress

import transformers

# ---- Ends, padding, loss ----


def keep_ends(settings, base):
    """Where the makers name several ends, such as that of a tool's call, keep them, too."""
    with suppress(Exception):  # a model may come without such settings
        ends = transformers.GenerationConfig.from_pretrained(base).eos_token_id
        if isinstance(ends, list):  # a number alone may be a class's default, and no end at all
            settings.eos_token_id = sorted({*settings.eos_token_id, *ends})


def read_pads(model):
    """[(settings, their padding token)], to be set again when a trainer has put in its own.

    A model that is loaded with one, often EOS, does not train the embedding of that token.
    """
    owners = model.config.get_text_config(), model.generation_config
    return [(owner, getattr(owner, "pad_token_id", None)) for owner in owners]


def set_pads(pads):
    for owner, pad in pads:
        owner.pad_token_id = pad


def drop_other_losses(model):
    """Leave the loss of the tokens alone, whatever the published settings add to it.

    The loss of routers would be added whole to each batch's part of a mean, and to evaluations.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    if "output_router_logits" in inspect.signature(type(base).forward).parameters:
        base.register_forward_pre_hook(without_routers, with_kwargs=True)
    if hasattr(base, "z_loss_coefficient"):  # Bamba's, of the size of logits
        base.z_loss_coefficient = 0.0


def without_routers(_, args, kwargs):
    return args, {**kwargs, "output_router_logits": False}


# ---- A note on the tokenizer ----


def tell_tokenizer(directory):
    """Say in README.md how the result's tokenizer is read where AutoTokenizer reads another."""
    own = transformers.TokenizersBackend.from_pretrained(directory)  # tokenizer.json as it stands
    text = "It's WE'LL 1234567  ｱＡＢ鬱😀\n\n\n" + own.decode([*range(0, len(own), 7)])
    with suppress(TypeError):  # a class may not even take in the file
        plain = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if plain(text)["input_ids"] == own(text)["input_ids"]:
            return
    file = directory / "README.md"
    before = file.read_text("utf-8") if file.exists() else ""
    if "PreTrainedTokenizerFast" not in before:
        call = "PreTrainedTokenizerFast.from_pretrained(DIR)"
        note = f"AutoTokenizer gives other ids than tokenizer.json here. Type\n\n    {call}"
        file.write_text(f"{before}\n# Tokenizer\n\n{note}\n", "utf-8")
