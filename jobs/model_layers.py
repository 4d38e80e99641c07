"""What a model consists of: the matrices in its layers, and what adapters can stand beside; what it
sees with. published.py loads it.
"""

import inspect
import logging
import math
import re
from contextlib import nullcontext
from functools import cache

import torch
import transformers
from run_common import check, say
from transformers.integrations import is_deepspeed_zero3_enabled

READ_PAST = "its weight is read past an adapter"  # by fused kernels, Mamba's for example


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
                why = READ_PAST
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


def find_targets(model, script):
    """Say what LoRA is put on; return the full names of (modules, parameters, whole modules).

    Parameters are experts, and linear layers that PEFT would take for experts.
    """
    whole = find_names(model, script.modules_to_save, "modules_to_save")
    targets = find_names(model, script.lora_target_modules, "lora_target_modules")
    inside = tuple(f"{name}." for name in whole)
    targets = [name for name in targets if not f"{name}.".startswith(inside)]
    is_good = targets or script.lora_target_modules == ["none"]
    check(is_good, "--modules_to_save holds all that --lora_target_modules names.")
    modules, experts, weights = split(model, targets)
    problem = "--lora_dropout does not work on experts. Leave it out, or name --lora_target_modules"
    check(not (experts + weights and script.lora_dropout), f"{problem} {ends_of(modules)}.")
    layers = modules + weights
    text = f"LoRA of rank {script.lora_r} on {len(layers)} layers ({ends_of(layers) or 'none'})"
    each = f", and for each expert on {len(experts)} stacks ({ends_of(experts)})"
    say("adapter", text + each * bool(experts))
    if whole:
        say("whole", ", ".join(whole))
    say("coverage", coverage(model, targets))
    return modules, experts + weights, whole


def find_names(model, given, option):
    """The full names of the modules that an option names, by their name or the end of it."""
    found = []
    if option == "modules_to_save":  # what is quantised cannot be trained
        numbers = {name: [*module.parameters()] for name, module in model.named_modules() if name}
        beside = {model.get_parameter(name) for name in beside_text(model)}  # it gets no gradient
        numbers = {name: weights for name, weights in numbers.items() if not beside >= {*weights}}
        known = [n for n, w in numbers.items() if all(x.is_floating_point() for x in w)]
    else:
        known = fitting(model)
    for end in given if given not in (["all-linear"], ["none"]) else ():
        new = [name for name in known if f".{name}".endswith(f".{end}")]
        check(new, f"--{option} {end}: it can be {ends_of(known)}.")
        found += new
    inside = [name for name in found if name.startswith(tuple(f"{outer}." for outer in found))]
    check(not inside, f"--{option}: {', '.join(inside)} stands inside another one. Leave it out.")
    return known if given == ["all-linear"] else found


def fitting(model):
    """The names of what an adapter can stand beside."""
    return [name for name, (_, why) in weigh_layers(model).items() if not why]


def split(model, targets):
    """Return (linear layers, experts, weights of layers that PEFT would take for experts)."""
    parameters, weights = {name for name, _ in model.named_parameters()}, []
    experts = sorted(parameters & {*targets})
    modules = [name for name in targets if name not in parameters]
    if parameters & {*fitting(model)}:  # PEFT rewrites the targets of a model with experts
        for name in list(modules):
            is_mlp = re.search(r"\.((gate|up|down)_proj|w[123])$", name)
            if is_mlp and model.get_submodule(name).weight.is_floating_point():  # not in 8, 4 bit
                modules.remove(name)
                weights.append(f"{name}.weight")
    return modules, experts, weights


def check_targets(model, modules):
    """Refuse what PEFT left out of the modules to put adapters beside, or would not load again."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    remedy = "name others by --lora_target_modules."
    lost = {*modules} - {*model.base_model.targeted_module_names}
    check(not lost, f"PEFT puts nothing beside {ends_of(lost)}: {remedy}")
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = set_peft_model_state_dict(model, saved).missing_keys  # names are rewritten in loading
    lost = {name.partition(".lora_")[0] for name in found if ".lora_" in name}
    check(not lost, f"PEFT cannot load what it saves beside {ends_of(lost)}: {remedy}")


def coverage(model, targets):
    """What share an adapter on these stands beside, and what it leaves out, as a text."""
    layers, left = weigh_layers(model), {}
    for name in layers.keys() - targets:
        left.setdefault(layers[name][1] or "not named", []).append(name)
    text = "".join(f"; not {ends_of(left[why])}: {why}" for why in sorted(left))
    return f"{share_of(layers, targets):.2%} of the layers' weights{text}"


def share_rounded(model, done):
    """What share of the layers' weights these layers hold; none must be read past its layer."""
    layers = weigh_layers(model)
    past = [name for name in done if layers.get(name, (0, ""))[1] == READ_PAST]
    problem = f"{ends_of(past)}: code reads these weights past their layers, in 8 or 4 bit wrongly."
    check(not past, f"{problem} Leave --load_in_... out.")  # a repository's own code
    return share_of(layers, done)


