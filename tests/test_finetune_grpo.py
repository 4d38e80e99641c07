"""finetune_grpo.py against a calculation by hand, what is sampled, and what is refused."""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import grpo_inside
import keep_grpo
import keep_run
import matrix
import pytest
import seven_models
import torch
from conftest import CONFIGS, ROOT, ROWS, load_script, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from test_finetune_full import refused, results
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments

SCRIPT = ROOT / "finetune_grpo" / "finetune_grpo.py"
SHORT = [ROWS[number] | {"choices": ["a", "b"]} for number in (1, 3, 5, 6)]
STEPS = (
    "--num_generations 4 --per_device_train_batch_size 8 --max_completion_length 8 --max_steps 2"
)
STEPS += " --shuffle_dataset false --optim sgd --learning_rate 0.3 --lr_scheduler_type constant"
STEPS += " --max_grad_norm 1e6 --logging_steps 1 --save_strategy no"


@pytest.fixture(scope="module")
def script():
    gc.freeze()
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def own_signals():
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


@pytest.fixture
def fixed(script, monkeypatch):
    """Answers and rewards that hang on nothing but the prompt."""
    monkeypatch.setattr(script, "reward", script.reward)
    trainer = script.RewardTrainer
    monkeypatch.setattr(trainer, "_generate_single_turn", trainer._generate_single_turn)
    grpo_inside.fix(script)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("grpo") / "train.jsonl", SHORT)


