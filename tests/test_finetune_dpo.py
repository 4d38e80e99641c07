"""finetune_dpo.py: losses, rewards and margins against a calculation by hand, the ids of pairs, and
what is saved and resumed.
"""

import dataclasses
import importlib
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import keep_run
import pytest
import seven_models
import torch
import yaml
from conftest import CONFIGS, ROOT, ROWS, load_script, make_checkpoint, write_jsonl
from safetensors.torch import load_file
from test_finetune_full import launch, refused, results
from test_interrupted import start, stop_at
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

SCRIPT = ROOT / "finetune_dpo" / "finetune_dpo.py"
WORSE = ["一時間", "山", "本と雑誌", "赤い", "犬だ", "火", "六"]
PAIRS = [{"id": str(i), "prompt": row["prompt"], "chosen": row["completion"], "rejected": worse}
         for i, (row, worse) in enumerate(zip(ROWS, WORSE, strict=True))]  # fmt: skip
PLAIN = ["--logging_steps", 1, "--save_strategy", "no", "--max_grad_norm", 0, "--optim", "sgd",
         "--lr_scheduler_type", "constant", "--train_sampling_strategy", "sequential"]  # fmt: skip
IN_TWO = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
         "logps/chosen", "logps/rejected")  # fmt: skip


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


@pytest.fixture(autouse=True)
def own_signals():
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


def train(script, model, file, out, *more):
    words = ["--model_name_or_path", model, "--train_file", file, "--output_dir", out, *more]
    script.main([str(word) for word in words])
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


# ---- A calculation that knows nothing of the script, in 64 bits, an answer at a time ----


def log_prob(model, tokenizer, prompt, answer):
    """Of an answer and the EOS behind it, after a prompt with what the tokenizer puts before it."""
    before = tokenizer(prompt)["input_ids"]
    ids = before + tokenizer(answer, add_special_tokens=False)["input_ids"]
    config = model.config
    limit = getattr(config, "max_position_embeddings", None) or config.max_seq_len
    ids = torch.tensor([[*ids, tokenizer.eos_token_id][:limit]])
    logs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(logs[i - 1, ids[0, i]] for i in range(len(before), ids.shape[1]))


def by_hand(model, reference, tokenizer, pairs, beta):
    """What a step over these pairs should log; "loss" can be differentiated."""
    rows = []
    for pair in pairs:
        logs = [log_prob(model, tokenizer, pair["prompt"], pair[k]) for k in ("chosen", "rejected")]
        with torch.no_grad():
            base = [
                log_prob(reference, tokenizer, pair["prompt"], pair[k])
                for k in ("chosen", "rejected")
            ]
        good, bad = (beta * (log - own) for log, own in zip(logs, base, strict=True))
        loss = torch.log(1 + torch.exp(bad - good))
        rows.append([loss, good, bad, good - bad, (good > bad).double(), *logs])
    return dict(
        zip(NAMES, (sum(column) / len(rows) for column in zip(*rows, strict=True)), strict=True)
    )


