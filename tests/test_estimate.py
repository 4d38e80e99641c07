"""jobs/estimate.py against real training steps: bytes of real tensors, allocations of a CPU.

python tests/test_estimate.py     # how far off it is, and the READMEs' whole table (3 minutes)
"""

import copy
import functools
import gc
import json
import random
import re
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import trl.trainer.utils
from conftest import ROOT, load_script, make_tokenizer, write_jsonl
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

sys.path.append(str(ROOT / "jobs"))
import count_memory
import count_tokens
import count_trl
import estimate
import warn_job

DRAW = load_script(ROOT / "deepspeed_configs" / "draw.py")
READMES = ("README.md", "README.en.md")


def tiny_config(kind, layers=3, hidden=64):
    sizes = {"vocab_size": 384, "hidden_size": hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 3 * hidden}
    sizes |= {"max_position_embeddings": 512, "tie_word_embeddings": kind == "qwen3"}
    if kind != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    if kind == "qwen3":
        sizes["head_dim"] = hidden // 4
    return AutoConfig.for_model(kind, **sizes)


def plan_of(folder, config, *words):
    """The plan for a model of this configuration."""
    config.save_pretrained(folder)
    line = ["--model_name_or_path", str(folder), "--precision", "fp32", *words]
    args = estimate.complete(estimate.parse([str(word) for word in line]))
    args.nodes, args.gpus, args.stage = 1, 1, "none"
    return args


# ---- Real steps, written without the project ----


def real_model(config, method="full", attention=None):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if method == "last_layer":
        head = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone())
        model.requires_grad_(False)
        model.get_output_embeddings().weight = head
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    return model.train()


def size(tensors):
    """Bytes; tensors that share their memory count once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def batch_of(rows, length, share=1.0):
    ids = torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    learned = torch.zeros(rows, length, dtype=torch.bool)
    learned[:, : max(1, round(share * (length - 1)))] = True
    batch = {"input_ids": ids, "labels": ids, "use_cache": False, "logits_to_keep": learned}
    return batch | {"shift_labels": ids.roll(-1, 1)[learned]}


def measured_peak(model, batch, step=lambda model, batch: model(**batch).loss):
    """Most bytes that the CPU's allocator had given out at once, beyond those before the step."""
    step(model, batch).backward()  # gradients are there already
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step(model, batch).backward()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def pair_step(model, reference, ids):
    """DPO's loss of rows whose first half is preferred, with TRL's head; no word of the project's."""
    ones = torch.ones_like(ids)
    scores = model(input_ids=ids, attention_mask=ones, labels=ids, fused_lm_head=True).log_probs
    with torch.no_grad(), nullcontext() if reference else model.disable_adapter():
        frozen = reference or model
        start = frozen(input_ids=ids, attention_mask=ones, labels=ids, fused_lm_head=True).log_probs
    better, worse = (scores - start).sum(1).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (better - worse)).mean()


