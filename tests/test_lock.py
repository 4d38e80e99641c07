"""An output_dir's lock: the next job of a chain waits for a run that was killed, not for one that lives."""

import os
import subprocess
import threading
import time

import pytest
from conftest import ROOT, load_script

FILES = load_script(ROOT / "jobs" / "run_files.py")
HERE = os.uname().nodename


@pytest.fixture
def wait(tmp_path, monkeypatch, capsys):
    """Look at the lock, with a qstat that knows these jobs; returns (status, seconds, what is said)."""

    def look(running=(), **variables):
        qstat = tmp_path / "bin" / "qstat"
        qstat.parent.mkdir(exist_ok=True)
        qstat.write_text(f'#!/bin/bash\n[[ " {" ".join(running)} " == *" $1 "* ]]\n')
        qstat.chmod(0o755)
        variables = {"PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBID": "8.pbs1"} | variables
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setenv("PATH", f"{qstat.parent}:{os.environ['PATH']}")
            patch.setattr(FILES.time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 5))
            began, status = time.time(), 0
            try:
                FILES.check_lock(tmp_path / "lock")
            except SystemExit as stopped:
                status = stopped.code
        said = capsys.readouterr()
        return status, time.time() - began, said.out + said.err

    return look


def write(directory, text, age=0):
    (directory / "lock").write_text(text)
    moment = time.time() - age
    os.utime(directory / "lock", (moment, moment))


def test_no_lock_or_a_dead_one(tmp_path, wait):
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert wait()[0] == 0
    for text, age in ((f"{HERE} {gone.pid} 7.pbs1", 0), ("hnode999 12 7.pbs1", 121), ("", 121)):
        write(tmp_path, text, age)  # where the process is known to be gone, whatever its job does
        status, seconds, said = wait(running=["7.pbs1"] * (age == 0))
        assert (status, said) == (0, "") and seconds < 1
        assert not (tmp_path / "lock").exists()


def test_a_chain_waits_for_a_killed_run(tmp_path, wait):
    write(tmp_path, "hnode999 12 7.pbs1", age=118)
    status, seconds, said = wait()
    assert status == 0 and seconds > 1
    assert said.startswith("waiting    up to 2 minutes") and said.count("\n") == 1
    write(tmp_path, "hnode999 12 8.pbs1", age=121)  # rerun by PBS: the same job, on another node
    assert wait(running=["8.pbs1"])[0] == 0
    write(tmp_path, "hnode999 12 7.pbs1", age=100)
    threading.Timer(1.5, (tmp_path / "lock").unlink).start()  # it ends by itself
    assert wait()[0] == 0


def test_by_hand_one_is_told(tmp_path, wait):
    write(tmp_path, "hnode999 12 7.pbs1", age=60)
    status, seconds, said = wait(PBS_ENVIRONMENT="PBS_INTERACTIVE")
    assert status == 2 and seconds < 1 and "Or wait 60 s, if it was killed." in said
    write(tmp_path, "shopping list")
    assert wait()[0] == 2 and (tmp_path / "lock").exists()


def test_a_living_run_is_an_error(tmp_path, wait):
    write(
        tmp_path, "hnode999 12 7.pbs1", age=500
    )  # it cannot reach the disk, perhaps; its job runs
    status, seconds, said = wait(running=["7.pbs1"])
    assert status == 2 and seconds < 1
    problem = f"error: process 12 on hnode999 is writing {tmp_path}. Choose another --output_dir.\n"
    assert said == problem
    for text in ("hnode999 12 ", "", f"{HERE} {os.getppid()} "):  # touched while one waits
        write(tmp_path, text, age=60)
        threading.Timer(0.7, lambda: os.utime(tmp_path / "lock")).start()
        status, _, said = wait()
        assert status == 2 and "error: " in said
