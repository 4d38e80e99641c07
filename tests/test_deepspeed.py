"""The three training scripts under DeepSpeed, for real: two CPU processes over gloo, one launch.

One case per row and column of the grid in matrix.py, which says what is compared, and the cases
with a history.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import matrix
import pytest
import torch
import transformers
from conftest import ROOT, load_script, write_jsonl
from safetensors.torch import load_file, save_file
from test_finetune_dpo import PAIRS
from test_finetune_full import refused

FULL, LAST, LORA = "finetune_full", "finetune_lastlayer", "finetune_lora"
STEPS = 4
ROWS = ["--train", "new_tokens", *matrix.NEW]
ENDS = ["--train", "input_output", "--weight_decay", "0.1", "--learning_rate", "0.1"]
HEAD = ["--modules_to_save", "lm_head"]
HALF = ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "1"]
BF16 = ["--precision", "bf16"]
# So high a rate spoils the model: an early checkpoint stays the best.
STOP = ["--early_stopping_patience", "2", "--save_steps", "1", "--learning_rate", "0.3"]
CASES = {
    **{f"as without, {name}": (name, FULL, "llama", BF16) for name in matrix.CONFIGS},
    "own file, in bf16": ("own", FULL, "llama", BF16),
    "stage 1": ("zero1", FULL, "falcon", BF16),
    "stage 2": ("zero2", LORA, "mpt", []),
    "untied": ("zero3", LAST, "gpt2", ["--train", "last_block", *BF16]),
    "accumulated": ("zero2_offload", LAST, "llama", HALF),
    "8-bit optimizer": ("zero3_offload", LORA, "gpt_neox", ["--optim", "adamw_bnb_8bit"]),
    "another name in the file": ("zero3", FULL, "gpt_neox", []),
    "bf16 adapter": ("zero3", LORA, "gpt_neox", [*HEAD, *BF16]),
    "tied head in an adapter": ("zero3", LORA, "gpt2", HEAD),
    "rows": ("zero3", LAST, "gpt2_tokens", ROWS),
    "rows, stage 2": ("zero2", LAST, "llama_tokens", ROWS),
    "rows, accumulated": ("zero2", LAST, "gpt2_tokens", [*ROWS, *HALF]),
    "rows of an adapter": ("zero2", LORA, "llama_tokens", matrix.NEW[:2]),
    "both ends": ("zero3", LAST, "gpt_neox", [*ENDS, *BF16]),
    "head of its own": ("zero3", FULL, "falcon_own_head", []),
    "best": ("zero3", FULL, "gpt2", STOP),
    "best adapter": ("zero2", LORA, "gpt2", STOP),
    "4 bit": ("zero2", LORA, "llama", ["--load_in_4bit", "true", *BF16]),
    "8 bit": ("zero1", LORA, "gpt_neox", ["--load_in_8bit", "true", *BF16]),
    "last layer on 8 bit": ("zero2", LORA, "gpt2", [*matrix.HEAD, *matrix.IN_8BIT, *BF16]),
}
# finetune_dpo.py: (configuration, arguments); the first is resumed, too.
PREFERENCES = {"dpo": ("zero2", []), "dpo, full": ("zero3", ["--full", "true"])}
RESUMED = {"stage 1", "stage 2", "untied", "accumulated", "8-bit optimizer",
           "another name in the file"}  # fmt: skip


def pairs_words(folder, rows, more):
    """A training on preferences with the same four pairs in each step, on one or on two processes."""
    file = write_jsonl(folder / "pairs.jsonl", PAIRS)
    words = ["--model_name_or_path", folder / "models" / "gpt2", "--train_file", file, *more]
    words += ["--validation_file", file, "--eval_strategy", "steps", "--eval_steps", 2]
    words += ["--learning_rate", "3e-3", "--logging_steps", 1, "--max_steps", STEPS]
    words += ["--save_steps", 2, "--train_sampling_strategy", "sequential"]
    return [*words, "--per_device_train_batch_size", rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{case: (directory, errors)} after one launch."""
    folder = tmp_path_factory.mktemp("deepspeed")
    matrix.prepare(folder, ["gpt2", "gpt_neox", "falcon", "mpt", "llama"])
    for kind in ("gpt2", "llama"):
        matrix.prepare_tokens(folder, kind)
    own = folder / "models" / "falcon_own_head"
    shutil.copytree(folder / "models" / "falcon", own)
    weights = load_file(own / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].flip(0).contiguous()
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    other = write_jsonl(folder / "other.jsonl", [{"prompt": "甲", "completion": "乙丙丁"}])
    own = json.loads((ROOT / "deepspeed_configs" / "zero2.json").read_text())
    own["bf16"] = own.pop("torch_autocast") and {"enabled": "auto"}
    (folder / "own.json").write_text(json.dumps(own))
    cases, words = {}, []
    for name, (config, script, kind, more) in CASES.items():
        config = folder / "own.json" if config == "own" else config
        more = [*more, "--validation_file", other] if more is STOP else more
        out, (whole, resumed) = matrix.together(folder, config, script, kind, more, STEPS)
        first = len(words)
        words += [whole, resumed] if name in RESUMED else [whole]
        places = slice(first, len(words))
        cases[name] = SimpleNamespace(out=out, folder=folder, places=places)
    for name, (config, more) in PREFERENCES.items():
        out, places = folder / name, slice(len(words), len(words) + 2 - len(more) // 2)
        run = [ROOT / "finetune_dpo" / "finetune_dpo.py", *pairs_words(folder, 2, more)]
        run += ["--deepspeed", ROOT / "deepspeed_configs" / f"{config}.json"]
        middle = ["--resume_from_checkpoint", out / "whole" / "checkpoint-2"]
        both = [
            [*run, "--output_dir", out / "whole"],
            [*run, "--output_dir", out / "resumed", *middle],
        ]
        words += both[: places.stop - places.start]
        cases[name] = SimpleNamespace(out=out, folder=folder, places=places)
    _, (whole, resumed) = matrix.together(folder, "zero2", FULL, "llama", [], STEPS)
    words += [whole, [ROOT / "tests" / "malicious_inside.py", *resumed[1:]]]
    _, ((_, *inside), _) = matrix.together(folder, "zero3", FULL, "llama", [], 2)
    words.append([ROOT / "tests" / "model_inside.py", *inside])  # the last, since it never ends
    errors = matrix.launch(words, folder / "launch")
    log = (folder / "launch" / "log.txt").read_text()
    for case in cases.values():
        case.errors, case.log = errors[case.places], log
    cases["inside"] = SimpleNamespace(error=errors[-1], log=log)
    cases["malicious"] = SimpleNamespace(error=errors[-2], checkpoint=Path(resumed[-1]))
    return cases


@pytest.mark.parametrize("name", CASES)
def test_learns_what_one_process_learns_and_saves_it(name, runs):
    (_, script, kind, more), case = CASES[name], runs[name]
    more = more[: -len(HALF)] if more[-len(HALF) :] == HALF else more  # the same rows in each step
    reference = None if more is STOP else matrix.alone(case.folder, script, kind, more, STEPS)
    tolerance = 1e-4 if name.startswith("rows") else 1e-3  # few rows change the loss little
    assert matrix.check(case.errors, case.out, reference, tolerance) == "ok"


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name, runs):
    """The reference model is what training began from, whichever process holds which part of it."""
    (_, more), case = PREFERENCES[name], runs[name]
    assert not any(case.errors), case.errors
    words = [*pairs_words(case.folder, 4, more), "--output_dir", case.out / "alone"]
    load_script(ROOT / "finetune_dpo" / "finetune_dpo.py").main([str(word) for word in words])
    for key in (
        "loss",
        "rewards/margins",
        "rewards/accuracies",
        "eval_loss",
        "eval_rewards/margins",
    ):
        wanted = matrix.logged(case.out / "alone", key)
        assert len(wanted) == (2 if "eval" in key else STEPS)
        for directory in sorted(case.out.iterdir()):
            assert matrix.logged(directory, key) == pytest.approx(wanted, abs=1e-4), directory
    assert abs(matrix.logged(case.out / "whole", "eval_rewards/margins")[-1]) > 0.01