def measured_kept(model, batch):
    """Bytes that autograd keeps from the forward pass, the model's own not counted."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, []
    own |= {b.untyped_storage().data_ptr() for b in model.buffers()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss  # which holds them
    return size(kept) if loss is not None else 0


CASES = [  # kind, attention, rows, length, checkpointing, method
    ("llama", "sdpa", 4, 128, False, "full"),
    ("llama", "sdpa", 6, 200, True, "full"),
    ("llama", "sdpa", 4, 128, False, "lora"),
    ("gpt_neox", "sdpa", 5, 160, False, "full"),
    ("gpt_neox", "eager", 3, 128, True, "full"),
    ("gpt_neox", "sdpa", 4, 64, False, "last_layer"),
    ("qwen3", "sdpa", 4, 128, True, "full"),
    ("qwen3", "eager", 2, 160, False, "full"),
]


def compare(folder, kind, attention, rows, length, checkpointing, method, layers=3, hidden=64):
    """(computed, measured) for the kept bytes, and for the peak."""
    config = tiny_config(kind, layers, hidden)
    words = ["--method", method, "--max_length", length, "--attn_implementation", attention]
    words += ["--activation_checkpointing", str(checkpointing)]
    kept, peak = count_memory.activations(plan_of(folder, copy.deepcopy(config), *words))(rows)
    model = real_model(config, method, attention)
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = batch_of(rows, length)
    really_kept = kept if checkpointing else measured_kept(model, batch)
    return (kept, really_kept), (peak, measured_peak(model, batch))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_activations_within_a_tenth(case, tmp_path):
    for computed, measured in compare(tmp_path, *case):
        assert computed == pytest.approx(measured, rel=0.1), f"{computed:,} {measured:,}"


@pytest.mark.parametrize("trainer", ["dpo", "grpo"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_pairs_within_a_tenth(method, trainer, tmp_path, monkeypatch):
    """Two answers a row, the reference's pass, TRL's tiles in place of logits; narrow ones, since
    on a CPU TRL needs more for each than on a GPU."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    monkeypatch.setattr(count_trl, "COLUMNS", 64)
    config, rows, length = tiny_config("llama"), 4, 128
    config.vocab_size = 3000  # whole logits would be the most of all
    words = ["--method", method, "--max_length", length, "--trainer", trainer]
    plan = plan_of(tmp_path, copy.deepcopy(config), *words)
    plan.counts = count_memory.count(plan)
    kept, computed = count_memory.most_bytes(plan, count_memory.activations(plan), rows)
    model = real_model(config, method)
    reference = AutoModelForCausalLM.from_config(config).eval() if method == "full" else None
    for one in filter(None, (model.get_base_model() if method == "lora" else model, reference)):
        trl.trainer.utils.add_fused_lm_head(one)
    rows *= 2 if trainer == "dpo" else 1
    ids = torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    measured = measured_peak(model, ids, lambda model, ids: pair_step(model, reference, ids))
    assert computed == pytest.approx(measured, rel=0.1), f"{computed:,} {measured:,} {kept:,}"
    plan.stage = "none"
    copy_of_it = 4 * plan.counts.total if method == "full" else 0
    assert count_memory.reference_bytes(plan, plan.counts.total, 4) == copy_of_it


def test_checkpointing_in_16_bit(tmp_path):
    """Layer norms are fp32 in autocast; what is computed again has to come out in the same."""
    words = ["--max_length", 64, "--method", "lora"]
    config = tiny_config("gpt_neox")
    plans = [
        plan_of(tmp_path / str(on), copy.deepcopy(config), *words, "--activation_checkpointing", on)
        for on in (True, False)
    ]
    for plan in plans:
        plan.precision = "bf16"
    saved, plain = (count_memory.activations(plan)(8)[0] for plan in plans)
    assert 0 < saved < plain


