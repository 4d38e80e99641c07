"""Check the virtual environment this runs in against requirements.txt, and print a table.

Command:  bash jobs/setup_venv.sh  (which ends with it), or in a job: python ../jobs/check_venv.py

Three questions: are the pinned versions there, does each package import, and do torch, bitsandbytes
and DeepSpeed (by their own reports, ``python -m bitsandbytes`` and ``ds_report``) find what they
need on this machine. On a login node, which has no GPU, the last one can only be half answered: run
it once in a GPU job too. Exit code 1 when a check failed.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import io
import os
import re
import subprocess
import sys
from pathlib import Path

# Import name where it is not the package's name.
IMPORT_NAMES = {"protobuf": "google.protobuf", "pyyaml": "yaml"}


def read_pins(path: Path) -> dict[str, str]:
    """Package -> exact version, for each ``name==version`` line of a requirements file."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^\s;#]+)", line)
        if match:
            pins[match[1]] = match[2]
    return pins


def installed_version(package: str) -> str | None:
    """Version of a package in this environment, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(pin: str, version: str | None) -> bool:
    """True when the installed version is the pinned one, but for a build name (``2.13.0+cpu``)."""
    return version is not None and pin in (version, version.split("+")[0])


def check_packages(pins: dict[str, str]) -> list[tuple[str, str, bool, str]]:
    """Rows (package, version, ok, remark): pinned version and import of each package."""
    rows = []
    for package, pin in pins.items():
        version = installed_version(package)
        if not fits(pin, version):
            rows.append((package, version or "-", False, f"requirements.txt wants {pin}"))
            continue
        try:
            # DeepSpeed says a good deal while it is imported; its own report below says it better.
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                importlib.import_module(IMPORT_NAMES.get(package, package).replace("-", "_"))
        except Exception as error:  # whatever an import can raise is this row's finding
            remark = f"does not import: {type(error).__name__}: {' '.join(str(error).split())[:90]}"
            rows.append((package, version, False, remark))
        else:
            rows.append((package, version, True, "imports"))
    return rows


# Copied from abci_firststep/first_step.py
def driver_cuda() -> str | None:
    """The newest CUDA version that the driver runs, as "13.0"; None without one. Needs no GPU."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except OSError:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


# Copied from abci_firststep/first_step.py
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


def own_report(command: list[str], good: str, bad: str) -> tuple[bool, str]:
    """Run a package's own report; return (ok, its telling line).

    ``bad`` counts more than ``good``; both are regular expressions for one line.
    """
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"{' '.join(command[-2:])}: {error}"
    lines = [
        re.sub(r"\x1b\[\d*m", "", line).strip() for line in (run.stdout + run.stderr).splitlines()
    ]
    faults = [line for line in lines if re.search(bad, line)]
    telling = faults or [line for line in lines if re.search(good, line)]
    if not telling:
        return False, "said nothing we know"
    return run.returncode == 0 and not faults, telling[0][:110]


def check_reports() -> list[tuple[str, str, bool, str]]:
    """Rows for bitsandbytes' and DeepSpeed's own reports, and for torch against the driver."""
    try:
        import torch
    except Exception as error:  # a torch that is missing or broken is a finding
        return [("torch CUDA", "-", False, f"torch does not import: {error}")]
    driver, gpus = driver_cuda(), torch.cuda.device_count()
    ok, remark = versions_fit(torch.version.cuda, driver)
    if driver and ok:
        remark += f", {gpus} GPU{'s' * (gpus != 1)} seen"
        ok = (
            gpus > 0
            or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
            or os.environ.get("PBS_QUEUE") == "rt_HC"
        )
    elif torch.version.cuda and not driver:
        remark += " (a login node?): check again in a GPU job"
    rows = [("torch CUDA", torch.version.cuda or "-", ok, remark)]
    bad = r"failed to load|running as CPU-only|^Traceback|^\w*Error:"
    ok, remark = own_report(
        [sys.executable, "-m", "bitsandbytes"], r"CPU library loaded successfully|^SUCCESS!", bad
    )
    rows.append(
        ("bitsandbytes", installed_version("bitsandbytes") or "-", ok, f"reports: {remark}")
    )
    if torch.version.cuda:
        name = f"libbitsandbytes_cuda{torch.version.cuda.replace('.', '')}.so"
        there = any(file.name == name for file in importlib.metadata.files("bitsandbytes") or [])
        remark = f"its wheel {'carries' if there else 'does not carry'} {name}"
        rows.append(("bitsandbytes", "", there, remark))
    report = str(Path(sys.executable).with_name("ds_report"))
    ok, remark = own_report(
        [sys.executable, report],
        r"^ninja \.+ \[OKAY\]",
        r"^Traceback|^ninja \.+ \[NO|ModuleNotFoundError",
    )
    rows.append(("deepspeed", installed_version("deepspeed") or "-", ok, f"reports: {remark}"))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Print the table; SystemExit(1) when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument(
        "--pins", action="store_true", help="compare versions only; imports nothing, takes a moment"
    )
    parser.add_argument(
        "--requirements",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "requirements.txt",
    )
    args = parser.parse_args(argv)
    try:
        pins = read_pins(args.requirements)
    except OSError as error:
        parser.error(
            f"{args.requirements} cannot be read ({error.strerror}), so nothing tells the "
            "right versions"
        )
    if args.pins:
        rows = [
            (name, installed_version(name) or "-", fits(pin, installed_version(name)), "")
            for name, pin in pins.items()
        ]
    else:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        rows = check_packages(pins) + check_reports()
    for name, version, ok, remark in rows:
        print(f"{name:<16} {version:<14} {'ok  ' if ok else 'FAIL'}  {remark}".rstrip())
    failed = [name for name, _, ok, _ in rows if not ok]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} checks passed"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
