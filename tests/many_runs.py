"""Test helper: many_runs.py SCRIPT RUNS.json calls SCRIPT's main() once for each list of arguments.

With DS_ACCELERATOR=cpu, accelerate is told what it cannot find out without a GPU, so that DeepSpeed runs on CPU
processes over gloo. The scripts themselves carry no trace of this.
"""

import importlib
import json
import os
import sys
from pathlib import Path

if os.environ.get("DS_ACCELERATOR") == "cpu" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import accelerate.state
    import torch
    import transformers.training_args
    from accelerate.utils import DistributedType

    accelerate.state.PartialState._prepare_backend = lambda self, *a, **k: ("gloo", DistributedType.NO)
    accelerate.state.PartialState.default_device = property(lambda self: torch.device("cpu"))
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True

script, runs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
sys.argv = [str(script)]
sys.path.insert(0, str(script.parent))
module = importlib.import_module(script.stem)
for arguments in runs:
    module.main(arguments)
