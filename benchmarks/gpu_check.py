#!/usr/bin/env python3
"""Check on one GPU what no CPU shows: exactness, memory, speed; print it as the page's table.

Runs the lessons' own scripts, on tiny models and on models of real sizes whose weights are drawn
from a seed; gpu_items.py has the list. Takes 30 minutes at most, an item 8; started again it goes
on where it stopped. Nothing but the figures is kept, in a JSON file.

    python gpu_check.py
    python gpu_check.py --items full_bf16,full_7b
    python gpu_check.py --list            what is run, and what is expected
    python gpu_check.py --table           the table of what was measured so far
    python gpu_check.py --dry_run         all of it on a CPU, with tiny sizes
    qsub -P GROUP job.sh

--wheels DIR takes packages from wheels in DIR, where nothing can be installed.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path += [str(HERE), str(ROOT / "jobs")]
from gpu_items import ITEMS  # noqa: E402
from run_common import check, fail, say  # noqa: E402
from run_ranks import error_line  # noqa: E402

PYTHON = [sys.executable]
ITEM_SECONDS = 480
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text("utf-8"), re.M))
# What is left out, or not as the collection is tested, without a package or with an older one.
ALL = "every item"
WITHOUT = {
    "torch": ALL,
    "transformers": ALL,
    "datasets": "every training",
    "accelerate": "training",
}
WITHOUT |= {"peft": "LoRA", "deepspeed": "ZeRO", "bitsandbytes": "8 and 4 bit"}
WITHOUT |= {"sentencepiece": ALL, "protobuf": "models of the llama kind"}
OPTIONAL = {"flash-attn": "flash_attention_2", "flash-attn-3": "flash_attention_3"}
OPTIONAL |= {"kernels": "hub_kernel"}


class LeftOut(Exception):
    """An item that cannot be done here; the words say why."""


class Failed(Exception):
    """A command of an item ended badly; the words are its last line."""


# ---- What is asked for ----


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error, add = fail, parser.add_argument
    add("--items", help="NAME,NAME: only these (default: all that are not done yet)")
    add("--list", action="store_true", help="print the items and leave")
    add("--table", action="store_true", help="print the table of --output_file and leave")
    add("--dry_run", action="store_true", help="run every item on the CPU with tiny sizes")
    add("--minutes", type=float, default=30, help="start no item after this (default 30)")
    add("--wheels", type=Path, help="directory of wheels to use without installing them")
    add("--output_file", type=Path, help="the results (default: output/gpu_check.json)")
    args = parser.parse_args(argv)
    names = [item.name for item in ITEMS]
    wanted = args.items.split(",") if args.items else names
    for name in wanted:
        check(name in names, f"--items {name or '(empty)'} is no item. --list names them.")
    args.items = [item for item in ITEMS if item.name in wanted]
    check(args.minutes > 0, f"--minutes {args.minutes} must be above 0.")
    name = "gpu_check_dry_run.json" if args.dry_run else "gpu_check.json"
    args.output_file = args.output_file or HERE / "output" / name
    return args


def unpack_wheels(folder, site):
    """Put wheels where this process and those it starts find them."""
    wheels = sorted(folder.glob("*.whl"))
    check(wheels, f"--wheels {folder} has no *.whl in it.")
    for wheel in wheels:
        tag = wheel.stem.rsplit("-", 3)[1:2]
        what = "holds code for another Python. Take a wheel with py3-none in its name."
        good = {"py3", f"py3{sys.version_info.minor}"}
        is_any = tag and good & {*tag[0].split(".")} and "-none-" in wheel.name
        check(is_any, f"{wheel.name} {what}")
        try:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)
        except (OSError, zipfile.BadZipFile) as error:
            fail(f"{wheel}: {error}. Fetch it again.")
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])


# ---- The machine ----


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def look_at_machine(is_dry):
    """Device, driver and versions; without a GPU None, but for a dry run."""
    machine = {"device": "CPU (dry run)", "gpus": 2, "memory": 1e15}
    if not is_dry:
        query = "--query-gpu=name,memory.total,power.limit,driver_version"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            name, memory, power, driver = done.stdout.splitlines()[0].split(", ")
            import torch

            if not torch.cuda.is_available():
                return None
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            return None
        machine = {"device": name, "gpus": torch.cuda.device_count(), "memory": int(memory) * 2**20}
        machine |= {"power_limit_w": power, "driver": driver, "cuda": torch.version.cuda}
    machine["python"] = sys.version.split()[0]
    machine["versions"] = {name: installed(name) for name in [*PINNED, *OPTIONAL]}
    sources = [*ROOT.glob("finetune_*/*.py"), *ROOT.glob("jobs/*.py"), *HERE.glob("gpu_*.py")]
    sources += [*ROOT.glob("generate_text/*.py"), *ROOT.glob("deepspeed_configs/*.json")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources)))
    machine["sources"] = digest.hexdigest()[:12]
    return machine


def show_machine(machine):
    names = ("power_limit_w", "driver", "cuda", "python", "sources")
    words = ", ".join(f"{name} {machine[name]}" for name in names if name in machine)
    say("machine", f"{machine['gpus']} x {machine['device']}, {words}")
    for name, found in machine["versions"].items():
        wanted, lost = PINNED.get(name), WITHOUT.get(name) or OPTIONAL.get(name)
        if found is None:
            say(
                "missing",
                f"{name} {wanted or ''}".strip() + f": left out: {lost or 'nothing here'}",
            )
        elif wanted and found.split("+")[0] != wanted:
            say(
                "differs", f"{name} {found}, pinned is {wanted}; it matters for {lost or 'nothing'}"
            )


# ---- An item ----


class Bench:
    """Where the items work, and how they run a command."""

    LeftOut, Failed = LeftOut, Failed

    def __init__(self, work, machine, is_dry):
        self.work, self.is_dry, self.card = work, is_dry, machine["memory"]
        self.done, self.figures, self.count, self.ends = {}, {}, 0, 0
        self.data, self.texts = work / "jsquad_train.jsonl", work / "texts.jsonl"
        self.uneven, self.uneven_long = work / "uneven.jsonl", work / "uneven_long.jsonl"
        self.prompts, self.few_prompts = work / "24.jsonl", work / "8.jsonl"
        self.many_prompts = work / "128.jsonl"
        self.real = "--max_length 64 --max_steps 4" if is_dry else "--max_length 2048 --max_steps 8"

    def folder(self):
        self.count += 1
        return self.work / "results" / str(self.count)

    def run(self, command, env=None, fails=False):
        """Run a script as a user would; what it printed, its last line and its status."""
        own = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        own["HF_DATASETS_CACHE"] = f"{self.work}/cache"
        process = subprocess.Popen(
            [*PYTHON, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | own | (env or {}),
            start_new_session=True,
        )
        limit = self.ends - time.monotonic()
        try:
            log = process.communicate(timeout=max(1, limit))[0]
        except subprocess.TimeoutExpired:
            raise Failed("was not ready in time") from None
        finally:
            if process.poll() is None:
                end(process)
        lines = [line for line in log.splitlines() if line.strip()] or ["(it said nothing)"]
        last = error_line(lines) or lines[-1]
        if process.returncode and not fails:
            raise Failed(f"status {process.returncode}: {last}")
        return SimpleNamespace(log=log, last=last, status=process.returncode)

    def prepare(self):
        """Rows to train on, prompts, and the small models."""
        self.ends = time.monotonic() + ITEM_SECONDS
        sample = [
            "--jglue_dir",
            ROOT / "jglue/sample",
            "--task",
            "jsquad",
            "--output_dir",
            self.work,
        ]
        self.run([ROOT / "jglue/prepare_jglue.py", *sample])
        rows = self.data.read_text("utf-8").strip().split("\n")
        for file, count in ((self.prompts, 24), (self.few_prompts, 8), (self.many_prompts, 128)):
            if file != self.prompts or count == 24:
                file.write_text("\n".join((rows * 9)[:count]) + "\n", "utf-8")
        text = "".join(json.loads(row)["prompt"] for row in rows)
        text *= 1 if self.is_dry else 1 + 400_000 // len(text)
        self.texts.write_text(json.dumps({"text": text}) + "\n", "utf-8")
        for file, times in ((self.uneven, 1), (self.uneven_long, 6)):
            parts = [text[: times * (30 + number * 29 % 450)] for number in range(64)]
            file.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), "utf-8")
        for kind in ("llama", "gpt_neox"):
            words = f"--model_type {kind} --vocab_size 510 --hidden_size 96 --num_hidden_layers 2"
            words += f" --num_attention_heads 3 --initializer_range 0.1 --text_file {self.data}"
            out = ["--output_dir", self.work / kind]
            self.run([ROOT / "tiny_model/make_tiny_model.py", *words.split(), *out])

    def entry(self, model):
        models = json.loads((ROOT / "tiny_model/models.json").read_text("utf-8"))["models"]
        return models[model.partition("_6")[0]]

    def weights(self, model):
        """Bytes of a real model in 16 bit."""
        return 0 if self.is_dry else 2 * self.entry(model)["parameters"]

    def make_real(self, model):
        """A directory with a real model's configuration and a small tokenizer; no weights."""
        config, folder = dict(self.entry(model)["config"]), self.work / model
        if folder.exists():
            return
        if model.endswith("_6"):
            config["num_hidden_layers"] = 6
        if self.is_dry:
            config |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
            config |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        files = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(self.work / config["model_type"], folder, ignore=files)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")


