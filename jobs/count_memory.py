"""Count the memory of a training step without a GPU and without weights; estimate.py prints it.

Parameters are counted on the meta device. Activations come from one layer and two layers of the
model, trained for a step of two and of three rows with tensors that have a shape and no content:
the memory grows by the same amount with each layer and with each row.
"""

import contextlib
import functools
import importlib.util
import io
import operator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from count_trl import cache_bytes, head_bytes, reference_bytes, sequences
from live_bytes import LikeCuda, Live
from model_layers import READ_PAST, freeze_beside_text, weigh_layers
from published import auto_class
from run_common import check, fail
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).resolve().parent.parent
# Of an H200's 150.8 GB, less 7 % that fragments; what CUDA and its libraries take, assumed.
GPU_GB, CONTEXT_GB, MARGIN = 140, 1, 0.93
HOST_GB = {"rt_HG": 160, "rt_HF": 1920}
STAGES = ("none", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
BITS = {"lora_8bit": 8, "qlora": 4}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---- What is trained ----


@functools.cache
def load_lesson(name):
    """A training script as a module: it knows best what it trains."""
    spec = importlib.util.spec_from_file_location(name, HERE / name / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept_in(plan):
    """What trained weights are kept in: fp32, but for some of DeepSpeed's own ways."""
    is_16_bit = plan.stage != "none" and (plan.precision == "fp16" or plan.is_rounding)
    return DTYPES[plan.precision] if is_16_bit else torch.float32


def held_in(plan):
    """What the model is loaded in; the base of an adapter in what is computed in."""
    return DTYPES[plan.precision] if "lora" in plan.method else kept_in(plan)


def build(plan, layers=None):
    """The plan's model as its script makes it, with all or the first layers; no weights."""
    config = type(plan.config).from_dict(plan.config.to_dict())
    text = config.get_text_config()
    if layers:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    kind = {"attn_implementation": plan.attn_implementation, "dtype": held_in(plan)}
    model = auto_class(config).from_config(config, **kind)
    model.loss_type = "ForCausalLM"
    freeze_beside_text(model)
    with contextlib.redirect_stdout(io.StringIO()):  # what the lesson says to its user
        if plan.method == "last_layer":
            lesson = load_lesson("finetune_lastlayer")
            chosen = lesson.choose_parameters(model, plan.train)
            lesson.untie(model, chosen)
            for name, parameter in model.named_parameters():
                parameter.requires_grad = name in chosen
        elif "lora" in plan.method:
            tokenizer = SimpleNamespace(get_vocab=dict)
            training = SimpleNamespace(seed=0, kept_in=kept_in(plan))
            return load_lesson("finetune_lora").add_adapter(plan, training, tokenizer, model)
    return model


def linear_weights(model):
    """The frozen matrices that bitsandbytes rounds: not the head, nor what is read past."""
    from transformers.pytorch_utils import Conv1D

    past = {name for name, (_, why) in weigh_layers(model).items() if why == READ_PAST}
    weights = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not module.weight.requires_grad
        and module.weight.dim() == 2
        and name not in past
    }
    head = model.get_output_embeddings()  # trained as a whole, it holds its frozen original, too
    return weights - {head.weight, getattr(head, "original_module", head).weight}


def count(plan):
    """Numbers of parameters, and bytes of the frozen ones, of the whole model."""
    try:
        with torch.device("meta"):
            model = build(plan)
    except Exception as error:  # of a model's code, anything
        fail(f"a {plan.config.model_type} cannot be built for this: {error!r}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    rounded = linear_weights(model) if plan.method in BITS else set()
    number, rows = sum(w.numel() for w in rounded), sum(w.shape[0] for w in rounded)
    frozen = held_in(plan).itemsize * (total - trained - number)
    if plan.method == "lora_8bit":  # a byte, and an fp32 scale for each output
        frozen += number + 4 * rows
    elif plan.method == "qlora":  # half a byte; a byte for 64 of them, an fp32 number for 64 x 256
        frozen += sum(w.numel() // 2 + w.numel() // 64 + w.numel() // 64 // 64 for w in rounded)
    largest = 2 * max((w.numel() for w in rounded), default=0)
    head, is_lora = model.get_output_embeddings().weight, "lora" in plan.method
    base = total - trained if is_lora else total
    is_copy = plan.config.tie_word_embeddings and head is not model.get_input_embeddings().weight
    base -= head.numel() * (is_copy and not is_lora)  # untied; LoRA's copy is among the trained
    sizes = {"total": total, "base": base, "trained": trained, "frozen": frozen}
    sizes |= {"head": head.numel() * head.requires_grad, "largest": largest}
    return SimpleNamespace(**sizes, idle=idle(plan, model))


def idle(plan, model):
    """Parameters of experts that a token does not pass through."""
    text = plan.config.get_text_config()
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
    taken = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
    taken = max(taken) if isinstance(taken, list) else taken  # of each layer
    experts = [w for n, w in model.named_parameters() if w.dim() == 3 and "experts" in n]
    experts = [w for w in experts if taken and not (w.requires_grad and "lora" in plan.method)]
    return sum(w.numel() * (1 - min(taken, len(w)) / len(w)) for w in experts)


# ---- Weights, gradients, optimizer, buffers: bytes on each GPU ----


def states(plan, counts):
    """{item: bytes}; deepspeed_configs/README.md says where each number of ZeRO's comes from."""
    t, n, stage = counts.trained, plan.nodes * plan.gpus, plan.stage
    moments = 2 if "8bit" in plan.optim else 8
    kept, held = kept_in(plan).itemsize, held_in(plan).itemsize
    part = (4 + moments) * t / n  # fp32 weights, and Adam's averages
    bucket = 2 * kept * min(t, 5e8)
    pieces = held * min(counts.total, 1e9) + (8 - kept) * min(t / n, 1e9)
    # While batches are accumulated, gradients stand outside the buckets that PyTorch sends.
    twice = 4 * t if n > 1 and plan.gradient_accumulation_steps > 1 else 0
    weights, gradients, optimizer, buffers = {
        "none": (4 * t, 4 * t, moments * t, twice),
        "zero1": (kept * t, max(kept + kept / n, 8 / n) * t, part, bucket),
        "zero2": (kept * t, 8 / n * t, part, bucket),
        "zero3": (kept * t / n, kept * t / n, part, pieces),
        "zero2_offload": (kept * t, 0, 0, bucket),
        "zero3_offload": (0, 0, 0, pieces),
    }[stage]
    spread = {"zero3": n, "zero3_offload": float("inf")}.get(stage, 1)
    items = {"weights": weights + counts.frozen / spread, "gradients": gradients}
    return items | {"optimizer": optimizer, "communication": buffers}


def host_bytes(plan, counts):
    """In each node's memory: what its processes load, or what is offloaded and a save collects."""
    weights = held_in(plan).itemsize * counts.total
    loading = weights * (1 if plan.stage.startswith("zero3") else plan.gpus)
    # The step's weights, Adam's averages, gradients; those that are sent to and fro.
    each = 16 + 2 * kept_in(plan).itemsize if plan.stage.endswith("offload") else 0
    return max(loading, each * counts.trained / plan.nodes + weights)


# ---- Activations ----


def train_step(plan, layers, rows):
    """Bytes after each operation of (forward, backward), and between the two."""
    with torch.device("meta"):
        model = build(plan, layers).train()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    is_tied = ends[0].weight is ends[1].weight
    # Whether rows are packed is looked up in their content; ours are not.
    unpacked = mock.patch("transformers.masking_utils.find_packed_sequence_indices", forget)
    # Experts in fp32, which autocast passes over: torch knows the shapes of bf16's product alone.
    in_bf16 = mock.patch("transformers.integrations.moe._can_use_grouped_mm", is_in_bf16)
    with unpacked, in_bf16, FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # with a device that has its kernels; still without content
        if is_tied:
            ends[1].weight = ends[0].weight
        if plan.activation_checkpointing or all(p.requires_grad for p in model.parameters()):
            # The embedding's own gradient comes when all else is gone: it makes no peak.
            model.enable_input_require_grads()
            ends[0].weight.requires_grad = is_tied and ends[0].weight.requires_grad
        if plan.activation_checkpointing:  # what is computed again is so in a GPU's precision, too
            again = {"context_fn": lambda: (contextlib.nullcontext(), LikeCuda())}
            model.activation_checkpointing_enable({"use_reentrant": False} | again)
        if plan.method == "lora_8bit":  # keeps the input of each layer
            for weight in linear_weights(model):
                weight.requires_grad = True
        for parameter in model.parameters():
            if parameter.requires_grad:  # counted apart, not here
                parameter.register_post_accumulate_grad_hook(forget)
        ids = torch.zeros(rows, plan.max_length, dtype=torch.long)
        learned = max(1, round(plan.learned_share * (plan.max_length - 1)))
        batch = {"input_ids": ids, "labels": ids, "use_cache": False}
        learned = torch.zeros(rows, learned, dtype=torch.long)
        batch |= {"logits_to_keep": learned, "shift_labels": learned}
        is_mixed = plan.precision != "fp32" and kept_in(plan) == torch.float32
        autocast = torch.autocast("cpu", DTYPES[plan.precision], enabled=is_mixed)
        with Live(model) as live, LikeCuda():
            with autocast:
                loss = model(**batch).loss
            forward, between = len(live.line), live.bytes
            if layers > 1:
                loss.backward()
    return live.line[:forward], live.line[forward:], [between]


def forget(tensor):
    tensor.grad = None


def is_in_bf16(tensor, weight, offs):
    return weight.dtype == torch.bfloat16


def activations(plan):
    """A function of the rows: (bytes kept for the backward pass, most bytes at any time)."""
    layers = plan.config.get_text_config().num_hidden_layers
    try:
        steps = {(a, b): train_step(plan, a, b) for a in (1, 2) for b in (2, 3)}
    except Exception as error:  # of a model's code, anything
        fail(f"a {plan.config.model_type} cannot be traced without its weights: {error!r}")

    def at(rows, layers, part, worst=max):
        """A step of these layers, continued to this number of rows."""
        two, three = steps[layers, 2][part], steps[layers, 3][part]
        return worst([x + (rows - 2) * (y - x) for x, y in zip(two, three, strict=True)])

    def result(rows):
        last = operator.itemgetter(-1)  # all layers' copies in 16 bit are still there
        kept, each = at(rows, 1, 2, last), at(rows, 2, 2, last) - at(rows, 1, 2, last)
        forward = at(rows, 2, 0) + (layers - 2) * (at(rows, 2, 0, last) - at(rows, 1, 0, last))
        peak = max(forward, at(rows, 2, 1) + (layers - 2) * each)
        return kept + (layers - 1) * each, peak

    return result


# ---- Where it fits ----


def places(args):
    """(nodes, GPUs of each, ZeRO stage) to try, the cheapest first."""
    rounded = args.method in ("lora_8bit", "qlora")
    stages = [stage for stage in STAGES[:4] if not (rounded and stage == "zero3")]
    check(not (rounded and "zero3" in str(args.zero_stage)), "ZeRO-3 takes no rounded base.")
    if args.zero_stage:
        stages = [args.zero_stage]
    if args.nodes or args.gpus:
        return [(args.nodes or 1, args.gpus or 8, stage) for stage in stages]
    alone = [(1, 1, "none")] if stages[0] == "none" else []
    is_one_node = args.method == "last_layer" or args.trainer != "sft"
    several = [] if is_one_node else [(2, 8, stages[-1]), (4, 8, stages[-1])]
    return alone + [(1, 8, stage) for stage in stages if alone != [(1, 8, stage)]] + several


def most_bytes(args, rows_need, rows):
    """(kept for the backward pass, most at any time) for this many rows of the data."""
    kept, peak = rows_need(sequences(args, rows))
    peak += head_bytes(args, rows) + args.counts.largest  # a matrix of 4 or 8 bit, unpacked
    return kept, max(peak, cache_bytes(args, rows))


def fit(args):
    """Fill in where it runs, what it needs there, and how many rows fit."""
    traced = {}
    for place in places(args):
        args.nodes, args.gpus, args.stage = place
        kept = kept_in(args)
        if kept not in traced:
            traced[kept] = count(args), activations(args)
        args.counts, rows_need = traced[kept]
        args.items = states(args, args.counts)
        if reference := reference_bytes(args, args.counts.total, held_in(args).itemsize):
            args.items["reference"] = reference
        fixed = sum(args.items.values()) + CONTEXT_GB * 1e9 * (1 if args.gpus == 1 else 2)
        args.items["CUDA, NCCL"] = fixed - sum(args.items.values())
        kept, peak = most_bytes(args, rows_need, args.per_device_train_batch_size)
        args.items |= {"activations": kept, "logits, work": peak - kept}
        args.need, args.queue = fixed + peak, "rt_HG" if args.gpus == 1 else "rt_HF"
        args.host = host_bytes(args, args.counts)
        args.fits = args.need <= GPU_GB * 1e9 and args.host <= HOST_GB[args.queue] * 1e9
        args.most = 0
        for step in (2**k for k in range(12, -1, -1)):
            more = args.most + step
            args.most = (
                more if fixed + most_bytes(args, rows_need, more)[1] <= GPU_GB * 1e9 else args.most
            )
        if args.fits:
            break
    return args
