"""TRL's GRPOTrainer as finetune_grpo.py needs it: exact on every architecture, and after a resume.

RewardTrainer changes what goes wrong there in silence; print_banner and save_results are those of
the other training scripts, with rewards.
"""

import inspect
import math
import time
import traceback
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import transformers
from keep_answers import pads_well
from keep_model import keep_ends, read_pads, set_pads
from keep_run import KeepRun
from model_text import start_of_answer
from run_common import check, fail, say
from script_parts import peak_memory
from transformers.hf_argparser import HfArg
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_model_param_count
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, add_fused_lm_head


@dataclass
class TrainingArguments(GRPOConfig):
    """TRL's arguments and one of ours; the last two are among ScriptArguments."""

    full: bool = HfArg(default=False, help="Train all parameters: 20 bytes each; 16 with beta 0.")
    trust_remote_code: bool = field(init=False, default=False)
    chat_template_kwargs: str | None = field(init=False, default=None)

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            rows = "--per_device_train_batch_size x processes x --gradient_accumulation_steps"
            hint = f" A generation batch is {rows}." * ("generation_batch" in str(error))
            raise ValueError(f"{error}{hint}") from error


class EpochSampler(RepeatSampler):
    """TRL's order, but drawn from seed and epoch: the same after a resume."""

    def __iter__(self):
        if self.shuffle:
            args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
            seed = args.seed if args.data_seed is None else args.data_seed
            self.generator.manual_seed(seed + 1000 * epoch)
        return super().__iter__()


