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


# ---- --task: the score held out, with stand-ins for what takes long ----

STAND_IN = """
import json, sys
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, name = Path(words["--output_dir"]), Path(sys.argv[0]).stem
out.mkdir(parents=True)
(out / "words.json").write_text(json.dumps([name, words]))
if name != "make_tiny_model":
    results = {"trainable_parameters": 25, "total_parameters": 1000, "train_runtime": len(out.name)}
    results |= {"peak_memory_gib": 0.5, "train_loss": 1.0}
    (out / "all_results.json").write_text(json.dumps(results))
"""
# Right are the first 9 answers of the base, 18 of "full", 27 of "dpo", 45 of "grpo".
ANSWERS = """
import json, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
right = {"base": 9, "full": 18, "dpo": 27, "grpo": 45}[words["--model_name_or_path"].split("/")[-1]]
rows = [json.loads(line) for line in open(words["--prompt_file"], encoding="utf-8")]
with open(words["--output_file"], "w", encoding="utf-8") as file:
    for number, row in enumerate(rows):
        text = row["completion"] if number < right else "?"
        file.write(json.dumps({**row, "generated_text": text}) + "\\n")
"""
PAIRS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture
def standing_in(tmp_path, monkeypatch):
    """compare_methods.py, which finds quick scripts in the places of the slow ones."""
    for name in ("full", "lastlayer", "lora", "dpo", "grpo"):
        folder = tmp_path / "root" / f"finetune_{name}"
        folder.mkdir(parents=True)
        (folder / f"finetune_{name}.py").write_text(STAND_IN)
    for name, text in (
        ("tiny_model/make_tiny_model", STAND_IN),
        ("generate_text/generate_text", ANSWERS),
    ):
        (tmp_path / "root" / name).parent.mkdir()
        (tmp_path / "root" / f"{name}.py").write_text(text)
    (tmp_path / "root" / "jglue").symlink_to(ROOT / "jglue")
    script = load_script(SCRIPT)
    monkeypatch.setattr(script, "ROOT", tmp_path / "root")
    monkeypatch.setattr(
        script, "PROBE", """print('{"device": "CPU", "threads": 1, "gib": 0.25}')"""
    )
    monkeypatch.setattr(script, "run", with_pairs(script.run))
    return script


def with_pairs(run):
    """The preference pairs, in case that prepare_jglue.py writes none."""

    def prepare(args, name, command):
        text = run(args, name, command)
        pairs = args.output_dir / "jnli_preferences_train.jsonl"
        if name == "data" and not pairs.exists():
            pairs.write_text(PAIRS)
        return text

    return prepare


def words_of(directory):
    return json.loads((directory / "words.json").read_text())


def test_a_task_held_out(standing_in, tmp_path, capsys):
    """Who starts where and learns from what; the table has the scripts' figures and the scores."""
    out = tmp_path / "out"
    standing_in.main(["--task", "jnli", "--output_dir", str(out), "--methods", "full,dpo,grpo",
                      "--max_steps", "7", "--more_steps", "3"])  # fmt: skip
    text = capsys.readouterr().out
    table = text[text.index("Measured on 2") :].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in table]
    assert rows[2] == ["base, untrained on the task", "0", "", "", "", "0.167 [0.090, 0.287]"]
    assert rows[3] == ["all parameters", "25", "2.50%", "4.0", "0.50", "0.333 [0.222, 0.466]"]
    assert rows[4] == ["SFT, then DPO", "25", "2.50%", "4.0 + 3.0", "0.50", "0.500 [0.371, 0.629]"]
    assert rows[5] == ["SFT, then GRPO", "25", "2.50%", "4.0 + 4.0", "0.50", "0.833 [0.713, 0.910]"]
    assert "on 54 rows held out" in text and "commonest label: 0.33" in text
    assert "imports alone take 0.25" in text
    assert words_of(out / "base")[1]["--train_file"] == f"{out}/texts.jsonl"
    texts = [json.loads(line) for line in (out / "texts.jsonl").open(encoding="utf-8")]
    assert all(
        list(row) == ["text"] and not row["text"].endswith(("含意", "矛盾", "中立"))
        for row in texts
    )
    for name, start, file, steps in (("full", "base", "train", "7"),
                                     ("dpo", "full", "preferences_train", "3"),
                                     ("grpo", "full", "rewards", "3")):  # fmt: skip
        script, words = words_of(out / name)
        assert script == f"finetune_{name}"
        assert words["--model_name_or_path"] == f"{out}/{start}"
        assert words["--train_file"] == f"{out}/jnli_{file}.jsonl"
        assert words["--max_steps"] == steps
    row = json.loads((out / "jnli_rewards.jsonl").open(encoding="utf-8").readline())
    assert row["choices"] == ["含意", "矛盾", "中立"] and row["completion"] in row["choices"]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_dpo_alone_trains_its_start_first(standing_in, tmp_path, capsys):
    standing_in.main(["--task", "jnli", "--output_dir", str(tmp_path / "out"), "--methods", "dpo"])
    assert words_of(tmp_path / "out" / "full")[1]["--train_file"].endswith("jnli_train.jsonl")
    assert "| 4.0 + 3.0 |" in capsys.readouterr().out


def test_the_interval():
    """Its ends are the shares that lie 1.96 of their own standard deviations away."""
    for right, number in ((0, 36), (1, 5), (18, 54), (54, 54)):
        low, high = load_script(SCRIPT).wilson(right, number)
        for end in (low, high):
            if 0 < end < 1:
                away = abs(right / number - end) / (end * (1 - end) / number) ** 0.5
                assert away == pytest.approx(1.96, abs=1e-3)
        assert low <= right / number <= high and (low > 0) == (right > 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "dpo"], "--methods dpo needs --task"),
        (["--task", "jnli", "--overfit"], "--task has files of its own"),
        (["--task", "jnli", "--repeat", "2"], "--repeat out"),
        (["--task", "jsquad", "--methods", "grpo"], "grpo is no method. They are: full"),
        (["--task", "jnli", "--methods", "dpp"], "dpp is no method. They are: full"),
        (["--task", "jnli", "--more_steps", "0"], "--more_steps 0 is below 1"),
    ],
)
def test_bad_input_with_a_task(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        load_script(SCRIPT).parse([*options, "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert words in error


def test_json_lines_end_at_line_ends_alone(tmp_path):
    """A random model's answers hold characters at which str.splitlines() cuts, too."""
    file = tmp_path / "answers.jsonl"
    file.write_text('{"a": "\u2028\x85"}\n{"a": ""}\n', "utf-8")
    lines = load_script(SCRIPT.with_name("generation.py")).read_lines(file)
    assert [json.loads(line)["a"] for line in lines] == ["\u2028\x85", ""]