def test_experts_a_token_does_not_pass(tmp_path):
    """Two of eight experts compute: time goes by the other weights and a quarter of these."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("mixtral", **sizes, num_local_experts=8)
    model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    for method in ("full", "lora"):
        counts = count_memory.count(plan_of(tmp_path, copy.deepcopy(config), "--method", method))
        assert experts == 2 * 8 * 3 * 64 * 96 and counts.idle == experts * 3 / 4
        assert counts.base == sum(p.numel() for p in model.parameters())


def test_logits_count_where_something_is_learned(tmp_path):
    """A tenth of the tokens with a loss, and a large vocabulary: measured again."""
    config = tiny_config("llama", layers=1)
    config.vocab_size = 8000
    words = ["--max_length", 64]
    peaks = []
    for share in (1, 0.1):
        args = plan_of(tmp_path, config, *words, "--learned_share", share)
        model = real_model(config)
        computed = count_memory.activations(args)(3)[1]
        assert computed == pytest.approx(measured_peak(model, batch_of(3, 64, share)), rel=0.1)
        peaks.append(computed)
    assert peaks[0] > 3 * peaks[1]


# ---- Weights, gradients, optimizer: to the byte ----


@pytest.mark.parametrize("method", ["full", "last_layer", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # a head of its own, and a tied one
def test_states_to_the_byte(kind, method, tmp_path):
    config = tiny_config(kind)
    args = plan_of(tmp_path, copy.deepcopy(config), "--method", method)
    counts = count_memory.count(args)
    items = count_memory.states(args, counts)
    model = real_model(config, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    model(**batch_of(2, 32)).loss.backward()
    optimizer.step()
    states = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert items["weights"] == size(model.parameters())
    assert items["gradients"] == size(p.grad for p in trained)
    assert items["optimizer"] == size(states)
    assert counts.trained == sum(p.numel() for p in trained)
    plain = AutoModelForCausalLM.from_config(config)
    assert counts.base == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("method", ["qlora", "lora_8bit"])
def test_rounded_weights_to_the_byte(method, tmp_path):
    """Layers that bitsandbytes has really rounded; its tables of 16 and 256 values aside."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    config = tiny_config("llama", layers=1, hidden=256)
    args = plan_of(tmp_path, copy.deepcopy(config), "--method", method, "--precision", "bf16")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rounded, total = [], 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            shape = (module.in_features, module.out_features)
            if method == "qlora":
                new = Linear4bit(*shape, bias=False, compress_statistics=True, quant_type="nf4")
            else:
                new = Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.load_state_dict({"weight": module.weight.detach().float()})
            weight = new.to("cpu").weight
            state = getattr(weight, "quant_state", None)
            parts = [state.absmax, state.state2.absmax] if state else [weight.SCB]
            total += size([weight.data, *parts])
            rounded.append(module.weight)
    others = [p for p in model.parameters() if not any(p is w for w in rounded)]
    counts = count_memory.count(args)
    assert counts.frozen == total + size(others)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # a head of its own, and a tied one
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_head_beside_an_adapter(kind, method, tmp_path):
    """Trained as a whole it is a copy of its own: the base stays as it is, and as many bytes."""
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config)
    words = ["--method", method, "--precision", "bf16"]
    plans = [plan_of(tmp_path, copy.deepcopy(config), *words)]
    plans += [plan_of(tmp_path, copy.deepcopy(config), *words, "--modules_to_save", "lm_head")]
    plain, whole = map(count_memory.count, plans)
    head = model.get_output_embeddings().weight.numel()
    assert plain.base == whole.base == sum(p.numel() for p in model.parameters())
    assert whole.trained - plain.trained == whole.head == head and plain.head == 0
    assert plain.frozen == whole.frozen


PARTS = {  # what is trained, in the words of the project, and the names of it
    "--method full": "",
    "--method last_layer": r"lm_head",
    "--method last_layer --train last_block": r"lm_head|layers\.2\.|model\.norm",
    "--method lora --lora_r 1": None,
    "--method lora --lora_r 1 --modules_to_save lm_head": None,
}


@pytest.mark.parametrize("words", PARTS)
def test_operations_as_torch_counts_them(words, tmp_path):
    """A model that is mostly vocabulary, whose embedding is a product, since it is tied."""
    from peft import LoraConfig, get_peft_model

    config = tiny_config("qwen3")
    config.vocab_size = 4000
    args = plan_of(tmp_path, copy.deepcopy(config), "--max_length", 8, *words.split())
    args.counts = count_memory.count(args)
    computed = estimate.minutes(args, 32) * 60 * estimate.FP32_FLOPS * estimate.SHARE
    if PARTS[words] is None:
        whole = ["lm_head"] if "modules_to_save" in words else None
        lora = LoraConfig(r=1, target_modules="all-linear", modules_to_save=whole)
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    else:
        model = real_model(config, args.method)
        for name, weight in model.named_parameters():
            weight.requires_grad = bool(re.search(PARTS[words], name))
    ids = torch.zeros(4, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert computed == pytest.approx(counted.get_total_flops(), rel=0.06)


@pytest.mark.parametrize("stage", count_memory.STAGES)
def test_stages_are_those_of_the_lesson(stage, tmp_path):
    """As deepspeed_configs/draw.py counts them; DDP's second gradients are communication here."""
    args = plan_of(tmp_path, tiny_config("llama"))
    counts = count_memory.count(args)
    for args.nodes, args.gpus in ((1, 1), (1, 8), (2, 8)):
        args.stage, n = stage, args.nodes * args.gpus
        items = count_memory.states(args, counts)
        found = [items[name] / counts.total for name in ("weights", "gradients", "optimizer")]
        if stage == "none":
            found[1] += items["communication"] / counts.total
        assert found == pytest.approx(DRAW.gpu_bytes(stage, n)), n
        host = count_memory.host_bytes(args, counts) / counts.total
        assert host == pytest.approx(DRAW.host_bytes(stage, n)), n


def test_twice_the_gradients_where_batches_are_accumulated(tmp_path):
    """As deepspeed_configs/README.md measured them: 16 bytes, and 20; on one GPU always 16."""
    args = plan_of(tmp_path, tiny_config("llama"))
    counts = count_memory.count(args)
    for args.gpus, args.gradient_accumulation_steps, size in ((8, 1, 16), (8, 2, 20), (1, 2, 16)):
        items = count_memory.states(args, counts)
        assert sum(items.values()) == size * counts.total


ROUNDING = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}


