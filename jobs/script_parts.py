"""What a training script does around its training: marked copies of parts of the older scripts.

finetune_dpo.py and finetune_grpo.py import this file: the settings and the adapter of
finetune_lora.py, reading rows, tokenizer and model, precision, the banner, the results.
"""

import json
import os
import time
import warnings
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import keep_run
import model_layers
import torch
import transformers
from model_text import CHAT_TEMPLATE, choose_chat_template, exact_tokenizer, turn_end_id
from pyarrow import parquet
from run_common import check, fail, say
from transformers import AutoModelForCausalLM
from transformers.hf_argparser import HfArg
from transformers.trainer_pt_utils import get_model_param_count


# Copied from finetune_lora/finetune_lora.py
@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="Directory or hub name of the model.")
    train_file: list[str] | None = HfArg(default=None, help="JSON Lines, JSON or Parquet files.")
    validation_file: list[str] | None = HfArg(default=None, help="The same, for evaluations.")
    dataset_name: str | None = HfArg(default=None, help="Hub data set instead of --train_file.")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration.")
    max_length: int | None = HfArg(default=None, help="Tokens per example. Default: up to 1024.")
    chat_template: str | None = HfArg(default=None, help="alpaca, or a Jinja file.")
    chat_template_kwargs: str = HfArg(default="{}", help='Like {"enable_thinking": false}.')
    precision: str = HfArg(default="auto", help="auto (what the GPU has), bf16, fp16 or fp32.")
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2.")
    early_stopping_patience: int | None = HfArg(default=None, help="Saves without a lower loss.")
    trust_remote_code: bool = HfArg(default=False, help="Run the repository's code. Read it first.")
    lora_r: int = HfArg(default=16, help="Rank: capacity and memory grow with it.")
    lora_alpha: float = HfArg(default=32, help="What the adapter adds is scaled by alpha / r.")
    lora_dropout: float = HfArg(default=0.0, help="Share of inputs left out; 0.05 for few data.")
    lora_target_modules: str = HfArg(default="all-linear", help="all-linear, NAME,NAME or none.")
    modules_to_save: str | None = HfArg(default=None, help="NAME,NAME of modules to train whole.")
    new_tokens: str | None = HfArg(default=None, help='"<a>,<b>": train their rows, too.')
    load_in_8bit: bool = HfArg(default=False, help="Base in 8 bit: half of 16 bit's memory.")
    load_in_4bit: bool = HfArg(default=False, help="Base in 4 bit (QLoRA): a quarter, slower.")
    allow_partly_quantized: bool = HfArg(default=False, help="Even if most of it stays in 16 bit.")

    def __post_init__(self):  # NAME,NAME becomes a list
        for option in ("lora_target_modules", "modules_to_save", "new_tokens"):
            names = (getattr(self, option) or "").split(",")
            setattr(self, option, [name.strip() for name in names if name.strip()])