def run(script, model, train_file, out, *more):
    words = ["--model_name_or_path", model, "--train_file", train_file, "--output_dir", out]
    script.main([str(word) for word in [*words, *more]])
    state = json.loads((Path(out) / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


# ---- Loss, KL, rewards and gradients, by hand ----


def log_probs(model, prompt, answer, temperature):
    """Of each token of an answer, alone in its row; and nothing of TRL or the project."""
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    scores = (logits[len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
    return scores.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def by_hand(policy, base, tokenizer, beta=0.04, temperature=1.0, loss_type="dapo", scale="group"):
    """Two steps of plain gradient descent, two prompts with four answers each; a dict for each."""
    logged, rate = [], 0.3
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    for rows in (SHORT[:2], SHORT[2:]):
        terms, rewards, lengths = [], [], []
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answers = [grpo_inside.answer(prompt, number) for number in range(4)]
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
            found = [grpo_inside.reward(row, text) for text in texts]
            earned = torch.tensor([sum(parts.values()) for parts in found])
            rewards += found
            for ids, value in zip(answers, earned, strict=True):
                ours = log_probs(policy, prompt, ids, temperature)
                with torch.no_grad():
                    theirs = log_probs(base, prompt, ids, temperature)
                terms.append((ours, theirs, value, earned))
        whole = torch.cat([earned for _, _, _, earned in terms[::4]])
        losses, gaps = [], []
        for ours, theirs, value, earned in terms:
            spread = {"group": earned.std(), "batch": whole.std(), "none": 1 - 1e-4}[scale]
            advantage = (value - earned.mean()) / (spread + 1e-4)
            ratio = (ours - ours.detach()).exp()
            gap = (theirs - ours).exp() - (theirs - ours) - 1
            losses.append(-advantage * ratio + beta * gap * ratio)
            gaps.append(gap.detach())
            lengths.append(len(ours))
        if loss_type == "grpo":
            loss = torch.stack([term.mean() for term in losses]).mean()
        elif loss_type == "dr_grpo":
            loss = torch.cat(losses).sum() / (len(losses) * 8)
        else:
            loss = torch.cat(losses).mean()
        for weight, slope in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            weight.data -= rate * slope
        mean = {name: sum(p[name] for p in rewards) / 8 for name in rewards[0]}
        logged.append({"loss": loss.item(), "kl": torch.cat(gaps).mean().item(),
                       "reward": sum(mean.values()), "reward/right": mean["right"],
                       "reward/form": mean["form"],
                       "completions/mean_length": sum(lengths) / 8})  # fmt: skip
    return logged


def fill(model):
    """LoRA's B with std 0.1: at 0 an adapter does nothing, and no mistake would show."""
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=draw)


def load(path, bits=None):
    options = {}
    if bits:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**{bits: True}, **nf4)
        options["device_map"] = {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # else an evaluation repacks the weights
    return model


HEAD = "--modules_to_save lm_head"
CASES = {kind: (kind, "", {}) for kind in CONFIGS}
CASES |= {f"{kind}, full": (kind, "--full true", {}) for kind in ("gpt2", "gpt_neox", "falcon")}
CASES |= {
    "accumulated": ("gpt2", "--per_device_train_batch_size 4 --gradient_accumulation_steps 2", {}),
    "grpo": ("llama", "--loss_type grpo --beta 0", {"loss_type": "grpo", "beta": 0}),
    "dr_grpo": ("llama", "--loss_type dr_grpo --scale_rewards batch",
                {"loss_type": "dr_grpo", "scale": "batch"}),
    "bnpo": ("llama", "--loss_type bnpo --scale_rewards none", {"scale": "none"}),
    "temperature": ("qwen3", "--temperature 0.7 --beta 0.5", {"temperature": 0.7, "beta": 0.5}),
    "full, no KL": ("mpt", "--full true --beta 0", {"beta": 0}),
    "recomputed": ("gpt2", "--activation_checkpointing true", {}),
    "head": ("llama", HEAD, {}),
    "tied head": ("gpt2", HEAD, {}),
    "4 bit": ("llama", "--load_in_4bit true", {}),
    "8 bit": ("gpt_neox", "--load_in_8bit true", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_steps_by_hand(case, script, checkpoints, train_file, tmp_path, monkeypatch, fixed):
    """What is logged, and where the weights end."""
    (kind, more, settings), original = CASES[case], script.load_models

    def load_models(*args):
        model, reference = original(*args)
        fill(model)
        if hasattr(model, "peft_config"):
            model.save_pretrained(tmp_path / "start")
        return model, reference

    monkeypatch.setattr(script, "load_models", load_models)
    found = run(
        script, checkpoints[kind], train_file, tmp_path / "out", *STEPS.split(), *more.split()
    )
    bits = next((bits for bits in ("load_in_4bit", "load_in_8bit") if bits in more), None)
    base, policy = load(checkpoints[kind], bits), load(checkpoints[kind], bits)
    if "full" not in more:
        policy = PeftModel.from_pretrained(policy, tmp_path / "start", is_trainable=True)
        policy = policy.to(torch.float32) if not bits else policy
    wanted = by_hand(policy, base, AutoTokenizer.from_pretrained(checkpoints[kind]), **settings)
    # What an 8-bit layer makes of a row hangs on the other rows.
    near = {"abs": 0.03, "rel": 0.1} if bits == "load_in_8bit" else {"abs": 1e-4, "rel": 1e-4}
    for one, two in zip(found, wanted, strict=True):
        for name in two if settings.get("beta", 1) else two.keys() - {"kl"}:
            assert one[name] == pytest.approx(two[name], **near), (case, name)
    assert "full" in more or found[1]["loss"] != found[0]["loss"]
    file = "model.safetensors" if "full" in more else "adapter_model.safetensors"
    saved = load_file(tmp_path / "out" / file)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert not (tmp_path / "out" / "ref").exists()
    policy.save_pretrained(tmp_path / "hand")
    by_hand_saved = load_file(tmp_path / "hand" / file)
    assert saved.keys() == by_hand_saved.keys()
    if bits != "load_in_8bit":
        for name, tensor in by_hand_saved.items():
            torch.testing.assert_close(saved[name], tensor, atol=1e-4, rtol=1e-3)


# ---- What is sampled ----


def greedy(model, tokenizer, prompt, length):
    """The likeliest tokens after a prompt, alone in its row, without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(length):
        token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        ids = [*ids, token]
    return tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_answers_are_the_models(kind, script, checkpoints, train_file, tmp_path, monkeypatch):
    """Almost without temperature, the likeliest ones; and the reward sees them with their rows."""
    seen = []

    def keep(row, answer):
        seen.append((row["completion"], row["prompt"], answer))
        return {"any": 0}

    monkeypatch.setattr(script, "reward", keep)
    model = tmp_path / "model"
    shutil.copytree(checkpoints[kind], model)
    config = json.loads((model / "generation_config.json").read_text())
    base, tokenizer = load(checkpoints[kind]), AutoTokenizer.from_pretrained(checkpoints[kind])
    ids = torch.tensor([tokenizer(SHORT[0]["prompt"])["input_ids"]])
    likeliest = base(ids).logits[0, -1].argmax().item()  # which the model's own settings forbid
    own = {"suppress_tokens": [likeliest], "min_new_tokens": 3, "do_sample": True, "top_k": 1}
    (model / "generation_config.json").write_text(json.dumps(config | own))
    more = [*STEPS.split(), "--temperature", "1e-4", "--max_steps", 1, "--learning_rate", 0]
    run(script, model, train_file, tmp_path / "out", *more)
    assert len(seen) == 8
    assert {row for row, *_ in seen} == {row["completion"] for row in SHORT[:2]}
    for _, prompt, answer in seen:
        assert answer == greedy(base, tokenizer, prompt, 8)


def test_answers_end_where_they_end(script, checkpoints, train_file, tmp_path, monkeypatch):
    """Behind the first end nothing counts, by its place: padding may be the same token."""
    batches, new = [], torch.tensor([[5, 0, 7, 0], [0, 0, 0, 0], [5, 6, 7, 8], [9, 9, 0, 1]] * 2)
    inner = script.RewardTrainer._generate_and_score_completions

    def keep(trainer, inputs):
        batches.append(inner(trainer, inputs))
        return batches[-1]

    def generate(model, input_ids, **_):
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(script, "reward", lambda row, answer: {"length": len(answer)})
    monkeypatch.setattr(script.RewardTrainer, "_generate_and_score_completions", keep)
    monkeypatch.setattr("peft.PeftModelForCausalLM.generate", generate)
    more = [*STEPS.split(), "--max_completion_length", 4, "--max_steps", 1]
    (entry,) = run(script, checkpoints["gpt2"], train_file, tmp_path / "out", *more)
    assert batches[0]["completion_mask"].sum(1).tolist() == [2, 1, 4, 3] * 2
    assert entry["completions/mean_length"] == 2.5
    assert entry["completions/clipped_ratio"] == 0.25
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["gpt2"])
    texts = [tokenizer.decode(ids) for ids in ([5], [], [5, 6, 7, 8], [9, 9])]
    assert entry["reward"] == pytest.approx(sum(map(len, texts)) / 4)
    own = json.loads((Path(checkpoints["gpt2"]) / "tokenizer_config.json").read_text())
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert own.get("pad_token") == saved.get("pad_token"), "the result is saved as it came"


@pytest.mark.parametrize("full", ["false", "true"])
def test_answers_end_where_the_makers_end_them(full, script, checkpoints, tmp_path, monkeypatch):
    """At each of several ends, such as that of a tool's call; after a resume, too."""
    model, out, batches = tmp_path / "model", tmp_path / "out", []
    shutil.copytree(checkpoints["gpt2"], model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [0, 9]}))
    new = torch.tensor([[5, 9, 7, 0], [9, 9, 9, 9], [5, 6, 7, 8], [5, 6, 0, 9]] * 2)
    inner = script.RewardTrainer._generate_and_score_completions

    def keep(trainer, inputs):
        assert sorted(trainer.generation_config.eos_token_id) == [0, 9]
        batches.append(inner(trainer, inputs)["completion_mask"].sum(1).tolist())
        return inner(trainer, inputs)

    def generate(model, input_ids, **_):
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(script, "reward", lambda row, answer: {"length": len(answer)})
    monkeypatch.setattr(script.RewardTrainer, "_generate_and_score_completions", keep)
    name = "GPT2LMHeadModel" if full == "true" else "PeftModelForCausalLM"
    library = "transformers" if full == "true" else "peft"
    monkeypatch.setattr(f"{library}.{name}.generate", generate)
    monkeypatch.setattr("keep_grpo.pads_well", lambda *_: True)  # which asks it, too
    more = [*STEPS.split(), "--max_completion_length", 4, "--max_steps", 2, "--full", full]
    file = write_jsonl(tmp_path / "t.jsonl", SHORT)
    out.mkdir()
    (out / "STOP").touch()
    with pytest.raises(SystemExit):
        run(script, model, file, out, *more)
    run(script, model, file, out, *more)
    assert batches == [[2, 1, 4, 3] * 2] * 2
    saved = json.loads((out / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 9]


FORMS = {
    "prompt": [{"prompt": row["prompt"], "completion": "x"} for row in ROWS],
    "instruction": [{"instruction": row["prompt"], "input": "甲", "output": "x"} for row in ROWS],
    "messages": [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "甲"},
                      {"role": "user", "content": "乙"}, {"role": "assistant", "content": row["completion"]}]}
        for row in ROWS
    ],
    "no answer": [{"prompt": row["prompt"]} for row in ROWS],
    "no answer, instruction": [{"instruction": row["prompt"]} for row in ROWS],
    "no answer, messages": [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in ROWS],
}  # fmt: skip


@pytest.mark.parametrize("name", seven_models.NAMES)
def test_prompts_are_those_of_generation_and_sft(name, script, tmp_path, capsys):
    """The same ids for every form; and the answer stands in none."""
    generate = load_script(ROOT / "generate_text" / "generate_text.py")
    sft = load_script(ROOT / "finetune_full" / "finetune_full.py")
    try:
        model = seven_models.make(name, tmp_path / "model")
        names = {"model_name_or_path": model, "trust_remote_code": False, "max_length": None}
        names |= {"chat_template": None, "chat_template_kwargs": "{}"}
        tokenizer, _ = script.load_tokenizer(SimpleNamespace(**names))
    except SystemExit:  # converted first, which test_convert_tokenizer.py tries
        assert "convert_tokenizer.py" in capsys.readouterr().err
        return
    for form, rows in FORMS.items():
        settings = SimpleNamespace(
            train_file=[write_jsonl(tmp_path / "rows.jsonl", rows)], dataset_name=None
        )
        data = script.load_data(
            settings, SimpleNamespace(max_completion_length=1), tokenizer, 10**6
        )
        found = [row["prompt"] for row in data["prompts"]]
        assert found == [generate.encode_prompt(row, tokenizer)[1] for row in rows], form
        assert [row for _, row in data["rows"]] == rows
        for row, ids in zip(rows, found, strict="no answer" not in form):
            if "no answer" not in form:
                whole, labels = sft.encode(sft.format_row(row, tokenizer)[1][-1], tokenizer)
                last = max(i for i, label in enumerate(labels) if label == -100)
                assert ids == whole[: last + 1], form


def test_prompts_without_room_are_dropped_and_counted(script, checkpoints, tmp_path, capsys, fixed):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["gpt2"])
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in ROWS]
    room = sorted(lengths)[3]
    file = write_jsonl(tmp_path / "t.jsonl", ROWS)
    more = [*STEPS.split(), "--max_length", room + 8]
    run(script, checkpoints["gpt2"], file, tmp_path / "out", *more)
    lost = sum(length > room for length in lengths)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train "))
    assert 0 < lost < 7 and f"{7 - lost} prompts" in line and f"{lost} dropped" in line


