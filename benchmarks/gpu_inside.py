"""Run a lesson's script as it stands, in this process, and write down what only it can see.

    python gpu_inside.py REPORT.json CHANGES SCRIPT.py ARGUMENTS...

CHANGES are words with commas between them, or "none":
random   the weights are drawn here from a seed, on the device, in place of being read, and nothing
         but the figures is saved: a model of a real size without a download. Matrices have the
         configuration's deviation, norms are 1, biases 0. Ahead of it, a matmul is timed.
load, step, eval, save   the GPU's memory is full when this begins.
"""

import json
import os
import runpy
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel, Trainer

FULL = {"load": "_move_model_to_device", "step": "training_step"}
FULL |= {"eval": "evaluation_loop", "save": "save_model"}
SEEN = {"widths": set(), "gradients_8bit": set(), "rows": 0}


def before(owner, name, look):
    """Have look(*arguments) called before each call of a method."""
    plain = getattr(owner, name)

    def looked(*args, **kwargs):
        look(*args, **kwargs)
        return plain(*args, **kwargs)

    setattr(owner, name, looked)


# ---- Weights of a real size ----


def draw(name, like, config, dtype, device):
    """Random values for this weight; what is one-dimensional does not change its input."""
    if like.dim() < 2:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=dtype, device=device)
    deviation = getattr(config.get_text_config(), "initializer_range", 0.02)
    return torch.empty(like.shape, dtype=dtype, device=device).normal_(0, deviation)


def read_nothing():
    """from_pretrained gets weights that were drawn, in place of the name of a directory."""
    plain = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, name, *args, config, dtype=torch.float32, **options):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with torch.device("meta"):
            shapes = cls(config).state_dict()
        torch.manual_seed(0)
        weights = {n: draw(n, like, config, dtype, device) for n, like in shapes.items()}
        return plain(cls, None, *args, config=config, dtype=dtype, state_dict=weights, **options)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def save_nothing():
    with suppress(ModuleNotFoundError):
        import keep_run  # the room on the disk does not matter then

        keep_run.KeepRun.check_disk = lambda *_: None
    Trainer.save_model = lambda *_, **__: None


def matmul_speed(size=8192, seconds=2):
    """Operations a second of a product of two bf16 matrices."""
    size, seconds = (size, seconds) if torch.cuda.is_available() else (256, 0.1)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    times, began = [], time.monotonic()
    while time.monotonic() - began < seconds:
        wait()
        start = time.monotonic()
        for _ in range(10):
            left @ right
        wait()
        times.append((time.monotonic() - start) / 10)
    return 2 * size**3 / sorted(times)[len(times) // 2]


# ---- What is looked at ----


def fill(trainer, *args, **kwargs):
    """More than any GPU has; the scripts try their arguments on a layer before, which fits."""
    if any(type(value) is torch.nn.Linear for value in args):
        return
    if torch.cuda.is_available():
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError("no GPU here, raised by hand")


def look_at_step(trainer, model, inputs, *args, **kwargs):
    SEEN["widths"].add(inputs["input_ids"].shape[1])
    SEEN["workers"] = trainer.args.dataloader_num_workers
    SEEN["ddp_timeout"] = trainer.args.ddp_timeout


def look_at_answers(model, input_ids=None, **kwargs):
    SEEN["rows"] = max(SEEN["rows"], len(input_ids))


def look_at_8bit():
    with suppress(ImportError):
        from bitsandbytes.autograd import _functions

        for function in (_functions.MatMul8bitLt, _functions.MatMul8bitFp):
            look = lambda _, gradient: SEEN["gradients_8bit"].add(str(gradient.dtype)[6:])  # noqa: E731
            before(function, "backward", look)
            function.backward = staticmethod(function.backward)


def forget_loading(*args, **kwargs):
    """The weights were not read as a user's are: memory is counted from here on."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def report(file):
    counts = torch._dynamo.utils.counters if "torch._dynamo" in sys.modules else {}
    SEEN["graphs"] = counts["stats"]["unique_graphs"] if counts else 0
    SEEN["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    SEEN["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    found = {name: sorted(v) if isinstance(v, set) else v for name, v in SEEN.items()}
    if os.environ.get("RANK", "0") == "0":
        Path(file).write_text(json.dumps(found))


def main(file, changes, script, *arguments):
    changes = changes.split(",")
    sys.path.append(str(Path(__file__).resolve().parent.parent / "jobs"))
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *arguments]
    if "random" in changes:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        SEEN["matmul"] = matmul_speed()
        forget_loading()
        read_nothing()
        save_nothing()
        before(Trainer, "train", forget_loading)
    before(Trainer, "training_step", look_at_step)
    before(GenerationMixin, "generate", look_at_answers)
    look_at_8bit()
    for change in FULL.keys() & changes:
        before(Trainer, FULL[change], fill)
    transformers.logging.set_verbosity_error()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        report(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
