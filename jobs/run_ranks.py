#!/usr/bin/env python3
"""Run a launcher of many processes; name at the end which host and rank failed first, with what.

    python ../jobs/run_ranks.py torchrun --standalone --nproc_per_node 8 finetune_full.py ...

What the launcher and its processes print passes through unchanged. torchrun and mpirun go on
talking after a failure, one page per node; so when all is over, one more line gathers what counts,
and the exit status is the launcher's.

A script that stops before it is finished (deadline, SIGTERM, STOP) prints a line `stopped    ...`,
and all its ranks leave with status 0: torchrun and mpirun know only success and failure. This one
then leaves with status 75, "submit again". RUN_RANKS in the environment tells the scripts so.
Follows https://docs.pytorch.org/docs/stable/elastic/errors.html (the form of torchrun's report).
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque

# One process's part of torchrun's report. Each node prints one report.
FAILURE = re.compile(
    r"time\s+: (?P<time>\S+)\s+host\s+: (?P<host>\S+)\s+"
    r"rank\s+: (?P<rank>\d+) .*?exitcode\s+: (?P<code>-?\d+)",
    re.S,
)
STOPPED = "stopped    "
PREFIX = re.compile(r"^(\[\S+\]:\s?|\[1,\d+\]<stderr>:\s?)+")  # of torch's ranks, of mpirun's nodes


def first_failure(text):
    """Return (host, rank, exit code) of the process that failed first, by torchrun's reports.

    Processes that were killed come before those that ended by themselves: the others notice it by a
    broken connection, sometimes within the tenth of a second after which torchrun looks. It ends
    the rest with SIGTERM (-15): these last. None where no process is reported.
    """
    found = [(int(match["code"]), match) for match in FAILURE.finditer(text)]
    found.sort(key=lambda pair: (pair[0] == -signal.SIGTERM, pair[0] >= 0, pair[1]["time"]))
    return (found[0][1]["host"], found[0][1]["rank"], found[0][0]) if found else None


def error_line(lines, rank=None):
    """The last line with an error: of the given rank where torch marks its lines, else of any."""
    error = re.compile(r"\S*(error|Error|Exception|Interrupt)\b")
    named = [line for line in lines if error.match(PREFIX.sub("", line))]
    named = [line for line in named if "ChildFailedError" not in line]
    own = [line for line in named if rank is not None and line.startswith(f"[rank{rank}]:")]
    ours = [line for line in named if PREFIX.sub("", line).startswith("error: ")]
    return PREFIX.sub("", (own or ours or named or [""])[-1]).strip()


def describe(lines, status):
    """One line for the end of the log: what failed, where."""
    failure = first_failure("\n".join(lines))
    if failure is None:
        nodes = [line for line in lines if re.match("node .* ended with status ", line)]
        node = nodes[0] if nodes else ""
        what = error_line(lines) or "see above"
        if "RendezvousTimeout" in what:
            what += " (not all nodes came within START_TIMEOUT, see jobs/node.sh)"
        return f"{node.removeprefix('node').strip() or f'status {status}'}: {what}"
    host, rank, code = failure
    if code < 0:
        what = f"killed by {signal.Signals(-code).name}"
        what += " (by hand, or for memory: see the host's limit)" if code == -signal.SIGKILL else ""
    else:
        what = error_line(lines, rank) or f"exit status {code}"
        # A broken connection is never the first cause: a launcher that was killed reports nothing.
        killed = [line for line in lines if re.match("node .* ended with status 137", line)]
        if killed and re.search("[Cc]onnection (reset|closed)", what):
            return f"{killed[0].removeprefix('node').strip()}: {what}"
    return f"{host}, rank {rank}: {what}"


def main(command):
    if command in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not command:
        print("error: no command. Type: run_ranks.py torchrun ...", file=sys.stderr)
        return 2
    try:
        env = os.environ | {"RUN_RANKS": "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env)
    except OSError as error:
        print(f"error: {command[0]} does not start: {error.strerror}", file=sys.stderr)
        return 2
    # PBS and Ctrl-C send these to the launcher too. It decides when all is saved; this one waits.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    lines = deque(maxlen=20_000)  # a thousand ranks print a page each
    stopped = threading.Event()

    def pass_on():
        for line in process.stderr:
            if stopped.is_set():
                continue  # read, for a full pipe would block; what a launcher says now misleads
            lines.append(line.decode(errors="replace").rstrip("\n"))
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            if PREFIX.sub("", lines[-1].rsplit("\r", 1)[-1]).startswith(STOPPED):
                stopped.set()

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    status = process.wait()
    reader.join(timeout=3)  # not for ever: a process left behind may hold the pipe
    status = 128 - status if status < 0 else status
    # Another rank's unfinished line may stand before ours; no failure, so it is no quotation.
    if stopped.is_set() or (status == 0 and any(STOPPED in line for line in lines)):
        return 75
    if status:
        print(f"failed     {describe(list(lines), status)}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
