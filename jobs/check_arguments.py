"""Refuse arguments with which a training script would do nothing, or another thing than it says.

The training scripts import this file where `jobs` lies beside their directory. All is checked
before anything is loaded; each refusal is one line, and exit code 2.
"""

import json
import math
import os
import shlex
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from model_layers import shares_keys
from run_common import check, fail, say
from transformers import AutoConfig, Trainer, modeling_utils
from transformers.integrations import is_deepspeed_zero3_enabled

# Trainer's options that would do nothing here, or harm in silence, by their beginnings; what to do.
REFUSED = {
    "accelerator_ auto_find bf16_full debug disable_ do_train do_predict": "leave it out",
    "fp16_full label_ optim_ skip_memory use_cache use_liger": "leave it out",
    "dataloader_multi dataloader_persist": "workers must end with the script, come what may",
    "batch_eval eval_acc eval_do eval_use include_for": "an evaluation gives the loss alone",
    "average dataloader_drop dataloader_in_ ignore_data length_": "each token counts, once",
    "enable_jit save_on_each save_only": "a checkpoint must be whole, and in one place",
    "fsdp": "take --deepspeed ../deepspeed_configs/zero3.json",
    "greater metric_for": "leave it out: the best model is the one of the lowest loss",
    "hub_ push_to_hub": "upload the result afterwards: hf upload NAME OUTPUT_DIR",
}
GONE = {
    "--packing": "leave it out, it was never faster",
    "--packing_length": "leave it out",
    "--load_in_8bit": "type finetune_lora.py --lora_target_modules none --modules_to_save lm_head "
    "--load_in_8bit true",
}

# The same for finetune_grpo.py, of TRL's options and of those that make no sense with rewards.
ONCE = "each answer trains once, so that nothing is clipped: leave it out"
ELSEWHERE = "score the result instead: ../generate_text, then ../jglue/evaluate_jglue.py"
GRPO_REFUSED = {
    "delta epsilon importance_sampling off_policy num_iterations generation_batch": ONCE,
    "do_eval eval_ early_ load_best num_generations_eval": ELSEWHERE,
    "per_device_eval prediction_loss validation_file": ELSEWHERE,
    "sapo_ vespo_": "the --loss_type is dapo, grpo, bnpo or dr_grpo",
    "new_tokens": "teach them by finetune_lora.py before",
    "lora_dropout": "an answer is to be scored by the very model that gave it",
    "neftune torch_compile": "an answer is to be scored by the very model that gave it",
    "log_completions log_multimodal log_unique num_completions_to": "see the lines `answers`",
    "sync_ref ref_model_ use_adaptive entropy_coef_ entropy_target": "a resume would not be exact",
    "model_init reward_weights multi_objective max_tool use_transformers transformers_": (
        "leave it out"
    ),
    "include_num train_sampling cast_lm_head generation_kwargs ds3_gather use_bias": "leave it out",
}


def read_words(words):
    """The words of a command line; a settings file in front as its options, ~ as the home."""
    words = list(words)
    if words and words[0].lower().endswith((".yaml", ".yml", ".json")):
        settings = yaml.safe_load(Path(os.path.expanduser(words.pop(0))).read_text("utf-8"))
        check(isinstance(settings, dict), "a settings file must hold lines of `name: value`.")
        settings.pop("run", None)  # what run_args.yaml tells besides
        for name, value in reversed(settings.items()):
            values = value if isinstance(value, list) else [value]
            words[:0] = [f"--{name}", *(v if isinstance(v, str) else json.dumps(v) for v in values)]
    for number, word in enumerate(words):
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words[number] = name + equals + os.path.expanduser(value)
    return words


def refuse(message):
    """The parser's error; for an option that is gone, what to type instead."""
    words = message.split() if message.startswith("unrecognized") else []
    for name in {word.partition("=")[0] for word in words} & set(GONE):
        fail(f"{name} is gone: {GONE[name]}.")
    fail(message)