def test_what_weights_are_kept_in(tmp_path):
    """fp32, in fp16 and with DeepSpeed's own bf16 2 bytes; an adapter's base in 16 bit."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps(ROUNDING), "utf-8")
    ours = ROOT / "deepspeed_configs" / "zero2.json"
    cases = [("bf16", "full", ours, 4, 4), ("fp32", "full", ours, 4, 4)]
    cases += [("bf16", "full", own, 2, 2), ("fp16", "full", ours, 2, 2)]
    cases += [("bf16", "lora", ours, 4, 2), ("fp32", "lora", ours, 4, 4)]
    cases += [("bf16", "last_layer", ours, 4, 4)]
    for precision, method, file, kept, held in cases:
        words = ["--precision", precision, "--method", method, "--deepspeed", file]
        args = plan_of(tmp_path / "model", tiny_config("llama"), *words)
        args.gpus, args.stage = 8, "zero2"
        counts = count_memory.count(args)
        frozen = held * (counts.total - counts.trained)
        items = count_memory.states(args, counts)
        assert items["weights"] == kept * counts.trained + frozen, (precision, method, file)
        assert items["communication"] == 2 * kept * counts.trained
        model = count_memory.build(args)
        sizes = {p.element_size() for p in model.parameters() if p.requires_grad}
        assert sizes == {kept}


def test_models_that_see_and_other_kinds(tmp_path):
    """What text does not pass is frozen, and loaded."""
    text = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    sight = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"intermediate_size": 48, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=sight)
    args = plan_of(tmp_path, config, "--max_length", 32)
    counts = count_memory.count(args)
    assert 0 < counts.trained < counts.total
    assert count_memory.states(args, counts)["weights"] == 4 * counts.total
    kept, peak = count_memory.activations(args)(4)
    assert 0 < kept <= peak


def test_the_largest_batch(tmp_path, monkeypatch):
    """It fits, and one more does not."""
    monkeypatch.setattr(count_memory, "GPU_GB", 0.05)
    monkeypatch.setattr(count_memory, "CONTEXT_GB", 0)
    args = plan_of(tmp_path, tiny_config("gpt_neox"), "--max_length", 64)
    traced = count_memory.activations(args)
    monkeypatch.setattr(count_memory, "activations", lambda args: traced)
    args.gpus, args.zero_stage = 1, "none"
    most = count_memory.fit(args).most
    assert most > 10
    for rows, fits in ((most, True), (most + 1, False)):
        args.per_device_train_batch_size = rows
        assert count_memory.fit(args).fits == fits
        needed = sum(count_memory.states(args, args.counts).values()) + traced(rows)[1]
        assert (needed <= 0.05e9) == fits


# ---- What it prints ----


@pytest.fixture
def small(monkeypatch):
    """Nothing is traced, where memory is not the question."""
    monkeypatch.setattr(count_memory, "activations", lambda args: lambda rows: (rows, rows))


def run(capsys, *words):
    estimate.main([str(word) for word in words])
    return capsys.readouterr().out


def test_the_line_to_type(tmp_path, capsys, monkeypatch, small):
    """The job file and its variables are there, the script knows each option, PBS the walltime."""
    tiny_config("llama").save_pretrained(tmp_path / "model")
    data = tmp_path / "my.jsonl"
    write_jsonl(data, [{"text": "abc " * 50}] * 40)
    monkeypatch.chdir(tmp_path)
    known = {field.name for field in fields(TrainingArguments)}
    for method, more in (("full", ["--nodes", 2]), ("last_layer", []), ("qlora", []), ("lora", [])):
        where = ["--model_name_or_path", "model", "--train_file", "my.jsonl", "--method", method]
        out = run(capsys, *where, "--max_length", 128, *more)
        words = shlex.split(out.split("type ")[1])
        folder = (tmp_path / words[1]).resolve()  # from where it was typed
        assert words[:1] + words[2:4] == ["cd", "&&", "qsub"]
        script = load_script(folder / f"{folder.name}.py")
        assert re.search(r"-l walltime=\d+:00:00 ", out)
        assert ("select=2" in out) == (method == "full") == words[-1].endswith("multinode.sh")
        job = (folder / words[-1]).read_text("utf-8")
        values = words[words.index("-v") + 1].split(",")
        variables = dict(value.split("=", 1) for value in values)
        assert all(name in job for name in variables)
        assert Path(variables["MODEL"]).is_absolute() and Path(variables["TRAIN_FILE"]) == data
        if deepspeed := variables.get("DEEPSPEED"):
            assert (folder / deepspeed).is_file()
        options = {word.removeprefix("--") for word in variables["ARGS"].split()[::2]}
        assert options <= known | {field.name for field in fields(script.ScriptArguments)}
        assert ("load_in_4bit" in options) == (method == "qlora")


def test_the_line_says_what_was_computed(tmp_path, capsys, small):
    """The length that was asked for, the modules, the file of DeepSpeed; or that it cannot."""
    data = write_jsonl(tmp_path / "my.jsonl", [{"text": "a"}] * 300 + [{"text": "a" * 900}] * 9000)
    own = tmp_path / "own.json"
    own.write_text((ROOT / "deepspeed_configs" / "zero2.json").read_text())
    where = ["--model_name_or_path", "open-calm-7b", "--method", "lora", "--train_file", data]
    more = ["--deepspeed", own, "--nodes", 1, "--lora_target_modules", "query_key_value"]
    out = run(capsys, *where, *more, "--max_length", 64)
    assert "--max_length 64 " in out and "rows x 64 tokens" in out  # short rows stand in front
    assert f"DEEPSPEED={own}," in out and "--lora_target_modules query_key_value" in out
    found = int(re.search(r"about ([\d,]+) tokens", out)[1].replace(",", ""))
    assert found == pytest.approx(9000 * 300, rel=0.1)  # of 3 bytes each, where no tokenizer is
    out = run(capsys, *where, *more[:-1], "query_key_value,dense", "--max_length", 64)
    assert re.search(r"type +--lora_target_modules query_key_value,dense does not pass", out)


def test_time_points_and_walltime(capsys, small):
    """6.9 billion x 8 x 5.12 million operations at 2.97e14 a second are 15.9 minutes."""
    where = ["--model_name_or_path", "falcon-7b", "--gpus", 1, "--zero_stage", "none"]
    more = ["--tokens", 5_120_000 * 4, "--num_train_epochs", 3, "--activation_checkpointing"]
    out = run(capsys, *where, *more, "--max_length", 64)
    assert "6,921,720,704 parameters" in out
    hours = 12 * 15.93 / 60  # 3.2
    assert f"{hours:.1f} h for 61,440,000 tokens" in out and "walltime=8:00:00" in out
    assert f"about {3 * (hours + 0.5):.1f}; 24 are taken" in out


BAD = [
    ("--method full", "--model_name_or_path is missing"),
    ("--model_name_or_path nosuch --nodes x", "argument --nodes"),
    ("--model_name_or_path nosuch --method full2", "invalid choice"),
    ("--model_name_or_path nosuch/model", "no configuration of nosuch/model"),
    ("--model_name_or_path falcon-7b --max_length 4096", "over 2048 positions"),
    ("--model_name_or_path falcon-7b --deepspeed no.json", "no configuration of DeepSpeed"),
    ("--model_name_or_path falcon-7b --method qlora --zero_stage 3", "no rounded base"),
    ("--model_name_or_path falcon-7b --method last_layer --nodes 2", "no job for several nodes"),
    ("--model_name_or_path falcon-7b --trainer dpo --nodes 2", "finetune_dpo has no job for sev"),
    ("--model_name_or_path falcon-7b --trainer grpo --method last_layer", "has no last layer"),
    ("--model_name_or_path falcon-7b --learned_share 2", "at most 1"),
    ("--model_name_or_path falcon-7b --train_file no.jsonl", "--train_file no.jsonl"),
    ("--model_name_or_path falcon-7b --gpus 2", "--gpus is 1 (rt_HG) or 8"),
    ("--model_name_or_path falcon-7b --nodes 1.5", "no whole number"),
    ("--model_name_or_path falcon-7b --nodes 129", "128 to a job at most"),
    ("--model_name_or_path falcon-7b --method lora --lora_r 1.5", "no whole number"),
    ("--model_name_or_path falcon-7b --attn_implementation no", "cannot be built for this"),
    ("--model_name_or_path falcon-7b --batch 4", "unrecognized"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stopped:
        estimate.main(words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("text", ["", "[]", "1\n2\n", '["a"]'])
def test_data_without_rows_is_one_line(text, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        count_tokens.some_rows(str(tmp_path / "a.json"))
    assert stopped.value.code == 2 and "holds no rows" in capsys.readouterr().err


def test_data_is_counted_roughly(tmp_path):
    """Rows of 30 and of 60 letters in turn, of 3 bytes each; only 300 of 2,000 are read."""
    rows = [
        {"messages": [{"role": "user", "content": "あ" * 30 * (1 + n % 2)}]} for n in range(2000)
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    for file in ("a.jsonl", "a.json"):
        args = plan_of(tmp_path / "model", tiny_config("llama"), "--max_length", 50)
        args.train_file = [str(tmp_path / file)]
        tokens, longest = count_tokens.look_at_data(args)
        assert longest == 50  # the longer ones are cut
        assert tokens == pytest.approx(2000 * (30 + 50) / 2, rel=0.1)


def shapes_of_data():
    """{name: (rows, tokens of a row at most)} that a few rows from all over show badly."""
    draw = random.Random(0)
    lengths = [draw.randrange(10, 2000) for _ in range(2000)]
    few = [draw.choice([1] * 30 + [20000]) for _ in range(3000)]
    return {"sorted by length": (sorted(lengths), 256), "few very long": (few, 256)}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("shape", ["sorted by length", "few very long"])
def test_rows_of_all_lengths_are_drawn(shape, kind, tmp_path):
    """Of 3 bytes a letter, as where no tokenizer is; a row of Parquet is drawn by its place."""
    lengths, most = shapes_of_data()[shape]
    rows = [{"prompt": "あ" * length, "completion": "い"} for length in lengths]
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif kind == "json":
        file.write_text(json.dumps(rows), "utf-8")
    else:
        write_jsonl(file, rows)
    args = plan_of(tmp_path / "model", tiny_config("llama"), "--max_length", most)
    args.train_file = [str(file)]
    tokens, _ = count_tokens.look_at_data(args)
    exact = sum(min(most, length + 1 + 1 / 3) for length in lengths)
    rel = 0.3 if (kind, shape) == ("parquet", "few very long") else 0.05
    assert tokens == pytest.approx(exact, rel=rel)


@pytest.mark.parametrize(
    "own", [None, "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"]
)
def test_chats_are_counted_with_their_template(own, tmp_path):
    """The model's, or that of the scripts; short turns are mostly template."""
    args = plan_of(tmp_path / "model", tiny_config("llama"), "--max_length", 256)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = own
    tokenizer.save_pretrained(tmp_path / "model")
    text = "<|user|>はい<|assistant|>いいえ" if own else (
        "### 指示:\nはい\n\n### 応答:\nいいえ<|endoftext|>\n")  # fmt: skip
    wanted = len(tokenizer(text)["input_ids"])
    turns = [{"role": "user", "content": "はい"}, {"role": "assistant", "content": "いいえ"}]
    for number, (row, each) in enumerate([
        ({"messages": turns}, 1),
        ({"instruction": "はい", "input": "", "output": "いいえ"}, 1),
        ({"prompt": turns[:1], "chosen": turns[1:], "rejected": turns[1:]}, 2),
        ({"chosen": turns, "rejected": turns}, 2),
    ]):  # fmt: skip
        args.train_file = [write_jsonl(tmp_path / f"{number}.jsonl", [row] * 50)]
        assert count_tokens.look_at_data(args) == (50 * wanted * each, wanted), row


