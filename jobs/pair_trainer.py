"""TRL's DPOTrainer as finetune_dpo.py uses it: on ids that are ready, each pair counted once.

What TRL would do by itself is in the comments, with what would be wrong with it here.
"""

import math
import time
from collections import defaultdict
from dataclasses import fields

import torch
from keep_model import read_pads, set_pads
from run_common import check, fail, say
from script_parts import peak_memory
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOConfig, DPOTrainer


# Copied from finetune_full/finetune_full.py
class EpochSampler(LengthGroupedSampler):
    """Trainer's order, but drawn from seed and epoch: the same on all ranks and after a resume."""

    def __iter__(self):
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        seed = args.seed if args.data_seed is None else args.data_seed
        self.generator = torch.Generator().manual_seed(seed + 1000 * epoch)
        return super().__iter__()


class FineTuner(DPOTrainer):
    """TRL's trainer whose losses and margins are means over pairs; else as in finetune_full.py."""

    loss_is_scaled_for_ga, is_checked = True, False
    sums, tokens_seen, first_step = 0, 0, 0

    def __init__(self, model, args, *more, **data):
        """Arguments as Trainer's; args holds beta and the reference model, too."""
        for field in fields(DPOConfig):  # TRL's defaults, of what TrainingArguments do not know
            if not hasattr(args, field.name):
                default = field.default_factory() if field.name == "loss_type" else field.default
                setattr(args, field.name, default)
        args.disable_dropout = False  # without_dropout did it
        args.router_aux_loss_coef = 0.0  # the other scripts have no loss of routers, either
        reference = vars(args).pop("reference")  # the arguments are saved
        # The loss of a row that fills up a batch: it has no answers, so that its margin is 0.
        zeros = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1}
        zeros["ipo"] = 1 / (2 * args.beta) ** 2
        (kind, *others), known = args.loss_type, ", ".join(zeros)
        problem = f"loss_type {args.loss_type}: a list of one of {known} works, as ['ipo']."
        check(kind in zeros and not others, problem)
        self.at_zero = zeros[kind]
        kept = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
        tokenizer, pads = data["processing_class"], read_pads(model)
        pads.append((tokenizer, tokenizer.pad_token_id))
        super().__init__(model, reference, args, *more, **data)
        set_pads(pads)
        if "ref" in getattr(model, "peft_config", ()):  # the copy of an adapter that adds nothing
            model.delete_adapter("ref")
        for name, weights in kept.items():  # adapters on a quantised base would be bf16
            model.get_parameter(name).data = weights

    def _prepare_dataset(self, dataset, *args):
        """The ids are ready: TRL would cut prompts at other places, and drop long ones unheard."""
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = EpochSampler(sampler.batch_size, lengths=sampler.lengths[:])
            sampler.trainer = self
        return sampler

    def save_model(self, output_dir=None, _internal_call=False):
        """With it, where an answer ends."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(self, *args, **kwargs):
        """None: it would be a README.md in the output directory. Nor is anything sent home."""

    _send_telemetry = create_model_card

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean of all pairs of a step; TRL's is one of all rows, and of means of batches."""
        names = ("input_ids", "attention_mask", "completion_mask")
        rows, pairs = len(inputs["labels"]), inputs["shift_labels"].numel()
        tokens, inputs = inputs["num_tokens"], {name: inputs[name] for name in names}
        if not self.is_checked:
            self.is_checked = check_head(model, inputs)
        loss = super().compute_loss(model, inputs)
        summed = loss * rows - self.at_zero * (rows - pairs)
        sums = summed.detach().double()
        self.sums += torch.stack([sums, sums.new_tensor(pairs), tokens.to(sums)])
        loss = summed / num_items_in_batch * self.args.world_size
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        count = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            loss = self.compute_loss(model, inputs, num_items_in_batch=count.clamp(min=1))
        return loss, None, None

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # What is summed up must not reach into an evaluation, nor be lost to a resume.
        control, is_last = self.control, self.state.global_step >= self.state.max_steps
        control.should_log |= control.should_save or control.should_evaluate or is_last
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        """Means over pairs, not over batches; a line for each: `grep '^step'`."""
        for name in {"loss", "eval_loss"} & set(logs):
            loss, pairs, tokens = self.accelerator.reduce(self.sums, "sum").tolist()
            loss, self.sums = loss / pairs, 0
            logs.update({name: loss, "num_learned": pairs, "num_tokens": tokens})
            done, total, now = self.state.global_step, self.state.max_steps, time.time()
            check(math.isfinite(loss), f"the loss is {loss} at step {done}. Lower --learning_rate.")
            means = self.means_of_pairs("train" if name == "loss" else "eval", pairs)
            margin, accuracy = means["rewards/margins"][0], means["rewards/accuracies"][0]
            text = f"step {done}/{total}  loss {loss:.4f}"
            text += f"  margin {margin:.4f}  accuracy {accuracy:.4f}"
            if name == "eval_loss":
                say("eval", text)
                continue
            lr, grad = logs["learning_rate"], logs["grad_norm"]
            logs["tokens_per_second"] = speed = tokens / (now - self.last)
            text += f"  lr {lr:.2e}  grad {grad:.3f}  {speed:,.0f} tok/s  {peak_memory():.2f} GiB"
            left = int((total - done) * (now - self.began) / (done - self.first_step))
            say(text, f"  left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
            self.last, self.tokens_seen = now, self.tokens_seen + tokens
        super().log(logs, start_time)

    def means_of_pairs(self, mode, pairs):
        """TRL's means of all rows, which it is about to log, as means of the pairs."""
        found, size = self._metrics[mode], getattr(self.args, f"{mode}_batch_size")
        self._metrics[mode] = means = defaultdict(list)
        for name in [name for name in found if name.startswith(("rewards/", "logps/"))]:
            means[name].append(sum(found[name]) * size * self.args.world_size / pairs)
        return means

    def save_metrics(self, split, metrics, combined=True):
        """With the last step's margins."""
        last = [entry for entry in self.state.log_history if "loss" in entry][-1]
        metrics |= {f"train_{name}": value for name, value in last.items() if "/" in name}
        super().save_metrics(split, metrics, combined)


def without_dropout(model):
    """Both models must be without noise; TRL leaves attention's, and takes an adapter's, too."""
    for config in (model.config, model.config.get_text_config()):
        for name in [n for n, v in vars(config).items() if "drop" in n and isinstance(v, float)]:
            setattr(config, name, 0.0)
    for name, module in model.named_modules():
        for key in [k for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]:
            setattr(module, key, 0.0)
        for key in {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"} & vars(module).keys():
            setattr(module, key, 0.0)  # what training adds before a router
        if isinstance(module, torch.nn.Dropout) and "lora_" not in name:
            module.p = 0.0
    return model


def check_head(model, inputs):
    """Refuse a model whose probabilities TRL computes otherwise than the model itself; True.

    TRL multiplies the last hidden states by the head, and knows only some models' scales and caps.
    """
    row = {name: inputs[name][:1, :64] for name in ("input_ids", "attention_mask")}
    was_training = model.training
    model.eval()  # no dropout: it would draw numbers that a resumed run does not
    with torch.no_grad():
        logits = model(**row, use_cache=False).logits[:, :-1]
        try:
            found = model(**row, labels=row["input_ids"], fused_lm_head=True).log_probs.float()
        except AttributeError as error:  # it looks for parts that Llama 4, say, has elsewhere
            fail(f"TRL cannot score this model's answers: {error}. Take finetune_lora.py.")
    model.train(was_training)
    wanted = logits.float().log_softmax(-1).gather(-1, row["input_ids"][:, 1:, None])[..., 0]
    error, limit = (wanted - found).abs().mean().item(), 1e-3
    if logits.dtype != torch.float32:
        limit = 0.1
    check(error < limit, f"TRL's probabilities are not this model's: {error:.3f} off in the logs.")
    return True
