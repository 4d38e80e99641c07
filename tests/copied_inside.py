"""Test helper: finetune_full.py, but on several processes the gradients lie beside what is sent."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "finetune_full"))
full = importlib.import_module("finetune_full")


def main(argv):
    begin = full.begin

    def begin_with_copies(script, trainer, *more):
        begin(script, trainer, *more)
        handler = trainer.accelerator.ddp_handler
        assert handler.gradient_as_bucket_view, "nothing to compare with"
        handler.gradient_as_bucket_view = False

    full.begin = begin_with_copies
    try:
        full.main(argv)
    finally:
        full.begin = begin