def test_pairs_are_counted_with_their_prompt(tmp_path):
    """Each answer behind the prompt, whether as text or as turns that repeat it or not."""
    ask, yes, no = "あ" * 20, "い" * 5, "う" * 10
    turn = {"role": "user", "content": ask}
    yes_turn, no_turn = ([{"role": "assistant", "content": text}] for text in (yes, no))
    rows = [
        {"prompt": ask, "chosen": yes, "rejected": no},
        {"prompt": [turn], "chosen": yes_turn, "rejected": no_turn},
        {"prompt": ask, "chosen": [turn, *yes_turn], "rejected": [turn, *no_turn]},
        {"chosen": [turn, *yes_turn], "rejected": [turn, *no_turn]},
    ]
    args = plan_of(tmp_path / "model", tiny_config("llama"), "--max_length", 500)
    for number, row in enumerate(rows):
        args.train_file = [write_jsonl(tmp_path / f"{number}.jsonl", [{**row, "id": "x"}] * 50)]
        tokens, longest = count_tokens.look_at_data(args)
        words = 0 if number == 0 else 14  # "user" and "assistant"
        assert tokens / 50 == pytest.approx(2 * 20 + 5 + 10, abs=words + 1), number
        assert 30 <= longest <= 30 + 7, number


def test_the_line_of_pairs(capsys, small):
    """Its own directory; eight operations a parameter and token with the reference's two."""
    where = ["--model_name_or_path", "open-calm-7b", "--max_length", 64, "--tokens", 1e9]
    hours = {}
    for trainer in ("sft", "dpo"):
        out = run(capsys, *where, "--method", "full", "--trainer", trainer)
        hours[trainer] = float(re.search(r"time +([\d.]+) h", out)[1])
    assert hours["dpo"] / hours["sft"] == pytest.approx(8 / 6, rel=0.05)
    assert "cd finetune_dpo && " in out and "--full true" in out and "reference" in out
    out = run(capsys, *where, "--method", "qlora", "--trainer", "dpo")
    assert "--load_in_4bit true" in out and "reference" not in out and "--full" not in out
    out = run(capsys, *where, "--method", "lora", "--trainer", "grpo")
    assert "not estimated: answers are written" in out and "qsub" not in out