def end(process):
    """Kill it and all that it started: torchrun's workers have sessions of their own."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def do(bench, item, machine):
    """An item's result; whatever goes wrong in it is recorded, and the others go on."""
    began, bench.figures = time.monotonic(), {}
    lacks = [name for name in item.needs.split() if not installed(name)]
    try:
        if lacks and not (bench.is_dry and item.on_cpu is not None):
            raise LeftOut(f"{', '.join(lacks)} is not installed")
        if item.gpus > machine["gpus"]:
            raise LeftOut(f"needs {item.gpus} GPUs, has {machine['gpus']}")
        good, measured = item.kind(bench, item)
        status = "ok" if good else "differs"
    except LeftOut as why:
        status, measured = "left out", str(why)
    except Failed as why:
        status, measured = "failed", str(why)
    except Exception as error:  # a file that is not there, a line that says something else
        status, measured = "failed", repr(error)
    finally:
        shutil.rmtree(bench.work / "results", ignore_errors=True)
    if bench.is_dry and item.on_cpu is not None:
        measured += "; not on a CPU: " + item.more.replace(f"{ROOT}/", "")
    seconds = round(time.monotonic() - began, 1)
    return {"status": status, "measured": measured[:300], "seconds": seconds} | bench.figures


# ---- Results ----


