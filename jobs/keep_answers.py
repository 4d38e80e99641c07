"""Keep the answers to a file of prompts: they go on where they were cut off, and stop in time.

generate_text.py imports this file where `jobs` lies beside its directory. Beside OUT, the answers
so far are in OUT.partial, what they were made with in OUT.settings.json, which is the lock, too.
"""

import fcntl
import hashlib
import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from run_common import check, fail, read_deadline


def note(name, text):
    print(f"{name:<11}{text}", file=sys.stderr)  # stdout holds answers only


def claim_output(args, precision, prompts):
    """Refuse to mix answers, or to replace a file of others; a finished run ends here.

    `precision` and the ids of the prompts are compared with those of the answers so far.
    """
    args.deadline = read_deadline()
    signal.signal(signal.SIGTERM, lambda *_: setattr(args, "deadline", 0))
    output = Path(args.output_file).resolve()
    text = Path(args.prompt_file).read_bytes() + json.dumps(prompts).encode()
    settings = vars(args) | {"precision": precision, "prompts": hashlib.sha256(text).hexdigest()}
    free = ["device_map", "prompt_file", "output_file", "deadline"]  # they change no answer
    settings |= dict.fromkeys(free if args.do_sample else [*free, "batch_size"])
    for directory in (args.base, args.model_name_or_path):
        for name in ("*.safetensors", "*.bin", "*config.json"):
            stats = [(file.name, file.stat()) for file in sorted(Path(directory).glob(name))]
            settings[f"{directory}/{name}"] = [[n, s.st_size, s.st_mtime_ns] for n, s in stats]
    record = Path(f"{output}.settings.json")
    ends = [end for end in ("", ".partial", ".tmp") if Path(f"{output}{end}").exists()]
    text = record.read_bytes() if record.is_file() else b"{}"
    before = None if text or ends else {}
    with suppress(ValueError):
        before = json.loads(text)
    check(isinstance(before, dict), f"{record} is damaged: remove it and .partial to begin anew.")
    pairs = [(name, before.get(name), value) for name, value in settings.items()]
    changed = [f"{name} was {was}, now {now}" for name, was, now in pairs if was != now]
    is_free = not ends and (not before or "prompts" in before)
    check(is_free or not changed, f"{output} holds other answers: choose another. {changed}")
    if output.exists():
        note("finished", f"{output} holds these answers; remove it to make them again")
        raise SystemExit(0)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        args.lock = record.open("a")  # the system frees it, in whatever way this process ends
        try:
            fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # where there are no locks, two will write the same answers
            is_held = isinstance(error, BlockingIOError)
            check(not is_held, f"another process is writing {output}. Wait, or choose another.")
        if changed:
            record.write_text(json.dumps(settings, indent=1, ensure_ascii=False), "utf-8")
    except OSError as error:
        fail(f"--output_file {output} cannot be written: {error}")
    stop_if_asked(args)


def stop_if_asked(args, seconds=0, done=""):
    """Leave with 75, "not finished", where a batch of so many seconds must not begin any more."""
    file, until = Path(args.output_file).resolve().with_name("STOP"), args.deadline
    if file.exists() or time.time() + seconds + 10 > until:
        why = file if file.exists() else f"DEADLINE {time.ctime(until)}" if until else "SIGTERM"
        file.unlink(missing_ok=True)
        note("stopped", f"by {why}; {done}to go on, type the same command or submit the same job")
        raise SystemExit(75)