# Copied from finetune_full/finetune_full.py
def load_tokenizer(script):
    """Return (tokenizer with a chat template, tokens per example at most)."""
    name, remote = script.model_name_or_path, {"trust_remote_code": script.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(name, **remote).get_text_config()
    tokenizer = exact_tokenizer(name, config.vocab_size, say, **remote)
    choose_chat_template(script.chat_template, tokenizer, script.chat_template_kwargs)
    if keep_run:  # the template may stand in another file, or take lists of parts alone
        keep_run.find_template(name, script.chat_template, tokenizer, say, CHAT_TEMPLATE)
    limit = getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", 10**9)
    length = min(1024, limit) if script.max_length is None else script.max_length
    check(2 <= length <= limit, f"--max_length {length} does not fit the {limit} positions.")
    return tokenizer, length


# Copied from finetune_full/finetune_full.py
def read_model(script, tokenizer, source, **options):
    """The model, frozen where text does not pass; refused if weights are missing."""
    remote = {"trust_remote_code": script.trust_remote_code}
    config, load = transformers.AutoConfig.from_pretrained(source, **remote), AutoModelForCausalLM
    if keep_run:  # a model that sees, too, and weights that are published quantised
        load = keep_run.prepare(config, source, options)
    is_plain = config.get_text_config() is config and not hasattr(config, "quantization_config")
    is_plain &= not (script.trust_remote_code and hasattr(config, "auto_map"))
    check(keep_run or is_plain, "own code, images, weights published quantised need ../jobs.")
    options |= {"attn_implementation": script.attn_implementation, "output_loading_info": True}
    model, info = load.from_pretrained(source, config=config, **options, **remote)
    wrong = [*info["missing_keys"], *(k for k in info["unexpected_keys"] if "weight_scale" in k)]
    check(not wrong, f"{source} lacks or packs weights: {sorted(wrong)[:3]} would be random.")
    if keep_run and (parts := keep_run.freeze_beside_text(model, source)):
        say("frozen", f"{', '.join(parts)}: text does not pass there")
    model.loss_type = "ForCausalLM"  # gpt2 names none and divides by a wrong number of tokens
    model.accepts_loss_kwargs = True  # the number of tokens, which composites seem to refuse
    ends = {tokenizer.eos_token_id, turn_end_id(tokenizer)} - {None}
    model.generation_config.eos_token_id = sorted(ends)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature or the like without do_sample: nothing could be saved
        model.generation_config.do_sample = True
    return model


# Copied from finetune_lora/finetune_lora.py
def load_model(script, training, tokenizer, resume):
    """The base, in the precision that is computed in or quantised, and the adapter on it."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    options = {"dtype": dtypes.get(script.precision, torch.float32)}
    if bits := 8 * script.load_in_8bit or 4 * script.load_in_4bit:
        # The quantiser passes over subclasses of Linear.
        transformers.models.falcon.modeling_falcon.FalconLinear = torch.nn.Linear
        options["device_map"] = {"": str(training.device)}
        kind = {f"load_in_{bits}bit": True, "bnb_4bit_compute_dtype": options["dtype"]}
        kind |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**kind)
    model = read_model(script, tokenizer, script.model_name_or_path, **options)
    done = [m for m in model.modules() if type(m).__module__ == "bitsandbytes.nn.modules"]
    for layer in done:
        layer.support_avx512bf16_for_cpu = False  # or an evaluation on a CPU spoils the training
    check(done or not bits, f"no layer was quantised: leave --load_in_{bits}bit out.")
    text = f"{len(done)} layers in {bits} bit, else " if bits else ""
    text += f"{script.precision}; frozen; {model.get_memory_footprint() / 2**20:,.1f} MiB"
    if bits and model_layers:
        text += f"; {model_layers.prepare_rounded(model, script, training)}"
    say("base", text)
    if Path(script.model_name_or_path).is_dir():  # so that the adapter finds it from anywhere
        model.name_or_path = str(Path(script.model_name_or_path).resolve())
    return add_adapter(script, training, tokenizer, model)


# Copied from finetune_lora/finetune_lora.py
def add_adapter(script, training, tokenizer, model):
    """Freeze the model and put on it what is trained, in fp32."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    whole, weights, modules = script.modules_to_save, [], script.lora_target_modules
    if model_layers:  # experts, too, and nothing that passes an adapter by
        modules, weights, whole = model_layers.find_targets(model, script)
    else:
        plain = not (whole or script.load_in_8bit) and all(w.dim() < 3 for w in model.parameters())
        check(plain, "--modules_to_save, 8 bit, experts, Mamba layers need `jobs` beside this.")
        lost = {*modules} - {n.rpartition(".")[2] for n, _ in model.named_modules()}
        check(not lost or modules in (["all-linear"], ["none"]), f"no layer is named {lost}.")
        modules = {"all-linear": "all-linear", "none": []}.get(",".join(modules), modules)
    # A file may hold a head of its own in spite of its configuration, as Falcon's does.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.config.tie_word_embeddings = is_tied = head.weight is embedding.weight
    ends = [n for n, m in model.named_modules() if m is embedding or (m is head and not is_tied)]
    rows = [tokenizer.get_vocab()[token] for token in script.new_tokens]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=modules or DUMMY_TARGET_MODULES,  # which match no layer
        target_parameters=weights or None,
        modules_to_save=whole or None,
        trainable_token_indices=dict.fromkeys(ends, rows) if rows else None,
    )
    warnings.filterwarnings("ignore", module="peft|transformers")  # of what PEFT mends itself
    transformers.set_seed(training.seed)  # the adapter begins at random
    model = get_peft_model(model, config)
    for parameter in (p for p in model.parameters() if p.requires_grad):  # 16 bit for DeepSpeed
        parameter.data = parameter.data.to(getattr(training, "kept_in", torch.float32))
    if model_layers:
        model_layers.check_targets(model, modules)
    return model