def read_results(file):
    try:
        return json.loads(file.read_text("utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        return fail(f"--output_file {file} cannot be read: {error}. Name another, or remove it.")


def write_results(file, results):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
        new.replace(file)
    except OSError as error:
        fail(f"--output_file {file} cannot be written: {error.strerror}. Name another.")


def measured_on(result):
    """The line that tells where and when a GPU gave this result; none for what it did not give."""
    machine, versions = result["machine"], []
    if "CPU" in machine["device"] or result["status"] not in ("ok", "differs"):
        return ""
    for name in "torch transformers datasets peft deepspeed bitsandbytes".split():
        if number := machine["versions"].get(name):
            versions.append(f"{name} {number}")
    power = f"power limit {machine['power_limit_w']} W, driver {machine['driver']}"
    return f"Measured on {result['date']}: {machine['device']}, {power}, {', '.join(versions)}."


def table(results):
    """The page's table; what no GPU has shown is not measured."""
    for line in dict.fromkeys(map(measured_on, results.values())):
        if line:
            yield from (line, "")
    yield "| Item | Expected | Measured |"
    yield "|---|---|---|"
    for item in ITEMS:
        found = results.get(item.name, {})
        measured = found.get("measured", "not measured").replace("|", "\\|")
        if "CPU" in found.get("machine", {}).get("device", ""):
            measured = "not measured"
        note = "" if found.get("status") in (None, "ok") else f"**{found['status']}**: "
        yield f"| `{item.name}` | {item.expected} | {note}{measured} |"


def main(argv=None):
    args = parse(argv)
    if args.list:
        for item in args.items:
            say(f"{item.name:<20}", f"{item.what.replace(f'{ROOT}/', '')}  ({item.expected})")
        return 0
    results = read_results(args.output_file)
    if args.table:
        print(*table(results), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as work:
        return check_all(args, results, Path(work))


def check_all(args, results, work):
    ends = time.monotonic() + 60 * args.minutes
    if args.wheels:
        unpack_wheels(args.wheels, work / "site")
    machine = look_at_machine(args.dry_run)
    check(machine, "no GPU that torch can use. nvidia-smi? Or type --dry_run, or --table.")
    show_machine(machine)
    write_results(args.output_file, results)
    is_done = lambda name: (  # noqa: E731
        results.get(name, {}).get("status") in ("ok", "differs")
        and results[name]["machine"] == machine
    )
    todo = [item for item in args.items if not is_done(item.name)]
    todo.sort(key=lambda item: item.name in results)  # what failed before comes last
    say("items", f"{len(todo)} of {len(args.items)} to do; {args.output_file}")
    bench = Bench(work, machine, args.dry_run)
    if todo:
        bench.prepare()
    for number, item in enumerate(todo):
        left = ends - time.monotonic()
        if left < 60:
            number = len(todo) - number
            say("time", f"{number} items are left. The same command goes on from there.")
            return 1
        bench.ends = time.monotonic() + min(ITEM_SECONDS, left)
        found = do(bench, item, machine)
        if found["measured"] == "was not ready in time" and left < ITEM_SECONDS:
            continue
        results[item.name] = found | {"machine": machine, "date": time.strftime("%Y-%m-%d")}
        write_results(args.output_file, results)
        line = f"{found['status']:<9}{found['measured']}  (expected {item.expected})"
        print(f"{item.name:<21}{line}  {found['seconds']:.0f} s", flush=True)
    print()
    print(*table(results), sep="\n")
    bad = {"failed", "differs"}
    return int(any(results.get(item.name, {}).get("status") in bad for item in args.items))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    sys.exit(main())