def in_double(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return seven_models.make("Gemma-3", tmp_path_factory.mktemp("gemma") / "model")


@pytest.mark.parametrize("kind", [*CONFIGS, "gemma"])
def test_three_steps_by_hand(kind, script, checkpoints, gemma, pairs_file, tmp_path):
    """Four pairs, three, four: each pair of a step counts once, in whatever batch it lies."""
    source, rate, beta = checkpoints.get(kind, gemma), 0.05, 0.3
    more = ["--full", "true", "--beta", beta, "--learning_rate", rate, "--max_steps", 3]
    logged = train(script, source, pairs_file, tmp_path, *PLAIN, *IN_TWO, *more)
    model, reference = in_double(source), in_double(source)
    tokenizer, moved = AutoTokenizer.from_pretrained(source), []
    for step, pairs in enumerate((PAIRS[:4], PAIRS[4:], PAIRS[:4])):
        wanted = by_hand(model, reference, tokenizer, pairs, beta)
        for name, value in wanted.items():
            assert logged[step][name] == pytest.approx(value.item(), abs=1e-4), (step, name)
        moved.append(abs(wanted["rewards/margins"].item()))
        weights = [p for p in model.parameters() if p.requires_grad]
        for weight, gradient in zip(
            weights, torch.autograd.grad(wanted["loss"], weights), strict=True
        ):
            weight.data -= rate * gradient
    assert moved[0] == 0 and max(moved) > 5e-3, "or equal margins prove nothing"
    saved, trained = load_file(tmp_path / "model.safetensors"), model.state_dict()
    for name, tensor in saved.items():
        name = name.replace("embed_out.", "lm_head.")
        torch.testing.assert_close(tensor.double(), trained[name], atol=1e-5, rtol=0, msg=name)
    assert results(tmp_path)["train_rewards/margins"] == logged[2]["rewards/margins"]
    size = (tmp_path / "training_args.bin").stat().st_size
    assert size < 20_000, "it holds the reference model"


@pytest.mark.parametrize("kind", ["ipo", "hinge", "robust", "bco_pair"])
def test_another_loss(kind, script, checkpoints, pairs_file, tmp_path, monkeypatch):
    """Set in load_model, as the page says: three pairs and one that fills up count as three."""
    load = script.load_model

    def load_model(script, training, *more):
        training.loss_type, training.label_smoothing = [kind], 0.1 * (kind == "robust")
        return load(script, training, *more)

    monkeypatch.setattr(script, "load_model", load_model)
    words = [*PLAIN, "--per_device_train_batch_size", 4, "--max_steps", 2, "--beta", 0.1]
    if kind == "bco_pair":
        with pytest.raises(SystemExit):
            train(script, checkpoints["llama"], pairs_file, tmp_path, *words)
        return
    logged = train(script, checkpoints["llama"], pairs_file, tmp_path, *words, "--learning_rate", 0)
    wanted = {"ipo": 25, "hinge": 1, "robust": math.log(2)}[kind]  # of a margin of 0
    found = [entry["loss"] for entry in logged if "loss" in entry]
    assert found == pytest.approx([wanted, wanted], rel=1e-5)


def test_an_adapter_by_hand(script, checkpoints, pairs_file, tmp_path, capsys):
    """With a whole head, on tied and untied models; merged, the evaluation is what it was.

    The reference is the base without the adapter, and an evaluation counts its seven pairs once.
    """
    merge = load_script(ROOT / "finetune_lora" / "merge_lora.py")
    for kind, more in (("gpt2", ["--modules_to_save", "lm_head"]), ("llama", []), ("falcon", [])):
        out, source = tmp_path / kind, checkpoints[kind]
        more = [*more, "--validation_file", pairs_file, "--per_device_eval_batch_size", 4]
        more += ["--max_steps", 3, "--learning_rate", 3e-2, "--eval_strategy", "epoch"]
        train(script, source, pairs_file, out, "--logging_steps", 1, *IN_TWO, *more)
        merge.main(["--adapter_name_or_path", str(out), "--output_dir", str(out / "merged")])
        tokenizer = AutoTokenizer.from_pretrained(out / "merged")
        model, reference = in_double(out / "merged"), in_double(source)
        with torch.no_grad():
            wanted = by_hand(model, reference, tokenizer, PAIRS, 0.1)
        found = results(out)
        for name, value in wanted.items():
            assert found[f"eval_{name}"] == pytest.approx(value.item(), abs=1e-4), (kind, name)
        assert abs(wanted["rewards/margins"]) > 0.05 and "accuracy" in capsys.readouterr().out
        # Nothing of TRL's is left: a copy of the adapter, a pad token, a README of its own.
        assert not (out / "ref").exists() and not any(
            "ref" in n for n in load_file(out / "adapter_model.safetensors")
        )
        before, after = (AutoTokenizer.from_pretrained(place) for place in (source, out))
        assert after.pad_token == before.pad_token and (out / "generation_config.json").is_file()
        assert (
            AutoConfig.from_pretrained(out / "merged").pad_token_id
            == AutoConfig.from_pretrained(source).pad_token_id
        )
        words = [
            "--model_name_or_path",
            out,
            "--train_file",
            pairs_file,
            "--output_dir",
            tmp_path / "n",
        ]
        assert "is an adapter. Merge it first" in refused(script, capsys, words)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_on_a_quantised_base_stay_in_fp32(bits, script, checkpoints, pairs_file, tmp_path):
    """TRL makes them bf16, in which small updates vanish; an evaluation in between changes nothing."""
    words = ["--max_steps", 3, "--learning_rate", "1e-3", *IN_TWO, f"--load_in_{bits}", "true"]
    words += ["--logging_steps", 1, "--validation_file", pairs_file]
    plain = train(script, checkpoints["llama"], pairs_file, tmp_path / "plain", *words)
    train(
        script,
        checkpoints["llama"],
        pairs_file,
        tmp_path / "evaluated",
        *words,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        1,
    )
    one, two = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "evaluated")
    )
    for name, tensor in one.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, two[name])
        assert not torch.equal(tensor, tensor.bfloat16().float()), name
    assert plain[0]["rewards/margins"] == 0 and plain[2]["rewards/margins"] > 0


