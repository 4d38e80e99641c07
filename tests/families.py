"""Small models of today's architectures, and of the composites that see images besides.

Each has two layers (or as many kinds of layer as it mixes), weights of std 0.15 and the tokenizer of
conftest.py. What a configuration class does not know is left out, so one set of sizes does for all.
"""

import contextlib
import io
import itertools
import json
import re
from functools import partial
from pathlib import Path

import coverage_grid
import grpo_inside
import seven_grid as grid
import torch
from conftest import ROOT, ROWS, load_script, make_tokenizer, write_jsonl
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
)

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "n_embd": 32,
    "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 64, "d_model": 32, "n_layers": 2,
    "n_heads": 4, "max_seq_len": 128, "ffn_dim": 64, "word_embed_proj_dim": 32, "sliding_window": 8,
    "attention_dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "hidden_dropout": 0.0, "residual_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "attn_dropout": 0.0,
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_d_ssm": 64, "state_size": 8,
    "time_step_rank": 4, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
TIED = {"tie_word_embeddings": True}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
       "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1}  # fmt: skip
GEMMA_4 = {**SLIDING, **TIED, "hidden_size_per_layer_input": 8, "per_layer_config": {"1": {"head_dim": 16}}}  # fmt: skip
EXPERTS_4 = {**SLIDING, **TIED, "enable_moe_block": True, "top_k_experts": 2}
GEMMA_3N = {**SLIDING, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
            "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]}  # fmt: skip
LLAMA_4 = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8,
           "intermediate_size_mlp": 48, "moe_layers": [1], "no_rope_layers": [1, 0],
           "num_experts_per_tok": 1}  # fmt: skip
TEXT = {
    "llama": {}, "mistral": {}, "ministral3": {}, "mixtral": {}, "qwen2": {}, "qwen2_moe": {},
    "qwen3": TIED, "qwen3_moe": {}, "qwen3_next": MIXED, "qwen3_5_text": MIXED, "gemma": TIED,
    "gemma2": TIED, "gemma3_text": SLIDING | TIED, "gemma4_text": GEMMA_4, "gpt2": TIED,
    "gpt_neox": {}, "gpt_neox_japanese": {}, "gpt_oss": SLIDING, "gpt_bigcode": {}, "opt": {},
    "bloom": {}, "falcon": {}, "falcon_h1": {}, "falcon_mamba": {}, "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}, "mpt": {}, "phi": {},
    "phi3": {}, "olmo": {}, "olmo2": {}, "olmo3": SLIDING, "olmoe": {}, "granite": {},
    "granitemoe": {}, "granitemoehybrid": {"layer_types": ["mamba", "attention"],
                                           "shared_intermediate_size": 16}, "nemotron": {},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"], "ssm_state_size": 8,
                   "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron_h experts": {"layers_block_type": ["mamba", "attention", "moe", "mlp"],
                           "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
                           "ssm_state_size": 8, "chunk_size": 8, "n_group": 1, "topk_group": 1,
                           "moe_shared_expert_intermediate_size": 16},
    "cohere": TIED, "cohere2": SLIDING | TIED, "deepseek_v2": MLA, "deepseek_v3": MLA, "glm": {},
    "glm4": {}, "glm4_moe": {}, "exaone4": SLIDING, "ernie4_5": {}, "ernie4_5_moe": {},
    "hunyuan_v1_dense": {}, "smollm3": {}, "starcoder2": {}, "stablelm": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "minimax": MIXED | {"block_size": 8, "sliding_window": None},
    "minimax_m2": {}, "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "seed_oss": {}, "hyperclovax": {},
    "llama4_text": LLAMA_4, "gemma4_text experts": EXPERTS_4, "gemma4_unified_text": SLIDING | TIED,
    "gemma3n_text": GEMMA_3N, "qwen3_5_moe_text": MIXED, "glm4_moe_lite": MLA,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gptj": {"rotary_dim": 8}, "gpt_neo": {"num_layers": 2, "num_heads": 4, "window_size": 8,
                                           "attention_types": [[["global", "local"], 1]]},
    "ministral": {}, "arcee": {}, "apertus": {}, "helium": {}, "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}, "jetmoe": {},
    "exaone_moe": {}, "hunyuan_v1_moe": {}, "dots1": {}, "granitemoeshared": {}, "granite_swa": {},
    "olmo_hybrid": {}, "vaultgemma": {}, "mellum": {}, "nanochat": {}, "jais2": {}, "afmoe": {},
    "solar_open": {}, "cwm": {}, "internlm3": {}, "hy_v3": {}, "laguna": {},
}  # fmt: skip
EYE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": 16,
       "num_attention_heads": 2, "patch_size": 4}  # fmt: skip