# ---- A run from start to end ----

LONG = "--num_generations 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_completion_length 8"
LONG += " --max_steps 9 --save_steps 9 --logging_steps 3 --learning_rate 1e-2"


def length_reward(row, answer):
    return {"length": len(answer), "twice": 2 * answer.count("e")}


@pytest.mark.parametrize("full", ["false", "true"])
def test_stopped_and_resumed_is_not_stopped(
    full, script, checkpoints, tmp_path, monkeypatch, capsys
):
    """In the middle and at the end of an epoch (of three steps), with sampling and all."""
    monkeypatch.setattr(script, "reward", length_reward)
    file = write_jsonl(tmp_path / "t.jsonl", ROWS)
    kind = "gpt_neox" if full == "true" else "llama"
    words = [checkpoints[kind], file]
    options = [*LONG.split(), "--full", full]
    whole = run(script, *words, tmp_path / "whole", *options)
    look, out = keep_run.KeepRun.on_step_end, tmp_path / "cut"
    for stop in (3,) if full == "true" else (3, 7):

        def ask(self, args, state, control, stop=stop, **kwargs):
            if state.global_step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            look(self, args, state, control, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(keep_run.KeepRun, "on_step_end", ask)
            with pytest.raises(SystemExit) as left:
                run(script, *words, out, *options)
            assert left.value.code == 75
    cut = run(script, *words, out, *options)
    file = "model.safetensors" if full == "true" else "adapter_model.safetensors"
    ours, theirs = load_file(out / file), load_file(tmp_path / "whole" / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ends = [{k: e[k] for k in ("step", "reward", "kl", "num_tokens")} for e in (whole[-1], cut[-1])]
    assert (
        ends[0]["num_tokens"] == ends[1]["num_tokens"] and ends[0]["step"] == ends[1]["step"] == 9
    )
    if full == "true":
        reference = load(checkpoints[kind]).state_dict()
        assert not all(torch.equal(ours.get(n, w), w) for n, w in reference.items() if n in ours)
    capsys.readouterr()
    with pytest.raises(SystemExit) as again:
        run(script, *words, out, *options)
    assert again.value.code == 0 and "finished" in capsys.readouterr().out


def test_what_a_run_leaves_and_merging(
    script, checkpoints, train_file, tmp_path, monkeypatch, capsys
):
    """The lines, the files; merged by merge_lora.py, the model is base + B A alpha / r."""
    from test_finetune_lora import by_hand as base_plus_adapter

    monkeypatch.setattr(script, "reward", length_reward)
    out = tmp_path / "out"
    run(script, checkpoints["qwen3"], train_file, out, *LONG.split(), "--save_strategy", "no")
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["3/9", "6/9", "9/9"]
    for name in "loss reward length twice alike kl lr grad tok/s GiB left".split():
        assert f" {name} " in steps[0] + " ", name
    assert sum(line.startswith("answers ") for line in lines) == 3
    found = results(out)
    assert (
        found["steps"] == 9
        and {"reward", "first_reward", "train_loss", "peak_memory_gib"} <= found.keys()
    )
    assert found["versions"]["trl"]
    assert not (out / "README.md").exists() or "GRPO" not in (out / "README.md").read_text()
    merge = load_script(ROOT / "finetune_lora" / "merge_lora.py")
    merge.main(
        ["--adapter_name_or_path", str(out), "--output_dir", str(tmp_path / "merged"), "--verify"]
    )
    ids = torch.tensor([[5, 50, 150, 20, 7]])
    wanted = base_plus_adapter(checkpoints["qwen3"], out)(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - load(checkpoints["qwen3"])(input_ids=ids).logits).abs().max() > 1e-3


def test_dropout_is_off(script, checkpoints, train_file, tmp_path, fixed):
    """What an answer is scored by is what gave it; KL and loss would be noise else."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["gpt_neox"], model)
    config = json.loads((model / "config.json").read_text())
    noisy = {"attention_dropout": 0.5, "hidden_dropout": 0.5}
    (model / "config.json").write_text(json.dumps(config | noisy))
    plain = run(script, checkpoints["gpt_neox"], train_file, tmp_path / "plain", *STEPS.split())
    found = run(script, model, train_file, tmp_path / "noisy", *STEPS.split())
    assert [e["loss"] for e in found] == [e["loss"] for e in plain]
    assert [e["kl"] for e in found] == [e["kl"] for e in plain]


# ---- What is refused ----

REWARDS = {
    "raises": (lambda row, answer: {"a": row["nothing"]}, r"t.jsonl, row \d: line \d+, reward\(.*KeyError\('nothing'\)"),
    "no dict": (lambda row, answer: 1.0, r"row \d: reward\(.* gave 1.0, not numbers"),
    "text": (lambda row, answer: {"a": "1"}, r"row \d: reward\(.* gave {'a': '1'}, not numbers"),
    "infinite": (lambda row, answer: {"a": float("nan")}, r"row \d: .* gave {'a': nan}"),
    "nothing": (lambda row, answer: {}, r"row \d: .* gave {}"),
    "other names": (lambda row, answer: {row["completion"]: 1}, r"row \d: .* gave .*, not numbers by the names"),
    "other arguments": (lambda row: {"a": 1}, r"row \d: .*TypeError"),
}  # fmt: skip


NUMBERS = {"choices": ["本", "山", "水"], "completion": "2"}
DIGITS = {"choices": ["2", "7", "9"], "completion": "2"}  # whose number is 2: it is the 9
NAMES = {"choices": ["含意", "矛盾", "中立"], "completion": "矛盾"}


@pytest.mark.parametrize(
    ("row", "answer", "right", "form"),
    [(NUMBERS, "2", 1, 0.2), (NUMBERS, " 2\n", 1, 0.2), (NUMBERS, "2です", 1, 0), (NUMBERS, "22", 0, 0),
     (NUMBERS, "1", 0, 0.2), (NUMBERS, "水", 0, 0), (NUMBERS, "", 0, 0), (NUMBERS, "3", 0, 0),
     (DIGITS, "2", 1, 0.2), (DIGITS, "0", 0, 0.2), (DIGITS, "7", 0, 0), (NAMES, "矛盾", 1, 0.2), (NAMES, "矛盾する", 1, 0), (NAMES, "中立", 0, 0.2), (NAMES, "1", 0, 0)],
)  # fmt: skip
def test_the_reward_as_it_stands(row, answer, right, form):
    """By the number of a choice as JCommonsenseQA asks, by its word as JNLI does."""
    assert load_script(SCRIPT).reward(row, answer) == {"right": right, "form": form}


@pytest.mark.parametrize("case", REWARDS)
def test_a_reward_that_fails_names_the_row(
    case, script, checkpoints, tmp_path, monkeypatch, capsys
):
    reward, message = REWARDS[case]
    monkeypatch.setattr(script, "reward", reward)
    file = write_jsonl(tmp_path / "t.jsonl", SHORT)
    words = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", file]
    line = refused(script, capsys, [*words, "--output_dir", tmp_path / "out", *STEPS.split()])
    assert re.search(message, line), line


BAD = {
    "dataset": (["--train_file", "ROWS_text"], "row 1: there is nothing to answer"),
    "only answers": (["--train_file", "ROWS_assistant"], "row 1: there is nothing to answer"),
    "unknown": (["--train_file", "ROWS_unknown"], "row 1: the columns question are of no known form"),
    "empty": (["--train_file", "ROWS_empty"], "row 1: the prompt is empty"),
    "two forms": (["--train_file", "ROWS_two"], "row 2: a row of another form"),
    "no room": (["--max_completion_length", 64], "--max_completion_length 64 leaves no prompt room"),
    "all too long": (["--max_length", 12], "no prompt within 4 tokens"),
    "too few prompts": (["--per_device_train_batch_size", 40], "10 prompts a step, but the data has 4"),
    "groups": (["--num_generations", 3], "generation_batch_size .8. must be divisible by num_generations .3."),
    "one answer": (["--num_generations", 1], "at least 2 generations"),
    "both": (["--full", "true", "--lora_r", 4], "--full true trains no adapter"),
    "full in 4 bit": (["--full", "true", "--load_in_4bit", "true"], "--full true trains no adapter"),
    "nothing trained": (["--lora_target_modules", "none"], "trains nothing"),
    "no eos": (["--model_name_or_path", "NO_EOS"], "no EOS token"),
}  # fmt: skip
BAD_ROWS = {
    "text": [{"text": "a"}], "assistant": [{"messages": [{"role": "assistant", "content": "a"}]}],
    "unknown": [{"question": "a"}], "empty": [{"prompt": "", "completion": "a"}],
    "two": [{"prompt": "a"}, {"instruction": "a"}],
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, script, checkpoints, tmp_path, train_file, capsys):
    more, message = BAD[case]
    more = list(more)
    for number, word in enumerate(more):
        if str(word).startswith("ROWS_"):
            more[number] = write_jsonl(tmp_path / "bad.jsonl", BAD_ROWS[word[5:]])
        if word == "NO_EOS":
            more[number] = tmp_path / "model"
            shutil.copytree(checkpoints["gpt2"], more[number])
            file = more[number] / "tokenizer_config.json"
            settings = {k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}
            file.write_text(json.dumps(settings))
    words = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file]
    words += ["--output_dir", tmp_path / "out", *STEPS.split(), *more]
    assert re.search(message, refused(script, capsys, words))


def test_a_model_that_trl_scores_wrongly_is_refused(
    script, checkpoints, train_file, tmp_path, monkeypatch, capsys
):
    """One whose head does more than TRL knows of."""
    original = script.load_models

    def load_models(*args):
        model, reference = original(*args)
        head = model.get_base_model().lm_head
        head.register_forward_hook(lambda module, given, out: out * 1.5)
        return model, reference

    monkeypatch.setattr(script, "load_models", load_models)
    words = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file]
    words += ["--output_dir", tmp_path / "out", *STEPS.split()]
    assert "TRL scores this model's answers wrongly" in refused(script, capsys, words)


# ---- Every option of TRL ----

# What finetune_grpo.py makes of what GRPOConfig has beyond TrainingArguments, as in test_arguments.py.
WORKS = """num_generations max_completion_length shuffle_dataset pad_to_multiple_of temperature top_p top_k min_p
    repetition_penalty cache_implementation beta scale_rewards loss_type
    mask_truncated_completions top_entropy_quantile entropy_coef router_aux_loss_coef
    steps_per_generation""".split()
OURS = "chat_template_kwargs trust_remote_code full disable_dropout".split()
REFUSED = {
    "delta": "2", "epsilon": "0.3", "epsilon_high": "0.3", "off_policy_mask_threshold": "0.1", "num_iterations": "2",
    "generation_batch_size": "16", "num_generations_eval": "2", "sapo_temperature_neg": "2",
    "sapo_temperature_pos": "2", "vespo_k_pos": "3", "vespo_lambda_pos": "4", "vespo_k_neg": "4",
    "vespo_lambda_neg": "3", "log_completions": "true", "log_multimodal": "false", "log_unique_prompts": "true",
    "num_completions_to_print": "3", "log_completions_hub_repo": "a/b", "sync_ref_model": "true",
    "ref_model_mixup_alpha": "0.5", "ref_model_sync_steps": "9", "use_adaptive_entropy": "true",
    "entropy_coef_min": "0.1", "entropy_coef_max": "2", "entropy_coef_delta": "0.1", "entropy_target": "0.1",
    "importance_sampling_level": "sequence", "use_bias_correction_kl": "false",
    "model_init_kwargs": '{"a":1}', "reward_weights": "1", "multi_objective_aggregation": "normalize_then_sum",
    "max_tool_calling_iterations": "1", "use_transformers_continuous_batching": "true",
    "transformers_continuous_batching_config": '{"a":1}', "use_transformers_paged": "true",
    "cast_lm_head_to_fp32": "true", "generation_kwargs": '{"a":1}', "ds3_gather_for_generation": "false",
    "use_vllm": "true", "vllm_mode": "server", "vllm_model_impl": "transformers", "vllm_enable_sleep_mode": "true",
    "vllm_structured_outputs_regex": "a", "vllm_server_base_url": "a", "vllm_server_host": "a",
    "vllm_server_port": "1", "vllm_server_timeout": "1", "vllm_group_port": "1", "vllm_gpu_memory_utilization": "0.5",
    "vllm_max_model_length": "9", "vllm_tensor_parallel_size": "2", "vllm_importance_sampling_correction": "false",
    "vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": "2",
    "vllm_importance_sampling_clip_min": "1", "vllm_importance_sampling_cap": "2",
}  # fmt: skip
# What SFT has, and rewards have no use for.
REFUSED |= {"eval_strategy": "steps", "do_eval": "true", "load_best_model_at_end": "true", "validation_file": "VALID",
            "early_stopping_patience": "1", "new_tokens": "a", "lora_dropout": "0.1", "neftune_noise_alpha": "5",
            "torch_compile": "true", "train_sampling_strategy": "sequential", "per_device_eval_batch_size": "4",
            "include_num_input_tokens_seen": "all"}  # fmt: skip
WRONG = {
    "loss_type": "cispo",
    "steps_per_generation": "2",
    "temperature": "0",
    "max_completion_length": "0",
    "beta": "-1",
}


def test_every_field_of_trl_has_a_kind():
    """A newer TRL shows here what it added."""
    fields = {field.name for field in dataclasses.fields(keep_grpo.TrainingArguments)}
    new = fields - {field.name for field in dataclasses.fields(TrainingArguments)}
    assert new == {*WORKS, *OURS} | (REFUSED.keys() & new)


@pytest.mark.parametrize("name", [*REFUSED, *WRONG])
def test_refused(name, script, checkpoints, train_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "load_tokenizer", lambda *_: pytest.fail("something was loaded"))
    value = {**REFUSED, **WRONG}[name].replace("VALID", train_file)
    words = [
        "--model_name_or_path",
        checkpoints["gpt2"],
        "--train_file",
        train_file,
        f"--{name}",
        value,
    ]
    line = refused(script, capsys, [*words, "--output_dir", tmp_path / "out"])
    assert name in line and capsys.readouterr().out == ""


HARMLESS = ["--pad_to_multiple_of 8", "--steps_per_generation 1", "--cache_implementation dynamic"]
ACTIVE = ["--top_p 0.5", "--top_k 3", "--min_p 0.9", "--repetition_penalty 5.0", "--shuffle_dataset true --seed 3",
          "--mask_truncated_completions true", "--top_entropy_quantile 0.5",
          "--entropy_coef 0.5"]  # fmt: skip


def test_what_works(script, checkpoints, train_file, tmp_path, monkeypatch):
    """Each changes the weights, or none of them; those not here are in CASES."""
    monkeypatch.setattr(script, "reward", length_reward)

    def weights(name, options):
        run(
            script,
            checkpoints["gpt2"],
            train_file,
            tmp_path / name,
            *STEPS.split(),
            *options.split(),
        )
        return load_file(tmp_path / name / "adapter_model.safetensors")

    plain, tried = weights("plain", ""), set()
    for number, options in enumerate([*HARMLESS, *ACTIVE]):
        found = weights(str(number), options)
        close = all(torch.allclose(found[name], plain[name], atol=1e-6) for name in plain)
        assert close == (options in HARMLESS), options
        tried |= {word[2:] for word in options.split() if word.startswith("--")}
    tried |= {
        word[2:] for _, more, _ in CASES.values() for word in more.split() if word[:2] == "--"
    }
    tried |= {word[2:] for word in STEPS.split() if word[:2] == "--"} | {
        "router_aux_loss_coef"
    }  # of experts
    assert not {*WORKS} - tried, "no run tries them"


# ---- Two processes under DeepSpeed ----


def test_under_deepspeed(script, checkpoints, train_file, tmp_path, fixed):
    """ZeRO-2 and 3 learn what one process learns; with sampling, a resumed run ends like an unbroken one."""
    file, inside = ROOT / "deepspeed_configs" / "zero2.json", ROOT / "tests" / "grpo_inside.py"
    half = [*STEPS.split(), "--per_device_train_batch_size", 4]

    def words(program, kind, out, *more):
        data = ["--model_name_or_path", checkpoints[kind], "--train_file", train_file]
        return [program, *data, "--deepspeed", file, "--output_dir", tmp_path / out, *half, *more]

    sampled = "--max_steps 4 --save_strategy steps --save_steps 2 --learning_rate 0.01".split()
    resume = ["--resume_from_checkpoint", tmp_path / "sampled" / "checkpoint-2"]
    zero3 = ["--deepspeed", ROOT / "deepspeed_configs" / "zero3.json"]
    full = ["--full", "true"]
    # Answers are fixed from the fourth on: grpo_inside.py changes what it finds loaded.
    launched = [words(SCRIPT, "llama", "sampled", *sampled), words(SCRIPT, "llama", "resumed", *sampled, *resume),
                words(SCRIPT, "llama", "parted", *full, *zero3), words(inside, "llama", "lora"),
                words(inside, "gpt2", "full", *full), words(inside, "llama", "lora3", *zero3)]  # fmt: skip
    errors = matrix.launch(launched, tmp_path / "launch")
    log = (tmp_path / "launch" / "log.txt").read_text()[-3000:]
    assert "ZeRO-3 is for adapters" in errors.pop(2), log
    assert errors == [""] * 5, log
    cases = {"lora": ("llama", []), "full": ("gpt2", full), "lora3": ("llama", [])}
    for out, (kind, more) in cases.items():
        one = tmp_path / f"{out} alone"
        wanted = run(script, checkpoints[kind], train_file, one, *STEPS.split(), *more)
        found = json.loads((tmp_path / out / "trainer_state.json").read_text())["log_history"]
        for ours, theirs in zip(found[:2], wanted, strict=True):
            for name in {"loss", "kl", "reward"} & theirs.keys():
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (out, name)
        name = "model.safetensors" if more else "adapter_model.safetensors"
        ours, theirs = load_file(tmp_path / out / name), load_file(one / name)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-3)
    ours, theirs = (
        load_file(tmp_path / out / "adapter_model.safetensors") for out in ("sampled", "resumed")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
