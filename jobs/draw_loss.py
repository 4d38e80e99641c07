#!/usr/bin/env python3
"""Draw a training's losses over its steps: OUTPUT_DIR/trainer_state.json -> OUTPUT_DIR/loss.png.

Of a training by rewards (GRPO), the reward and its parts as well.

By hand       python ../jobs/draw_loss.py output        (the job files do it after training)
"""

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

SIGNATURE = "draw_loss.py"  # in each picture's file; a loss.png without it is somebody else's


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output_dir", help="the --output_dir of a training that has ended")
    parser.add_argument("--since", type=float, help="Unix time: leave losses alone that are older")
    args = parser.parse_args(argv)
    directory = Path(os.path.expanduser(args.output_dir))
    state, picture = directory / "trainer_state.json", directory / "loss.png"
    if args.since and not (state.is_file() and state.stat().st_mtime >= args.since):
        print(f"picture    none: this job wrote no {state}. Others: jobs/draw_loss.py OUTPUT_DIR")
        return
    losses = read_losses(state)
    partial = directory / ".loss.partial.png"
    try:
        replaced = "; replaces the one before" if picture.exists() else ""
        if replaced and SIGNATURE.encode() not in picture.read_bytes():
            fail(f"{picture} was not drawn by this program. Rename it, then draw again.")
        unit = "pair" if "rewards/margins" in state.read_text("utf-8") else "learned token"
        draw(losses, directory.resolve().name, partial, unit)
        partial.replace(picture)
    except ImportError as error:
        fail(f"matplotlib does not load ({error}). Type: pip install matplotlib")
    except OSError as error:
        partial.unlink(missing_ok=True)
        fail(f"{picture} cannot be written ({error.strerror}). See ls -ld, df -h and your quota.")
    named = " and ".join(name for name in losses if not name.startswith("reward")) + " loss"
    named += " and reward" * ("reward" in losses)
    print(f"picture    {picture}: {named}{replaced}")


def read_losses(path):
    """Return {"training": [(step, loss), ...], "validation": ..., "reward": ...}, what there is."""
    losses = {}
    try:
        history = json.loads(path.read_text("utf-8"))["log_history"]
        rewards = sorted({key for entry in history for key in entry if key.startswith("reward")})
        rewards = {key: key for key in rewards if key == "reward" or key.startswith("reward/")}
        for name, key in ({"training": "loss", "validation": "eval_loss"} | rewards).items():
            points = [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]
            if points:
                losses[name] = points
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} cannot be read: {error!r}. Name the --output_dir of a training that ended.")
    return losses or fail(f"{path} holds no loss. Train with a smaller --logging_steps.")


def draw(losses, title, path, unit):
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word about its caches
    warnings.filterwarnings("ignore", "Glyph .* missing")  # of Japanese names; boxes will do
    from matplotlib.figure import Figure

    count = 1 + ("reward" in losses)
    figure = Figure(figsize=(7, 3 + count if count > 1 else 4), layout="constrained")
    panels = figure.subplots(count, squeeze=False, sharex=True)[:, 0]
    for name, points in losses.items():
        axes = panels[-1] if name.startswith("reward") else panels[0]
        axes.plot(*zip(*points, strict=True), "o--" if name == "validation" else ".-", label=name)
    panels[0].set_ylabel("loss" if count > 1 else f"loss per {unit} (nats)")
    panels[0].set_title(f"{title[:60]}: loss" + " and reward" * (count > 1), parse_math=False)
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside what it would cover
    figure.savefig(path, dpi=120, metadata={"Software": SIGNATURE})


def fail(message):
    """Print one line on stderr and leave with exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
