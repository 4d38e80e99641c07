"""Test helper: many_runs.py SCRIPT RUNS.json calls SCRIPT's main() for each list of arguments.

A list that starts with NAME.py is for that script instead. With OUTCOMES=FILE a run that ends with
an error does not end the others; FILE gets one JSON line per run, and under DeepSpeed each output
directory gets start.pt and gathered.pt.

With DS_ACCELERATOR=cpu, accelerate is told what it cannot find out without a GPU, so that DeepSpeed
runs on CPU processes over gloo. The scripts themselves carry no trace of this.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

import transformers
import transformers.modeling_utils

if (
    os.environ.get("DS_ACCELERATOR") == "cpu"
    and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
):
    import accelerate.state
    import torch
    import transformers.training_args
    from accelerate.utils import DistributedType

    accelerate.state.PartialState._prepare_backend = lambda self, *a, **k: (
        "gloo",
        DistributedType.NO,
    )
    accelerate.state.PartialState.default_device = property(lambda self: torch.device("cpu"))
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def gather(trainer, file="gathered.pt"):
    """What DeepSpeed trains, {name: tensor}, from the optimizer's own fp32 copies if any.

    Not by the way in which Trainer saves: a fault there must show as a difference.
    """
    import torch
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in trainer.model.named_parameters():
        with GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            whole = parameter.detach().clone()
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter).clone()
        found[name] = whole
    if trainer.is_world_process_zero():
        torch.save(found, Path(trainer.args.output_dir) / file)


class GatherFirst(transformers.TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, *more, **named):
        gather(self.trainer, "start.pt")


def gather_and_save(module):
    def begin(script, trainer, *more):
        module.began(script, trainer, *more)
        if trainer.is_deepspeed_enabled:
            trainer.add_callback(GatherFirst(trainer))

    def save_results(trainer, *more):
        if trainer.is_deepspeed_enabled:
            gather(trainer)
        module.save(trainer, *more)

    module.began, module.begin = module.begin, begin
    module.save, module.save_results = module.save_results, save_results


def run(script, arguments):
    """Call the script's main(); return its last line of error, empty if there was none."""
    sys.path.insert(0, str(script.parent))
    module = importlib.import_module(script.stem)
    if hasattr(module, "save_results") and not hasattr(module, "save"):
        gather_and_save(module)
    # What a run under ZeRO-3 puts around it must not be around the next run's, too.
    library, errors = transformers.modeling_utils, io.StringIO()
    equal = library._tied_params_are_equal
    with contextlib.redirect_stderr(errors):
        try:
            module.main(arguments)
        except SystemExit as stop:
            return ["left", *errors.getvalue().strip().splitlines()][-1] if stop.code else ""
        except Exception:
            print(traceback.format_exc(), flush=True)
            return traceback.format_exc().strip().splitlines()[-1]
        finally:
            library._tied_params_are_equal = equal
    return ""


script, outcomes = Path(sys.argv[1]), os.environ.get("OUTCOMES")
runs = json.loads(Path(sys.argv[2]).read_text())
for arguments in runs:
    own = Path(arguments.pop(0)) if arguments[0].endswith(".py") else script
    sys.argv = [str(own)]
    if not outcomes:
        sys.path.insert(0, str(own.parent))
        importlib.import_module(own.stem).main(arguments)
        continue
    began = time.time()
    outcome = {"error": run(own, arguments), "seconds": time.time() - began}
    if os.environ.get("RANK", "0") == "0":
        with Path(outcomes).open("a") as file:
            file.write(json.dumps(outcome) + "\n")
