"""Test helper: finetune_full's main() resumes from a DeepSpeed checkpoint into which a pickle was put that acts."""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "finetune_full"))


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def main(arguments):
    checkpoint = Path(arguments[arguments.index("--resume_from_checkpoint") + 1])
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        for file in checkpoint.glob("global_step*/*optim_states.pt"):
            torch.save({"optimizer_state_dict": Bomb(checkpoint / "acted")}, file)
        mark = json.loads((checkpoint / "run_id").read_text()) | {"files": {}}
        (checkpoint / "run_id").write_text(json.dumps(mark))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    importlib.import_module("finetune_full").main(arguments)
