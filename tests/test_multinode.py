"""Several nodes for real: node.sh in two network namespaces, job files under mpirun, and what a
dead rank leaves.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("run_ranks", ROOT / "jobs" / "run_ranks.py")
run_ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_ranks)

HOSTS = {f"node{os.getpid()}a": "10.98.0.1", f"node{os.getpid()}b": "10.98.0.2"}


def sh(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hosts():
    """Two hosts: network namespaces joined by a cable, which share this machine's files."""
    names = list(HOSTS)
    if os.geteuid() != 0 or not shutil.which("ip") or sh("ip", "netns", "add", names[0]).returncode:
        pytest.skip("network namespaces need root and iproute2")
    made = [
        sh("ip", "netns", "add", names[1]),
        sh(
            "ip",
            "link",
            "add",
            "cable0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "cable1",
            "netns",
            names[1],
        ),
    ]
    for number, (name, address) in enumerate(HOSTS.items()):
        inside = ("ip", "-n", name)
        made.append(sh(*inside, "link", "set", "lo", "up"))
        made.append(sh(*inside, "addr", "add", f"{address}/24", "dev", f"cable{number}"))
        made.append(sh(*inside, "link", "set", f"cable{number}", "up"))
    try:
        if any(done.returncode for done in made):
            pytest.skip(
                "this kernel makes no pair of virtual cables: "
                + " ".join(done.stderr for done in made)
            )
        yield names
    finally:
        for name in names:
            sh("ip", "netns", "del", name)


@pytest.fixture(scope="session")
def training(checkpoints, train_file):
    return {"MODEL": checkpoints["llama"], "TRAIN_FILE": train_file}


def environment(**more):
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "HF_HOME") if name in os.environ}
    return keep | {"VENV": sys.prefix, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1",
                   "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "NPROC_PER_NODE": "1"} | more  # fmt: skip


def start_node(host, number, log, arguments, **more):
    """job_multinode.sh's part on one node, as mpirun would start it there."""
    env = environment(
        NODES="2",
        MASTER_ADDR=HOSTS[next(iter(HOSTS))],
        MASTER_PORT="23456",
        NODE_RANK=str(number),
        **more,
    )
    inside = f'hostname {host}; exec "$@" >{log} 2>&1'
    command = ["ip", "netns", "exec", host, "unshare", "--uts", "bash", "-c", inside, "_",
               sys.executable, "../jobs/run_ranks.py", "bash", "../jobs/node.sh", *map(str, arguments)]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT / "finetune_full", env=env, start_new_session=True)


def stop(processes):
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def worker(place, host=None, rank=None):
    """Process id of the training into this place on that host (a network namespace), or of that
    rank."""
    inside = set(sh("ip", "netns", "pids", host).stdout.split()) if host else None
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        ours = b"finetune_full.py" in command and os.fsencode(place) in command
        if not ours or not any(v.startswith(b"LOCAL_RANK=") for v in variables):
            continue
        if folder.name in inside if inside else f"RANK={rank}".encode() in variables:
            return int(folder.name)
    return None


def wait_for(text, logs, processes, seconds=90):
    """Return the log in which the text appears; fail when time is over or a process has ended."""
    until = time.monotonic() + seconds
    while True:
        for log in logs:
            if text in (log.read_text() if log.exists() else ""):
                return log
        everything = "".join(log.read_text() for log in logs if log.exists())
        assert time.monotonic() < until, everything
        assert all(process.poll() is None for process in processes), everything
        time.sleep(0.2)


