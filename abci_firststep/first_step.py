"""Print what a job sees on this machine; each device multiplies two matrices as proof of life.

By hand:  python first_step.py
Submit:   qsub -P GROUP job.sh

Takes some seconds per device. Look here first when something is slow or fails: the host, the CPUs
given and usable, the memory, the GPUs, whether driver, CUDA and torch fit together, the PBS
variables, the job's deadline and the room left for models. Exit code 2 with an error line when the
node has a GPU that torch cannot use.

The multiplication counts 2 n^3 floating-point operations (n^3 multiplications and as many
additions) and runs in the precision that a training would use on that device: bf16 on GPUs that
have it (compute capability 8.0 and up), fp16 on older ones, fp32 on a CPU.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

# Dense 16-bit tensor-core TFLOP/s by the name that the driver gives, from NVIDIA's pages (Hopper's
# figures there are twice these, "with sparsity"). A card held below its default power limit, as
# some sites do, cannot reach them.
ADVERTISED_TFLOPS = {
    "NVIDIA H200": 989,  # https://www.nvidia.com/en-us/data-center/h200/
    "NVIDIA H100 80GB HBM3": 989,  # https://www.nvidia.com/en-us/data-center/h100/
    "NVIDIA A100-SXM4-80GB": 312,  # https://www.nvidia.com/en-us/data-center/a100/
    "NVIDIA A100-SXM4-40GB": 312,
    "Tesla V100-SXM2-16GB": 125,  # https://www.nvidia.com/en-us/data-center/v100/
    "Tesla V100-SXM2-32GB": 125,
}
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
GPU_DRIVER_FILE = Path("/dev/nvidiactl")
GIB = 1024**3


def fail(message: str) -> None:
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def show(name: str, value: object) -> None:
    """Print one line of the report."""
    print(f"{name:<10} {value}", flush=True)


def cgroup_values(file: str, controller: str = "") -> list[str]:
    """Contents of a limit file in this process's cgroup and in all above it, which count as well.

    ``controller`` names a hierarchy of cgroup v1; "" is v2.
    """
    values = []
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            for group in [Path(path), *Path(path).parents]:
                limit = CGROUPS / controller / group.relative_to("/") / file
                values += [limit.read_text().strip()] if limit.is_file() else []
    return values


def report_cpus() -> None:
    """CPUs of the machine, given by PBS, usable here, and the cgroup's share of their time."""
    given = f"{os.environ['NCPUS']} given by PBS, " if "NCPUS" in os.environ else ""
    quotas = [value.split() for value in cgroup_values("cpu.max") if not value.startswith("max")]
    share = min((float(limit) / float(period) for limit, period in quotas), default=None)
    limited = "" if share is None else f", time of {share:g} CPUs (cgroup)"
    usable = f"{given}{len(os.sched_getaffinity(0))} usable{limited}"
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    show("cpus", f"{os.cpu_count()} on the machine, {usable}; OMP_NUM_THREADS {threads}")