QWEN_EYE = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
            "out_hidden_size": 32, "num_position_embeddings": 16, "patch_size": 4}  # fmt: skip
QWEN_IDS = {"image_token_id": 9, "video_token_id": 10, "vision_start_token_id": 11,
            "vision_end_token_id": 12}  # fmt: skip
# The model type of the text, the image tower, and what else the configuration needs.
COMPOSITE = {
    "gemma3": ("gemma3_text", {"model_type": "siglip_vision_model", **EYE},
               {"mm_tokens_per_image": 4, "image_token_index": 9, "boi_token_index": 10,
                "eoi_token_index": 11}),
    "gemma4": ("gemma4_text", EYE | {"num_key_value_heads": 2, "head_dim": 8,
                                     "position_embedding_size": 16},
               {"image_token_id": 9, "video_token_id": 10, "audio_token_id": 11}),
    "gemma4 experts": ("gemma4_text experts", EYE | {"num_key_value_heads": 2, "head_dim": 8,
                                                     "position_embedding_size": 16},
                       {"image_token_id": 9, "video_token_id": 10, "audio_token_id": 11}),
    "qwen3_5": ("qwen3_5_text", QWEN_EYE, QWEN_IDS),
    "qwen3_5_moe": ("qwen3_5_moe_text", QWEN_EYE, QWEN_IDS),
    "qwen3_vl": ("qwen3_vl_text", QWEN_EYE | {"deepstack_visual_indexes": [0, 1]}, QWEN_IDS),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", QWEN_EYE | {"deepstack_visual_indexes": [0, 1]}, QWEN_IDS),
    "mistral3": ("mistral", {"model_type": "pixtral", **EYE},
                 {"image_token_index": 9, "tie_word_embeddings": False}),
    "llama4": ("llama4_text", EYE | {"intermediate_size": 64, "vision_output_dim": 16,
                                     "projector_input_dim": 16, "projector_output_dim": 16},
               {"image_token_index": 9}),
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                             "mrope_section": [2, 1, 1]}}  # fmt: skip
TEXT_OF = {"qwen3_vl_text": MROPE, "qwen3_vl_moe_text": MROPE}
# Layers whose weight is computed with outside of them: they must stay as they are in 4 bit.
PAST = {"gemma3n_text": ["altup.correction_coefs", "altup.prediction_coefs",
                         "altup_unembed_projections.0"], "jamba": ["dt_proj"],  # and the last one
        **{key: ["mamba.out_proj"] for key in ("falcon_h1", "granitemoehybrid", "bamba")},
        **{key: ["mixer.out_proj"] for key in ("mamba2", "nemotron_h", "nemotron_h experts")},
        **{key: ["x_proj", "dt_proj", "mixer.out_proj"] for key in ("mamba", "falcon_mamba")}}  # fmt: skip
# What the repository of a composite says of its image processor.
IMAGES = {"gemma3": "Gemma3", "gemma4": "Gemma4", "gemma4 experts": "Gemma4", "mistral3": "Pixtral",
          "llama4": "Llama4", **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
                                              "Qwen2VL")}  # fmt: skip


