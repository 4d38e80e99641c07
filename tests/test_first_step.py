"""first_step.py: what it reports, against what this test finds by other means, and what it refuses."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "abci_firststep" / "first_step.py"


@pytest.fixture
def first_step():
    spec = importlib.util.spec_from_file_location("first_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def outside_pbs(monkeypatch):
    for name in list(os.environ):
        if name.startswith("PBS_") or name in ("NCPUS", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)


def report(capsys, call, *arguments):
    call(*arguments)
    return capsys.readouterr().out


def qstat_stub(folder, monkeypatch, text):
    """A qstat on PATH that prints a text, instead of PBS's."""
    (folder / "qstat").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "qstat").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_whole_report_alone_in_an_empty_folder(tmp_path):
    """Copied away it runs; every line of the report is there, and the speed is one that a CPU can have."""
    (tmp_path / "first_step.py").write_bytes(SCRIPT.read_bytes())
    command = [sys.executable, "first_step.py", "--seconds", "0.1", "--matrix_size", "256"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PBS_")}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert [name for name in names if name not in ("gpu", "matmul")][:8] == [
        "host", "cpus", "memory", "job", "deadline", "models", "scratch", "versions",
    ]  # fmt: skip
    assert os.uname().nodename in done.stdout
    speed = float(
        re.search(r"matmul +\S+ \(.*\): ([\d,.]+) TFLOP/s in \w+, n = 256", done.stdout)[1].replace(
            ",", ""
        )
    )
    assert speed < 5000


def test_help_and_a_typo_need_no_torch(tmp_path):
    """Both answer without importing torch: a torch that cannot be imported does not matter."""
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    for argument, code, text in (
        ("--help", 0, "--matrix_size"),
        ("--second=1", 2, "unrecognized arguments: --second=1"),
        ("--seconds=0", 2, "--seconds 0.0 is not above 0"),
        ("--seconds=nan", 2, "--seconds nan"),
        ("--matrix_size=0", 2, "--matrix_size 0"),
    ):
        done = subprocess.run(
            [sys.executable, SCRIPT, argument], env=env, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, text in done.stdout + done.stderr) == (code, True), done.stderr
    done = subprocess.run(
        [sys.executable, SCRIPT], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: torch does not import (broken on purpose). Make the environment first: bash ../jobs/setup_venv.sh\n"
    )


