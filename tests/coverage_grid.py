"""Small checkpoints of architectures whose layers are more than Linear: experts in one tensor,
Mamba layers, linear attention, routers; and what LoRA must be on each of them: the losses of a
calculation by hand, a gradient for each weight, and the same answers when reloaded and merged.
"""

import contextlib
import io
import json
from pathlib import Path

import torch
from conftest import ROOT, ROWS, load_script, make_tokenizer, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128,
         "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 24}  # fmt: skip
MLA = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
       "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
       "n_shared_experts": 1, "num_key_value_heads": 4}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
         "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 16}  # fmt: skip
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MIXED = ["mamba", "attention"]
CONFIGS = {
    "qwen3_moe": MOE | {"decoder_sparse_step": 1},
    "qwen2_moe": MOE | {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 24},
    "mixtral": MOE,
    "olmoe": MOE,
    "phimoe": MOE | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "gpt_oss": MOE | {"intermediate_size": 64},
    "llama4_text": MOE | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
                          "num_experts_per_tok": 1},
    "deepseek_v2": MOE | MLA,
    "deepseek_v3": MOE | MLA | {"head_dim": 4},
    "dots1": MOE | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "glm4_moe": MOE | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": MOE | {"moe_topk": 2, "num_shared_expert": 1},
    "minimax": MOE | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "granitemoe": MOE,
    "granitemoehybrid": MOE | MAMBA | {"layer_types": MIXED, "shared_intermediate_size": 24},
    "jetmoe": MOE | {"kv_channels": 8, "ffn_hidden_size": 24},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
             "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "jamba": MOE | {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2,
                    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "nemotron_h": MOE | {"layers_block_type": ["mamba", "attention", "moe", "mlp"],
                         "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
                         "ssm_state_size": 8, "chunk_size": 16, "n_group": 1, "topk_group": 1,
                         "moe_shared_expert_intermediate_size": 24},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "zamba2": MAMBA | {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4,
                       "mamba_ngroups": 1, "mamba_headdim": 16, "chunk_size": 16,
                       "num_mem_blocks": 1, "attention_hidden_size": 64, "attention_head_dim": 16,
                       "num_key_value_heads": 4, "adapter_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "qwen3_next": MOE | DELTA | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_5_text": DELTA,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi3": {"pad_token_id": 0},
    "exaone4": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "llama": {},
}  # fmt: skip


