"""benchmarks/compare_methods.py: the table holds what the scripts' own result files say.

Bad input gets one line.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script, write_jsonl

SCRIPT = ROOT / "benchmarks" / "compare_methods.py"


def compare(tmp_path, *options):
    command = [sys.executable, SCRIPT, "--output_dir", tmp_path / "out", *options]
    command = [str(word) for word in command]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


METHODS = {"last_layer_8bit": "last layer on 8 bit", "lora_8bit": "LoRA on 8 bit"}


def test_the_table_holds_what_the_scripts_report(tmp_path, checkpoints, train_file):
    options = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file,
               "--validation_file", train_file, "--methods", ",".join(METHODS),
               "--max_steps", 2, "--lora_r", 2]  # fmt: skip
    done = compare(tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    note, _, *table = done.stdout[done.stdout.index("Measured on 2") :].splitlines()
    for words in ("torch 2", "peft 0", "bitsandbytes 0", "2 steps of 4 rows, rank 2", "thread"):
        assert words in note
    cells = [line.strip("| ").split(" | ") for line in table]
    assert len({len(row) for row in cells}) == 1
    assert [row[0] for row in cells[2:]] == [*METHODS.values()]
    for method, row in zip(METHODS, cells[2:], strict=True):
        found = dict(zip(cells[0], row, strict=True))
        results = json.loads((tmp_path / "out" / method / "all_results.json").read_text("utf-8"))
        assert results["steps"] == 2
        assert found["trained parameters"] == f"{results['trainable_parameters']:,}"
        share = results["trainable_parameters"] / results["total_parameters"]
        assert found["share"] == f"{share:.2%}"
        assert found["peak GiB"] == f"{results['peak_memory_gib']:.2f}"
        assert found["seconds"] == f"{results['train_runtime']:.1f}"
        assert found["tokens/s"] == f"{results['train_tokens_per_second']:,.0f}"
        assert found["validation loss"] == f"{results['eval_loss']:.4f}"
    # The last layer of this model is a matrix of 300 x 32, and LoRA of rank 2 adds
    # 2 x (inputs + outputs) a layer.
    lora = 2 * 2 * (4 * (32 + 32) + 3 * (32 + 64))
    assert [row[1] for row in cells[2:]] == ["9,600", f"{lora:,}"]
    # What was measured before does not count as measured now.
    assert compare(tmp_path, *options).stderr.endswith("out is not empty. Name a new one.\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "lora,lastlayer"], "lastlayer is no method. They are: full, last_layer"),
        (["--methods", ""], "(empty) is no method"),
        (["--max_steps", "0"], "--max_steps 0 is below 1"),
        (["--train_file", "none.jsonl"], "none.jsonl does not exist"),
        (["--output_dir", "/proc/none"], "cannot be written"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, options, words):
    done = compare(tmp_path, *options)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_the_error_of_a_script_is_passed_on(tmp_path, capsys):
    args = load_script(SCRIPT).parse(["--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        load_script(SCRIPT).make_model(args, tmp_path / "none.jsonl")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model_768x8: --text_file ") and error.count("\n") == 1
    assert "none.jsonl does not exist" in error
    assert f"The log is {args.output_dir / 'model_768x8.log'}" in error


def test_what_is_learned_by_heart_is_not_in_the_first_training(tmp_path, capsys):
    rows = [{"id": f"q{n}", "prompt": f"{n}?", "completion": f"{n}"} for n in range(60)]
    script = load_script(SCRIPT)
    args = script.parse(["--overfit", "--output_dir", str(tmp_path / "out")])
    files = script.split_rows(args, Path(write_jsonl(tmp_path / "train.jsonl", rows)))
    few, others = ([json.loads(line) for line in file.open(encoding="utf-8")] for file in files)
    assert [row["prompt"] for row in few + others] == [row["prompt"] for row in rows]
    assert len(few) == 50
    assert few[7] == {"id": "7", "prompt": "7?", "completion": "7", "answers": ["7"]}
    for bad, words in (([{"text": "?"}] * 60, "prompt + completion"), (rows[:50], "has too few")):
        with pytest.raises(SystemExit):
            script.split_rows(args, Path(write_jsonl(tmp_path / "bad.jsonl", bad)))
        assert words in capsys.readouterr().err


def test_computed_bytes():
    """Of four bytes a weight and twelve more a trained one, or the base's own and sixteen."""
    results = {"trainable_parameters": 10, "total_parameters": 1000}
    needed = load_script(SCRIPT).needed_bytes
    assert needed(results, "model      llama\n") == 4 * 1000 + 12 * 10
    for kind in ("5 layers in 8 bit, else fp32", "bf16"):
        log = f"base       {kind}; frozen; 1,026.5 MiB\n"
        assert needed(results, log) == 1026.5 * 2**20 + 160