def test_a_malicious_checkpoint_is_refused(runs):
    """torch.load of DeepSpeed's files would run what is pickled in them."""
    case = runs["malicious"]
    assert "holds a file that is more than data" in case.error
    assert list(case.checkpoint.glob("global_step*/*optim_states.pt"))
    assert not (case.checkpoint / "acted").exists()


def saved(directory):
    return load_file(next(directory.glob("*model.safetensors")))


def test_what_is_trained_is_kept_and_saved_in_fp32(runs):
    for name in [*PREFERENCES, *(name for name in CASES if name != "own file, in bf16")]:
        dtypes = {tensor.dtype for tensor in saved(runs[name].out / "whole").values()}
        assert dtypes == {torch.float32}, name


@pytest.mark.parametrize("config", matrix.CONFIGS)
def test_weights_bit_by_bit(config, runs):
    """At the start the file's, unrounded; what is saved is what is trained, as without DeepSpeed.

    One process that adds up two batches does what two processes do, to the last bit. ZeRO-3 adds
    up in another order.
    """
    case = runs[f"as without, {config}"]
    whole, trained = case.out / "whole", torch.load(case.out / "whole" / "gathered.pt")
    file, start = saved(case.folder / "models" / "llama"), torch.load(whole / "start.pt")
    assert not equal(file, {name: t.bfloat16().float() for name, t in file.items()})
    assert equal(start, file) and equal(saved(whole), trained) and not equal(trained, file)
    more = [*BF16, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    alone = matrix.alone(case.folder, FULL, "llama", more, STEPS)
    for name in ("loss", "eval_loss"):
        assert matrix.differ(matrix.logged(whole, name), matrix.logged(alone, name)) < 1e-6
    if "zero3" in config:
        assert all((t - trained[name]).abs().max() < 1e-4 for name, t in saved(alone).items())
    else:
        assert equal(saved(alone), trained)


def equal(one, other):
    """Whether these are the same tensors, bit by bit; a tied head may stand there twice."""
    names = one.keys() & other.keys()
    assert one.keys() ^ other.keys() <= {"lm_head.weight"}
    return all(one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in names)


def test_a_file_of_ones_own_may_keep_bf16(runs):
    """It starts rounded and saves rounded; the banner says so, and loads no more than that."""
    case = runs["own file, in bf16"]
    file, whole = saved(case.folder / "models" / "llama"), case.out / "whole"
    assert equal(torch.load(whole / "start.pt"), {n: t.bfloat16().float() for n, t in file.items()})
    assert {tensor.dtype for tensor in saved(whole).values()} == {torch.bfloat16}
    assert "(100.00%) in bfloat16" in case.log and "(100.00%) in float32" in case.log


def test_a_head_is_saved_with_the_adapter(runs):
    for name in ("bf16 adapter", "tied head in an adapter", "last layer on 8 bit"):
        found = saved(runs[name].out / "whole")
        heads = [tensor for key, tensor in found.items() if "lm_head" in key]
        assert [head.shape for head in heads] == [(300, 32)]
        trained = torch.load(runs[name].out / "whole" / "gathered.pt")
        (wanted,) = (t for key, t in trained.items() if "lm_head.modules_to_save" in key)
        assert torch.equal(heads[0], wanted)
        assert (len(found) == 1) == (name == "last layer on 8 bit")


def test_a_head_of_its_own_is_not_lost(runs):
    """Under ZeRO-3 transformers compares emptied tensors, finds them equal, and ties them."""
    found = saved(runs["head of its own"].out / "whole")
    ends = found["lm_head.weight"], found["transformer.word_embeddings.weight"]
    assert not torch.allclose(*ends, atol=0.1)


@pytest.mark.parametrize("name", ["rows", "rows, stage 2", "rows, accumulated"])
def test_only_new_rows_are_trained(name, runs):
    """All other rows, and all else, stay bit by bit what they were before the tokens were added."""
    case, kind = runs[name], CASES[name][2]
    before = saved(case.folder / "models" / kind.removesuffix("_tokens"))
    start, after = saved(case.folder / "models" / kind), saved(case.out / "whole")
    ends = [key for key in start if start[key].shape[0] == 302]
    assert len(ends) == (1 if kind == "gpt2_tokens" else 2)
    for key in before:
        assert torch.equal(after[key][:300] if key in ends else after[key], before[key]), key
    for key in ends:
        assert (after[key][300:] != start[key][300:]).all()
    # DeepSpeed writes a tied head under both its names.
    assert all(torch.equal(after[key], after[ends[0]]) for key in after.keys() - before.keys())


@pytest.mark.parametrize("name", ["best", "best adapter"])
def test_early_stopping_keeps_the_best(name, runs):
    whole = runs[name].out / "whole"
    state = json.loads((whole / "trainer_state.json").read_text())
    assert state["best_global_step"] < state["global_step"]
    best, found = saved(whole / f"checkpoint-{state['best_global_step']}"), saved(whole)
    assert all(torch.equal(best[key], found[key]) for key in found)


def test_loading_inside_main_process_first_never_ends(runs):
    """Under ZeRO-3 the first rank waits in its first broadcast, and the other one for the first.

    Every other run here prepares the data inside and loads the model outside, and ends.
    """
    case = runs["inside"]
    assert "ended early" in case.error
    stacks = case.log.split("Timeout (0:00:20)!")[1:3]
    first, other = sorted(stacks, key=lambda text: "in broadcast" not in text)
    assert "in broadcast" in first and "in from_pretrained" in first
    assert "in barrier" in other and "in main_process_first" in other
    assert "in from_pretrained" not in other


NOT_PARTED = "ZeRO-3 parts no quantised base and no new tokens.*zero2.json"
REFUSED = {FULL: [], LAST: [], LORA: [matrix.IN_8BIT, matrix.IN_4BIT, matrix.NEW]}


@pytest.mark.parametrize("script", REFUSED)
def test_what_cannot_work_is_refused(
    script, checkpoints, train_file, tmp_path, capsys, monkeypatch
):
    module = load_script(matrix.script_path(script))
    base = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file]
    base += ["--output_dir", tmp_path / "o"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    library = transformers.modeling_utils  # the next tests' is as it was
    monkeypatch.setattr(library, "_tied_params_are_equal", library._tied_params_are_equal)
    config = json.loads((ROOT / "deepspeed_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    (tmp_path / "ungathered.json").write_text(json.dumps(config))
    words = [*base, "--deepspeed", tmp_path / "ungathered.json"]
    lock = tmp_path / "extensions" / "fused_adam" / "lock"  # of a build that was killed
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert "stage3_gather_16bit_weights_on_model_save" in refused(module, capsys, words)
    os.utime(lock, (0, time.time() - 1000))
    assert f"type: rm {lock}" in refused(module, capsys, words) and lock.exists()
    lock.unlink()
    for more in REFUSED[script]:
        words = [*base, "--deepspeed", ROOT / "deepspeed_configs" / "zero3.json", *more]
        assert re.search(NOT_PARTED, refused(module, capsys, words)), more
