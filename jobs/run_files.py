"""Files of a run: its lock, and the marks in its checkpoints.

A run has an id. A checkpoint bears a mark with it, the file run_id: written before all else, and
completed with the names and sizes of the files when these are on the disk. Only what bears a run's
own mark is ever set aside or removed; a checkpoint without a mark is somebody else's.
"""

import atexit
import json
import os
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

from run_common import check, say


def check_lock(path):
    """Refuse an output_dir in which another run lives: that touches the file `lock` there.

    Killed, a run leaves its lock behind. That is free at once where its process is known to be
    gone, else when nobody has touched it for 2 minutes and PBS does not know its job any more. A
    job of the queue waits for that; by hand one is told.
    """
    waits, first = os.environ.get("PBS_ENVIRONMENT") == "PBS_BATCH", None
    with suppress(FileNotFoundError):  # which ends the waiting
        while path.exists():
            text, touched = path.read_text("utf-8", errors="replace"), path.stat().st_mtime
            words = text.split()  # none after a crash
            host, pid, job = [*words, "?"][:3] if len(words) > 1 else "???"
            advice = "move it, or choose another --output_dir."
            check(not text or pid.isdecimal(), f"{path} is no run's lock: {advice}")
            is_here, age = host == os.uname().nodename, time.time() - touched
            is_gone = is_here and (pid == str(os.getpid()) or not Path("/proc", pid).exists())
            runs = age > 120 and not is_gone and is_running(job)
            if is_gone or (age > 120 and not runs):
                path.unlink()
                return
            wait = "" if runs else f" Or wait {120 - age:.0f} s, if it was killed."
            text = f"process {pid} on {host} is writing {path.parent}. Choose another --output_dir."
            check(waits and not runs and touched == (first or touched), text + wait)
            if first is None:
                say("waiting", f"up to 2 minutes: {path} may be of a run that was killed")
            first = touched
            time.sleep(5)


def is_running(job):
    """Whether PBS knows a job, another than this, as queued or running."""
    if job in ("?", os.environ.get("PBS_JOBID")):
        return False
    with suppress(OSError, subprocess.SubprocessError):
        env = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/opt/pbs/bin"}
        done = subprocess.run(["qstat", job], env=env, capture_output=True, timeout=20)
        return done.returncode == 0
    return False


def take_lock(path):
    """Write host, process and job into the lock, and touch it for as long as this run lives."""

    def keep_young():
        while path.exists():
            os.utime(path)
            time.sleep(30)

    with path.open("x") as file:  # of two that start at once, one fails
        file.write(f"{os.uname().nodename} {os.getpid()} {os.environ.get('PBS_JOBID', '')}")
    atexit.register(path.unlink, missing_ok=True)
    threading.Thread(target=keep_young, daemon=True).start()


def find_checkpoints(output_dir, run_id=None):
    """checkpoint-<digits> in order, of a run those with its mark; other names are ignored."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    found = sorted((p for p in found if [*p.glob("*")]), key=lambda path: int(path.name[11:]))
    if run_id is None:
        return found
    return [p for p in found if not p.is_symlink() and read_mark(p).get("run") == run_id]


def find_complete(output_dir, run_id):
    """The complete checkpoints in order; of this run, what a kill left behind is set aside."""
    found = {path: what_lacks(path) for path in find_checkpoints(output_dir)}
    for path, lacks in found.items():
        mark = path / "run_id"
        if lacks and run_id and mark.exists() and read_mark(path).get("run", run_id) == run_id:
            aside = Path(f"{path}.incomplete")
            is_ours = not aside.exists() or read_mark(aside).get("run") == run_id
            check(is_ours, f"{aside} is in the way: move it, or choose another --output_dir.")
            say("incomplete", f"{path} lacks {lacks}: set aside as {aside.name}")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier kill
            mark.write_text(json.dumps({"run": run_id}))
            path.rename(aside)
    return [path for path, lacks in found.items() if not lacks]


def what_lacks(path):
    """What a checkpoint lacks to be complete, or None; one without a mark needs Trainer's state."""
    if not (path / "run_id").exists():
        return None if (path / "trainer_state.json").is_file() else "trainer_state.json"
    for name, size in read_mark(path).get("files", {"the end of its save": 0}).items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            return name
    return None


def free_bytes(directory):
    """What may still be written there: the disk's room, or what a quota of Lustre leaves of it."""
    free = [shutil.disk_usage(directory).free]
    for whose in (["-u", os.getuid()], ["-g", Path(directory).stat().st_gid]):
        command = ["lfs", "quota", "-q", *whose, directory]
        with suppress(OSError, ValueError, subprocess.SubprocessError):  # no Lustre, most often
            words = list(map(str, command))
            text = subprocess.run(words, capture_output=True, text=True, timeout=10).stdout
            used, quota, limit = (int(word.rstrip("*")) for word in text.split()[1:4])  # in KiB
            if limit or quota:
                free.append(max(0, (limit or quota) - used) * 1024)
    return min(free)


def read_mark(path):
    """The mark in a checkpoint: {"run": id} and, once it is complete, {"files": {name: bytes}}."""
    with suppress(OSError, ValueError):
        return dict(json.loads((path / "run_id").read_text("utf-8")))
    return {}


def write_mark(path, run_id, is_complete=False):
    """Mark a checkpoint as this run's; as complete when all its files are on the disk."""
    mark = {"run": run_id}
    if is_complete:
        for file in path.glob("*.safetensors"):  # as readable as the rest, not by the owner only
            file.chmod((path / "trainer_state.json").stat().st_mode)
        os.sync()
        files = [file for file in path.rglob("*") if file.is_file() and file.name != "run_id"]
        mark["files"] = {str(file.relative_to(path)): file.stat().st_size for file in files}
    path.mkdir(exist_ok=True)
    (path / "run_id").write_text(json.dumps(mark))
    if is_complete:
        os.sync()


def remove(path):
    """Remove a checkpoint, its mark last: what a kill leaves of it is still known as this run's."""
    for file in sorted(path.iterdir(), key=lambda file: file.name == "run_id"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    path.rmdir()