def prepare_rounded(model, script, training):
    """Ready a base in 8 or 4 bit; return what share of its layers' weights is, as a text.

    A share below a half is refused.
    """
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    done = [name for name, kind in kinds.items() if kind in ("Linear8bitLt", "Linear4bit")]
    share = share_rounded(model, done)
    problem = f"only {share:.1%} of the layers' weights can be in 8 or 4 bit. Leave --load_in_..."
    good = share >= 0.5 or script.allow_partly_quantized
    check(good, f"{problem} out, or add --allow_partly_quantized true.")
    if script.load_in_8bit:
        prepare_8bit([model.get_submodule(name) for name in done], model.dtype)
        if training.activation_checkpointing:
            # On a GPU each layer keeps its input where autograd does not see it, and checkpointing
            # would save little, were there no first pass without a graph.
            given, is_shared = training.activation_checkpointing_kwargs, shares_keys(model.config)
            given = {**(given or {}), "use_reentrant": not is_shared}
            if is_shared:
                say("note", "layers share keys and values: checkpointing saves little in 8 bit")
            training.activation_checkpointing_kwargs = given
            training.gradient_checkpointing_kwargs = given  # TRL goes by the old name
            model.enable_input_require_grads()
    return f"{share:.1%} of the layers' weights rounded"


def shares_keys(config):
    """Whether layers take keys and values from a layer before, beside their input.

    Reentrant checkpointing, whose first pass has no graph, would lose the gradients of these.
    """
    modes = getattr(config.get_text_config(), "kv_sharing_modes", None) or []
    return any("reuse" in str(mode) for mode in modes)


def prepare_8bit(layers, dtype):
    """Let these layers compute in `dtype`; norms give them fp32 under autocast."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a cast, in every layer
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def ends_of(names):
    """How names end, each once."""
    return ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names}))


# ---- Models that see ----


def freeze_beside_text(model, path=None):
    """Freeze what text does not pass: image and audio towers; return the names of these parts.

    `path` is what the model was loaded from.
    """
    if path and "quantization_config" in transformers.PreTrainedConfig.get_config_dict(path)[0]:
        model._weight_conversions = None  # it would be saved packed again, or by other names
    names = beside_text(model)
    for name in names:
        model.get_parameter(name).requires_grad = False
    return sorted({name.removeprefix("model.").split(".")[0] for name in names})


def beside_text(model):
    """The names of the parameters that text does not pass."""
    ends = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    text = {weight for end in ends for weight in end.parameters()}
    return [name for name, weight in model.named_parameters() if weight not in text]


# ---- A part to train ----


def last_block(model):
    """The names of the last block and of what comes behind the blocks, which is the final norm."""
    number = model.config.get_text_config().num_hidden_layers
    inside = {*model.get_decoder().modules()}
    for name, blocks in model.named_modules():
        if isinstance(blocks, torch.nn.ModuleList) and len(blocks) == number and blocks in inside:
            parent, _, own = name.rpartition(".")
            children = [child for child, _ in model.get_submodule(parent).named_children()]
            behind = children[children.index(own) + 1 :]
            return [f"{name}.{number - 1}", *(f"{parent}.{child}" for child in behind)]
    return check(False, f"{type(model).__name__} has no list of blocks: type names to --train.")


def gather(weight):
    """Around what needs a whole weight: under ZeRO-3 each GPU has a part of it."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([weight])


def check_part(script, training, choose_parameters):
    """Refuse a --train that means nothing, before data and weights are loaded.

    `choose_parameters(model, script.train)` returns names, and refuses what it does not find.
    """
    from published import prepare

    check_expression(script.train)
    if is_deepspeed_zero3_enabled():
        return  # the twin below would be spread over the GPUs; the model itself gets the same check
    remote = {"trust_remote_code": script.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(script.model_name_or_path, **remote)
    with torch.device("meta"):
        twin = prepare(config, script.model_name_or_path, {}).from_config(config, **remote)
    freeze_beside_text(twin)
    is_high = {*choose_parameters(twin, script.train)} <= {*choose_parameters(twin, "last_block")}
    in_vain = training.activation_checkpointing and is_high
    check(not in_vain, "--activation_checkpointing true only costs time: nothing below is trained.")


def check_expression(train):
    """Refuse a --train that is no regular expression."""
    try:
        re.compile(train)
    except re.error as error:
        check(False, f"--train {train} is no regular expression ({error}). Type \\. for a dot.")


def say_rounding(adapter, model):
    """Say so where the run that made the adapter, or this checkpoint of it, rounded the base."""
    run = adapter.absolute()
    record = (run.parent if run.name.startswith("checkpoint-") else run) / "run_args.yaml"
    text, kinds = record.read_text("utf-8") if record.is_file() else "", {}
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        if f"precision: {name}" in text:  # what does not change was published in as few bits
            fine = "|".join(model._get_dtype_plan(dtype)).replace("*", ".*") or "$^"  # stay in fp32
            weights = [w for n, w in model.named_parameters() if not re.search(fine, n)]
            weights = [w for w in weights if w.is_floating_point()]
            kinds[name] = any((w.to(dtype).float() != w).any() for w in weights)
    kinds |= {f"{bits} bit": f"load_in_{bits}bit: true" in text for bits in (8, 4)}
    if coarse := [kind for kind, is_rounded in kinds.items() if is_rounded]:
        why = f"trained on the base in {coarse[-1]}, whose rounding is gone now"
        say("note", f"{why}: score it anew")
