"""What a user may call a file or a directory works as every script's input and output.

Here in one name that holds it all; the names one by one are tried where the code stands first
(test_runs.py, test_generate_text.py, test_merge_lora.py, test_convert_tokenizer.py, test_add_tokens.py).
"""

import json
import shutil

import pytest
import seven_grid as grid
from conftest import ROWS, write_jsonl

NAME = "~ [1] a*b? x{1,2} a$\\x$b 100% c#1 日本語 l'été a=b"
SHORT = "--max_steps 1 --per_device_train_batch_size 2 --logging_steps 1".split()
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHOICE = {"prompt": "a", "completion": "1", "choices": ["b", "c"]}
TRAINED = {
    "lora": (ROWS[:2], []),
    "lastlayer": (ROWS[:2], []),
    "dpo": ([PAIR, PAIR | {"prompt": "d"}], []),
    "grpo": ([CHOICE] * 2, ["--num_generations", 2, "--max_completion_length", 2]),
}


@pytest.fixture
def place(tmp_path, checkpoints, monkeypatch):
    """A directory of that name, with a model of that name in it, from where the scripts start."""
    folder = tmp_path / NAME
    folder.mkdir()
    shutil.copytree(checkpoints["gpt2"], folder / f"{NAME}.d")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("lesson", TRAINED)
def test_training(lesson, place):
    rows, more = TRAINED[lesson]
    data = write_jsonl(place / f"{NAME}.JSONL", rows)
    words = [
        "--model_name_or_path",
        f"./{NAME}.d",
        "--train_file",
        f"./{NAME}.JSONL",
        *SHORT,
        *more,
    ]
    for _ in range(2):  # the second one finds it finished
        script = f"finetune_{lesson}/finetune_{lesson}.py"
        log, error = grid.call(script, *words, "--output_dir", f"./{NAME}.out")
        assert not error, error
    assert "finished" in log and (place / f"{NAME}.out" / "all_results.json").is_file() and data
    assert not [p for p in place.iterdir() if not p.name.startswith("~ [1]")]


def test_what_stands_beside_training(place):
    write_jsonl(place / f"{NAME}.jsonl", ROWS)
    model, data = ["--model_name_or_path", f"./{NAME}.d"], f"./{NAME}.jsonl"
    calls = [
        ["finetune_lastlayer/show_model.py", *model],
        ["jobs/estimate.py", *model, "--method", "lora", "--train_file", data],
        ["tiny_model/make_tiny_model.py", "--model_type", "gpt2", "--text_file", data, "--vocab_size", 270,
         "--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--output_dir", f"./{NAME}.tiny"],
        ["jglue/prepare_jglue.py", "--jglue_dir", f"./{NAME}.jglue", "--output_dir", f"./{NAME}.data",
         "--task", "all"],
        ["jglue/evaluate_jglue.py", "--task", "jnli", "--prediction_file", f"./{NAME}.json",
         "--output_file", f"./{NAME}.scores"],
    ]  # fmt: skip
    shutil.copytree(grid.ROOT / "jglue" / "sample", place / f"{NAME}.jglue")
    rows = [
        {
            "id": "1",
            "label": "neutral",
            "generated_text": "中立",
            "prompt": "a",
            "completion": "中立",
        }
    ]
    write_jsonl(place / f"{NAME}.json", rows)
    for script, *words in calls:
        _, error = grid.call(script, *words)
        if script == "jobs/estimate.py":  # it prints a line for qsub, whose -v takes no blanks
            assert "does not pass through qsub -v" in error
        else:
            assert not error, (script, error)
    assert json.loads((place / f"{NAME}.scores").read_text())
    assert (place / f"{NAME}.tiny" / "config.json").is_file()
    assert (place / f"{NAME}.data" / "jnli_train.jsonl").is_file()
    assert not [p for p in place.iterdir() if not p.name.startswith("~ [1]")]
