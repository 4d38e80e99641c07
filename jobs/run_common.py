"""What the files beside it share: lines for the log, errors in one line, the time to stop at."""

import os
import sys
import time
from contextlib import suppress


# Copied from finetune_full/finetune_full.py
def say(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", flush=True)


# Copied from finetune_full/finetune_full.py
def fail(message, every_rank=False):
    """One line on stderr and exit code 2; of several ranks the first one speaks."""
    text = " ".join(str(message).split())[:600]
    text += " Accept its licence there, then type: hf auth login" if "gated repo" in text else ""
    if every_rank or os.environ.get("RANK", "0") == "0":
        print("error:", text, file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when one leaves
    raise SystemExit(2)


# Copied from finetune_full/finetune_full.py
def check(condition, message):
    if not condition:
        fail(message)


def read_deadline():
    """$DEADLINE as seconds since the epoch; given as HH:MM it is the next such time."""
    text, now = os.environ.get("DEADLINE") or "inf", time.localtime()
    with suppress(ValueError):
        if ":" in text:
            hour, minute = time.strptime(text, "%H:%M")[3:5]
            is_over = (hour, minute) <= (now.tm_hour, now.tm_min)
            return time.mktime((*now[:2], now.tm_mday + is_over, hour, minute, 0, 0, 0, -1))
        if float(text) >= 0:
            return float(text)
    return fail(f"DEADLINE={text} is no time: type 18:30, or seconds since 1970 (date +%s).")