def text_config(kind, rows, more=()):
    """The small configuration of a text model, as a dictionary."""
    known = AutoConfig.for_model(kind.split()[0])  # what follows tells variants of a type apart
    fields = {*type(known).__dataclass_fields__, *type(known).attribute_map}
    own = {"vocab_size": rows, **SIZES, **TEXT.get(kind, {}), **TEXT_OF.get(kind, {}), **dict(more)}
    own |= {"vocab_size_per_layer_input": rows}
    return {name: value for name, value in own.items() if name in fields | {"per_layer_config"}}


def families():
    """{name: configuration(rows)} of all architectures here, text models first."""
    made = {kind: lambda rows, kind=kind: AutoConfig.for_model(kind.split()[0], **text_config(kind, rows))
            for kind in TEXT}  # fmt: skip
    return made | {kind: lambda rows, kind=kind: composite(kind, rows) for kind in COMPOSITE}


def composite(kind, rows):
    text, eye, more = COMPOSITE[kind]
    inner = {"model_type": text.split()[0], **text_config(text, rows)}
    return AutoConfig.for_model(kind.split()[0], text_config=inner, vision_config=eye, **more)


def make(kind, folder, **settings):
    """Write a small checkpoint of this architecture; return its path."""
    tokenizer = make_tokenizer(bos=True)
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if kind in COMPOSITE else AutoModelForCausalLM
    model = auto.from_config(families()[kind](len(tokenizer)), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):  # of Mamba, which would overflow
            is_norm = parameter.ndim == 1 and "norm" in name  # about 1, or logits are all alike
            torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.15)
    model.generation_config = GenerationConfig(eos_token_id=0, bos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind in COMPOSITE:
        image = {"image_processor_type": f"{IMAGES[kind]}ImageProcessor", "do_resize": False}
        (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return str(folder)


def load(kind, directory):
    """The model in fp32, in its published class; (model, names of weights that are not text's)."""
    auto = AutoModelForImageTextToText if kind in COMPOSITE else AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    towers = ("vision", "visual", "multi_modal_projector", "embed_vision")
    return model.eval(), {n for n, _ in model.named_parameters() if any(t in n for t in towers)}


# ---- The cells: each returns "" where all is well ----


def full(kind, model, folder):
    """At rate 0 the loss is the mean over tokens; at another all text moves, and no tower does."""
    out, error = grid.train("full", model, folder / "zero", *grid.ONCE,
                            "--gradient_accumulation_steps", 2)  # fmt: skip
    if error:
        return error
    net, towers = load(kind, model)
    found, wanted = grid.train_loss(out), grid.token_mean(net, grid.tokens(out))
    if abs(found - wanted) > 1e-4:
        return f"loss {found} instead of {wanted}"
    trained = json.loads((out / "all_results.json").read_text())["trainable_parameters"]
    if trained != sum(w.numel() for n, w in net.named_parameters() if n not in towers):
        return f"{trained} parameters are trained"
    out, error = grid.train("full", model, folder / "moved")
    if error:
        return error
    before, after = net.state_dict(), load(kind, out)[0].state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    # The bias of a router for balance gets no gradient: only its makers' training moves it.
    names = {
        name
        for name, _ in net.named_parameters()
        if not name.endswith(("correction_bias", "expert_bias"))
    }
    still = sorted(names - towers - moved)
    if moved & towers or still:
        return f"did not move: {still[:3]}; moved: {sorted(moved & towers)[:3]}"
    file = "preprocessor_config.json"
    if kind in COMPOSITE and (out / file).read_text() != Path(model, file).read_text():
        return f"{file} is not there, or another"
    return ""


def last_layer(kind, model, folder):
    """The head has moved, in memory and in the file, and nothing else."""
    out, error = grid.train("lastlayer", model, folder)
    if error:
        return error
    (before, _), (after, _) = load(kind, model), load(kind, out)
    head, embedding = (net.get_output_embeddings() for net in (after, before))
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    name = next(name for name, weight in new.items() if weight is head.weight)
    moved = {n for n in old.keys() & new.keys() if not torch.equal(old[n], new[n])}
    if torch.equal(head.weight, embedding.weight) or moved - {name, f"{name[:-6]}bias"}:
        return f"moved: {sorted(moved)[:4]}, not {name} alone"
    return ""


def adapter(kind, model, folder):
    """LoRA: losses by hand, a gradient for each weight, the share that is said, reloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_jsonl(folder / "train.jsonl", ROWS)
    return coverage_grid.adapter(model, str(folder / "out"), data, lambda path: load(kind, path)[0])


def merge(kind, model, folder):
    """The adapter's merged model has its logits."""
    trained = folder.parent / "LoRA"
    if not (trained / "out" / "adapter_config.json").is_file():
        text = adapter(kind, model, trained)
        if not text.startswith("ok"):
            return text
    out = str(trained / "out")
    return coverage_grid.merge(model, out, lambda path: load(kind, path)[0])


def four_bit(kind, model, folder):
    """At rate 0 the loss of the model that transformers itself rounds; the share, if refused."""
    bits = ["--load_in_4bit", "true", "--lora_r", 4]
    out, error = grid.train("lora", model, folder / "asked", *grid.ONCE, *bits)
    auto = AutoModelForImageTextToText if kind in COMPOSITE else AutoModelForCausalLM
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                             bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32,
                             llm_int8_skip_modules=["lm_head", *PAST.get(kind, [])])  # fmt: skip
    net = auto.from_pretrained(
        model, dtype=torch.float32, quantization_config=nf4, device_map={"": "cpu"}
    )
    for module in net.modules():
        module.support_avx512bf16_for_cpu = False
    if found := re.search(r"only ([\d.]+)% of the layers' weights can be in", error):
        whole, towers = load(kind, model)
        done = {f"{n}.weight" for n, m in net.named_modules() if "4bit" in type(m).__name__}
        share = f"{100 * coverage_grid.covered(whole, done - towers):.1f}"
        if share != found[1]:
            return f"{share}% can be rounded: {error}"
        bits += ["--allow_partly_quantized", "true"]
        out, other = grid.train("lora", model, folder / "allowed", *grid.ONCE, *bits)
        error = other or ("" if done else error)
    if "PEFT puts nothing beside" in error or "PEFT cannot load" in error:
        return f"refused: {error.removeprefix('error: ').partition(':')[0]} in 4 bit"
    if error:
        return error
    loss, wanted = grid.train_loss(out), grid.token_mean(net, grid.tokens(out))
    if abs(loss - wanted) > 1e-3:
        return f"loss {loss} instead of {wanted}"
    return f"refused: only {found[1]}% can be in 4 bit; right if allowed" if found else ""


def generate(kind, model, folder, sizes=(4, 1)):
    """In batches, one by one, and token by token without a cache: the same text."""
    folder.mkdir(parents=True, exist_ok=True)
    data, texts = write_jsonl(folder / "prompts.jsonl", ROWS[:4]), []
    for size in sizes:
        out = folder / f"by{size}.jsonl"
        words = ["--model_name_or_path", model, "--prompt_file", data, "--output_file", out]
        _, error = grid.call(grid.GENERATE, *words, "--max_new_tokens", 8, "--batch_size", size)
        if error:
            return error
        lines = out.read_text().splitlines()
        texts.append([json.loads(line)["generated_text"] for line in lines])
    net, tokenizer = load(kind, model)[0], grid.tokens(model)
    answers = [grid.greedy(net, tokenizer(row["prompt"])["input_ids"], 8, {0}) for row in ROWS[:4]]
    texts.append([tokenizer.decode(answer, skip_special_tokens=True) for answer in answers])
    if any(text != texts[-1] for text in texts):
        return f"{texts[:-1]} in batches of {sizes}, {texts[-1]} without a cache"
    return ""


def chat(kind, model, folder):
    """A conversation's prompt has in generation the ids that training put before the answer."""
    turns = [{"role": "user", "content": row["prompt"]} for row in ROWS[:2]]
    turns = [turns[0], {"role": "assistant", "content": "はい。"}, turns[1]]
    script, asking = (load_script(ROOT / f"{path}.py") for path in
                      ("finetune_full/finetune_full", "generate_text/generate_text"))  # fmt: skip
    tokenizer = grid.tokens(model)
    script.choose_chat_template(None, tokenizer)
    row = {"messages": [*turns, {"role": "assistant", "content": "いいえ。"}]}
    ids, labels = script.encode(script.format_row(row, tokenizer)[1][-1], tokenizer)
    prompt = asking.encode_prompt({"messages": turns}, tokenizer)[1]
    is_same = (
        ids[: len(prompt)] == prompt and -100 == labels[len(prompt) - 1] != labels[len(prompt)]
    )
    return "" if is_same else f"{prompt} asked, {ids} trained"


PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
         for row, other in itertools.pairwise(ROWS[:5])]  # fmt: skip