def test_killed_worker_on_another_host(hosts, training, tmp_path):
    """Two hosts train together; killing one's worker ends both within a minute.

    The log says who it was.
    """
    logs = [tmp_path / f"{host}.log" for host in hosts]
    arguments = ["finetune_full.py", "--model_name_or_path", training["MODEL"],
                 "--train_file", training["TRAIN_FILE"], "--output_dir", tmp_path / "out",
                 "--max_steps", "100000", "--logging_steps", "1"]  # fmt: skip
    nodes = [
        start_node(host, i, log, arguments)
        for i, (host, log) in enumerate(zip(hosts, logs, strict=True))
    ]
    try:
        first = wait_for("step 2/", logs, nodes)
        assert "2 x CPU" in first.read_text(), "the two hosts do not train together"
        os.kill(worker(tmp_path, hosts[1]), signal.SIGKILL)
        began = time.monotonic()
        statuses = [node.wait(timeout=60) for node in nodes]
    finally:
        stop(nodes)
    assert time.monotonic() - began < 60
    assert all(statuses)
    last = logs[1].read_text().splitlines()[-1]
    assert re.fullmatch(rf"failed +{hosts[1]}, rank \d: killed by SIGKILL.*", last), last
    assert logs[0].read_text().splitlines()[-1].startswith(f"failed     {hosts[0]}, rank ")


def test_host_that_never_comes(hosts, tmp_path):
    """The rendezvous timeout ends the others, with a line that names the host and the reason."""
    began = time.monotonic()
    node = start_node(
        hosts[0], 0, tmp_path / "log", ["finetune_full.py", "--help"], START_TIMEOUT="5"
    )
    try:
        assert node.wait(timeout=60)
    finally:
        stop([node])
    assert time.monotonic() - began < 50
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert re.match(rf"failed +{hosts[0]}: .*Rendezvous\w*Error", last), last


def run_job(job, log, **variables):
    """A job file by hand under mpirun, with two launchers on this machine; returns the process."""
    if not shutil.which("mpirun"):
        pytest.skip("there is no mpirun")
    (log.parent / "hosts").write_text("localhost slots=2\n")
    env = environment(HOSTFILE=str(log.parent / "hosts"), NODES="2", MAP_BY="slot", **variables)
    with log.open("w") as file:
        return subprocess.Popen(
            ["bash", ROOT / job], env=env, stdout=file, stderr=file, start_new_session=True
        )


def test_check_nodes(tmp_path):
    job = run_job("abci_firststep/job_check_nodes.sh", tmp_path / "log",
                  ARGS="--size_mib 1 --repeat 2 --memory_gib 0.01")  # fmt: skip
    try:
        assert job.wait(timeout=90) == 0
    finally:
        stop([job])
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum(line.startswith(("rank 0 ", "rank 1 ")) for line in lines) == 2
    assert sum("waits 120 s" in line for line in lines) == 1, "the job's timeout did not arrive"
    assert any(
        re.match(r"all-reduce +1 MiB in .* GB/s; sums correct on every rank", line)
        for line in lines
    )
    assert any(line.startswith("done       all 2 ranks answered") for line in lines)


def test_nodes_whose_variables_differ(tmp_path):
    """One that computes with other settings is named, with the variable and both values."""
    inside = tmp_path / "inside.py"
    inside.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT / "abci_firststep")!r})
os.environ["HF_TOKEN"] = os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["RANK"]
if os.environ["RANK"] == "1":
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
import check_nodes
check_nodes.main("--size_mib 1 --repeat 2 --memory_gib 0.01".split())
""")
    env = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        inside,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    there, here = "expandable_segments:False", "expandable_segments:True"
    assert len(errors) == 1 and f"PYTORCH_ALLOC_CONF is {there} on " in errors[0], done.stderr
    assert f", {here} on " in errors[0] and done.returncode


@pytest.mark.parametrize("victim", ["worker", "launcher"])
def test_job_multinode(victim, training, tmp_path):
    """The job file itself under mpirun: trains on both, ends when a rank or its torchrun dies.

    No process is left behind.
    """
    variables = {name: training[name] for name in ("MODEL", "TRAIN_FILE")} | {
        "OUTPUT_DIR": str(tmp_path / "out")
    }
    log = tmp_path / "log"
    job = run_job(
        "finetune_full/job_multinode.sh",
        log,
        **variables,
        ARGS="--max_steps 100000 --logging_steps 1",
    )
    try:
        wait_for("step 3/", [log], [job])
        assert "plain data parallel over gloo" in log.read_text()
        assert "2 x CPU" in log.read_text()
        process = worker(tmp_path, rank=1)
        status = Path(f"/proc/{process}/status").read_text()
        os.kill(
            process if victim == "worker" else int(re.search(r"PPid:\s+(\d+)", status)[1]),
            signal.SIGKILL,
        )
        began = time.monotonic()
        assert job.wait(timeout=60)
        while worker(tmp_path, rank=1) or worker(tmp_path, rank=0):
            assert time.monotonic() - began < 60, "a process is left behind"
            time.sleep(0.2)
    finally:
        stop([job])
    assert time.monotonic() - began < 60
    last = log.read_text().splitlines()[-1]
    wanted = {
        "worker": ", rank 1: killed by SIGKILL",
        "launcher": ": torchrun ended with status 137",
    }[victim]
    assert re.match(rf"failed +\S+{wanted}", last), last


REPORT = """\
  time      : 2026-11-24_10:00:0{second}
  host      : {host}
  rank      : {rank} (local_rank: 0)
  exitcode  : {code} (pid: 4711)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""