def make_model(kind, rows=300):
    """A random model whose weights have std 0.15 (see conftest.py); norms and states stay."""
    config = AutoConfig.for_model(kind, **{**SMALL, "vocab_size": rows, **CONFIGS[kind]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def make_checkpoint(directory, kind):
    tokenizer = make_tokenizer()
    make_model(kind, len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


# ---- A cell: train, compare with the calculation by hand, reload, merge ----

STEPS, RATE = 4, 1e-2
IDS = torch.randint(12, 290, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def adapted(model):
    """[(name of the weight that is adapted, its PEFT layer)]."""
    found = []
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            key = getattr(layer, "parameter_name", "weight")
            found.append((f"{name.replace('.base_layer', '')}.{key}", layer))
    return found


def change(layer, a, b):
    """What an adapter adds to a weight, expert by expert."""
    scale, wide = layer.scaling["default"], layer.r["default"]
    count = getattr(layer, "num_experts", 1)
    each = [scale * b[:, e::count] @ a[e * wide : (e + 1) * wide] for e in range(count)]
    if count == 1:
        return each[0].T if type(layer.get_base_layer()).__name__ == "Conv1D" else each[0]
    is_turned = getattr(layer.get_base_layer(), "is_transposed", False)
    return torch.stack([one.T if is_turned else one for one in each])


def losses_by_hand(model, layers, start, examples, rates):
    """The losses of training W + BA on all examples at once, one after the other, without PEFT."""
    model.train()
    weights, losses = dict(model.named_parameters()), []
    trained = {name: [x.clone().requires_grad_() for x in start[name]] for name, _ in layers}
    flat = [x for pair in trained.values() for x in pair]
    optimizer = torch.optim.AdamW(flat, weight_decay=0.0)
    learned = sum(label != -100 for example in examples for label in example["labels"][1:])
    for rate in rates:
        new = {n: weights[n] + change(layer, *trained[n]) for n, layer in layers}
        loss = 0
        for example in examples:
            ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
            options = {"input_ids": ids, "use_cache": False}
            found = torch.func.functional_call(model, new, kwargs=options).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(found, labels[0, 1:], reduction="sum")
        loss = loss / learned
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return losses


def train(base, data, out, *more):
    """Run finetune_lora.py on all rows at once; return (what it said, trainer, start, gradients)."""
    script, seen = load_script(ROOT / "finetune_lora" / "finetune_lora.py"), {"gradients": {}}
    once, said = script.FineTuner.train, io.StringIO()

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, p in model.named_parameters():
                if p.requires_grad and p.grad is not None:
                    largest = max(seen["gradients"].get(name, 0), p.grad.abs().max().item())
                    seen["gradients"][name] = largest

    def watched(trainer, *args, **options):
        trainer.add_callback(Watch())
        pairs = adapted(trainer.model)
        matrices = {name: [layer.lora_A, layer.lora_B] for name, layer in pairs}
        seen["start"] = {
            name: [m["default"].weight.detach().clone() for m in both]
            for name, both in matrices.items()
        }
        seen["trainer"] = trainer
        return once(trainer, *args, **options)

    words = ["--model_name_or_path", base, "--train_file", data, "--output_dir", out]
    words += ["--max_steps", STEPS, "--learning_rate", RATE, "--logging_steps", 1, "--lora_r", 4]
    words += ["--max_grad_norm", 0, "--save_strategy", "no", *more]
    script.FineTuner.train = watched
    try:
        with contextlib.redirect_stdout(said):
            script.main([str(word) for word in words])
    finally:
        script.FineTuner.train = once
    return said.getvalue(), seen["trainer"], seen["start"], seen["gradients"]


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def cell(folder, kind, data):
    """ "ok" and the share that is covered, or what is wrong."""
    base, out = str(Path(folder, kind, "base")), str(Path(folder, kind, "adapter"))
    if not Path(base, "config.json").exists():
        make_checkpoint(base, kind)
    text = adapter(base, out, data)
    return (text.startswith("ok") and merge(base, out)) or text


def adapter(base, out, data, load=load):
    """Train one and compare it with the calculation by hand, and as it is saved."""
    said, trainer, start, gradients = train(base, data, out)
    model = trainer.model
    still = [n for n, p in model.named_parameters() if p.requires_grad and not gradients.get(n)]
    if still:
        return f"no gradient: {still[:3]}"
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    found, rates = ([entry[name] for entry in steps] for name in ("loss", "learning_rate"))
    wanted = losses_by_hand(load(base), adapted(model), start, trainer.train_dataset, rates)
    worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    if worst > 2e-4:
        return f"losses differ by {worst:.1e}: {found} {wanted}"
    ours, loaded = logits(model), load(base)
    if torch.allclose(logits(loaded), ours, atol=0.1):
        return "the adapter changes nothing"
    (line,) = [line for line in said.splitlines() if line.startswith("coverage")]
    share = covered(loaded, {name for name, _ in adapted(model)})
    if wrong := apart("reloaded", logits(PeftModel.from_pretrained(loaded, out)), ours):
        return wrong
    return f"ok {share:.2%}" if f" {share:.2%} " in line else f"{share:.2%} is covered: {line}"


def covered(model, names):
    """The share of these among the weights between embeddings and head that text passes."""
    ends = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    ends = {end.weight for end in [*ends, model.get_output_embeddings()]}
    towers = ("vision", "visual", "multi_modal_projector")
    sizes = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and weight not in ends and not any(part in name for part in towers)
    }
    return sum(sizes[name] for name in names) / sum(sizes.values())


def apart(name, found, wanted):
    good = torch.allclose(found, wanted, atol=1e-5 * max(1, wanted.abs().max().item()))
    return "" if good else f"{name}: logits differ by {(found - wanted).abs().max():.1e}"


def merge(base, out, load=load):
    """What is wrong with the merged model, compared with the adapter on its base, or ""."""
    merged = f"{out}-merged"
    words = ["--adapter_name_or_path", out, "--output_dir", merged]
    with contextlib.redirect_stdout(io.StringIO()):
        load_script(ROOT / "finetune_lora" / "merge_lora.py").main(words)
    adapted = PeftModel.from_pretrained(load(base), out)
    found, wanted = logits(load(merged)), logits(adapted)
    torch.manual_seed(0)
    for weight in adapted.parameters():  # by half the distance of two numbers in fp32
        weight.data *= 1 + 6e-8 * torch.randn_like(weight)
    rounding = (logits(adapted) - wanted).abs().max()  # qwen3_next's recurrence multiplies it
    return "" if (found - wanted).abs().max() < rounding else apart("merged", found, wanted)


# ---- Models that are published quantised: written here by hand, number by number ----

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def to_mxfp4(weight):
    """(blocks, scales, what they mean) of a weight (experts, in, out), 32 numbers along `in` each."""
    rows = weight.transpose(1, 2).unflatten(2, (-1, 32))  # experts, out, blocks, 32
    power = torch.floor(torch.log2(rows.abs().amax(3, keepdim=True) / 4))
    codes = (rows / 2**power).unsqueeze(-1).sub(FP4).abs().argmin(-1)
    means = (FP4[codes] * 2**power).flatten(2).transpose(1, 2)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return blocks, (power[..., 0] + 127).to(torch.uint8), means


def to_fp8(weight, size=16):
    """(weight in 8 bit, scales of its blocks, what they mean)."""
    blocks = weight.unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2)
    scales = blocks.abs().amax((2, 3)) / 448
    small = (blocks / scales[..., None, None]).to(torch.float8_e4m3fn)
    means = small.float() * scales[..., None, None]
    join = lambda parts: parts.transpose(1, 2).flatten(2).flatten(0, 1)  # noqa: E731
    return join(small.view(torch.uint8)).view(torch.float8_e4m3fn), scales, join(means)


def to_int4(weight):
    """(eight numbers of -8 to 7 in an int32, the scale of each 16 in a row, what they mean)."""
    groups = weight.view(len(weight), -1, 16)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    numbers = (groups / scales).round().clamp(-8, 7)
    nibbles = (numbers.long() + 8).view(len(weight), -1, 8) << torch.arange(0, 32, 4)
    return nibbles.sum(-1).to(torch.int32), scales[..., 0], (numbers * scales).view_as(weight)


def make_published(directory, method):
    """A checkpoint as it is published in this form, and beside it in plain/ what it means."""
    kind = {"mxfp4": "gpt_oss"}.get(method, "llama")
    plain = Path(directory, "plain")
    make_checkpoint(plain, kind)
    make_checkpoint(directory, kind)
    stored, means = load_file(plain / "model.safetensors"), {}
    for name, weight in {**stored}.items():
        if method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, means[name] = to_mxfp4(stored.pop(name))
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        elif method == "fp8" and name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale_inv"], means[name] = to_fp8(weight)
        elif method == "compressed-tensors" and name.endswith("_proj.weight"):
            scales = weight.abs().amax(1, keepdim=True) / 448
            stored[name] = (weight / scales).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"], means[name] = scales, stored[name].float() * scales
        elif method == "compressed-tensors in 4 bit" and name.endswith("_proj.weight"):
            stored |= {f"{name}_shape": torch.tensor(stored.pop(name).shape)}
            stored[f"{name}_packed"], stored[f"{name}_scale"], means[name] = to_int4(weight)
    assert means
    whole = load_file(plain / "model.safetensors") | means
    save_file(
        {n: w.contiguous() for n, w in whole.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    save_file(
        {n: w.contiguous() for n, w in stored.items()},
        Path(directory, "model.safetensors"),
        {"format": "pt"},
    )
    config = json.loads(Path(directory, "config.json").read_text())
    eight = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": eight}
    four = eight | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    config["quantization_config"] = {"quant_method": method.partition(" ")[0]} | {
        "fp8": {"weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]},
        "compressed-tensors": {"config_groups": {"group_0": group}, "ignore": ["lm_head"],
                               "format": "float-quantized", "quantization_status": "compressed"},
        "compressed-tensors in 4 bit": {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": four}},
            "ignore": ["lm_head"], "format": "pack-quantized", "quantization_status": "compressed"},
    }.get(method, {})  # fmt: skip
    Path(directory, "config.json").write_text(json.dumps(config))
    return str(directory), str(plain)


def coverage(folder, wanted):
    """{architecture: {"LoRA": "ok" or what is wrong}}."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data = {}, write_jsonl(folder / "train.jsonl", ROWS)
    for kind in filter(wanted, CONFIGS):
        try:
            text, _, share = cell(folder, kind, data).partition(" ")
        except Exception as error:  # a cell must not end the grid
            text, share = f"{type(error).__name__}: {error}", ""
        table[kind] = {"LoRA": text if text == "ok" else f"{text} {share}"}
        print(f"{kind}: {text} {share}", flush=True)
    return table