# ---- Pairs ----

CHAT = [{"role": "user", "content": "空は何色?"}, {"role": "assistant", "content": "青"},
        {"role": "user", "content": "夜は?"}]  # fmt: skip


def turn(content):
    return {"role": "assistant", "content": content}


SAME = {"prompt": CHAT, "chosen": [turn("黒")], "rejected": [turn("赤いです")]}
WHOLE = [{"chosen": [*CHAT, turn("黒")], "rejected": [*CHAT, turn("赤いです")]},
         {"prompt": CHAT, "chosen": [*CHAT, turn("黒")], "rejected": [*CHAT, turn("赤いです")]}]  # fmt: skip


def pairs_of(script, tokenizer, rows, tmp_path, length=64):
    return list(
        script.make_examples([write_jsonl(tmp_path / "rows.jsonl", rows)], tokenizer, length)
    )


@pytest.mark.parametrize(
    "template", ["alpaca", seven_models.CHATML.replace("<|im_end|>", "<|pad|>")]
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompts_are_what_generation_gives(kind, template, script, checkpoints, tmp_path):
    """Text and messages, with and without BOS: once. Answers end with EOS, or with the turn's end."""
    generate = load_script(ROOT / "generate_text" / "generate_text.py")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[kind])
    if template != "alpaca":
        (tmp_path / "t.jinja").write_text(template)
        template = str(tmp_path / "t.jinja")
    script.load_tokenizer.__globals__["choose_chat_template"](template, tokenizer)
    rows = {"text": [PAIRS[0]], "messages": [SAME, *WHOLE]}
    for form, cases in rows.items():
        for example, row in zip(
            pairs_of(script, tokenizer, cases, tmp_path, 512), cases, strict=True
        ):
            asked = {"prompt": row["prompt"]} if form == "text" else {"messages": CHAT}
            prompt = generate.encode_prompt(asked, tokenizer)[1]
            batch = script.collate([{k: example[k] for k in ("input_ids", "labels", "length")}])
            for ids, learned in zip(batch["input_ids"], batch["completion_mask"], strict=True):
                assert ids[: len(prompt)].tolist() == prompt and not learned[: len(prompt)].any()
                answer = ids[learned.bool()].tolist()
                end = tokenizer.decode(answer[-3:] if form == "messages" else answer[-1:])
                assert tokenizer.eos_token in end or "<|pad|>" in end
                assert ids.tolist().count(tokenizer.bos_token_id) == (kind == "llama")
            text = tokenizer.decode(batch["input_ids"][0][batch["completion_mask"][0].bool()])
            assert text.startswith("黒" if form == "messages" else PAIRS[0]["chosen"])
    one, two, three = pairs_of(script, tokenizer, rows["messages"], tmp_path, 512)
    assert one == two == three, "the ways to write a conversation are one"