class RewardTrainer(GRPOTrainer):
    """GRPOTrainer with a reward for each answer, computed from its row and its text."""

    def __init__(self, model, args, reward, data, tokenizer, reference=None):
        self.reward, self.rows, self.names, self.samples = reward, data["rows"], None, []
        self.form = data["form"]
        self.tokens_seen, self.counted, self.first_step = 0, None, 0
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model
        known = inspect.signature(type(self.base).forward).parameters
        self.takes_positions = "position_ids" in known
        turn_off_dropout(model)
        trained = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
        keep_ends(model.generation_config, self.base.name_or_path)  # TRL reads now where to stop
        pads, beta, args.beta = read_pads(model), args.beta, 0.0
        # With a beta, TRL would double the adapter, or load a reference its own way. It sets a
        # padding token: in a copy of the tokenizer, since the result is to be saved with ours.
        super().__init__(
            model, self.score, args, data["prompts"], processing_class=deepcopy(tokenizer)
        )
        self.processing_class, self.beta, args.beta = tokenizer, beta, beta
        set_pads(pads)
        for weight, data in trained:  # TRL rounds what stands on a quantised base to bf16
            if weight.dtype != data.dtype:
                weight.data = data.to(weight.device)
        if reference is not None:
            turn_off_dropout(reference)
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = reference.requires_grad_(False).eval().to(self.accelerator.device)
        check_scores(self)

    def _send_telemetry(self):
        pass  # a training tells nobody of itself

    def create_model_card(self, *args, **kwargs):
        pass  # it would replace a README.md in the output_dir

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__, sampler.trainer = EpochSampler, self
        return sampler

    def _tokenize_prompts(self, prompts):
        return prompts, None, {}  # they are ids already, as in SFT and in generation

    def _generate_single_turn(self, *args, **kwargs):
        """Sample in the precision that is trained in, by no setting of the model's own."""
        if self.counted is None:  # what jobs before this one saw
            self.counted = self.state.num_input_tokens_seen
        own = self.base.generation_config
        self.base.generation_config = transformers.GenerationConfig()
        try:
            with self.compute_loss_context_manager():
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.base.generation_config = own

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """TRL's, but padding takes no position: a learned one, GPT-2's, would be another."""

        def with_positions(**inputs):
            if self.takes_positions:
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(0)
            return model(**inputs)

        with self.compute_loss_context_manager():
            return super()._get_per_token_logps_and_entropies(with_positions, *args, **kwargs)

    def score(self, completion_ids, number, log_metric, **_):
        """The reward of each answer, by the function at the top of the script."""
        answers, scored = [], []
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        for i, ids in zip(number, completion_ids, strict=True):
            end = next((k for k, token in enumerate(ids) if token in self.eos_token_ids), len(ids))
            chat = self.form != "prompt"  # as generation does
            start = start_of_answer(self.processing_class, ids[:end]) if chat else 0
            answers.append(self.processing_class.decode(ids[start:end], **plain))
            scored.append(self.parts(i, answers[-1]))
        for name in self.names:
            log_metric(f"reward/{name}", sum(parts[name] for parts in scored) / len(scored))
        rewards = [float(sum(parts.values())) for parts in scored]
        group = zip(number, answers, rewards, strict=True)
        self.samples = number[0], [pair for i, *pair in group if i == number[0]]
        return rewards

    def parts(self, number, answer):
        """What the reward function says of an answer; in one line, if that cannot be."""
        place, row = self.rows[number]
        try:
            parts = self.reward(dict(row), answer)
        except Exception as error:  # of an edit, anything
            frames, name = traceback.extract_tb(error.__traceback__), self.reward.__name__
            line = "".join([f"line {f.lineno}, " for f in frames if f.name == name][-1:])
            fail(f"{place}: {line}reward(row, {answer!r}): {error!r}", every_rank=True)
        is_good = isinstance(parts, dict) and all(
            isinstance(value, int | float) and math.isfinite(value) for value in parts.values()
        )
        self.names = self.names or (is_good and list(parts))
        if not is_good or not parts or list(parts) != self.names:
            wanted = f"numbers by the names {', '.join(self.names or ['NAME'])}"
            fail(f"{place}: reward(row, {answer!r}) gave {parts}, not {wanted}.", every_rank=True)
        return parts

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # What is summed up must not be lost to a resume.
        control, is_last = self.control, self.state.global_step >= self.state.max_steps
        control.should_log |= control.should_save or is_last
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        """A line for each logged step, `grep '^step'`, and what one prompt was answered."""
        super().log(logs, start_time)  # which puts TRL's means into logs
        if "loss" not in logs:
            return
        done, total, now = self.state.global_step, self.state.max_steps, time.time()
        problem = f"the loss is {logs['loss']} at step {done}. Lower --learning_rate."
        check(math.isfinite(logs["loss"]), problem)
        tokens, self.counted = logs["num_tokens"] - self.counted, logs["num_tokens"]
        text = f"step {done}/{total}  loss {logs['loss']:.4f}  reward {logs['reward']:.3f}"
        for name in self.names:
            text += f"  {name} {logs[f'reward/{name}']:.3f}"
        text += f"  alike {logs['frac_reward_zero_std']:.2f}"
        text += f"  length {logs['completions/mean_length']:.1f}"
        text += f"  kl {logs['kl']:.4f}" if self.beta else ""
        text += f"  lr {logs['learning_rate']:.2e}  grad {logs['grad_norm']:.3f}"
        text += f"  {tokens / (now - self.last):,.0f} tok/s  {peak_memory():.2f} GiB"
        left = int((total - done) * (now - self.began) / (done - self.first_step))
        say(text, f"  left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
        number, answers = self.samples
        shown = [f"{answer[:60]!r} {reward:.2f}" for answer, reward in answers[:4]]
        say("answers", f"{self.rows[number][0]}: {', '.join(shown)}")
        self.last, self.tokens_seen = now, self.tokens_seen + tokens


def turn_off_dropout(model):
    """An answer is to be scored by the very model that gave it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        for name in {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"} & vars(module).keys():
            setattr(module, name, 0.0)  # what training adds before a router


def check_scores(trainer):
    """Refuse a model of which TRL computes other probabilities than the model itself.

    TRL multiplies the last hidden states by the head, and knows only some models' scales and caps.
    """
    if is_deepspeed_zero3_enabled():  # the weights are not here yet
        say("scores", "under ZeRO-3, TRL's are not compared with the model's own")
        return
    model, device = trainer.model, trainer.base.device
    rows = trainer.base.config.get_text_config().vocab_size
    tokens, own = (torch.arange(9, device=device) * 37 + 11) % rows, []
    ids = torch.stack([tokens, torch.cat([tokens[:3], tokens[:6]])])  # the second has padding
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        try:
            found = trainer._get_per_token_logps_and_entropies(model, ids, mask, 4)[0]
        except AttributeError as error:  # it looks for parts that Llama 4, say, has elsewhere
            fail(f"TRL cannot score this model's answers: {error}. Take finetune_lora.py.")
        for row in (ids[0], ids[1, 3:]):
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            scores = (logits / trainer.temperature).log_softmax(-1)
            own.append(scores.gather(-1, row[1:, None])[-4:, 0])
        is_same = pads_well(trainer.base, tokens.tolist())
    own = torch.stack(own)
    error, is_exact = (found - own).abs().max().item(), own.dtype == found.dtype == torch.float32
    is_exact &= {w.dtype for w in model.parameters() if w.is_floating_point()} == {torch.float32}
    is_exact &= not (trainer.args.bf16 or trainer.args.fp16)
    limit = (1e-3 if is_exact else 0.3) * max(1, 1 / trainer.temperature)
    what = f"TRL scores this model's answers wrongly ({error:.3f} off in the logarithm)"
    check(error < limit, f"{what}: it cannot be trained by rewards. Take finetune_lora.py.")
    why = "padding before a prompt changes its answers"  # as of linear attention
    check(is_same, f"TRL cannot train this model by rewards: {why}. Take finetune_lora.py.")


def begin(script, trainer, given, run, resume):
    """Say what is done, and hand the run to what keeps it."""
    args, model = trainer.args, trainer.model
    if hasattr(model, "get_nb_trainable_parameters"):  # PEFT knows of packed and of single rows
        trained, total = model.get_nb_trainable_parameters()
    else:
        trained, total = (get_model_param_count(model, only) for only in (True, False))
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    run |= {"trainable_parameters": trained, "total_parameters": total, "device": device}
    print_banner(script, trainer, run, resume)
    model.config.use_cache = True  # for whoever loads the result
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # gradients once, not twice
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(KeepRun(trainer, given, run, resume))
    trainer.began = trainer.last = time.time()


def print_banner(script, trainer, run, resume):
    """Say what is done and why, and show a prompt."""
    args, model = trainer.args, trainer.model
    total, trained = run["total_parameters"], run["trainable_parameters"]
    counts = f"{total:,} parameters, {trained:,} of them trained ({trained / total:.2%})"
    kept = next(str(p.dtype)[6:] for p in model.parameters() if p.requires_grad)
    say("model", f"{script.model_name_or_path} ({model.config.model_type}), {counts} in {kept}")
    say("device", f"{args.world_size} x {run['device']}, {script.precision} ({script.reason})")
    say("attention", f"{model.config._attn_implementation}; prompts left-padded, masked")
    prompts, total = args.generation_batch_size // args.num_generations, len(trainer.train_dataset)
    check(prompts <= total, f"{prompts} prompts a step, but the data has {total}. Take fewer rows.")
    text = f"{prompts} prompts a step x {args.num_generations} answers of up to"
    left = f"; {total % prompts} prompts are left out of each epoch" * (total % prompts > 0)
    say("batch", f"{text} {args.max_completion_length} tokens{left}")
    what = "the start, frozen" if args.full else "the base without the adapter"
    say("reference", f"{what}; beta {args.beta}" if args.beta else "none (beta 0)")
    say("output", args.output_dir)
    say("resume", resume or "from the start (no checkpoint)")
    text = trainer.processing_class.decode(trainer.train_dataset[0]["prompt"])
    text = text if len(text) < 300 else f"{text[:100]} ... {text[-190:]}"
    say("example", text.replace("\n", "\\n"))


def save_results(trainer, run):
    """Model, tokenizer, trainer_state.json; all_results.json last: it marks the run as finished."""
    trainer.save_model()
    trainer.save_state()
    seconds, count = time.time() - trainer.began, trainer.state.global_step
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    peaks = [peak_memory(), peak_memory(torch.cuda.max_memory_reserved)]  # the most of any process
    peaks = trainer.accelerator.gather(torch.tensor([peaks], device=trainer.args.device)).amax(0)
    memory, reserved = peaks.tolist()
    speed = trainer.tokens_seen / seconds
    results = {**run, "train_loss": sum(e["loss"] for e in steps) / len(steps), "steps": count}
    results |= {"first_reward": steps[0]["reward"], "reward": steps[-1]["reward"]}
    results |= {"train_runtime": seconds, "train_tokens_per_second": speed}
    results |= {"peak_memory_gib": memory, "peak_reserved_gib": reserved}
    trainer.save_metrics("all", results, combined=False)
    if all(entry["frac_reward_zero_std"] == 1 for entry in steps):
        text = "all answers to a prompt earned the same, so nothing was learned from the reward"
        say("alike", f"{text}: start from a model that is sometimes right")
    rewards = f"reward {results['first_reward']:.3f} -> {results['reward']:.3f}"
    more = f" ({reserved:.2f} reserved)" if reserved != memory else ""
    speed = f"{count:,} steps, {seconds:,.0f} s, {speed:,.0f} tok/s"
    say("done", f"{rewards}, {speed}, peak {memory:.2f} GiB{more}")