def report_memory() -> None:
    """Memory of the machine and the cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = cgroup_values("memory.max") + cgroup_values("memory.limit_in_bytes", "memory")
    limit = min((int(value) for value in limits if value != "max"), default=total)
    # cgroup v1 writes a number near 2^63 for "no limit".
    limited = f"limit {limit / GIB:.1f} GiB (cgroup)" if limit < total else "no limit set"
    show("memory", f"{total / GIB:.1f} GiB on the machine, {limited}")


def job_deadline() -> str:
    """When PBS will end this job, from one call of qstat; where that is not known, the reason."""
    job = os.environ.get("PBS_JOBID")
    if not job:
        return "none (not in a PBS job)"
    try:
        command = ["qstat", "-f", "-F", "json", job]
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        facts = json.loads(run.stdout)["Jobs"][job]
        walltime = facts["Resource_List"]["walltime"]
        hours, minutes, seconds = (int(part) for part in walltime.split(":"))
        start = datetime.strptime(facts["stime"], "%a %b %d %H:%M:%S %Y")
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        return f"unknown (qstat: {type(error).__name__}: {str(error)[:80]})"
    end = start + timedelta(hours=hours, minutes=minutes, seconds=seconds)
    left = timedelta(seconds=int((end - datetime.now()).total_seconds()))
    given = f"walltime {walltime}, group {facts.get('project')}"
    return f"{end:%Y-%m-%d %H:%M:%S}, {left} from now ({given})"


def report_job() -> None:
    """The PBS variables (without the job's cookie and the search path), nodes and deadline."""
    show("job", os.environ.get("PBS_JOBID", "none (not in a PBS job)"))
    for name in sorted(os.environ):
        if name.startswith("PBS_") and name not in ("PBS_JOBCOOKIE", "PBS_JOBID", "PBS_O_PATH"):
            print(f"           {name}={os.environ[name]}")
    node_file = Path(os.environ.get("PBS_NODEFILE", ""))
    if node_file.is_file():
        show("nodes", " ".join(sorted(set(node_file.read_text().split()))))
    show("deadline", job_deadline())


def report_storage() -> None:
    """Free space where models and compiled code go. A quota may leave less (ABCI: show_quota)."""
    models = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    places = [os.environ.get(name) for name in ("BUILD_CACHE", "PBS_LOCALDIR", "TMPDIR")]
    scratch = next((place for place in places if place), "/tmp")
    for name, directory in (("models", models), ("scratch", scratch)):
        place = Path(directory).absolute()
        there = next(path for path in [place, *place.parents] if path.exists())
        free = shutil.disk_usage(there).free / GIB
        show(name, f"{directory}, {free:,.0f} GiB free on its file system")


def ask_nvidia_smi(fields: str) -> dict[str, list[str]]:
    """GPU UUID -> values of nvidia-smi's query fields; empty where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu=uuid,{fields}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [line.split(", ") for line in run.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows}


def driver_cuda() -> str | None:
    """The newest CUDA version that the driver runs, as "13.0"; None without one. Needs no GPU."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except OSError:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def versions_fit(torch_cuda: str | None, driver: str | None) -> tuple[bool, str]:
    """Whether a driver runs the CUDA that torch was built for, and the sentence that says so.

    The major versions decide: a driver runs programs of its own CUDA major version and of older
    ones (https://docs.nvidia.com/deploy/cuda-compatibility/).
    """
    if torch_cuda is None:
        but = f" but the driver runs CUDA {driver}" if driver else ""
        return driver is None, f"torch is a CPU-only build{but}"
    if driver is None:
        return True, f"torch is built for CUDA {torch_cuda}, and this machine has no NVIDIA driver"
    fit = int(driver.split(".")[0]) >= int(torch_cuda.split(".")[0])
    verdict = "they fit" if fit else "the driver is too old"
    return fit, f"torch is built for CUDA {torch_cuda}, the driver runs up to {driver}: {verdict}"


def report_gpus(torch) -> None:
    """Versions and each GPU; exit code 2 where torch sees none of the GPUs that the job has."""
    _, fit = versions_fit(torch.version.cuda, driver_cuda())
    driver = next(iter(ask_nvidia_smi("driver_version").values()), ["not found"])[0]
    python = sys.version.split()[0]
    show("versions", f"Python {python}, torch {torch.__version__}, NVIDIA driver {driver}; {fit}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    asked_for_none = visible == "" or os.environ.get("PBS_QUEUE") == "rt_HC"
    if GPU_DRIVER_FILE.exists() and not torch.cuda.is_available() and not asked_for_none:
        fail(
            f"this node has an NVIDIA driver ({driver}), but torch {torch.__version__} sees no "
            f"GPU: {fit}; CUDA_VISIBLE_DEVICES is {visible or 'unset'}. "
            "Type: bash ../jobs/setup_venv.sh (it checks the versions)"
        )
    limits = ask_nvidia_smi("power.limit,power.default_limit")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        limit, default = limits.get(f"GPU-{card.uuid}", ["not known", "not known"])
        name = f"{card.name}, compute capability {card.major}.{card.minor}"
        power = f"power limit {limit} (default {default})"
        show(f"gpu {index}", f"{name}, {card.total_memory / GIB:.1f} GiB, {power}")
    if not torch.cuda.device_count():
        show("gpus", "none" + (" given to this job" if GPU_DRIVER_FILE.exists() else ""))


def measure_matmul(torch, device, dtype, size: int, seconds: float) -> float:
    """TFLOP/s of size x size products on a device, over at least ``seconds`` after a warm-up."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    for _ in range(3):
        product = left @ right
    wait(device)
    # One entry computed apart, in double precision: a device that is fast and wrong is no sign of
    # life. An entry is a sum of `size` products of standard normal numbers, so of the size of its
    # square root; 16-bit rounding is 0.4 %.
    exact, found = float(left[0].double() @ right[:, 0].double()), float(product[0, 0])
    if not abs(found - exact) <= 0.02 * size**0.5:
        fail(f"{device} multiplies wrongly: {found:g}, {exact:g} is right. Change to another node")
    rounds, done, start = 1, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(rounds):
            torch.matmul(left, right, out=product)
        wait(device)
        done += rounds
        rounds = min(2 * rounds, 64)  # few waits, so that they cost nothing
    return 2 * size**3 * done / elapsed / 1e12


def report_speed(torch, size: int | None, seconds: float) -> None:
    """One line per device: its TFLOP/s, beside the advertised figure where one is known."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in gpus or [torch.device("cpu")]:
        name, dtype, n = "CPU", torch.float32, size or 1024
        if device.type == "cuda":
            name, n = torch.cuda.get_device_name(device), size or 8192
            has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
            dtype = torch.bfloat16 if has_bf16 else torch.float16
        speed = measure_matmul(torch, device, dtype, n, seconds)
        advertised, share = ADVERTISED_TFLOPS.get(name), ""
        if advertised:
            share = f", {100 * speed / advertised:.0f} % of the advertised {advertised}"
        how = f"in {str(dtype).split('.')[1]}, n = {n}"
        show("matmul", f"{device} ({name}): {speed:,.2f} TFLOP/s {how}{share}")


def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seconds", type=float, default=1.0, help="time for each device, at least (default 1)")
    add("--matrix_size", type=int, help="rows of a matrix (default 8192 on a GPU, 1024 on a CPU)")
    args = parser.parse_args(argv)
    if not 0 < args.seconds <= 3600:
        parser.error(f"--seconds {args.seconds} is not above 0 and at most 3600")
    if args.matrix_size is not None and not 1 <= args.matrix_size <= 65536:
        parser.error(f"--matrix_size {args.matrix_size} is not from 1 to 65536")
    show("host", f"{os.uname().nodename}, {os.uname().sysname} {os.uname().release}")
    report_cpus()
    report_memory()
    report_job()
    report_storage()
    try:
        import torch
    except ImportError as error:
        advice = "Make the environment first: bash ../jobs/setup_venv.sh"
        fail(f"torch does not import ({error}). {advice}")
    report_gpus(torch)
    report_speed(torch, args.matrix_size, args.seconds)


if __name__ == "__main__":
    main()
