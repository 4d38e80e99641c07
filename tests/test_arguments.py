"""Every option of Trainer, once: it works, or it is refused before anything is loaded, by one line that names it."""

import dataclasses
import json
import math
import re

import check_arguments
import pytest
import torch
from conftest import ROOT, load_script
from safetensors.torch import load_file
from transformers import TrainingArguments

SCRIPTS = {
    name: ROOT / name / f"{name}.py"
    for name in ("finetune_full", "finetune_lora", "finetune_lastlayer")
}
# What the scripts make of each field of TrainingArguments:
#   works    it does what transformers says
#   ours     the script sets it, whatever is said; another value is refused unless it is transformers' default
#   reports  handed on to --report_to, without effect else
#   refused  it would do nothing here, or change in silence what is learned, saved or said
KINDS = {
    "works": """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
        lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon
        gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
        activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
        torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps logging_strategy
        logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen
        log_level log_level_replica eval_strategy eval_steps eval_delay per_device_eval_batch_size
        prediction_loss_only eval_on_start save_strategy save_steps save_total_limit load_best_model_at_end
        restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu dataloader_num_workers
        dataloader_pin_memory dataloader_prefetch_factor train_sampling_strategy
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        deepspeed do_eval resume_from_checkpoint local_rank""",
    "ours": "remove_unused_columns disable_tqdm do_train use_cache",
    "reports": "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "refused": """accelerator_config auto_find_batch_size average_tokens_across_devices batch_eval_metrics
        bf16_full_eval dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_persistent_workers debug do_predict
        enable_jit_checkpoint eval_accumulation_steps eval_do_concat_batches eval_use_gather_object fp16_full_eval
        fsdp fsdp_config greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
        hub_token ignore_data_skip include_for_metrics label_names label_smoothing_factor length_column_name
        liger_kernel_config metric_for_best_model optim_args optim_target_modules
        parallelism_config push_to_hub save_on_each_node save_only_model skip_memory_metrics use_liger_kernel""",
}
KINDS = {name: kind for kind, names in KINDS.items() for name in names.split()}
# What to write for a field that `true` does not refuse; those without a value are tried with `true`.
OTHER = {
    "accelerator_config": '{"nonsense": 1}', "average_tokens_across_devices": "false", "eval_accumulation_steps": "4",
    "dataloader_in_order": "false", "dataloader_multiprocessing_context": "spawn", "debug": "underflow_overflow",
    "disable_tqdm": "false", "do_train": "false", "eval_do_concat_batches": "false", "fsdp": "full_shard",
    "fsdp_config": '{"x": 1}', "hub_strategy": "end", "label_smoothing_factor": "0.1",
    "liger_kernel_config": '{"rope": true}', "skip_memory_metrics": "false",
}  # fmt: skip
REFUSED = {
    f"{name} field": (["--" + name, OTHER.get(name, "true")], f"--{name}")
    for name, kind in KINDS.items()
    if kind == "refused" or name in ("disable_tqdm", "do_train", "use_cache")
}
# A best model needs evaluations where it is saved, or Trainer itself would be the first to complain.
BEST = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "3", "--validation_file", "VALID"]  # fmt: skip
VALUES = {
    "num_train_epochs": "0 -1 inf nan", "max_steps": "0 -5", "learning_rate": "-1 nan inf", "seed": "-1 4294967296",
    "data_seed": "-1", "weight_decay": "-0.1 nan", "max_grad_norm": "-1", "neftune_noise_alpha": "-5",
    "adam_beta1": "-1", "adam_epsilon": "-1", "per_device_train_batch_size": "0 -1", "per_device_eval_batch_size": "0",
    "gradient_accumulation_steps": "0", "logging_steps": "-1", "save_steps": "0 -1", "eval_steps": "0 -1",
    "eval_delay": "-1", "save_total_limit": "-1", "early_stopping_patience": "0 -1", "dataloader_num_workers": "-1",
    "dataloader_prefetch_factor": "0", "ddp_timeout": "0 -5", "warmup_steps": "-1", "torch_empty_cache_steps": "0",
}  # fmt: skip
for name, values in VALUES.items():
    for value in values.split():
        more = ["--dataloader_num_workers", "2"] if name == "dataloader_prefetch_factor" else []
        REFUSED[f"{name} {value}"] = (["--" + name, value, *more], name)
REFUSED |= {
    "evaluation without rows": (["--do_eval", "true"], "an evaluation needs --validation_file"),
    "first evaluation without rows": (["--eval_on_start", "true"], "an evaluation needs --validation_file"),
    "when to evaluate, but not that": (["--eval_steps", "2", "--validation_file", "VALID"], "--eval_steps needs --eval_strategy"),
    "evaluation between saves": (["--early_stopping_patience", "1", *BEST[2:]], "early stopping has its --save_steps"),
    "best, early stopping": (["--early_stopping_patience", "1", "--save_strategy", "best"], "--early_stopping_patience needs --save_strategy"),
    "best": (["--save_strategy", "best", *BEST], "save_strategy"),
    "beta": (["--adam_beta2", "1"], "Invalid beta parameter at index 1"),
    "package": (["--optim", "schedule_free_adamw"], "--optim schedule_free_adamw, .* install `schedulefree`"),
    "other package": (["--optim", "galore_adamw"], "--optim galore_adamw, .* install `galore_torch`"),
    "schedule without its number": (["--lr_scheduler_type", "warmup_stable_decay"], "--lr_scheduler.*num_decay_steps"),
    "schedule with another's": (["--lr_scheduler_kwargs", '{"min_lr": 1}'], "--lr_scheduler.*'min_lr'"),
    "compiler": (["--torch_compile_mode", "fast"], "Unrecognized mode=fast"),
    "reports": (["--report_to", "wandb"], "pip install wandb"),
    "choice": (["--optim", "adam"], "argument --optim: invalid choice: 'adam'"),
    "old name": (["--warmup_ratio", "0.1"], "unrecognized arguments: --warmup_ratio 0.1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(checkpoints, train_file, tmp_path_factory):
    """What a case is added to."""
    return ["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file, "--max_steps", "4",
            "--learning_rate", "1e-3", "--per_device_train_batch_size", "2", "--logging_steps", "1"]  # fmt: skip


def test_every_field_has_a_kind():
    """A newer transformers shows here what it added and what it dropped."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    advice = "try each, sort it into KINDS, and into REFUSED of jobs/check_arguments.py if it cannot be kept"
    assert not fields - set(KINDS), f"new in transformers: {advice}"
    assert not set(KINDS) - fields, "gone from transformers: take them out of KINDS"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_table_names_what_is_refused(name):
    """The beginnings in the script stand for these fields, for no other and for none of the script's own arguments."""
    script = load_script(SCRIPTS[name])
    starts = tuple(start for starts in check_arguments.REFUSED for start in starts.split())
    by_argparse = {"liger_kernel_config", "parallelism_config"}  # no text can be such a value
    refused = {field for field in KINDS if field.startswith(starts)}
    wanted = {field for field, kind in KINDS.items() if kind == "refused"} - by_argparse
    assert refused == wanted | {"disable_tqdm", "do_train", "use_cache"}
    own = [field.name for field in dataclasses.fields(script.ScriptArguments)]
    assert not [field for field in own if field.startswith(starts)]
    assert not [start for start in starts if not any(f.startswith(start) for f in refused)]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, base, train_file, tmp_path, capsys, monkeypatch):
    script = load_script(SCRIPTS["finetune_full"])
    for loads in ("load_tokenizer", "load_data", "load_model"):
        monkeypatch.setattr(script, loads, lambda *_: pytest.fail("something was loaded"))
    more, message = REFUSED[case]
    more = [train_file if word == "VALID" else word for word in more]
    with pytest.raises(SystemExit) as stop:
        script.main([*base, "--output_dir", str(tmp_path / "o"), *more])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err[:7]) == (2, "", "error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err


# Options that must leave every weight as it is without them, tried in groups that go together.
HARMLESS = [
    "--do_train true --do_eval true --validation_file VALID --per_device_eval_batch_size 3 --prediction_loss_only true "
    "--eval_strategy steps --eval_steps 1 --eval_delay 2 --eval_on_start true",
    "--load_best_model_at_end true --eval_strategy steps --eval_steps 1 --save_steps 1 --validation_file VALID",
    "--dataloader_num_workers 2 --dataloader_prefetch_factor 1",
    "--dataloader_pin_memory false --torch_empty_cache_steps 1 --tf32 false --use_cpu true --local_rank 0",
    "--ddp_bucket_cap_mb 1 --ddp_broadcast_buffers true --ddp_static_graph true --ddp_timeout 60 "
    "--ddp_find_unused_parameters true",
    "--logging_strategy epoch --log_on_each_node false --log_level error --log_level_replica critical "
    "--include_num_input_tokens_seen true --logging_nan_inf_filter false",
    "--logging_first_step true --logging_steps 3 --max_grad_norm 1000 --save_strategy epoch --save_total_limit 1 "
    "--restore_callback_states_from_checkpoint true --save_steps 2",
    "--report_to tensorboard --run_name x --project x --trackio_space_id x --trackio_bucket_id x "
    "--trackio_static_space_id x",
    '--activation_checkpointing true --activation_checkpointing_kwargs {"use_reentrant":true} --full_determinism true',
    '--gradient_checkpointing true --gradient_checkpointing_kwargs {"use_reentrant":false}',
]
# Options that must change them; the second is what the rates are to be, of a peak of 1e-3 in 4 steps.
LINEAR = [1, 0.75, 0.5, 0.25]
ACTIVE = {
    "--lr_scheduler_type cosine": [0.5 + 0.5 * math.cos(math.pi * k / 4) for k in range(4)],
    '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":2,"decay_type":"linear"}': [
        1,
        1,
        1,
        0.5,
    ],
    "--warmup_steps 2": [0, 0.5, 1, 0.5],
    "--weight_decay 0.5": LINEAR,
    "--adam_beta1 0.5 --adam_beta2 0.9 --adam_epsilon 1e-3": LINEAR,
    "--neftune_noise_alpha 5": LINEAR,
    "--seed 7": LINEAR,
    "--data_seed 7": LINEAR,
    "--train_sampling_strategy random": LINEAR,
    "--train_sampling_strategy batch_rebalance --data_seed 7": LINEAR,
    "--max_grad_norm 0.01 --optim sgd": LINEAR,
    "--optim adafactor": LINEAR,
    "--optim paged_lion_8bit": LINEAR,
    "--gradient_accumulation_steps 3": LINEAR,
    "--num_train_epochs 0.5 --max_steps -1 --per_device_train_batch_size 1 --learning_rate 1e-3": LINEAR,
    "--bf16 true": LINEAR,
}
# What other files try: needs a GPU, several processes, or a run before.
ELSEWHERE = "output_dir fp16 deepspeed ddp_backend resume_from_checkpoint torch_compile torch_compile_mode".split()


def run(base, train_file, output_dir, options):
    """(Weights, state) after a run; the options are words as in a shell without quotes."""
    more = [train_file if word == "VALID" else word for word in options.split()]
    try:
        load_script(SCRIPTS["finetune_full"]).main([*base, "--output_dir", str(output_dir), *more])
    finally:
        torch.use_deterministic_algorithms(False)  # --full_determinism stays on for the process
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return load_file(output_dir / "model.safetensors"), state


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_what_works(base, train_file, tmp_path, capsys):
    plain, state = run(base, train_file, tmp_path / "plain", "")
    assert state["global_step"] == 4
    for number, options in enumerate(HARMLESS):
        found, state = run(base, train_file, tmp_path / f"harmless{number}", options)
        assert same(found, plain), options
        lines = capsys.readouterr().out.splitlines()
        if "eval_delay" in options:
            steps = [line.split()[2] for line in lines if line.startswith("eval ")]
            assert steps == ["0/4", "2/4", "3/4", "4/4"], (
                "before the first step, then from eval_delay on"
            )
        if "tokens_seen" in options:  # with padding, so no less than what is learned from
            assert (
                state["num_input_tokens_seen"]
                >= sum(e.get("num_tokens", 0) for e in state["log_history"])
                > 0
            )
        if "logging_first_step" in options:
            assert [line.split()[1] for line in lines if line.startswith("step ")] == [
                "1/4",
                "3/4",
                "4/4",
            ]
        if "tensorboard" in options:
            assert list((tmp_path / f"harmless{number}").rglob("events.out.tfevents.*"))
    for number, (options, rates) in enumerate(ACTIVE.items()):
        found, state = run(base, train_file, tmp_path / f"active{number}", options)
        assert not same(found, plain), options
        assert all(tensor.isfinite().all() for tensor in found.values())
        logged = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
        assert logged == pytest.approx([1e-3 * rate for rate in rates], abs=1e-9), options
    tried = {
        word[2:] for options in [*HARMLESS, *ACTIVE] for word in options.split() if word[:2] == "--"
    }
    tried |= (
        {word[2:] for word in base if word[:2] == "--"} | set(ELSEWHERE) | {"torch_compile_backend"}
    )
    works = {name for name, kind in KINDS.items() if kind in ("works", "reports")}
    assert not works - tried, "no run tries them"
    assert not [name for name in tried if KINDS.get(name) == "refused"]


def test_compiled_training_is_the_same(base, train_file, tmp_path, monkeypatch):
    """It is compiled twice: the second width makes a variable of it, and no later one costs anything."""
    graphs, counters = [], torch._dynamo.utils.counters
    script = load_script(SCRIPTS["finetune_full"])
    computed = script.FineTuner.compute_loss

    def compute_loss(*args, **kwargs):
        graphs.append(counters["stats"]["unique_graphs"])
        return computed(*args, **kwargs)

    monkeypatch.setattr(script.FineTuner, "compute_loss", compute_loss)
    short = "--max_steps 5 --per_device_train_batch_size 1 --train_sampling_strategy sequential "
    plain, _ = run(base, train_file, tmp_path / "plain", short)
    torch._dynamo.reset()
    found, _ = run(base, train_file, tmp_path / "compiled", short + "--torch_compile_backend eager")
    assert graphs[5] < graphs[6] <= graphs[7] == graphs[-1], graphs
    assert set(found) == set(plain)  # no name of the compiled module's
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], atol=1e-6, rtol=0)


def test_weight_decay_by_hand(base, train_file, tmp_path, checkpoints):
    """One step of plain gradient descent: what the decay adds is rate x decay x weight, and nothing to biases and norms."""
    step = "--optim sgd --max_steps 1 --learning_rate 0.1 "
    plain, _ = run(base, train_file, tmp_path / "plain", step)
    decayed, _ = run(base, train_file, tmp_path / "decayed", step + "--weight_decay 0.5")
    before = load_file(checkpoints["gpt2"] + "/model.safetensors")
    for name, weight in before.items():
        share = 0.1 * 0.5 if weight.dim() > 1 else 0
        torch.testing.assert_close(decayed[name], plain[name] - share * weight, atol=1e-6, rtol=0)