def preferences(kind, model, folder):
    """DPO's second step by hand: the adapter after the first one against the base without it."""
    from test_finetune_grpo import log_probs

    folder.mkdir(parents=True, exist_ok=True)
    words = ["--model_name_or_path", model, "--output_dir", folder / "out", "--lora_r", 4]
    words += ["--train_file", write_jsonl(folder / "pairs.jsonl", PAIRS), "--max_steps", 2]
    words += "--per_device_train_batch_size 4 --learning_rate 2 --optim sgd --beta 0.3".split()
    words += "--lr_scheduler_type constant --max_grad_norm 0 --logging_steps 1".split()
    _, error = grid.call("finetune_dpo/finetune_dpo.py", *words, "--save_steps", 1)
    if error:
        return f"refused: {error[7:]}" if re.match("error: (TRL|PEFT) cannot", error) else error
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    base, tokenizer = load(kind, model)[0], grid.tokens(model)
    policy = PeftModel.from_pretrained(load(kind, model)[0], folder / "out" / "checkpoint-1").eval()
    logs = {}
    for name, net in (("policy", policy), ("base", base)):
        for key in ("chosen", "rejected"):
            rows = [(tokenizer(p["prompt"])["input_ids"], p[key]) for p in PAIRS]
            rows = [(i, tokenizer(t, add_special_tokens=False)["input_ids"] + [0]) for i, t in rows]
            with torch.no_grad():
                found = [log_probs(net, *row, 1).sum().item() for row in rows]
            logs[f"{name} {key}"] = torch.tensor(found)
    margins = 0.3 * sum(sign * logs[name] for name, sign in
                        {"policy chosen": 1, "base chosen": -1, "policy rejected": -1, "base rejected": 1}.items())  # fmt: skip
    wanted = {"loss": -torch.nn.functional.logsigmoid(margins), "rewards/margins": margins,
              "logps/chosen": logs["policy chosen"], "logps/rejected": logs["policy rejected"]}  # fmt: skip
    step = [entry for entry in state["log_history"] if "loss" in entry][1]
    if margins.abs().max() < 1e-3:
        return f"margins of {margins.tolist()} prove nothing"
    for name, values in wanted.items():
        if abs(step[name] - values.mean().item()) > 1e-3:
            return f"{name} {step[name]} instead of {values.mean()}"
    return ""


