"""The figures about DeepSpeed, in text and pictures, are those that draw.py counts."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deepspeed_configs"
READMES = ("README.md", "README.en.md")


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(paint):
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), layout="constrained")
    paint(drawn)
    return drawn


def test_the_counts_by_hand(draw):
    cases = itertools.product(draw.CONFIGS, (1, 8, 16))
    total = {(config, n): sum(draw.gpu_bytes(config, n)) for config, n in cases}
    assert (total["none", 1], total["none", 8]) == (16, 16)
    assert [total["zero1", n] for n in (1, 8, 16)] == [24, 10, 9]
    assert [total["zero2", n] for n in (1, 8, 16)] == [24, 6.5, 5.25]
    assert [total["zero3", n] for n in (1, 8, 16)] == [20, 2.5, 1.25]
    assert [total["zero2_offload", 8], total["zero3_offload", 8]] == [4, 0]
    # Eight processes that read fp32 weights; what is offloaded, and what a save collects.
    assert [draw.host_bytes(config, 8) for config in draw.CONFIGS] == [32, 32, 32, 4, 32, 28]
    assert [draw.host_bytes(config, 1) for config in draw.CONFIGS] == [4, 4, 4, 4, 28, 28]
    assert draw.host_bytes("zero3_offload", 16) == 16
    assert draw.largest("zero3", 8) == (56, "GPU")
    assert draw.largest("zero2_offload", 8) == (35, "GPU")
    assert draw.largest("zero3_offload", 1)[0] == pytest.approx(160 / 28)


PEAK = """
import contextlib, os, sys, torch
from pathlib import Path
def read(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
torch.set_num_threads(1)
where = "file://" + sys.argv[1]
torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
for view, parts in ((True, 1), (False, 1), (True, 1), (True, 2)):  # the first to warm up
    before, count = read("VmRSS"), 4
    layers = [torch.nn.Linear(2000, 2000, bias=False) for _ in range(count)]
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(*layers), gradient_as_bucket_view=view)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(3):
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        for part in range(parts):
            with model.no_sync() if part + 1 < parts else contextlib.nullcontext():
                model(torch.ones(1, 2000)).sum().backward()
        optimizer.step()
        model.zero_grad()
    print((read("VmHWM") - before) / (2000 * 2000 * count))
    del layers, model, optimizer