def settle(values):
    """Set what follows from other arguments: of early stopping, that each save is evaluated."""
    values["save_total_limit"] = None  # KeepRun removes old checkpoints itself, only this run's
    if values["early_stopping_patience"] is not None:
        when, steps = values["save_strategy"], values["save_steps"]
        check(when in ("steps", "epoch"), "--early_stopping_patience needs --save_strategy steps.")
        values.update(eval_strategy=when, eval_steps=steps, load_best_model_at_end=True)
    return values


def check_arguments(script, training, given):
    """Refuse what cannot work, and what Trainer would not refuse.

    `given` are the arguments that are not the default, by name.
    """
    for name, value in given.items():
        whys = [why for starts, why in REFUSED.items() if name.startswith(tuple(starts.split()))]
        check(not whys, f"--{name} does not work here: {' '.join(whys)}.")
        if isinstance(value, int | float):
            is_count = name.endswith(("steps", "epochs", "size", "patience", "factor", "timeout"))
            check(0 <= value < 2**32 and (value or not is_count), f"--{name} cannot be {value}.")
    if hasattr(training, "num_generations"):
        check_grpo(script, training, given)
    model, output_dir = Path(script.model_name_or_path), Path(training.output_dir).resolve()
    is_name = len(model.parts) == 1 or (len(model.parts) == 2 and not model.parent.is_dir())
    check(model.exists() or is_name, f"--model_name_or_path {model} is not here, nor a hub name.")
    is_inside = model.resolve() in [output_dir, *output_dir.glob("checkpoint-*")]
    check(not is_inside, "--output_dir holds the model to start from. Choose another --output_dir.")
    check_data(script, training, given)
    if hasattr(script, "beta"):
        check_preferences(script, given)
    if hasattr(script, "lora_r") and not getattr(training, "full", False):
        check_lora(script, training, given)
    elif hasattr(script, "train"):
        check_lastlayer(script, training)
    check_reentrant(script, training)
    check_gpu(given)
    check(training.n_gpu < 2, f"type torchrun --standalone --nproc_per_node {training.n_gpu} ...")
    launched = os.environ.get("WORLD_SIZE") == str(training.world_size) or not training.deepspeed
    check(launched, "--deepspeed needs a launcher: torchrun --standalone --nproc_per_node 1 ...")
    try:  # what Trainer would find only after loading
        Trainer.get_optimizer_cls_and_kwargs(training)
        if not training.deepspeed:  # which allows no second Trainer
            trial = Trainer(torch.nn.Linear(1, 1), training, eval_dataset=[])
            trial.accelerator.prepare_model(trial.model, evaluation_mode=True)  # compiles, if asked
            trial.create_optimizer_and_scheduler(9)
    except torch.OutOfMemoryError:
        raise  # somebody else fills the GPU: no argument is wrong
    except Exception as error:
        fail(f"--optim {training.optim.value}, --lr_scheduler_type or another argument: {error}")
    if training.deepspeed:
        prepare_deepspeed(training)


def check_reentrant(script, training):
    """Refuse checkpointing that loses the gradients of what layers share beside their inputs."""
    asked = (training.activation_checkpointing_kwargs or {}).get("use_reentrant")
    of_trl = hasattr(script, "beta") or hasattr(training, "num_generations")
    forced = is_deepspeed_zero3_enabled() and training.activation_checkpointing and of_trl
    forced = forced and not getattr(script, "full", False)  # TRL does so with an adapter
    if asked or forced:
        remote = {"trust_remote_code": script.trust_remote_code}
        config = AutoConfig.from_pretrained(script.model_name_or_path, **remote)
        problem = "layers of this model share keys and values: use_reentrant loses their gradients"
        remedy = "Take zero2.json, or no checkpointing" if forced else "Leave it out"
        check(not shares_keys(config), f"{problem}. {remedy}.")


