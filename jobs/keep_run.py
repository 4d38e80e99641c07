"""Keep a training run: it goes on where it was cut off, stops in time, and harms no file of yours.

The training scripts import this file where `jobs` lies beside their directory, and with it what
they use of its neighbours. KeepRun is a callback of the Trainer.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
import yaml
from chat_marks import plain  # noqa: F401 -- for scripts
from chat_turns import find_template  # noqa: F401
from check_arguments import check_tokens, read_words, refuse, settle  # noqa: F401
from find_run import find_run  # noqa: F401
from keep_model import drop_other_losses, keep_ends, read_pads, set_pads, tell_tokenizer
from model_layers import freeze_beside_text  # noqa: F401
from prepare_data import from_generator  # noqa: F401
from published import check_own_code, prepare  # noqa: F401
from run_common import check, fail
from run_files import (
    find_checkpoints,
    free_bytes,
    read_mark,
    remove,
    what_lacks,
    write_mark,
)
from transformers.utils import cached_file

PACKAGES = (
    "torch transformers tokenizers datasets accelerate peft trl deepspeed bitsandbytes".split()
)
IMAGES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
FULL = ("No space left", "Disk quota exceeded", "inline_container")  # the last is torch.save's


class KeepRun(transformers.TrainerCallback):
    """Records a run, marks its checkpoints, ends it in time: by $DEADLINE, SIGTERM, a file STOP."""

    def __init__(self, trainer, given, run, resume):
        args, self.trainer, self.run_id = trainer.args, trainer, run["id"]
        self.base = given["model_name_or_path"]
        self.keep = given.get("save_total_limit") or sys.maxsize
        keep_ends(trainer.model.generation_config, self.base)
        drop_other_losses(trainer.model)
        check_own_code(trainer)
        self.pads = read_pads(trainer.model)
        weights, trained = run["total_parameters"], run["trainable_parameters"]
        moments = (2 if "8bit" in args.optim else 8) + 8 * bool(args.deepspeed)
        if hasattr(trainer.model, "peft_config"):
            weights = trained
        self.save_bytes = 4 * weights + moments * trained
        if (patience := given.get("early_stopping_patience")) is not None:
            trainer.add_callback(transformers.EarlyStoppingCallback(patience))
        if not (trainer.is_deepspeed_enabled or hasattr(trainer.model, "peft_config")):
            trainer._load_best_model = partial(load_best_model, trainer)
        self.reason, self.is_agreed, self.evaluating = None, False, 0
        self.has_evaluated, self.first = False, None
        self.saving, self.longest, self.last = self.save_bytes / 5e8, 0, time.time()  # 0.5 GB/s
        rows = trainer.train_dataset
        lengths = rows["length"][:] if "length" in rows.column_names else [1] * len(rows)
        run["examples"], run["tokens"] = sum(n > 0 for n in lengths), sum(lengths)  # 0 fills up
        if resume:
            self.check_data(run)
            self.go_on(resume, given)
        if trainer.is_world_process_zero():
            self.record(given, run)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "reason", "SIGTERM"))
        trainer.evaluate = draw_nothing(trainer.evaluate)
        trainer.data_collator = Outlive(trainer.data_collator)
        if args.deepspeed and args.bf16 and args.kept_in == torch.float32:
            # DeepSpeed's own autocast leaves evaluations out.
            autocast = partial(torch.autocast, args.device.type, torch.bfloat16)
            trainer.compute_loss_context_manager = autocast

    def check_data(self, run):
        """Refuse other data than the run began with: a hub's data set may have changed since."""
        record = Path(self.trainer.args.output_dir, "run_args.yaml")
        if not record.is_file() or "from_checkpoint" in run:  # named by hand, it may differ
            return
        before = yaml.safe_load(record.read_text("utf-8"))["run"]
        for name in ("examples", "tokens"):
            was, now = before.get(name, run[name]), run[name]
            problem = f"the data has changed: {was} {name}, now {now}. Choose another --output_dir."
            check(was == now, problem)

    def go_on(self, resume, given):
        """What Trainer does not take from a checkpoint; without the end, it takes a step more."""
        args, patience = self.trainer.args, given.get("early_stopping_patience", math.inf)
        state = json.loads(Path(resume, "trainer_state.json").read_text("utf-8"))
        times = [entry.get("eval_runtime", 0) for entry in state["log_history"]]
        self.evaluating = max(times, default=0)  # in the jobs before
        self.trainer.first_step, epochs = state["global_step"], math.ceil(args.num_train_epochs)
        last = state["max_steps"] * epochs / state["num_train_epochs"]
        last = args.max_steps if args.max_steps > 0 else last
        early = state["stateful_callbacks"].get("EarlyStoppingCallback", {}).get("attributes", {})
        waited = early.get("early_stopping_patience_counter", 0)
        if waited >= patience or state["global_step"] >= last:
            args.max_steps, args.num_train_epochs = -1, int(state["epoch"])

    def record(self, given, run):
        """Write run_args.yaml: the arguments, the data, and what the run is done with."""
        args = self.trainer.args
        run["precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        run["versions"] = {n: str(sys.modules[n].__version__) for n in PACKAGES if n in sys.modules}
        output_dir = Path(args.output_dir)
        new = output_dir / "run_args.yaml.new"  # a full disk must not spoil the old one
        text = yaml.safe_dump({**given, "run": run}, sort_keys=False, allow_unicode=True)
        new.write_text(text, "utf-8")
        new.replace(new.with_suffix(""))
        (output_dir / "all_results.json").unlink(missing_ok=True)

    def on_train_begin(self, args, state, control, **kwargs):
        set_pads(self.pads)  # Trainer has just put in the tokenizer's
        # The checkpoint to go on from is read: what a kill left behind it is of no use any more.
        for path in Path(args.output_dir).glob("checkpoint-*.incomplete"):
            if read_mark(path).get("run") == self.run_id and state.is_world_process_zero:
                remove(path)
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)  # the directory may have moved since
        self.check_disk(args, state)

    def check_disk(self, args, state):
        """Refuse to start where the checkpoints to come do not fit."""
        saves = (state.max_steps - state.global_step) // max(1, state.save_steps)
        if args.save_strategy == "epoch":
            saves = math.ceil(state.num_train_epochs - (state.epoch or 0))
        there = find_checkpoints(args.output_dir, self.run_id)
        saves = max(0, min(saves, self.keep + 1 - len(there)))
        count = 1 if args.save_strategy == "no" else 1 + saves  # one more: the result
        need, free = count * self.save_bytes, free_bytes(args.output_dir)
        problem = f"{count} checkpoints take {need / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
        advice = "Make room, or take --save_total_limit 1, larger --save_steps."
        check(need < free, f"{problem}. {advice}")

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch % 1 and state.global_step < state.max_steps:  # else on_epoch_end follows
            self.look(args, state, control)
        self.mark(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.look(args, state, control)
        self.mark(args, state, control)

    def look(self, args, state, control):
        """Let all processes agree whether this step is the last one of this job."""
        now, accelerator = time.time(), self.trainer.accelerator
        self.longest, self.last = max(self.longest, now - self.last), now
        needed = 10 + self.saving + self.evaluating + 2 * self.longest
        first = self.first_evaluation(args, state, now)
        if accelerator.is_main_process and Path(args.output_dir, "STOP").exists():
            self.reason = "STOP"
        elif accelerator.is_main_process and now + needed + first > args.deadline:
            why = f" (an evaluation may take {math.ceil(first / 60)} min)" * (first > 0)
            self.reason = f"DEADLINE{why}"
        if self.reason:
            accelerator.set_trigger()
        if accelerator.check_trigger():  # the same on all ranks
            self.is_agreed = control.should_save = True

    def first_evaluation(self, args, state, now):
        """Seconds that an evaluation in the next step may take, while none has been measured.

        Half of what as many rows took in training, but for this job's first step, which warms up.
        """
        rows, step = self.trainer.eval_dataset, state.global_step + 1
        self.first = self.first or (state.global_step, now)
        steps, seconds = state.global_step - self.first[0], now - self.first[1]
        is_off = rows is None or args.eval_strategy == "no"
        if is_off or self.has_evaluated or self.evaluating or not steps:
            return 0
        if args.eval_strategy == "steps":
            is_near = step % state.eval_steps == 0
        else:  # the next step ends an epoch
            is_near = state.epoch % 1 + state.epoch / state.global_step > 0.999
        size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        return (is_near or step == state.max_steps) * seconds / steps / size * len(rows) / 2

    def on_evaluate(self, args, state, control, **kwargs):
        self.has_evaluated = True  # from now on it is in the longest step

    def mark(self, args, state, control):
        """Put this run's mark into a checkpoint before anybody writes to it."""
        if control.should_save:
            if args.should_save:
                path = Path(args.output_dir, f"checkpoint-{state.global_step}")
                write_mark(path, self.run_id)
            self.trainer.accelerator.wait_for_everyone()

    def on_train_end(self, args, state, control, **kwargs):
        if args.should_save:
            self.copy_images(args.output_dir)

    def copy_images(self, directory):
        """What a model that sees shows its images with: what is saved is such a model, too."""
        for file in IMAGES:
            with suppress(Exception):  # a hub's answer must not cost a training
                shutil.copy(cached_file(self.base, file), directory)

    def on_save(self, args, state, control, **kwargs):
        self.saving = 0  # from now on it is in the longest step
        if args.local_process_index == 0:
            os.sync()  # of each node: what the mark names must be on the disk
        self.trainer.accelerator.wait_for_everyone()  # all have written
        if args.should_save:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.copy_images(path)
            write_mark(path, self.run_id, is_complete=True)
            for old in find_checkpoints(path.parent, self.run_id)[: -self.keep]:
                if old != Path(state.best_model_checkpoint or ""):
                    remove(old)
        if self.is_agreed:
            for name in ("STOP", "lock") if state.is_world_process_zero else ():
                Path(args.output_dir, name).unlink(missing_ok=True)
            leave(f"by {self.reason or 'SIGTERM'} after step {state.global_step}, which is saved")


def draw_nothing(evaluate):
    """What an evaluation draws at random must change no dropout after it."""

    def evaluate_aside(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            return evaluate(*args, **kwargs)

    return evaluate_aside


def load_best_model(trainer):
    """Trainer compares names as they stand in the file, where gpt_neox's head has another."""
    checkpoint = trainer.state.best_model_checkpoint
    best = type(trainer.model).from_pretrained(checkpoint, dtype="float32")
    trainer.model.load_state_dict(best.state_dict())


class Outlive:
    """A collator; the worker that it runs in outlives the queue's SIGTERM, which comes to all."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples):
        if torch.utils.data.get_worker_info():  # 30 seconds, for a checkpoint
            signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
        return self.collate(examples)


def leave(text, alone=False):
    """End an unfinished run with status 75; under run_ranks.py with 0, which gives the job 75."""
    if alone or os.environ.get("RANK", "0") == "0":
        text = f"{' '.join(text.split())[:600]}. The same command or job goes on from there."
        sys.stderr.write(f"stopped    {text}\n")  # in one piece, for run_ranks.py
    if torch.distributed.is_initialized() and not alone:
        torch.distributed.destroy_process_group()  # or a rank may end by SIGABRT
    raise SystemExit(0 if "RUN_RANKS" in os.environ and not alone else 75)


@contextmanager
def hold(training, run):
    """Around training and saving: free the lock at the end; explain what can be mended."""
    try:
        yield
    except UnpicklingError:
        fail("a checkpoint holds a file that is more than data. Nothing of it was run.")
    except Exception as error:
        if not any(words in str(error) for words in FULL):
            raise
        incomplete = [p for p in find_checkpoints(training.output_dir, run["id"]) if what_lacks(p)]
        for path in incomplete if training.process_index == 0 else ():
            with suppress(OSError):  # another process may still be writing there
                remove(path)
        leave(f"the disk is full, the last checkpoint is whole: {error}", alone=True)
    if training.process_index == 0:
        output_dir = Path(training.output_dir)
        for file in output_dir.glob("*.safetensors"):  # as readable as the rest, not by you only
            file.chmod((output_dir / "tokenizer_config.json").stat().st_mode)
        (output_dir / "lock").unlink(missing_ok=True)
        with suppress(Exception):  # the result is saved; a note must not cost it
            tell_tokenizer(output_dir)