def rewards(kind, model, folder):
    """GRPO's two steps by hand, with answers that hang on nothing but the prompt."""
    from test_finetune_grpo import SHORT, STEPS, by_hand, fill

    folder.mkdir(parents=True, exist_ok=True)
    script = load_script(ROOT / "finetune_grpo" / "finetune_grpo.py")
    original, trainer = script.load_models, script.RewardTrainer
    sample = trainer._generate_single_turn
    grpo_inside.fix(script)

    def load_models(*args):
        net, reference = original(*args)
        fill(net)
        net.save_pretrained(folder / "start")
        return net, reference

    script.load_models = load_models
    data = write_jsonl(folder / "train.jsonl", SHORT)
    words = ["--model_name_or_path", model, "--train_file", data, "--output_dir", folder / "out"]
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            script.main([str(word) for word in [*words, *STEPS.split(), "--lora_r", 4]])
    except SystemExit:
        error = log.getvalue().splitlines()[-1]
        return f"refused: {error[7:]}" if re.match("error: (TRL|PEFT) cannot", error) else error
    finally:
        trainer._generate_single_turn = sample
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    found = [entry for entry in state["log_history"] if "loss" in entry]
    base, policy = load(kind, model)[0], load(kind, model)[0]
    policy = PeftModel.from_pretrained(policy, folder / "start", is_trainable=True).eval()
    wanted = by_hand(policy, base, grid.tokens(model))
    for number, (one, two) in enumerate(zip(found, wanted, strict=True)):
        for name, value in two.items():
            if abs(one[name] - value) > 1e-3 + 1e-3 * abs(value):
                return f"step {number}: {name} {one[name]} instead of {value}"
    return ""


