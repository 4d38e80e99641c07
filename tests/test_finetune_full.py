"""finetune_full.py against an independent calculation: one example at a time, from the raw row, plain torch."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, ROOT, ROWS, make_checkpoint, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = ROOT / "finetune_full" / "finetune_full.py"
# Packing is exact where a model restarts at restarting positions; the others are refused.
PACKS = {
    "gpt2": True,
    "gpt_neox": True,
    "falcon": False,
    "falcon_alibi": False,
    "mpt": False,
    "llama": True,
    "qwen3": True,
}


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def results(directory):
    return json.loads((directory / "all_results.json").read_text())


def run(script, model, train_file, output_dir, *more):
    script.main(["--model_name_or_path", model, "--train_file", train_file, "--output_dir", str(output_dir),
                 "--save_strategy", "no", *map(str, more)])  # fmt: skip
    return results(output_dir)


def expected_loss(model_dir, rows, max_length=64):
    """Sum of the answers' token losses over their number, with nothing of the project."""
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = ids[:max_length]
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].double(), -1)
        for position in range(max(len(prompt), 1), len(ids)):
            total -= log_p[position - 1, ids[position]].item()
            count += 1
    return total / count


ZERO = ["--learning_rate", 0, "--num_train_epochs", 1, "--per_device_train_batch_size", 2]


@pytest.mark.parametrize("kind", CONFIGS)
def test_train_loss_is_the_token_mean(kind, script, checkpoints, train_file, tmp_path):
    expected = expected_loss(checkpoints[kind], ROWS)
    for accumulation in (1, 4):
        more = [*ZERO, "--gradient_accumulation_steps", accumulation, "--validation_file", train_file]
        found = run(script, checkpoints[kind], train_file, tmp_path / f"padded{accumulation}", *more)
        assert found["train_loss"] == pytest.approx(expected, abs=1e-4)
        assert found["eval_loss"] == pytest.approx(expected, abs=1e-4)
        packed = [*more, "--packing", "true", "--packing_length", 100]
        if PACKS[kind]:
            found = run(script, checkpoints[kind], train_file, tmp_path / f"packed{accumulation}", *packed)
            assert found["train_loss"] == pytest.approx(expected, abs=1e-4)
    if not PACKS[kind]:
        with pytest.raises(SystemExit) as stop:
            run(script, checkpoints[kind], train_file, tmp_path / "packed", *packed)
        assert stop.value.code == 2


def test_two_processes_count_every_row_once(script, checkpoints, tmp_path):
    """7 rows on 2 ranks with 2 rows at once: Trainer alone would repeat one, and it would count twice."""
    train_file = write_jsonl(tmp_path / "train.jsonl", ROWS)
    cases = {}
    for kind in CONFIGS:
        for accumulation in (1, 4):
            more = [*ZERO, "--gradient_accumulation_steps", accumulation, "--validation_file", train_file]
            cases[kind, tmp_path / f"{kind}{accumulation}"] = more
        if PACKS[kind]:
            cases[kind, tmp_path / f"{kind}_packed"] = [*ZERO, "--packing", "true", "--packing_length", 100]
    runs = [["--model_name_or_path", checkpoints[kind], "--train_file", train_file, "--output_dir", out,
             "--save_strategy", "no", *more] for (kind, out), more in cases.items()]  # fmt: skip
    assert "device     2 x CPU" in launch(runs, tmp_path).stdout
    for kind, out in cases:
        expected = expected_loss(checkpoints[kind], ROWS)
        assert results(out)["train_loss"] == pytest.approx(expected, abs=1e-4), out
        assert results(out).get("eval_loss", expected) == pytest.approx(expected, abs=1e-4), out


def launch(runs, tmp_path, processes=2, script=SCRIPT, environment=()):
    """Run main() for each list of arguments, all in one launch of several processes (imports take seconds)."""
    (tmp_path / "runs.json").write_text(json.dumps([[str(word) for word in run] for run in runs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               str(ROOT / "tests" / "many_runs.py"), str(script), str(tmp_path / "runs.json")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
