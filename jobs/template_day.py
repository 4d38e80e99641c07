"""The day that a chat template writes into prompts, as "Today Date: 26 Nov 2026".

Some templates (Llama 3's, Mistral's, gpt-oss's) ask transformers for it by strftime_now. What was
cut off goes on with the day that it began with: the rest would get other ids, and nothing would
say so. What is saved with a model is the template as it was published.
"""

from datetime import date, datetime, time
from pathlib import Path
from types import SimpleNamespace

import yaml
from transformers.utils import chat_template_utils

LAST = {}  # the day that the template in use writes, if it writes one


def set_day(day=None):
    """Let templates write this day, as 2026-11-26, or today; return it."""
    day = date.fromisoformat(str(day)) if day else date.today()
    moment = datetime.combine(day, time())  # no hour, which would differ from row to row
    chat_template_utils.datetime = SimpleNamespace(now=lambda: moment)
    return str(day)


def keep_day(output_dir, resume, run):
    """Let templates write the day that this run began with, of a new one today; return it."""
    place, before = Path(resume).resolve().parent if resume else Path(output_dir), {}
    if (record := place / "run_args.yaml").is_file():
        before = (yaml.safe_load(record.read_text("utf-8")) or {}).get("run") or {}
    is_same = resume or before.get("id") == run["id"]
    return set_day(before.get("day") if is_same else None)


def find_day(tokenizer, say):
    """Say so where the tokenizer's template writes the day, and let that tell examples apart."""
    LAST.pop("day", None)
    if "strftime_now" not in str(tokenizer.chat_template):
        return
    clock, texts = chat_template_utils.datetime, []
    for day in ("2001-01-01", "2012-12-12"):
        set_day(day)
        try:
            turns = [{"role": "user", "content": "a"}]
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # it may ask for more: then it may write the day, too
            texts.append(day)
    chat_template_utils.datetime = clock
    if texts[0] != texts[1]:  # else --chat_template_kwargs may have set a date
        # The cache of examples goes by what a tokenizer holds; this is not saved with it.
        tokenizer.template_day = LAST["day"] = f"{clock.now():%Y-%m-%d}"
        say("template", f"may write the day into prompts: {LAST['day']}, until this run ends")