"""


def test_plain_training_measured(draw, tmp_path):
    """Several processes take 16 bytes per parameter as one does, and 20 where they accumulate."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "GLOO_SOCKET_IFNAME": "lo"}  # gives memory back
    command = [sys.executable, "-c", PEAK, tmp_path / "meeting"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    apart, inside, accumulated = map(float, done.stdout.split()[1:])
    expected = 20, sum(draw.gpu_bytes("none", 8)), 20
    assert (apart, inside, accumulated) == pytest.approx(expected, abs=1.5)


def test_more_gpus_and_later_stages_never_need_more(draw):
    for config in draw.CONFIGS[1:]:
        assert sum(draw.gpu_bytes(config, 16)) <= sum(draw.gpu_bytes(config, 8)), config
    sizes = [sum(draw.gpu_bytes(config, 8)) for config in ("none", "zero1", "zero2", "zero3")]
    assert sizes == sorted(sizes, reverse=True)


def test_every_configuration_is_counted_and_is_what_its_name_says(draw):
    files = {path.stem for path in FOLDER.glob("*.json")} | {"none"}
    assert files == {*draw.CONFIGS} == {*draw.FORMULAS}
    for config in draw.CONFIGS[1:]:
        text = (FOLDER / f"{config}.json").read_text(encoding="utf-8")
        zero = json.loads(text)["zero_optimization"]
        assert zero["stage"] == int(config[4])
        offloaded = [part for part in ("offload_optimizer", "offload_param") if part in zero]
        expected = {
            "zero2_offload": ["offload_optimizer"],
            "zero3_offload": ["offload_optimizer", "offload_param"],
        }
        assert offloaded == expected.get(config, [])
        assert all(zero[part]["device"] == "cpu" for part in offloaded)


def test_the_buffers_in_the_text_are_deepspeeds_own():
    """The README names sizes, and a dtype, that are DeepSpeed's defaults."""
    # Importing it would take a quarter of a minute.
    package = importlib.metadata.distribution("deepspeed")
    text = Path(package.locate_file("deepspeed/runtime/zero/config.py")).read_text(encoding="utf-8")
    sizes = {"reduce_bucket_size": "5e8", "max_live_parameters": "1e9", "sub_group_size": "1e9"}
    for name, default in sizes.items():
        assert re.search(rf"^    {name}: int = Field\(pp_int\({default}\)", text, re.M), name
    for path in FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "data_types" not in text and "sub_group_size" not in text and "max_live" not in text
        # fp32 weights, and all of it sent in fp32: see "What is in the files" of the README.
        wanted = {"enabled": "auto", "dtype": "bfloat16", "lower_precision_safe_modules": []}
        assert json.loads(text)["torch_autocast"] == wanted and '"bf16"' not in text


@pytest.mark.parametrize("name", READMES)
def test_tables_of_the_folder(draw, name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert "\n".join(draw.memory_rows()) in text
    assert "\n".join(draw.plan_rows()) in text
    assert f"{draw.RESERVE_GB} GB" in text and f"{draw.GPU_GB} GB" in text
    assert "](memory.png)" in text and "](parallel.png)" in text


@pytest.mark.parametrize("name", READMES)
def test_table_of_the_seven_models(draw, name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for model, (size, *_) in draw.MODELS.items():
        assert any(f"{size:,}" in line for line in text.splitlines() if f"[{model}]" in line), model


def test_plans_leave_the_reserve(draw):
    for model in draw.MODELS:
        for method in draw.METHODS:
            queue, gpus, config, size = draw.plan(model, method)
            assert size <= draw.GPU_GB - draw.RESERVE_GB
            assert draw.host_bytes(config, gpus) * draw.MODELS[model][0] / 1e9 <= draw.HOST_GB[gpus]
            assert (queue, config) == ("rt_HG", "none") or (queue, gpus) == ("rt_HF", 8)


def test_chart_shows_the_counts(draw):
    axes = figure(draw.draw_memory).axes[0]
    bars = [("none", 1)] + [(config, 8) for config in draw.CONFIGS]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [part for config, n in bars for part in draw.gpu_bytes(config, n)]
    text = " ".join(label.get_text() for label in axes.texts)
    assert all(f"{sum(draw.gpu_bytes(config, n)):g}" in text for config, n in bars)


def test_panels_work_only_on_one_thing_at_a_time(draw):
    """No GPU does two things at once or works beyond its line's end; the naive ones take turns."""
    panels = figure(draw.draw_parallel).axes
    assert len(panels) == 4
    for axes in panels:
        lanes = {}
        for box in axes.patches:
            if box.get_width() < 8:
                span = (box.get_x(), box.get_x() + box.get_width())
                lanes.setdefault(box.get_y(), []).append(span)
        assert len(lanes) == 4
        alone = list(lanes.values())
        if "Naive" in axes.get_title(loc="left"):
            alone = [[span for spans in alone for span in spans]]
        for spans in alone:
            spans = sorted(spans)
            assert all(end <= start + 0.01 for (_, end), (start, _) in itertools.pairwise(spans))
            assert spans[-1][1] <= 8.01


@pytest.mark.parametrize("name", ["parallel", "memory"])
def test_pictures_are_small_and_up_to_date(draw, name, tmp_path, monkeypatch, capsys):
    from matplotlib.image import imread

    assert (FOLDER / f"{name}.png").stat().st_size < 100_000
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.main()
    assert capsys.readouterr().out.count("| ") > 20
    old, new = imread(FOLDER / f"{name}.png"), imread(tmp_path / f"{name}.png")
    assert old.shape == new.shape
    assert abs(old - new).mean() < 0.01, f"{name}.png is another. Type: python draw.py"