# ---- In the READMEs ----


def shown_rows(readme):
    """The rows of the README's table of jobs, in the words of --all."""
    text = (ROOT / readme).read_text(encoding="utf-8").replace("分", " min").replace("、", ", ")
    return [line for line in text.splitlines() if re.match(r"\| `[\w-]+/[\w.-]+` \|", line)]


@pytest.mark.parametrize("readme", READMES)
def test_table_in_the_readme(readme, monkeypatch):
    """One model here; the whole table: python tests/test_estimate.py."""
    names = [entry["hub_id"] for entry in estimate.SEVEN.values()]
    shown = {row.split("`")[1]: row for row in shown_rows(readme)}
    assert [*shown] == names
    some = {"dolly-v2-12b": estimate.SEVEN["dolly-v2-12b"]}  # full on rt_HF, the rest on rt_HG
    monkeypatch.setattr(estimate, "SEVEN", some)
    for row in computed_rows():
        assert row == shown[row.split("`")[1]]


@functools.cache
def computed_rows():
    return [*estimate.table()]


# ---- In a job ----


def test_a_job_is_warned(tmp_path, capsys, monkeypatch, small):
    """Of memory, of time; with half of it done, of nothing."""
    tiny_config("llama").save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "my.jsonl", [{"text": "abc " * 400}] * 100)
    monkeypatch.setattr(warn_job, "gpu_bytes", lambda: 2e9)
    monkeypatch.setattr(estimate, "FLOPS", 2e9)
    output = ["--output_dir", str(tmp_path / "output"), "--save_steps", "200", "--bf16", "true"]
    words = ["--model_name_or_path", str(tmp_path / "model"), "--train_file"]
    words += [str(tmp_path / "my.jsonl"), *output, "--num_train_epochs", "1", "--max_length", "256"]
    args = warn_job.read_job("1", "finetune_full.py", *words)
    assert (args.method, args.precision, args.gpus) == ("full", "bf16", 1)
    count_memory.fit(args)
    needed = 60 * estimate.minutes(args, count_tokens.look_at_data(args)[0])
    monkeypatch.setenv("DEADLINE", str(int(time.time() + 0.75 * needed)))
    warn_job.warn(args)
    assert capsys.readouterr().out.startswith("warning    does not finish before the deadline")
    state = tmp_path / "output" / "checkpoint-5" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"global_step": 5, "max_steps": 10}))
    warn_job.warn(args)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(warn_job, "gpu_bytes", lambda: 1e9)
    warn_job.warn(args)
    out = capsys.readouterr().out
    assert out.startswith("warning    does not fit: 8 rows x 256 tokens") and "1 GB" in out
    settings = tmp_path / "run_args.yaml"
    settings.write_text(
        f"model_name_or_path: {tmp_path / 'model'}\nload_in_4bit: true\nrun: {{a: 1}}\n"
    )
    args = warn_job.read_job(
        "8",
        "finetune_lora.py",
        str(settings),
        "--deepspeed",
        str(ROOT / "deepspeed_configs/zero2.json"),
    )
    assert (args.method, args.zero_stage, args.gpus) == ("qlora", "zero2", 8)


