"""benchmarks/against_peers.py and growth.py: what is counted, the arithmetic, and bad input."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script, write_jsonl
from transformers import AutoTokenizer

BENCHMARKS = ROOT / "benchmarks"
ROWS = [
    {"prompt": f"質問：{'あ' * n}は何か。\n答え：", "completion": f"猫{n}"} for n in range(1, 13)
]


@pytest.fixture
def peers(monkeypatch):
    """against_peers.py, whose runs happen in this process and take made-up times."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = load_script(BENCHMARKS / "against_peers.py")

    def measure(command, out, threads):
        argv = command[1:]
        load_script(Path(command[0])).main(argv)
        results = json.loads(Path(out, "all_results.json").read_text("utf-8"))
        tokens = results.get("num_tokens") or module.own_tokens(out)
        names = ("tokens_per_second", "tokens_per_cpu_second", "first_step_seconds")
        names += ("peak_mib", "peak_reserved_mib")
        return {"tokens": tokens, "command": argv} | dict.fromkeys(names, float(len(argv)))

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "matmul_flops", lambda *args: 1e9)
    monkeypatch.setattr(
        module, "script", lambda path, *words: load_script(path).main([*map(str, words)])
    )
    return module


def tokens_of(model, rows):
    """Prompt, completion and EOS of each row, and BOS, which this tokenizer adds; no padding."""
    tokenizer, count = AutoTokenizer.from_pretrained(model), []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
        count.append(1 + len(ids) + 1)
    return count


def test_every_way_trains_on_the_same_useful_tokens(tmp_path, checkpoints, peers, capsys):
    """Each way counts the rows' own tokens; a longer row than the block is in none of them."""
    model = checkpoints["llama"]
    rows = [*ROWS, {"prompt": "長" * 60, "completion": "い"}]
    options = ["--train_file", write_jsonl(tmp_path / "train.jsonl", rows), "--repeat", "1",
               "--model_name_or_path", model, "--rows", "2", "--accumulate", "1", "--block", "60",
               "--precision", "fp32", "--output_dir", str(tmp_path / "out"),
               "--ways", "full,trl_512,trl_padded,padded_2023,lora,lora_trl"]  # fmt: skip
    peers.main(options)
    found = json.loads((tmp_path / "out/against_peers.json").read_text())
    lengths = sorted(zip(tokens_of(model, ROWS), range(len(ROWS)), strict=True))
    kept = [length for length, _ in lengths if length <= 60]
    assert len(kept) > 4 and sum(kept) == found["about"]["tokens"]
    ways = found["precisions"]["fp32"]["ways"]
    assert len(ways) == 6
    for way in ways:
        assert ways[way][0]["tokens"] == sum(kept), way
        words = ways[way][0]["command"]
        batch = words[words.index("--per_device_train_batch_size") + 1]
        assert batch == ("1" if way in ("trl_512", "lora_trl") else "2")
    text = (tmp_path / "out/against_peers.md").read_text("utf-8")
    assert text in capsys.readouterr().out and text.count("\n| ") == 7
    assert "every row padded to 60 (2023)" in text
    assert (tmp_path / "out/against_peers.png").stat().st_size > 10_000