def test_too_long_pairs_are_counted(script, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)  # with it, TRL is silent
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: pytest.fail("sent"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["gpt2"])
    rows = [{"prompt": "あ" * 3, "chosen": "い" * 3, "rejected": "う" * 30},  # cut
            {"prompt": "あ" * 90, "chosen": "い", "rejected": "う"},  # no answer left
            {"prompt": "あ", "chosen": "い" * 90, "rejected": "い" * 90 + "う"},  # no difference left
            {"prompt": "あ", "chosen": "", "rejected": "い"},  # an empty answer
            {"prompt": "あ", "chosen": "い", "rejected": "う"}]  # fmt: skip
    examples = pairs_of(script, tokenizer, rows, tmp_path)
    assert [e["outcome"] for e in examples] == ["cut", "dropped", "dropped", "dropped", "kept"]
    cut = script.collate([{k: examples[0][k] for k in ("input_ids", "labels", "length")}])
    assert cut["input_ids"].shape[1] == 64 and cut["completion_mask"][1].sum() > 40
    assert tokenizer.eos_token_id not in cut["input_ids"][1], (
        "it would teach to stop in mid-sentence"
    )
    whole = cut["input_ids"][0][cut["completion_mask"][0].bool()]
    assert (
        whole.tolist().count(tokenizer.eos_token_id) == 1 == (whole[-1] == tokenizer.eos_token_id)
    )
    file = write_jsonl(tmp_path / "few.jsonl", rows)
    train(script, checkpoints["gpt2"], file, tmp_path / "o", "--max_steps", 1)
    assert (
        "2 examples, " in (said := capsys.readouterr().out)
        and "1 cut at 64 tokens, 3 dropped" in said
    )