METHODS = {
    "full": full, "last layer": last_layer, "LoRA": adapter, "4 bit": four_bit, "merge": merge,
    "generate": partial(generate, sizes=[1]), "batched": partial(generate, sizes=[4]),
    "chat": chat, "DPO": preferences, "GRPO": rewards,
}  # fmt: skip
ZERO = {"ZeRO-2": ("finetune_full", "zero2"), "LoRA, ZeRO-2": ("finetune_lora", "zero2"),
        "LoRA, ZeRO-3": ("finetune_lora", "zero3")}  # fmt: skip


def zero(folder, table):
    """Fill in the columns of DeepSpeed, compared as in matrix.py's own grid."""
    import matrix

    write_jsonl(folder / "train.jsonl", ROWS)
    # Gemma 4's routers turn over with the last digit: accumulating alone moves the sixth loss by
    # 0.6 %, the fourth by 0.001 %.
    short, steps = ["--max_length", 64], {kind: 4 if " experts" in kind else 8 for kind in table}
    for method, (script, config) in ZERO.items():
        outs = {
            kind: matrix.together(folder, config, script, kind, short, steps[kind])
            for kind, row in table.items()
            if method in row
        }
        runs = [runs[0] for _, runs in outs.values()]
        errors = matrix.launch(runs, folder / f"launch {method}") if runs else []
        for (kind, (out, _)), error in zip(outs.items(), errors, strict=True):
            try:
                alone = matrix.alone(folder, script, kind, short, steps[kind])
                text = error or matrix.check([error], out, alone)
                if (
                    method.endswith("ZeRO-3") and "size mismatch for" in error
                ):  # experts stored turned
                    text = "refused: transformers does not load it under ZeRO-3"
            except SystemExit:
                is_refused = table[kind].get("LoRA", "").startswith("refused")
                text = "refused: as LoRA" if is_refused else "not even without DeepSpeed"
            table[kind][method] = text
            print(f"{kind}, {method}: {text[:300]}", flush=True)


def run(folder, wanted=lambda name: True):
    """{architecture: {method: text}}: "ok", the script's refusal, or what is wrong."""
    table = {}
    for kind in families():
        methods = [method for method in METHODS if wanted(f"{kind} {method}")]
        pieces = [method for method in ZERO if wanted(f"{kind} {method}")]
        model = make(kind, folder / "models" / kind) if methods or pieces else None
        for method in methods:
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    text = METHODS[method](kind, model, folder / kind / method) or "ok"
            except SystemExit:
                text = said.getvalue().splitlines()[-1].removeprefix("error: ")
                text = f"refused: {text}" if text.startswith("PEFT cannot load what") else text
            except Exception as error:  # a cell must not end the grid
                text = f"{type(error).__name__}: {error}"
            table.setdefault(kind, {})[method] = text
            print(f"{kind}, {method}: {text[:300]}", flush=True)
        for method in pieces:
            table.setdefault(kind, {})[method] = ""
    zero(folder, table)
    return table