def test_what_a_run_is_found_to_take(tmp_path, monkeypatch):
    """Times from what it prints, memory and processor time from the system."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = load_script(BENCHMARKS / "against_peers.py")
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "time.sleep(0.5); print('begin', flush=True); time.sleep(0.3)\n"
        "kept = bytearray(300 * 2**20); kept[:] = b'1' * len(kept); del kept\n"
        "print('step 1/2', flush=True); time.sleep(0.3); print('step 2/2', flush=True)\n"
        "out = pathlib.Path(sys.argv[1]); out.mkdir()\n"
        "(out / 'all_results.json').write_text('{\"num_tokens\": 900, \"peak_reserved_gib\": 2}')\n"
        "time.sleep(1)\n"
    )
    found = module.measure([str(script), str(out)], out, 1)
    assert found["seconds"] > 0.6 and found["tokens_per_second"] == 900 / found["seconds"]
    assert 0.8 < found["first_step_seconds"] < found["seconds"] + 30
    assert found["peak_mib"] > 600 and found["peak_reserved_mib"] == 2048
    assert found["cpu_seconds"] < found["seconds"] and found["steps"] == 2
    assert not out.exists()
    with pytest.raises(SystemExit) as stop:
        module.measure(["-c", "raise ValueError('no room')"], tmp_path / "other", 1)
    assert stop.value.code == 2


def test_ratios_are_taken_turn_by_turn_against_the_fastest(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = load_script(BENCHMARKS / "against_peers.py")
    speeds = {"full": (300, 100, 280), "trl_512": (100, 50, 90), "trl_1024": (80, 95, 80),
              "padded_2023": (30, 10, 40), "lora": (400, 400, 400)}  # fmt: skip
    others = ("tokens_per_cpu_second", "first_step_seconds", "peak_mib", "peak_reserved_mib")
    ways = {
        way: [{"tokens_per_second": s, **dict.fromkeys(others, 1.0)} for s in values]
        for way, values in speeds.items()
    }
    runs = {"ways": ways, "best": "512", "matmul": 1000.0, "flops": {"full": 2.0, "lora": 1.0}}
    found = {"about": {"block": 512}, "precisions": {"fp32": runs}}
    lines = {line["way"]: line for line in module.summary(found, "fp32")}
    assert lines["full"]["x_trl"] == (3.0, 2.0, 280 / 90)  # of trl_512: 90 beside 80
    assert lines["full"]["x_2023"] == (10.0, 7.0, 10.0)
    assert lines["full"]["share"] == pytest.approx((0.56, 0.2, 0.6))
    assert lines["trl_1024"]["x_trl"] == (80 / 90, 0.8, 1.9)
    assert lines["lora"]["x_trl"] is lines["lora"]["x_2023"] is None
    assert lines["lora"]["share"][0] == pytest.approx(0.4)


def test_operations_per_token(checkpoints, monkeypatch):
    """The tiny Llama by hand: 2 layers of width 32, 64 inside, a head of 300 tokens."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = load_script(BENCHMARKS / "against_peers.py")
    about = {"tokens": 100, "learned": 25, "squares": 100 * 20}
    inside, head = 2 * (4 * 32 * 32 + 3 * 32 * 64), 300 * 32
    attention = 3 * 2 * (2 * 32 * 20 / 2) * 2  # 3 passes, 2 products, half a square, 2 layers
    got = module.flops_per_token(checkpoints["llama"], about)
    assert got == pytest.approx(6 * (inside + head / 4) + attention)
    got = module.flops_per_token(checkpoints["llama"], about, lora_r=4)
    adapter = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert got == pytest.approx(4 * (inside + head / 4) + 6 * adapter + attention)
    assert module.precisions_of("flags : avx2 avx512f", gpu=False) == {"fp32"}
    assert module.precisions_of("flags : avx2 avx512_bf16", gpu=False) == {"fp32", "bf16"}
    assert module.precisions_of("flags : avx2", gpu=True) == {"bf16"}


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("against_peers", ["--ways", "full,liger"], "--ways liger: they are full, trl_512"),
        ("against_peers", ["--repeat", "0"], "--repeat 0 is below 1"),
        ("against_peers", ["--precision", "fp8"], "--precision fp8 is not auto"),
        ("against_peers", ["--train_file", "none.jsonl"], "none.jsonl does not exist"),
        ("against_peers", ["--train_file", "{text}"], "every row needs prompt and completion"),
        ("against_peers", ["--output_dir", "{full}"], "is not empty"),
        ("growth", ["--lengths", "64,x"], "--lengths must be whole numbers"),
        ("growth", ["--lengths", "1,2"], "a row of one token learns nothing"),
        ("growth", ["--widths", "100"], "--widths must be multiples of 64"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, capsys, peers, checkpoints, script, options, words):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "猫"}])
    out = [] if "--output_dir" in options else ["--output_dir", str(tmp_path / "out")]
    options = [word.format(text=text, full=tmp_path) for word in options + out]
    if script == "against_peers":
        options += ["--model_name_or_path", checkpoints["llama"]]
    with pytest.raises(SystemExit) as stop:
        load_script(BENCHMARKS / f"{script}.py").main(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error


def test_growth_changes_one_thing_at_a_time(tmp_path, peers, checkpoints, monkeypatch, capsys):
    growth = load_script(BENCHMARKS / "growth.py")
    seen, made = [], []
    train = growth.train
    tiny = load_script(ROOT / "tiny_model/make_tiny_model.py")

    def script(path, *words):
        if path.stem == "prepare_jglue":
            return peers.script(path, *words)
        made.append(tiny.parse_args([*map(str, words)]))
        return Path(made[-1].output_dir).symlink_to(checkpoints["llama"])

    monkeypatch.setattr(growth, "measure", peers.measure)
    monkeypatch.setattr(growth, "script", script)

    def note(args, model, file, point, out):
        seen.append((point, train(args, model, file, point, out)["tokens"]))
        return {"tokens_per_second": float(point[0]), "peak_mib": float(point[1])}

    monkeypatch.setattr(growth, "train", note)
    growth.main(["--lengths", "8,16,32", "--batches", "1,2", "--widths", "64", "--repeat", "1",
                 "--tokens", "64", "--num_hidden_layers", "1", "--output_dir",
                 str(tmp_path / "out")])  # fmt: skip
    # Rows of exactly that length: 3 steps at least, or what 64 tokens make.
    assert seen == [((8, 1, 64), 64), ((16, 1, 64), 64), ((32, 1, 64), 96), ((16, 2, 64), 96)]
    assert (made[0].hidden_size, made[0].num_hidden_layers) == (64, 1) and len(made) == 1
    out = capsys.readouterr().out
    assert "| tokens per row | 32 | 32 | 1 |" in out and "| rows at once | 2 | 16 | 2 |" in out
    assert "16 tokens per row, 1 rows at once, width 64" in out
    assert (tmp_path / "out/growth.png").stat().st_size > 10_000
    assert sys.modules["against_peers"] is peers


def test_the_picture_of_growth_shows_every_point(tmp_path, peers):
    growth = load_script(ROOT / "benchmarks" / "growth.py")
    found = {
        name: [{"at": 2**n, "speed": 10 * k * n, "memory": 7 * k * n} for n in (1, 2, 3)]
        for k, name in enumerate(growth.AXES, 1)
    }
    figure = growth.draw(found, tmp_path / "growth.png")
    for axes in figure.axes:
        bottom, top = axes.get_ylim()
        values = [value for line in axes.lines for value in line.get_ydata()]
        assert bottom == 0 and max(values) < top