# Copied from finetune_full/finetune_full.py
def choose_precision(values):
    """Set the precision that the GPU has, or refuse what it has not; return the reason."""
    asked = {name for name in ("bf16", "fp16") if values[name]} | {values["precision"]} - {"auto"}
    known = asked <= {"bf16", "fp16", "fp32"} and len(asked) < 2
    check(known, "--precision is auto, bf16, fp16 or fp32, and must not contradict --bf16, --fp16.")
    best, reason, impossible = "fp32", "no GPU in use", "fp16"
    if torch.cuda.is_available() and not values["use_cpu"]:
        capability = torch.cuda.get_device_capability()
        best, impossible = ("bf16", None) if capability >= (8, 0) else ("fp16", "bf16")
        reason = "compute capability {}.{}".format(*capability)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess and warn
        values["use_cpu"] |= not values["deepspeed"]  # or Trainer takes several processes for one
    values["precision"] = precision = min(asked, default=best)
    check(precision != impossible, f"--precision {precision} does not work here: {reason}.")
    values.update(bf16=precision == "bf16", fp16=precision == "fp16")
    return reason


# Copied from finetune_full/finetune_full.py
def read_rows(source):
    """Yield (place, row) of JSON Lines, JSON (a list) and Parquet files, or of a data set."""
    for file, start, stop in (s if isinstance(s, tuple) else (s, 0, None) for s in source):
        place, rows, is_lines = str(file), file, False
        try:
            if place.lower().endswith(".parquet"):
                rows = (r for b in parquet.ParquetFile(file).iter_batches() for r in b.to_pylist())
            elif isinstance(file, str):
                rows = Path(file).open(encoding="utf-8-sig")  # noqa: SIM115 -- the loop reads it
                is_lines = not rows.read(1000).lstrip().startswith("[")
                rows.seek(0)
                rows = rows if is_lines else json.load(rows)
            for number, row in enumerate(islice(rows, start, stop), start + 1):
                place = f"{file}, row {number}"
                if not is_lines or row.strip():
                    row = json.loads(row) if is_lines else row
                    check(isinstance(row, dict), f"{place}: a row must be an object.")
                    yield place, row
        except Exception as error:  # of a damaged file, anything
            place = str(file) if isinstance(error, UnicodeError) else place
            fail(f"{place}: {error} (wanted: objects, one a line or in a list, in UTF-8; Parquet)")


# Copied from finetune_full/finetune_full.py
def peak_memory(of=torch.cuda.max_memory_allocated):
    """Peak memory in GiB: of this process's GPU where it uses one, else of the process."""
    host = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return of() / 2**30 or host