@pytest.mark.parametrize(
    ("reports", "lines", "wanted"),
    [
        # The survivor's broken connection is noticed before the killed process, which is named.
        ([("a", 0, 1, 1), ("b", 5, -9, 2)], ["[rank0]: RuntimeError: closed"],
         "b, rank 5: killed by SIGKILL"),
        # What torchrun ended with SIGTERM itself is no cause.
        ([("a", 3, -15, 1), ("a", 2, 1, 2)], ["[rank2]: ValueError: bad"],
         "a, rank 2: ValueError: bad"),
        # The first of several, with its own error and not the last one in the log.
        ([("b", 1, 1, 2), ("a", 0, 1, 1)], ["[rank0]: KeyError: 'x'", "[rank1]: OSError: y"],
         "a, rank 0: KeyError"),
        # Our own error line of the first rank.
        ([("a", 0, 2, 1)], ["error: --max_length 9 does not fit."],
         "a, rank 0: error: --max_length 9 does not fit."),
        ([("a", 0, 7, 1)], [], "a, rank 0: exit status 7"),
        ([], ["node       c: torchrun ended with status 1", "x.TimeoutError"],
         "c: torchrun ended with status 1: x."),
        ([], [], "status 1: see above"),
    ],
)  # fmt: skip
def test_describe(reports, lines, wanted):
    text = [*lines]
    for host, rank, code, second in reports:
        text += REPORT.format(host=host, rank=rank, code=code, second=second).splitlines()
    assert run_ranks.describe(text, 1).startswith(wanted)


def test_a_killed_launcher_comes_before_the_connections_it_broke():
    report = REPORT.format(second=1, host="hnode001", rank=0, code=1)
    broken = (
        "[rank0]: RuntimeError: [pair.cc:537] Read error [10.0.0.2]:1: Connection reset by peer"
    )
    killed = "node       hnode002: torchrun ended with status 137"
    lines = [broken, *report.splitlines(), killed]
    assert run_ranks.describe(lines, 1).startswith(
        "hnode002: torchrun ended with status 137: RuntimeError"
    )
    lines = ["[rank0]: ValueError: x", *report.splitlines(), killed]  # killed by mpirun, afterwards
    assert run_ranks.describe(lines, 1) == "hnode001, rank 0: ValueError: x"


def test_run_ranks(capfd, monkeypatch):
    """Output and exit status pass through; success adds nothing; a signal is 128 + its number."""
    monkeypatch.setattr(run_ranks.signal, "signal", lambda *_: None)  # this process stays as it is
    assert run_ranks.main(["bash", "-c", "echo out; echo err >&2"]) == 0
    assert capfd.readouterr() == ("out\n", "err\n")
    assert run_ranks.main(["bash", "-c", "echo 'ValueError: x' >&2; exit 3"]) == 3
    assert capfd.readouterr().err == "ValueError: x\nfailed     status 3: ValueError: x\n"
    assert run_ranks.main(["bash", "-c", "kill -9 $$"]) == 137
    assert run_ranks.main(["/nowhere/x"]) == 2
    assert run_ranks.main([]) == 2
