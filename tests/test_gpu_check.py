"""benchmarks/gpu_check.py without a GPU: its dry run, its results file, what it says of a machine.

A cell for each kind of item is run here; `python benchmarks/gpu_check.py --dry_run` runs them all.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_script

gpu_check = load_script(ROOT / "benchmarks" / "gpu_check.py")
kinds = sys.modules["gpu_kinds"]
ITEMS = {item.name: item for item in gpu_check.ITEMS}
# One for each kind; ddp_timeout is of those that gpu_inside.py looks at.
CELLS = "full_fp16 answers_bf16 liger full_eval ddp_timeout hidden_gpu merge_note lora_13b"
CELLS = f"{CELLS} generate_7b several_nodes".split()


def start(*words):
    """(status, stdout, stderr) of a start of the command in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = gpu_check.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A command that runs scripts in a Python that has imported the packages: warm_python.py."""
    folder = tmp_path_factory.mktemp("gpu_check")
    script, socket, command = ROOT / "tests/warm_python.py", folder / "socket", folder / "python"
    client = shlex.join([sys.executable, "-S", str(script), str(socket)])
    real = f'[[ $1 != -m ]] || exec {shlex.quote(sys.executable)} "$@"'
    command.write_text(f'#!/bin/bash\n{real}\nexec {client} "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, script, socket], env=environment) as server:
        while not socket.exists() and server.poll() is None:
            time.sleep(0.1)
        kept, gpu_check.PYTHON = gpu_check.PYTHON, [str(command)]
        yield
        gpu_check.PYTHON = kept
        server.terminate()


@pytest.fixture(scope="module")
def dry(python, tmp_path_factory):
    """(status, what it printed, results, file) of a dry run of CELLS."""
    file = tmp_path_factory.mktemp("results") / "deep" / "results.json"
    status, out, errors = start("--dry_run", "--output_file", file, "--items", ",".join(CELLS))
    assert not errors
    return status, out, json.loads(file.read_text("utf-8")), file


def test_dry_run_of_every_kind(dry):
    status, out, results, _ = dry
    assert {*map(kind_of, CELLS), "saved", "segments"} == {*map(kind_of, ITEMS)}
    wanted = dict.fromkeys(CELLS, "ok") | {"several_nodes": "left out"}
    assert {name: found["status"] for name, found in results.items()} == wanted, out
    assert status == 0
    assert "not on a CPU: --precision fp16" in results["full_fp16"]["measured"]
    assert "loss 0.0e+00" in results["full_fp16"]["measured"]  # both in fp32 here
    assert re.match(r"\d+ of 24 equal", results["answers_bf16"]["measured"])
    assert "error: --use_liger_kernel does not work" in results["liger"]["measured"]
    assert results["full_eval"]["measured"].startswith("status 2: error: GPU memory is full. Try")
    assert "whose rounding is gone" in results["merge_note"]["measured"]
    # A figure of a CPU never gets into the table.
    assert out.count("not measured") == len(ITEMS)


def kind_of(name):
    return ITEMS[name].kind.__name__


def test_mfu_is_the_share_of_the_matmul(dry):
    """4 operations for each parameter of a frozen Llama and each token, counted by hand here."""
    found = dry[2]["lora_13b"]
    width, inner, layers, words = 64, 128, 2, 512
    layer = 4 * width * width + 3 * width * inner + 2 * width
    parameters = layers * layer + 2 * words * width + width
    speed, matmul = found["tokens_per_second"], found["matmul_tflops"] * 1e12
    assert found["mfu"] == pytest.approx(4 * parameters * speed / matmul)
    adapters = layers * 16 * (4 * 2 * width + 3 * (width + inner))
    wanted = found["peak_memory_gib"] * 2**30 / (parameters + adapters)
    assert found["bytes_per_parameter"] == pytest.approx(wanted)
    assert found["model"] == "open_llama_13b" and found["computed_gib"] > 0


def test_second_start_skips_what_is_done(dry, monkeypatch):
    _, _, before, file = dry
    monkeypatch.setattr(gpu_check, "PYTHON", ["false"])
    words = ["--dry_run", "--output_file", file, "--items", "full_fp16,lora_13b"]
    status, out, _ = start(*words)
    assert status == 0 and "0 of 2 to do" in out
    assert json.loads(file.read_text("utf-8")) == before
    # With another version, another driver or an edited script they are done anew; so is what failed.
    monkeypatch.setattr(gpu_check, "PINNED", gpu_check.PINNED | {"pip": "1.0"})
    monkeypatch.setattr(gpu_check.Bench, "prepare", lambda bench: None)
    status, out, _ = start(*words)
    assert status == 1 and "2 of 2 to do" in out and "differs    pip" in out
    after = json.loads(file.read_text("utf-8"))
    assert {after[name]["status"] for name in ("full_fp16", "lora_13b")} == {"failed"}
    assert after["merge_note"] == before["merge_note"]
    assert "2 of 2 to do" in start(*words)[1]
    file.write_text(json.dumps(before))


# ---- Exactness ----


def run_of(losses, gradient=1.0):
    return SimpleNamespace(steps=[{"loss": loss, "grad_norm": gradient} for loss in losses])


@pytest.mark.parametrize(
    ("losses", "gradient", "good"),
    [
        ([6.0, 5.0, 4.0, 3.0], 1.0, True),
        ([6.0, 5.0, 4.0, 3.029], 1.09, True),
        ([6.0, 5.0, 4.0, 3.031], 1.0, False),  # 1 % of 3
        ([6.061, 5.0, 4.0, 3.0], 1.0, False),
        ([6.0, float("nan"), 4.0, 3.0], 1.0, False),
        ([6.0, 5.0, 4.0, 3.0], float("inf"), False),
        ([6.0, 5.0, 4.0, 3.0], 1.11, False),
    ],
)
def test_tolerance(losses, gradient, good, monkeypatch):
    runs = {kinds.ON_CPU: run_of([6.0, 5.0, 4.0, 3.0])}
    found = run_of(losses, gradient)
    monkeypatch.setattr(kinds, "train", lambda bench, item, more, **_: runs.get(more, found))
    is_good, text = kinds.exact(SimpleNamespace(is_dry=False), ITEMS["full_bf16"])
    assert is_good is good, text


def test_a_wrong_loss_is_seen(python, tmp_path):
    """The CPU's run has the right positions, the run that stands for the GPU's has wrong ones."""
    bench = gpu_check.Bench(tmp_path, {"memory": 1e15}, True)
    bench.prepare()
    item, config = ITEMS["full_bf16"], tmp_path / "llama" / "config.json"
    kinds.train(bench, item, kinds.ON_CPU)
    right = config.read_text("utf-8")
    wrong = re.sub(r'"rope_theta": [\d.]+', '"rope_theta": 100.0', right)
    assert wrong != right
    config.write_text(wrong, "utf-8")
    found = gpu_check.do(bench, item, {"gpus": 1})
    assert found["status"] == "differs", found
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("8bit_warnings", {"log": "step 1"}, {"log": "step 1\nMatMul8bitLt: inputs will be cast"}),
        ("8bit_gradients", {"gradients_8bit": ["bfloat16"]}, {"gradients_8bit": ["float32"]}),
        ("8bit_gradients", {"gradients_8bit": ["bfloat16"]}, {"gradients_8bit": []}),
        ("workers", {"workers": 2}, {"workers": 0}),
        ("ddp_timeout", {"ddp_timeout": 21600}, {"ddp_timeout": 1800}),
        ("compile_widths", {"widths": [9, 8, 7, 6], "graphs": 8}, {"widths": [9, 8], "graphs": 2}),
        (
            "compile_widths",
            {"widths": [9, 8, 7, 6], "graphs": 6},
            {"widths": [9, 8, 7, 6], "graphs": 9},
        ),
        ("memory_told", {"allocated_gib": 1.0}, {"allocated_gib": 2.0}),
    ],
)
def test_what_is_seen_can_be_wrong(name, good, bad):
    results = {"peak_memory_gib": 1.0, "peak_reserved_gib": 1.5}
    for values, wanted in ((good, True), (bad, False)):
        report = {"allocated_gib": 1.0, "reserved_gib": 1.5} | values
        run = SimpleNamespace(log=values.get("log", ""), report=report, results=results)
        assert kinds.LOOKS[name](run)[0] is wanted


# ---- Cards that are too small, items that fail ----


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        (140, ("open_llama_13b", False, "")),
        (60, ("open_llama_13b", True, "open_llama_13b needs 115 GiB, has 60 GiB; ")),
        (40, (kinds.SMALLER, True, "open_llama_13b, checkpointed, needs 50 GiB, has 40 GiB; ")),
        (20, "japanese-gpt-neox-3.6b, checkpointed, needs 30 GiB, has 20 GiB"),
    ],
)
def test_a_card_that_is_too_small(card, wanted, monkeypatch, tmp_path):
    def need(bench, item, model, more, lesson):
        first = 30 if model == kinds.SMALLER else 50 if kinds.CHECKPOINTED in more else 115
        return SimpleNamespace(need=first * 2**30)

    bench = gpu_check.Bench(tmp_path, {"memory": card * 2**30}, False)
    bench.make_real = lambda model: None
    monkeypatch.setattr(kinds, "plan_of", need)
    if isinstance(wanted, str):
        monkeypatch.setattr(kinds, "real", kinds.place)
        found = gpu_check.do(bench, replace(ITEMS["lora_13b"], kind=kinds.place), {"gpus": 1})
        assert found["status"] == "left out" and found["measured"].endswith(wanted)
        return
    model, more, _, note = kinds.place(bench, ITEMS["lora_13b"])
    assert (model, kinds.CHECKPOINTED in more) == wanted[:2]
    assert note.endswith(wanted[2]) and (note != "") == (wanted[2] != "")


def test_the_estimate_is_of_the_item(tmp_path):
    """What an item is said to need: 16 bytes for each weight that is trained, 24 under ZeRO-2."""
    bench = gpu_check.Bench(tmp_path, {"memory": 1e15}, True)
    for kind in ("gpt_neox", "llama"):
        (tmp_path / kind).mkdir()
    for name, each in (("bytes", 16), ("bytes_zero2", 24 + 8)):  # and two buckets
        item = ITEMS[name]
        bench.make_real("open-calm-7b_6")
        more = f"{item.more} {bench.real}"
        plan = kinds.plan_of(bench, item, "open-calm-7b_6", more, "full")
        names = ("weights", "gradients", "optimizer", "communication")
        assert sum(plan.items[n] for n in names) == pytest.approx(each * plan.counts.total)


def test_a_failing_item_is_recorded_and_the_others_go_on(monkeypatch, tmp_path):
    def tell(bench, item):
        return True, bench.run(["-c", "print('fine')"]).last

    def fall(bench, item):
        return True, bench.run(["-c", "import sys; print('a'); sys.exit('error: no such thing')"])

    def hang(bench, item):
        bench.ends = time.monotonic() + 1
        file = tmp_path / "late"
        late = f"import time; time.sleep(3); open({str(file)!r}, 'w')"
        # As torchrun starts its workers: in a session of their own.
        start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {late!r}], "
        return True, bench.run(["-c", f"{start}start_new_session=True); {late}"])

    def lack(bench, item):
        return True, (tmp_path / "nothing").read_text()

    functions = [fall, hang, lack, tell]
    items = [replace(ITEMS["liger"], name=f.__name__, kind=f) for f in functions]
    items += [
        replace(items[-1], name="two", gpus=9),
        replace(items[-1], name="pip", needs="none-1"),
    ]
    monkeypatch.setattr(gpu_check, "ITEMS", items)
    monkeypatch.setattr(gpu_check, "PYTHON", [sys.executable])
    monkeypatch.setattr(gpu_check.Bench, "prepare", lambda bench: None)
    file = tmp_path / "results.json"
    status, out, _ = start("--dry_run", "--output_file", file)
    found = {name: (r["status"], r["measured"]) for name, r in json.loads(file.read_text()).items()}
    assert status == 1
    assert found.pop("lack")[1].startswith("FileNotFoundError")
    assert found == {
        "fall": ("failed", "status 1: error: no such thing"),
        "hang": ("failed", "was not ready in time"),
        "tell": ("ok", "fine"),
        "two": ("left out", "needs 9 GPUs, has 2"),
        "pip": ("left out", "none-1 is not installed"),
    }
    assert "fall                 failed   status 1: error: no such thing" in out
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()  # what was too slow was ended
    assert not list(tmp_path.glob("*.new"))


def test_no_item_begins_after_its_time(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check.Bench, "prepare", lambda bench: None)
    words = ["--dry_run", "--items", "liger,zero2", "--output_file", tmp_path / "r.json"]
    status, out, _ = start(*words, "--minutes", "0.5")
    assert status == 1 and "2 items are left. The same command goes on from there." in out
    assert json.loads((tmp_path / "r.json").read_text()) == {}


# ---- The machine ----


def write_wheel(folder, name, tag="py3-none-any", number="9.9"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{number}-{tag}.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", "")
        file.writestr(f"{name}-{number}.dist-info/METADATA", f"Name: {name}\nVersion: {number}\n")


def test_machine_and_versions(monkeypatch, tmp_path):
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/bash\necho 'NVIDIA H200, 143771, 700.00, 580.1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    write_wheel(tmp_path / "wheels", "peft")
    gpu_check.unpack_wheels(tmp_path / "wheels", tmp_path / "site")
    assert os.environ["PYTHONPATH"].startswith(str(tmp_path / "site"))
    monkeypatch.setattr(gpu_check, "PINNED", {**gpu_check.PINNED, "no-such": "1"})
    machine = gpu_check.look_at_machine(False)
    assert (machine["device"], machine["gpus"], machine["memory"]) == (
        "NVIDIA H200",
        1,
        143771 * 2**20,
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        gpu_check.show_machine(machine)
    first, *lines = out.getvalue().splitlines()
    assert "NVIDIA H200, power_limit_w 700.00, driver 580.1, cuda" in first
    pinned = re.search(r"peft==(\S+)", (ROOT / "requirements.txt").read_text())[1]
    assert f"differs    peft 9.9, pinned is {pinned}; it matters for LoRA" in lines
    assert "missing    no-such 1: left out: nothing here" in lines
    assert not [line for line in lines if line.startswith("differs    torch ")]


def test_without_a_gpu_one_line(tmp_path):
    status, out, errors = start("--output_file", tmp_path / "r.json")
    assert (status, out) == (2, "")
    assert errors.startswith("error: no GPU that torch can use.") and errors.count("\n") == 1
    assert not (tmp_path / "r.json").exists()


def test_bad_input_gets_one_line(tmp_path):
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "empty").mkdir()
    write_wheel(tmp_path / "compiled", "numpy", "cp312-cp312-manylinux_2_28_x86_64")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a-1-py3-none-any.whl").write_text("no zip")
    cases = {
        ("--items", "full_bf16,ful"): "--items ful is no item. --list names them",
        ("--items", ""): "",
        ("--minutes", "0"): "--minutes 0.0 must be above 0",
        ("--minutes", "x"): "invalid float value: 'x'",
        ("--item", "liger"): "unrecognized arguments: --item",
        ("--output_file", tmp_path / "damaged.json"): "damaged.json cannot be read",
        ("--output_file", "/proc/none/r.json"): "r.json cannot be written",
        ("--wheels", tmp_path / "empty"): "has no *.whl in it",
        ("--wheels", tmp_path / "compiled"): "holds code for another Python",
        ("--wheels", tmp_path / "broken"): "a-1-py3-none-any.whl: File is not a zip file",
    }
    for words, wanted in cases.items():
        if wanted:
            status, _, errors = start("--dry_run", *words)
            assert status == 2 and errors.startswith("error: "), words
            assert errors.count("\n") == 1 and wanted in errors, errors


# ---- What is written about it ----


@pytest.mark.parametrize(
    ("page", "head", "none"),
    [
        ("GPU_CHECK.en.md", "| Item | Expected | Measured |", "not measured"),
        ("GPU_CHECK.md", "| 項目 | 期待 | 測定 |", "未測定"),
    ],
)
def test_pages_have_the_table(page, head, none, tmp_path):
    """The command prints it; a name in it is one of the list's."""
    text = (ROOT / "benchmarks" / page).read_text("utf-8")
    _, out, _ = start("--table", "--output_file", tmp_path / "none.json")
    lines = out.replace("not measured", none).splitlines()
    assert "\n".join([head, *lines[1:]]) in text
    assert {*re.findall(r"^\| `([\w.]+)` \|", text, re.M)} == {*ITEMS}


def test_table_of_a_gpu(tmp_path):
    machine = {"device": "NVIDIA H200", "power_limit_w": "500.00", "driver": "580.1"}
    machine |= {"versions": {"torch": "2.13.0", "peft": None}}
    when = {"machine": machine, "date": "2026-12-24"}
    found = {"status": "ok", "measured": "loss 1e-3"} | when
    bad = {"status": "differs", "measured": "0 workers"} | when
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"full_bf16": found, "workers": bad}))
    _, out, _ = start("--table", "--output_file", file)
    assert "| `full_bf16` | CPU's loss ± 0.01 | loss 1e-3 |" in out
    what = "NVIDIA H200, power limit 500.00 W, driver 580.1, torch 2.13.0."
    assert out.startswith(f"Measured on 2026-12-24: {what}\n\n| Item")
    assert "| `workers` | 2 workers | **differs**: 0 workers |" in out
    assert out.count("not measured") == len(ITEMS) - 2


def test_list():
    status, out, _ = start("--list")
    assert status == 0 and len(out.splitlines()) == len(ITEMS) == len({*ITEMS})
    assert all(item.expected and item.what for item in ITEMS.values())
    assert str(ROOT) not in out
