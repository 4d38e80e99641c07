"""TRL's DPOTrainer as finetune_dpo.py uses it: on ids that are ready, each pair counted once.

What TRL would do by itself is in the comments, with what would be wrong with it here.
"""

import math
from collections import defaultdict
from dataclasses import fields

import torch
from run_common import check
from trl import DPOConfig, DPOTrainer


class PairTrainer(DPOTrainer):
    loss_is_scaled_for_ga, is_checked = True, False

    def __init__(self, model, args, *more, **data):
        """Arguments as Trainer's; args holds beta and the reference model, too."""
        for field in fields(DPOConfig):  # TRL's defaults, of what TrainingArguments do not know
            if not hasattr(args, field.name):
                default = field.default_factory() if field.name == "loss_type" else field.default
                setattr(args, field.name, default)
        args.disable_dropout = False  # without_dropout did it
        reference = vars(args).pop("reference")  # the arguments are saved
        kept = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
        owners = data["processing_class"], model.config.get_text_config(), model.generation_config
        pads = [owner.pad_token_id for owner in owners]
        super().__init__(model, reference, args, *more, **data)
        for owner, pad in zip(owners, pads, strict=True):  # a model that is loaded with a pad
            owner.pad_token_id = pad  # token, often EOS, does not train its embedding any more
        if "ref" in getattr(model, "peft_config", ()):  # the copy of an adapter that adds nothing
            model.delete_adapter("ref")
        for name, weights in kept.items():  # adapters on a quantised base would be bf16
            model.get_parameter(name).data = weights

    def _prepare_dataset(self, dataset, *args):
        """The ids are ready: TRL would cut prompts at other places, and drop long ones unheard."""
        return dataset

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
        inputs = {name: inputs[name] for name in names}
        if not self.is_checked:
            self.is_checked = check_head(model, inputs)
        loss = super().compute_loss(model, inputs)
        # A row that fills up a batch has no answers: its margin is 0, its loss this.
        summed = loss * rows - math.log(2) * (rows - pairs)
        return summed / num_items_in_batch * self.args.world_size, None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        count = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            loss = self.compute_loss(model, inputs, num_items_in_batch=count.clamp(min=1))
        return loss, None, None


def more(trainer, logs):
    """What a line says behind the loss: TRL's means of all rows as means of the pairs."""
    mode = "eval" if "eval_loss" in logs else "train"
    found, size = trainer._metrics[mode], getattr(trainer.args, f"{mode}_batch_size")
    trainer._metrics[mode] = means = defaultdict(list)
    for name in [name for name in found if name.startswith(("rewards/", "logps/"))]:
        summed = sum(found[name]) * size * trainer.args.world_size
        means[name].append(summed / logs["num_learned"])
    margin, accuracy = (means[f"rewards/{name}"][0] for name in ("margins", "accuracies"))
    return f"  margin {margin:.4f}  accuracy {accuracy:.4f}"


def without_dropout(model):
    """Both models must be without noise; TRL leaves attention's, and takes an adapter's, too."""
    for config in (model.config, model.config.get_text_config()):
        for name in [n for n, v in vars(config).items() if "drop" in n and isinstance(v, float)]:
            setattr(config, name, 0.0)
    for name, module in model.named_modules():
        for key in [k for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]:
            setattr(module, key, 0.0)
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
        found = model(**row, labels=row["input_ids"], fused_lm_head=True).log_probs.float()
    model.train(was_training)
    wanted = logits.float().log_softmax(-1).gather(-1, row["input_ids"][:, 1:, None])[..., 0]
    error, limit = (wanted - found).abs().mean().item(), 1e-3
    if logits.dtype != torch.float32:
        limit = 0.1
    check(error < limit, f"TRL's probabilities are not this model's: {error:.3f} off in the logs.")
    return True