def test_cpus_and_memory(first_step, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NCPUS", "16")
    monkeypatch.setenv("OMP_NUM_THREADS", "192")
    text = report(capsys, first_step.report_cpus)
    usable = len(os.sched_getaffinity(0))
    assert f"{os.cpu_count()} on the machine, 16 given by PBS, {usable} usable" in text
    assert "OMP_NUM_THREADS 192" in text

    # Limits of cgroup v2: the group's own is wider than the one above it, which counts.
    monkeypatch.setattr(first_step, "CGROUPS", tmp_path)
    monkeypatch.setattr(first_step, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/pbs/job/step\n")
    (tmp_path / "pbs/job/step").mkdir(parents=True)
    for group, cpu, memory in (
        ("pbs/job/step", "max 100000", "max"),
        ("pbs/job", "150000 100000", str(3 * 1024**3)),
    ):
        (tmp_path / group / "cpu.max").write_text(f"{cpu}\n")
        (tmp_path / group / "memory.max").write_text(f"{memory}\n")
    assert "time of 1.5 CPUs (cgroup)" in report(capsys, first_step.report_cpus)
    total = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 1024**2
    text = report(capsys, first_step.report_memory)
    assert "limit 3.0 GiB (cgroup)" in text
    assert abs(float(re.search(r"([\d.]+) GiB on the machine", text)[1]) - total) < 0.1

    # cgroup v1, with its number that means "none", then with a limit.
    (tmp_path / "own").write_text("4:memory:/job\n0::/\n")
    (tmp_path / "memory/job").mkdir(parents=True)
    (tmp_path / "memory/job/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert "no limit set" in report(capsys, first_step.report_memory)
    (tmp_path / "memory/job/memory.limit_in_bytes").write_text(str(2 * 1024**3))
    assert "limit 2.0 GiB (cgroup)" in report(capsys, first_step.report_memory)


def test_job_and_deadline(first_step, capsys, monkeypatch, tmp_path):
    assert first_step.job_deadline() == "none (not in a PBS job)"
    nodes = tmp_path / "nodes"
    nodes.write_text("hnode002\nhnode001\nhnode001\n")
    for name, value in {
        "PBS_JOBID": "12.pbs1",
        "PBS_JOBCOOKIE": "secret",
        "PBS_NODEFILE": str(nodes),
    }.items():
        monkeypatch.setenv(name, value)
    start = datetime.now().replace(microsecond=0) - timedelta(minutes=10)
    job = {
        "Resource_List": {"walltime": "01:30:00"},
        "stime": start.strftime("%a %b %d %H:%M:%S %Y"),
        "project": "gaa50000",
    }
    answer = json.dumps({"Jobs": {"12.pbs1": job}})
    qstat_stub(
        tmp_path, monkeypatch, f"[[ \"$*\" == '-f -F json 12.pbs1' ]] && cat <<'X'\n{answer}\nX"
    )
    text = report(capsys, first_step.report_job)
    assert f"{start + timedelta(minutes=90):%Y-%m-%d %H:%M:%S}, 1:19:" in text
    assert "(walltime 01:30:00, group gaa50000)" in text
    assert "nodes      hnode001 hnode002" in text
    assert "secret" not in text

    # Without an answer the report goes on.
    for script in ("exit 1", "echo '{'", "echo '{}'", ""):
        qstat_stub(tmp_path, monkeypatch, script)
        assert first_step.job_deadline().startswith("unknown (qstat: "), script
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert first_step.job_deadline().startswith("unknown (qstat: FileNotFoundError")


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "fit", "words"),
    [
        ("13.0", "13.0", True, "they fit"),
        ("13.2", "13.0", True, "they fit"),
        ("12.8", "13.0", True, "they fit"),
        ("13.0", "12.8", False, "too old"),
        ("13.0", None, True, "no NVIDIA driver"),
        (None, "13.0", False, "CPU-only build but the driver runs CUDA 13.0"),
        (None, None, True, "CPU-only build"),
    ],
)
def test_versions_fit(first_step, torch_cuda, driver, fit, words):
    assert first_step.versions_fit(torch_cuda, driver)[0] is fit
    assert words in first_step.versions_fit(torch_cuda, driver)[1]


class Cuda:
    """As much of torch.cuda as the report asks for; cards without a GPU behind them."""

    def __init__(self, cards):
        self.cards = cards

    def is_available(self):
        return bool(self.cards)

    def device_count(self):
        return len(self.cards)

    def get_device_properties(self, index):
        return self.cards[index]


class Torch:
    __version__ = "2.13.0+cu130"
    version = type("Version", (), {"cuda": "13.0"})

    def __init__(self, *cards):
        self.cuda = Cuda(cards)


def test_driver_without_a_visible_gpu(first_step, capsys, monkeypatch, tmp_path):
    """An error with the versions; but not in a job that asked for no GPU."""
    (tmp_path / "nvidiactl").write_text("")
    monkeypatch.setattr(first_step, "GPU_DRIVER_FILE", tmp_path / "nvidiactl")
    monkeypatch.setattr(first_step, "driver_cuda", lambda: "12.8")
    monkeypatch.setattr(first_step, "ask_nvidia_smi", lambda fields: {"GPU-1": ["570.1"]})
    with pytest.raises(SystemExit) as stop:
        first_step.report_gpus(Torch())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in ("570.1", "2.13.0+cu130", "CUDA 13.0", "12.8", "too old", "setup_venv.sh"):
        assert part in error
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("PBS_QUEUE", "rt_HC")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "gpus       none given to this job" in report(
                capsys, first_step.report_gpus, Torch()
            )


def test_gpu_lines(first_step, capsys, monkeypatch):
    card = type(
        "Card",
        (),
        {"name": "NVIDIA H200", "major": 9, "minor": 0, "total_memory": 150e9, "uuid": "a-b"},
    )
    limits = {"GPU-a-b": ["500.00 W", "700.00 W"]}
    monkeypatch.setattr(
        first_step,
        "ask_nvidia_smi",
        lambda fields: limits if "power" in fields else {"GPU-a-b": ["580.1"]},
    )
    text = report(capsys, first_step.report_gpus, Torch(card))
    assert "driver 580.1" in text
    assert (
        "gpu 0      NVIDIA H200, compute capability 9.0, 139.7 GiB, power limit 500.00 W (default 700.00 W)"
        in text
    )
    limits.clear()
    assert "power limit not known (default not known)" in report(
        capsys, first_step.report_gpus, Torch(card)
    )


def test_nvidia_smi_is_read(first_step, monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/bash\nprintf 'GPU-1, 500.00 W, 700.00 W\\nGPU-2, 1 W, 2 W\\n'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert first_step.ask_nvidia_smi("x") == {
        "GPU-1": ["500.00 W", "700.00 W"],
        "GPU-2": ["1 W", "2 W"],
    }
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\nexit 9\n")
    assert first_step.ask_nvidia_smi("x") == {}


def test_matmul_counts_right(first_step, capsys):
    """The figure is 2 n^3 per product over the time: checked with a device that takes a known time per product."""
    import torch

    product_time, real = 0.02, torch.matmul

    class Slow:
        def __getattr__(self, name):
            return getattr(torch, name)

        def matmul(self, *args, **kwargs):
            time.sleep(product_time)
            return real(*args, **kwargs)

    n = 64
    start = time.perf_counter()
    speed = first_step.measure_matmul(Slow(), torch.device("cpu"), torch.float32, n, 0.4)
    assert time.perf_counter() - start >= 0.4
    assert 0.5 < speed / (2 * n**3 / product_time / 1e12) <= 1.0
    assert capsys.readouterr().err == ""

    class Wrong:
        def __getattr__(self, name):
            return getattr(torch, name)

        def randn(self, *size, **kwargs):
            return torch.randn(*size, **kwargs).as_subclass(WrongTensor)

    class WrongTensor(torch.Tensor):
        def __matmul__(self, other):
            result = torch.Tensor.__matmul__(
                self.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor)
            )
            return result if result.ndim == 0 else result + 5

    with pytest.raises(SystemExit) as stop:
        first_step.measure_matmul(Wrong(), torch.device("cpu"), torch.float32, n, 0.1)
    assert stop.value.code == 2
    assert "multiplies wrongly" in capsys.readouterr().err


def test_storage(first_step, capsys, monkeypatch, tmp_path):
    """Free space of the place named, also when it is not made yet."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not/yet"))
    monkeypatch.setenv("BUILD_CACHE", str(tmp_path))
    text = report(capsys, first_step.report_storage)
    told = float(
        re.search(rf"models +{re.escape(str(tmp_path))}/not/yet, ([\d,]+) GiB free", text)[
            1
        ].replace(",", "")
    )
    room = os.statvfs(tmp_path)
    assert abs(told - room.f_bavail * room.f_frsize / 1024**3) < 2
    assert not (tmp_path / "not").exists()