def test_a_job_of_answers_is_warned_of_memory_only(tmp_path, capsys, monkeypatch, small):
    """DPO's --full true has a reference; GRPO's rows grow by their answers."""
    tiny_config("llama").save_pretrained(tmp_path / "model")
    file = write_jsonl(
        tmp_path / "my.jsonl", [{"prompt": "abc " * 75, "chosen": "a", "rejected": "b"}] * 9
    )
    monkeypatch.setattr(warn_job, "gpu_bytes", lambda: 1e9)
    monkeypatch.setenv("DEADLINE", str(int(time.time())))
    words = ["--model_name_or_path", str(tmp_path / "model"), "--train_file", str(file)]
    for script, more, length, is_late in (
        ("finetune_dpo.py", ["--full", "true"], 101, True),
        ("finetune_grpo.py", ["--max_completion_length", "64"], 165, False),
    ):
        args = warn_job.read_job("1", script, *words, *more)
        assert args.method == ("full" if is_late else "lora")
        warn_job.warn(args)
        out = capsys.readouterr().out
        assert f"8 rows x {length} tokens need" in out, out
        assert ("does not finish" in out) == is_late and ("reference" in args.items) == is_late


def test_a_job_goes_on_whatever_the_estimate_says(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    no_model = ["--model_name_or_path", "no/model"]
    for words in (["1", "finetune_full.py", *no_model], ["1", "finetune_full.py"], ["x"], []):
        warn_job.main(words)
        said = capsys.readouterr()
        assert said.out.startswith("estimate   none (") and (said.out.count("\n"), said.err) == (
            1,
            "",
        )


if __name__ == "__main__":
    import tempfile

    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            for layers, hidden in ((3, 64), (8, 192)):
                place = Path(folder) / f"{number}-{layers}"
                pairs = compare(place, *case, layers=layers, hidden=hidden)
                errors += [computed / measured - 1 for computed, measured in pairs[1:]]
                print(case, layers, hidden, f"{errors[-1]:+.1%}", flush=True)
    print(
        f"{len(errors)} peaks: from {min(errors):+.1%} to {max(errors):+.1%} of what was measured"
    )
    rows = [*estimate.table()]
    print(*rows, sep="\n")
    assert all(rows == shown_rows(readme) for readme in READMES), "the READMEs' tables differ"
