"""jobs/wait_lock.sh: the next job of a chain waits for a run that was killed, not for one that lives."""

import os
import subprocess
import threading
import time

import pytest
from conftest import ROOT

SCRIPT = ROOT / "jobs" / "wait_lock.sh"
HERE = os.uname().nodename


def wait(directory, running=(), **variables):
    """Call it with a qstat that knows these jobs as running. Returns (status, seconds, output)."""
    bin_dir = directory / "bin"
    bin_dir.mkdir(exist_ok=True)
    qstat = bin_dir / "qstat"
    qstat.write_text(f'#!/bin/bash\n[[ " {" ".join(running)} " == *" $1 "* ]]\n')
    qstat.chmod(0o755)
    env = {"PATH": f"{bin_dir}:{os.environ['PATH']}"} | variables
    began = time.time()
    run = subprocess.run(
        ["bash", SCRIPT, directory], env=env, capture_output=True, text=True, timeout=60
    )
    return run.returncode, time.time() - began, run.stdout + run.stderr


def write(directory, text, age=0):
    (directory / "lock").write_text(text)
    moment = time.time() - age
    os.utime(directory / "lock", (moment, moment))


@pytest.fixture
def gone():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_no_lock_or_a_dead_one(tmp_path, gone):
    assert wait(tmp_path)[0] == 0
    write(tmp_path, f"{HERE} {gone} 7.pbs1")
    assert wait(tmp_path, running=["7.pbs1"])[:2] < (0, 3), (
        "known to be gone, whatever its job does"
    )
    write(tmp_path, "hnode999 12 7.pbs1", age=121)
    status, seconds, text = wait(tmp_path)
    assert (status, text) == (0, "") and seconds < 3


def test_a_chain_waits_for_a_killed_run(tmp_path):
    write(tmp_path, "hnode999 12 7.pbs1", age=117)
    status, seconds, text = wait(tmp_path, PBS_JOBID="8.pbs1")
    assert status == 0 and seconds > 3
    assert text.startswith("waiting    up to 2 minutes") and len(text.splitlines()) == 1
    write(tmp_path, "hnode999 12 8.pbs1", age=121)  # rerun by PBS: the same job, on another node
    assert wait(tmp_path, running=["8.pbs1"], PBS_JOBID="8.pbs1")[0] == 0


def test_a_living_run_is_an_error(tmp_path):
    write(
        tmp_path, "hnode999 12 7.pbs1", age=500
    )  # it cannot reach the disk, perhaps; its job runs
    status, seconds, text = wait(tmp_path, running=["7.pbs1"], PBS_JOBID="8.pbs1")
    assert status == 2 and seconds < 3
    assert (
        text
        == f"error: {tmp_path} is being written by process 12 on hnode999, job 7.pbs1. Set another OUTPUT_DIR\n"
    )
    for text in ("hnode999 12 ", "", f"{HERE} {os.getpid()} "):  # touched while one waits
        write(tmp_path, text, age=60)
        toucher = threading.Timer(2, lambda: os.utime(tmp_path / "lock"))
        toucher.start()
        status, _, text = wait(tmp_path)
        assert status == 2 and "error: " in text