BAD_ROWS = {
    "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "must be there and differ"),
    "one answer": ({"prompt": "a", "chosen": "b"}, "prompt+chosen+rejected must hold text"),
    "answers alone": ({"completion": "b"}, "completion would be left out"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "prompt+chosen+rejected must hold text"),
    "empty prompt": ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
    "text and messages": ({"prompt": "a", "chosen": "b", "rejected": [turn("c")]}, "must hold text"),
    "numbers": ({"prompt": "a", "chosen": 1, "rejected": 2}, "must hold text"),
    "system beside": ({**SAME, "system": "s"}, "system would be left out"),
    "other questions": ({"chosen": [CHAT[0], turn("b")], "rejected": [CHAT[2], turn("c")]}, "differ before their last turn"),
    "two turns": ({"prompt": CHAT, "chosen": [turn("b"), *CHAT[:1], turn("d")], "rejected": [turn("c")]}, "the prompt's answer, or"),
    "a question last": ({"prompt": CHAT, "chosen": CHAT[:1], "rejected": CHAT[2:]}, "the prompt's answer"),
    "empty": ({"prompt": CHAT, "chosen": [], "rejected": [turn("c")]}, "the prompt's answer"),
    "another text first": ({"prompt": "x", "chosen": WHOLE[0]["chosen"], "rejected": WHOLE[0]["rejected"]}, "the prompt's answer"),
    "thoughts": ({"prompt": CHAT, "chosen": [{**turn("b"), "thinking": "考え"}], "rejected": [turn("c")]}, "thinking would"),
    "half a character": ({"prompt": "a", "chosen": "\ud83d", "rejected": "c"}, "surrogates"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case, script, checkpoints, tmp_path, capsys):
    row, message = BAD_ROWS[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    words = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", tmp_path / "rows.jsonl"]
    error = refused(script, capsys, [*words, "--output_dir", tmp_path / "o", "--max_steps", 1])
    assert message in error and "row 1" in error, error


# ---- Stopped and resumed ----


def test_stopped_and_resumed_is_not_stopped(
    script, checkpoints, pairs_file, tmp_path, monkeypatch, capsys
):
    """The reference stays what training began from, and so do the adapter's dropout and the order."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["gpt2"], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1, "attn_pdrop": 0.1}))
    words = [
        "--model_name_or_path",
        model,
        "--train_file",
        pairs_file,
        "--validation_file",
        pairs_file,
    ]
    words += "--num_train_epochs 3 --logging_steps 1 --save_steps 1 --learning_rate 1e-2".split()
    words += ["--eval_strategy", "steps", "--eval_steps", 2, *IN_TWO]
    for name, more in (("lora", ["--lora_dropout", 0.2]), ("full", ["--full", "true"])):
        whole, cut = tmp_path / f"{name}1", tmp_path / f"{name}2"
        assert start(script, *words, *more, "--output_dir", whole) == 0
        for step in (1, 4):
            with monkeypatch.context() as patch:
                stop_at(patch, script, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
                assert start(script, *words, *more, "--output_dir", cut) == 75
        assert start(script, *words, *more, "--output_dir", cut) == 0
        file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
        ours, theirs = load_file(whole / file), load_file(cut / file)
        assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
        one, two = (
            json.loads((o / "trainer_state.json").read_text())["log_history"] for o in (whole, cut)
        )
        keys = [*NAMES, *(f"eval_{n}" for n in NAMES), "step", "grad_norm", "num_tokens"]
        kept = [[{k: e[k] for k in keys if k in e} for e in history[:-1]] for history in (one, two)]
        assert kept[0] == kept[1] and len(kept[0]) > 6
        capsys.readouterr()
        assert start(script, *words, *more, "--output_dir", cut) == 0
        assert "finished" in capsys.readouterr().out
        if name == "full":  # as it is trained, so it is saved: see without_dropout
            assert json.loads((cut / "config.json").read_text())["resid_pdrop"] == 0
    assert not keep_run.what_lacks(keep_run.find_checkpoints(cut)[-1])


# ---- Arguments ----

# What becomes of DPOConfig's own fields: ours are arguments of the script, the others are unknown.
OURS = "beta max_length trust_remote_code learning_rate logging_steps"
UNKNOWN = """model_init_kwargs router_aux_loss_coef disable_dropout dataset_num_proc truncation_mode padding_free
    pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha
    f_divergence_type f_alpha_divergence_coef label_smoothing use_weighting discopop_tau activation_offloading
    sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token"""


def test_every_field_of_trl_is_sorted(script, checkpoints, pairs_file, tmp_path, capsys):
    from trl import DPOConfig

    own = {f.name for f in dataclasses.fields(DPOConfig)} - {
        f.name for f in dataclasses.fields(TrainingArguments)
    }
    assert own == {*UNKNOWN.split(), *OURS.split()} - {"learning_rate", "logging_steps"}
    base = [
        "--model_name_or_path",
        checkpoints["gpt2"],
        "--train_file",
        pairs_file,
        "--output_dir",
        tmp_path,
    ]
    for name in UNKNOWN.split():
        assert f"unrecognized arguments: --{name}" in refused(
            script, capsys, [*base, f"--{name}", "1"]
        )


REFUSED = {
    "beta": ("--beta 0", "--beta 0.0 must be above 0"),
    "negative beta": ("--beta -1", "--beta cannot be -1"),
    "beta without end": ("--beta inf", "--beta"),
    "adapter of all": ("--full true --lora_r 8", "--full true has no adapter: leave out --lora_r"),
    "4 bit of all": ("--full true --load_in_4bit true", "leave out --load_in_4bit"),
    "new tokens": ("--new_tokens <s>", "--new_tokens: teach them by finetune_lora.py"),
    "rank": ("--lora_r 0", "--lora_r, --lora_alpha: above 0"),
    "target": ("--lora_target_modules query_key_value", "it can be"),
    "head": ("--lora_target_modules lm_head", "--lora_target_modules lm_head: "),
    "Trainer's": ("--label_smoothing_factor 0.1", "--label_smoothing_factor does not work here"),
    "length": ("--max_length 65", "--max_length 65 does not fit the 64 positions"),
    "no such file": ("--validation_file no.jsonl", "no.jsonl of --train_file or --validation_file is no file"),
    "misspelt": ("--betta 1", "unrecognized arguments: --betta"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, script, checkpoints, pairs_file, tmp_path, capsys):
    more, message = REFUSED[case]
    base = ["--model_name_or_path", checkpoints["llama"], "--train_file", pairs_file]
    assert message in refused(
        script, capsys, [*base, "--output_dir", tmp_path / "o", *more.split()]
    )


def test_a_head_that_trl_computes_otherwise_is_refused(
    script, checkpoints, pairs_file, tmp_path, capsys
):
    """MPT's own logit_scale is not used by transformers, but by TRL."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["mpt"], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5}))
    words = [
        "--model_name_or_path",
        model,
        "--train_file",
        pairs_file,
        "--output_dir",
        tmp_path / "o",
    ]
    assert "TRL's probabilities are not this model's" in refused(script, capsys, words)


def test_dropout_of_every_kind_is_off(script, tmp_path):
    """Attention's is no module, so that TRL leaves it; LoRA's stays."""
    import pair_trainer
    from peft import LoraConfig, get_peft_model

    source = make_checkpoint(tmp_path / "m", "gpt_neox")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps(config | {"attention_dropout": 0.5, "hidden_dropout": 0.5})
    )
    model = AutoModelForCausalLM.from_pretrained(source).train()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    pair_trainer.without_dropout(model)
    adapted = get_peft_model(model, LoraConfig(lora_dropout=0.5, target_modules=["dense"]))
    kept = [
        m.p
        for n, m in pair_trainer.without_dropout(adapted).named_modules()
        if n.endswith("lora_dropout.default")
    ]
    assert kept == [0.5, 0.5]
    adapted.unload()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_without_jobs_it_says_so(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, SCRIPT.name, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Put `jobs` beside" in done.stderr


def test_two_processes_learn_what_one_learns(script, checkpoints, pairs_file, tmp_path):
    """7 pairs on 2 ranks: what fills up has no answers, and each pair counts once."""
    runs, common = (
        [],
        [*PLAIN, "--max_steps", 3, "--learning_rate", "3e-2", "--validation_file", pairs_file],
    )
    for name, more in (("lora", []), ("full", ["--full", "true"])):
        words = [
            "--model_name_or_path",
            checkpoints["llama"],
            "--train_file",
            pairs_file,
            *common,
            *more,
        ]
        words += ["--eval_strategy", "epoch"]
        script.main(
            [
                str(w)
                for w in [
                    *words,
                    "--output_dir",
                    tmp_path / f"{name}1",
                    "--per_device_train_batch_size",
                    4,
                ]
            ]
        )
        runs.append([*words, "--output_dir", tmp_path / name, "--per_device_train_batch_size", 2])
    launch(runs, tmp_path, script=SCRIPT)
    for name in ("lora", "full"):
        one, two = (
            json.loads((tmp_path / n / "trainer_state.json").read_text())["log_history"]
            for n in (f"{name}1", name)
        )
        for ours, theirs in zip(one, two, strict=True):
            for key in (k for k in ours if k.removeprefix("eval_") in NAMES):
                assert ours[key] == pytest.approx(theirs[key], abs=2e-5), (name, key)
    run = yaml.safe_load((tmp_path / "lora" / "run_args.yaml").read_text())["run"]
    scripts = [described["file"] for described in run["data"] if described["use"] == "script"]
    parts = ["model_text.py", "script_parts.py", "pair_trainer.py"]  # what decides
    parts += ["chat_turns.py", "keep_model.py"]
    assert (run["versions"]["trl"], scripts) == ("1.16.0", [SCRIPT.name, *parts])


@pytest.mark.parametrize("name", ["_get_train_sampler", "_maybe_log_save_evaluate"])
def test_what_is_as_in_the_other_scripts(name):
    """Methods have no marks that are compared: the order of rows and when to log must not drift."""
    full = load_script(ROOT / "finetune_full" / "finetune_full.py").FineTuner
    own = importlib.import_module("pair_trainer").FineTuner
    assert inspect.getsource(getattr(own, name)) == inspect.getsource(getattr(full, name))


def test_noise_before_a_router_is_off():
    """Mixtral's training shakes what its routers see: margins and rewards would be noise."""
    import coverage_grid
    import keep_grpo
    import pair_trainer

    ids = torch.tensor([[15, 16, 17, 18, 19, 20]])
    for turn_off in (pair_trainer.without_dropout, keep_grpo.turn_off_dropout):
        model = coverage_grid.make_model("mixtral").train()
        for layer in model.model.layers:
            layer.mlp.jitter_noise = 0.3
        assert not torch.equal(model(ids).logits, model(ids).logits)
        turn_off(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