def check_gpu(given):
    """Refuse to train on CPUs where there is a GPU that torch does not see."""
    none = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or os.environ.get("PBS_QUEUE") == "rt_HC"
    driver = Path("/dev/nvidiactl").exists() and not none
    problem = f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not see the GPU"
    is_blind = driver and not torch.cuda.is_available() and not given.get("use_cpu")
    check(not is_blind, f"{problem}. See nvidia-smi; or --use_cpu true.")


def prepare_deepspeed(training):
    """Settle what it keeps the weights in; read its checkpoints without running code from them."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero import GatheredParameters, Init
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    check_builds()
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    torch.serialization.add_safe_globals(known)
    settings = training.hf_deepspeed_config.config
    if autocast := settings.get("torch_autocast"):  # in fp32, as without DeepSpeed; bf16 rounds
        autocast["enabled"], settings["bf16"] = training.bf16, {"enabled": False}
    kept, kinds = torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}
    for name, dtype in kinds.items():
        part = settings.setdefault(name, {"enabled": getattr(training, name)})  # as Trainer will
        kept = dtype if part.get("enabled") else kept
    training.kept_in = kept
    if is_deepspeed_zero3_enabled():
        option = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        gathers = training.hf_deepspeed_config.get_value(option)
        check(gathers, f"ZeRO-3 would save no model. Set {option} in {training.deepspeed}.")

        def equal(one, other):  # transformers compares emptied tensors, and ties heads that differ
            with GatheredParameters([one, other]):
                return torch.equal(one, other)

        modeling_utils._tied_params_are_equal = equal
        # As from_pretrained is asked for: the base of an adapter may be in 16 bit.
        Init.dtype = property(lambda _: torch.get_default_dtype(), lambda *_: None)


def check_builds():
    """Refuse what a killed build left behind: DeepSpeed would wait for its lock without end.

    A build takes a minute or two.
    """
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with suppress(FileNotFoundError):  # another process may just have ended its build
            is_new = time.time() - lock.stat().st_mtime < 900
            remedy = f"type: rm {shlex.quote(str(lock))}"
            check(is_new, f"a build was cut off, and would be waited for without end; {remedy}")


def check_lora(script, training, given):
    """Refuse what finetune_lora.py cannot do, or would only seem to do."""
    for name in ("lora_target_modules", "modules_to_save", "new_tokens"):
        check(
            getattr(script, name) or name not in given, f"--{name} names nothing. Give NAME,NAME."
        )
    good = script.lora_r > 0 and 0 < script.lora_alpha < math.inf and 0 <= script.lora_dropout < 1
    check(good, "--lora_r, --lora_alpha: above 0; --lora_dropout: at least 0 and below 1.")
    trains = script.lora_target_modules != ["none"] or script.modules_to_save or script.new_tokens
    check(trains, "--lora_target_modules none trains nothing without --modules_to_save NAME.")
    check(not (script.load_in_8bit and script.load_in_4bit), "--load_in_8bit or --load_in_4bit?")
    quantised = script.load_in_8bit or script.load_in_4bit
    for package in ["peft", "bitsandbytes"] if quantised else ["peft"]:
        check(find_spec(package), f"a package is missing. Type: pip install {package}")
    is_old = training.device.type == "cuda" and torch.cuda.get_device_capability() < (7, 5)
    good = not (script.load_in_8bit and is_old)
    check(good, "--load_in_8bit goes wrong on this GPU: use --load_in_4bit true, or fp16.")
    impossible = is_deepspeed_zero3_enabled() and (quantised or script.new_tokens)
    check(not impossible, "ZeRO-3 parts no quantised base and no new tokens. Use zero2.json.")


def check_preferences(script, given):
    """Refuse what finetune_dpo.py cannot do: an adapter beside all parameters, new tokens."""
    merge = "python ../finetune_lora/merge_lora.py --adapter_name_or_path"
    is_adapter = Path(script.model_name_or_path, "adapter_config.json").is_file()
    problem = f"--model_name_or_path {script.model_name_or_path} is an adapter. Merge it first:"
    command = f"{merge} {script.model_name_or_path} --output_dir NEW"
    check(not is_adapter, f"{problem} {command}")
    check(0 < script.beta < math.inf, f"--beta {script.beta} must be above 0.")
    names = ("lora_", "modules_to", "load_in_", "allow_partly")
    given = [name for name in given if name.startswith(names)]
    check(
        not (script.full and given),
        f"--full true has no adapter: leave out --{', --'.join(given)}.",
    )
    check(not script.new_tokens, "--new_tokens: teach them by finetune_lora.py, then start here.")


def check_grpo(script, training, given):
    """Refuse what finetune_grpo.py cannot do, or would only seem to do."""
    for name in given:
        whys = [w for starts, w in GRPO_REFUSED.items() if name.startswith(tuple(starts.split()))]
        check(not whys, f"--{name} does not work here: {' '.join(whys)}.")
        is_vllm = name.startswith(("use_vllm", "vllm_"))
        check(not is_vllm or find_spec("vllm"), f"--{name}: vllm is not installed. Leave it out.")
    parts, steps = training.gradient_accumulation_steps, training.steps_per_generation
    check(steps == parts, f"--steps_per_generation must be the {parts} accumulated: leave it out.")
    known = training.loss_type in ("dapo", "grpo", "bnpo", "dr_grpo")
    check(known, f"--loss_type {training.loss_type}: it can be dapo, grpo, bnpo or dr_grpo.")
    length, hottest = training.max_completion_length, 0 < training.temperature < math.inf
    check(length > 0, f"--max_completion_length cannot be {length}.")
    check(hottest, f"--temperature cannot be {training.temperature}.")
    adapter = [name for name in given if name.startswith(("lora_", "load_in_", "modules_to"))]
    check(not (training.full and adapter), f"--full true trains no adapter: {adapter} has no use.")
    parted = is_deepspeed_zero3_enabled() and training.full
    check(not parted, "ZeRO-3 is for adapters here: leave --full out, or take zero2.json.")


def check_lastlayer(script, training):
    """Refuse new tokens without their rows, and optimizers that move other rows, too."""
    has_rows, names = script.train == "new_tokens", '--train new_tokens and --new_tokens "<a>,<b>"'
    check(has_rows == bool(script.new_tokens), f"{names} go together.")
    known = ("adamw_torch_fused", "adamw_torch", "sgd")
    exact = training.weight_decay == 0 and training.optim in known
    check(exact or not has_rows, "new tokens need --weight_decay 0 and --optim adamw_torch_fused.")


def check_tokens(names, tokenizer, examples):
    """Refuse new tokens that the tokenizer does not have, or that nothing would teach."""
    seen = {token for ids in examples["input_ids"] for token in ids} if names else ()
    for name in names:
        row, problem = tokenizer.get_vocab().get(name), f"--new_tokens {name}:"
        check(row is not None, f"{problem} ../finetune_lastlayer/add_tokens.py must add it first.")
        check(row in seen, f"{problem} it does not occur in the training data.")
        say("row", f"{name} = {row}")


def check_data(script, training, given):
    """Refuse files that are not there, and evaluations without rows or of no effect."""
    is_hub = script.dataset_name is not None
    check(is_hub != bool(script.train_file), "give one of --train_file and --dataset_name.")
    for file in (script.train_file or []) + (script.validation_file or []):
        check(Path(file).is_file(), f"{file} of --train_file or --validation_file is no file here.")
    asked = training.do_eval or training.eval_on_start
    check(is_hub or script.validation_file or not asked, "an evaluation needs --validation_file.")
    wanted = given.get("eval_steps")
    acts = not wanted or (training.eval_strategy == "steps" and training.eval_steps == wanted)
    check(acts, "--eval_steps needs --eval_strategy steps; early stopping has its --save_steps.")