# Copied from finetune_full/finetune_full.py
def print_banner(script, trainer, run, resume):
    """Say what is done and why, and show an example with the part that carries loss."""
    args, model, rows = trainer.args, trainer.model, trainer.train_dataset
    total, trained = run["total_parameters"], run["trainable_parameters"]
    counts = f"{total:,} parameters, {trained:,} of them trained ({trained / total:.2%})"
    kept = next(str(p.dtype)[6:] for p in model.parameters() if p.requires_grad)
    say("model", f"{script.model_name_or_path} ({model.config.model_type}), {counts} in {kept}")
    say("device", f"{args.world_size} x {run['device']}, {script.precision} ({script.reason})")
    say("attention", f"{model.config._attn_implementation}; no mask, rows right-padded")
    size, parts = args.train_batch_size * args.world_size, args.gradient_accumulation_steps
    tokens = size * parts * sum(rows["length"][:]) / len(rows)
    say("batch", f"{size} rows x {parts} accumulated, about {tokens:,.0f} tokens a step")
    say("output", args.output_dir)
    say("resume", resume or "from the start (no checkpoint)")
    text, pairs = "", zip(rows[0]["input_ids"], rows[0]["labels"], strict=True)
    for learned, part in groupby(pairs, key=lambda pair: pair[1] != -100):
        piece = trainer.processing_class.decode([token for token, _ in part])
        text += f"[[{piece}]]" if learned else piece
    text = text if len(text) < 300 else f"{text[:100]} ... {text[-190:]}"
    say("example", text.replace("\n", "\\n") + "    ([[ ]] carries loss)")


# Copied from finetune_full/finetune_full.py
def begin(script, trainer, given, run, resume):
    """Say what is done, and hand the run to what keeps it."""
    args, model = trainer.args, trainer.model
    count = getattr(model, "get_nb_trainable_parameters", None)  # PEFT knows packed and single rows
    trained, total = count() if count else [get_model_param_count(model, t) for t in (True, False)]
    check(trained, "nothing is trained: no parameter has requires_grad.")
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    run |= {"trainable_parameters": trained, "total_parameters": total, "device": device}
    print_banner(script, trainer, run, resume)
    model.config.use_cache = True  # for whoever loads the result; batches say False
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # gradients once, not twice
    trainer.remove_callback(transformers.PrinterCallback)
    if keep_run:
        trainer.add_callback(keep_run.KeepRun(trainer, given, run, resume))
    trainer.began = trainer.last = time.time()


# Copied from finetune_full/finetune_full.py
def save_results(trainer, run):
    """Model, tokenizer, trainer_state.json; all_results.json last: it marks the run as finished."""
    trainer.save_model()
    history = trainer.state.log_history
    evaluation = {} if trainer.args.load_best_model_at_end or len(history) < 2 else history[-2]
    if trainer.eval_dataset is not None and "eval_loss" not in evaluation:
        evaluation = trainer.evaluate()
    trainer.save_state()
    seconds, steps = time.time() - trainer.began, [entry for entry in history if "loss" in entry]
    learned = sum(entry["num_learned"] for entry in steps)
    loss = sum(entry["loss"] * entry["num_learned"] for entry in steps) / learned
    speed, count = trainer.tokens_seen / seconds, trainer.state.global_step
    peaks = [peak_memory(), peak_memory(torch.cuda.max_memory_reserved)]  # the most of any process
    peaks = trainer.accelerator.gather(torch.tensor([peaks], device=trainer.args.device)).amax(0)
    memory, reserved = peaks.tolist()
    results = run | {"train_loss": loss, "train_runtime": seconds, "train_tokens_per_second": speed}
    results |= {"steps": count, "peak_memory_gib": memory, "peak_reserved_gib": reserved}
    results |= {name: value for name, value in evaluation.items() if name.startswith("eval_")}
    trainer.save_metrics("all", results, combined=False)
    speed = f"{count:,} steps, {seconds:,.0f} s, {speed:,.0f} tok/s"
    more = f" ({reserved:.2f} reserved)" if reserved != memory else ""
    say("done", f"loss {loss:.4f}, {speed}, peak {memory:.2f} GiB{more}")
