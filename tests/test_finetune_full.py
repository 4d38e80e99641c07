"""finetune_full.py against an independent calculation: one example at a time, from the raw row, plain torch."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import CONFIGS, ROOT, ROWS, load_script, make_tokenizer, write_jsonl
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

SCRIPT = ROOT / "finetune_full" / "finetune_full.py"


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
    tokenizer, model = (
        AutoTokenizer.from_pretrained(model_dir),
        AutoModelForCausalLM.from_pretrained(model_dir),
    )
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = (
            prompt
            + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            + [tokenizer.eos_token_id]
        )
        ids = ids[:max_length]
        with torch.no_grad():
            log_p = torch.log_softmax(
                model(torch.tensor([ids]), use_cache=False).logits[0].double(), -1
            )
        for position in range(max(len(prompt), 1), len(ids)):
            total -= log_p[position - 1, ids[position]].item()
            count += 1
    return total / count


ZERO = ["--learning_rate", 0, "--num_train_epochs", 1, "--per_device_train_batch_size", 2]


@pytest.mark.parametrize("kind", CONFIGS)
def test_train_loss_is_the_token_mean(kind, script, checkpoints, train_file, tmp_path):
    expected = expected_loss(checkpoints[kind], ROWS)
    for accumulation in (1, 4):
        more = [
            *ZERO,
            "--gradient_accumulation_steps",
            accumulation,
            "--validation_file",
            train_file,
        ]
        found = run(
            script, checkpoints[kind], train_file, tmp_path / f"padded{accumulation}", *more
        )
        assert found["train_loss"] == pytest.approx(expected, abs=1e-4)
        assert found["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_two_processes_count_every_row_once(script, checkpoints, tmp_path):
    """7 rows on 2 ranks with 2 rows at once: Trainer alone would repeat one, and it would count twice."""
    train_file = write_jsonl(tmp_path / "train.jsonl", ROWS)
    cases = {}
    for kind in CONFIGS:
        for accumulation in (1, 4):
            more = [
                *ZERO,
                "--gradient_accumulation_steps",
                accumulation,
                "--validation_file",
                train_file,
            ]
            cases[kind, tmp_path / f"{kind}{accumulation}"] = more
    runs = [["--model_name_or_path", checkpoints[kind], "--train_file", train_file, "--output_dir", out,
             "--save_strategy", "no", *more] for (kind, out), more in cases.items()]  # fmt: skip
    # Gradients in the buckets that are sent, and beside them: accumulated, clipped, and resumed.
    words = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file, "--max_steps",
             4, "--save_steps", 2, "--per_device_train_batch_size", 1, "--max_grad_norm", 0.1,
             "--gradient_accumulation_steps", 2, "--learning_rate", 0.01, "--output_dir"]  # fmt: skip
    once, twice, resumed = (tmp_path / name for name in ("once", "twice", "resumed"))
    runs += [[*words, once], [ROOT / "tests" / "copied_inside.py", *words, twice]]
    runs += [[*words, resumed, "--resume_from_checkpoint", once / "checkpoint-2"]]
    assert "device     2 x CPU" in launch(runs, tmp_path).stdout
    assert same_weights(once, twice) and same_weights(once, resumed)
    assert not same_weights(once, once / "checkpoint-2", 1e-3)
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
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def same_weights(one, other, atol=0.0):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(
        torch.allclose(one[k], other[k], rtol=0, atol=atol) for k in one
    )


def refused(script, capsys, arguments):
    """The one line on stderr of a run that must end with exit code 2 (argparse prints its usage before it)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in arguments])
    assert stop.value.code == 2
    unset_hf_deepspeed_config()  # Trainer keeps it for the whole process
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mpt"])
def test_one_step_is_one_gradient_step(kind, script, checkpoints, train_file, tmp_path):
    """All rows in one step of plain SGD move the weights along the gradient of the mean over answer tokens."""
    more = ["--optim", "sgd", "--learning_rate", 0.5, "--max_grad_norm", 0, "--max_steps", 1]
    for name, batch in {"whole": 7, "accumulated": 2}.items():
        run(script, checkpoints[kind], train_file, tmp_path / name, *more, "--per_device_train_batch_size", batch,
            "--gradient_accumulation_steps", -(-7 // batch))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[kind])
    model = AutoModelForCausalLM.from_pretrained(checkpoints[kind], dtype=torch.float32)
    losses = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
        log_p = torch.log_softmax(
            model(torch.tensor([(prompt + answer)[:64]]), use_cache=False).logits[0], -1
        )
        losses += [
            -log_p[len(prompt) + i - 1, token]
            for i, token in enumerate(answer)
            if len(prompt) + i < 64
        ]
    torch.stack(losses).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    model.save_pretrained(tmp_path / "expected")
    assert not same_weights(checkpoints[kind], tmp_path / "expected", atol=1e-3)
    assert same_weights(tmp_path / "whole", tmp_path / "expected", atol=1e-5)
    assert same_weights(tmp_path / "accumulated", tmp_path / "expected", atol=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_labels_of_every_shape(bos, script, tmp_path):
    tokenizer = make_tokenizer(bos)
    script.choose_chat_template(None, tokenizer)
    first, eos = [1] if bos else [], tokenizer.eos_token_id

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def row(shape, max_length=64, **columns):
        path = write_jsonl(tmp_path / "row.jsonl", [columns])
        examples = [*script.make_examples([path], tokenizer, max_length)]
        assert {example["form"] for example in examples} == {shape}
        return [(e["input_ids"], e["labels"], e["outcome"]) for e in examples]

    prompt, answer = [*first, *ids("問い: ")], [*ids("答え"), eos]
    full = (prompt + answer, [-100] * len(prompt) + answer)
    assert row("prompt", prompt="問い: ", completion="答え") == [(*full, "kept")]
    # cut at the right, and then without EOS; an answer that is lost, or empty, teaches nothing
    length = len(prompt) + 1
    assert row("prompt", length, prompt="問い: ", completion="答え") == [
        (full[0][:length], full[1][:length], "cut")
    ]
    assert row("prompt", len(prompt), prompt="問い: ", completion="答え")[0][2] == "dropped"
    assert row("prompt", prompt="問い: ", completion="")[0][2] == "dropped"
    # text: everything carries loss, pieces of max_length, EOS once at the very end
    text = [*first, *ids("春はあけぼの。やうやう白くなりゆく山ぎは"), eos]
    pieces = [
        piece for piece, _, _ in row("text", 10, text="春はあけぼの。やうやう白くなりゆく山ぎは")
    ]
    assert [token for piece in pieces for token in piece] == text
    assert {len(piece) for piece in pieces[:-1]} == {10}
    assert row("text", text="")[0][2] == "dropped"
    # chat: loss on the assistants' turns and what ends them, nothing appended, two turns
    messages = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"},
                {"role": "user", "content": "三"}, {"role": "assistant", "content": "四"}]  # fmt: skip
    parts = [("### 指示:\n一\n\n### 応答:\n", 0), ("二", 1), ("", 2), ("\n", 1), ("### 指示:\n三\n\n### 応答:\n", 0),
             ("四", 1), ("", 2), ("\n", 1)]  # fmt: skip
    ((found, labels, outcome),) = row("messages", 200, messages=messages)
    whole = "".join(text + ("<|endoftext|>" if learned == 2 else "") for text, learned in parts)
    assert tokenizer.decode(found) == ("<s>" if bos else "") + whole
    assert (
        tokenizer.decode([token for token in labels if token != -100])
        == "二<|endoftext|>\n四<|endoftext|>\n"
    )
    assert outcome == "kept"
    assert all(label in (-100, token) for token, label in zip(found, labels, strict=True))
    # an instruction is the same conversation with one turn; the input goes below it
    one_turn = [
        {"role": "user", "content": "問い\n\n材料"},
        {"role": "assistant", "content": "答え"},
    ]
    instruction = row("instruction", 200, instruction="問い", input="材料", output="答え")
    assert instruction == row("messages", 200, messages=one_turn)
    assert script.turn_end_id(tokenizer) == eos
    assert script.encode([("<s>二度", False)], tokenizer)[0][:2] != [
        1,
        1,
    ]  # a BOS written in the text is not doubled


CONVERSATION = [{"role": "user", "content": "一\n行"}, {"role": "assistant", "content": "二\n行"},
                {"role": "user", "content": "三"}, {"role": "assistant", "content": "四"}]  # fmt: skip
INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# What a conversation looks like, and which parts of it are learned, by the makers' own descriptions.
TEMPLATES = {
    "alpaca": ["### 指示:\n一\n行\n\n### 応答:\n", "二\n行<|endoftext|>\n", "### 指示:\n三\n\n### 応答:\n",
               "四<|endoftext|>\n"],
    "dolly": [f"{INTRO}\n\n### Instruction:\n一\n行\n\n### Response:\n", "二\n行\n\n### End",
              "\n\n### Instruction:\n三\n\n### Response:\n", "四\n\n### End"],
    "rinna": ["ユーザー: 一<NL>行<NL>システム: ", "二<NL>行<|endoftext|><NL>", "ユーザー: 三<NL>システム: ",
              "四<|endoftext|><NL>"],
    # of today: a template in the tokenizer, whose end of a turn is special without having a role
    "turns": ["<turn>user\n一\n行<end>\n<turn>model\n", "二\n行<end>\n", "<turn>user\n三<end>\n<turn>model\n",
              "四<end>\n"],
}  # fmt: skip
TURNS = (
    "{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content }}"
    "{{ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_token_by_token(name, script, tmp_path):
    """Ids and labels of a conversation of two turns, piece by piece, and the token at which generation stops."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(token, special=True) for token in ("### End", "<turn>", "<end>")]
    )
    tokenizer.chat_template = TURNS if name == "turns" else None
    file = ROOT / "chat_templates" / f"{name}.jinja"
    script.choose_chat_template({"turns": None, "alpaca": name}.get(name, file), tokenizer)
    ids, labels = [], []
    for number, text in enumerate(TEMPLATES[name]):
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += new
        labels += new if number % 2 else [-100] * len(new)
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    (example,) = script.make_examples([path], tokenizer, 500)
    assert (example["input_ids"], example["labels"], example["outcome"]) == (ids, labels, "kept")
    end = {"dolly": "### End", "turns": "<end>"}.get(name, "<|endoftext|>")
    assert script.turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_templates_that_cannot_be_learned(script, checkpoints, tmp_path, capsys):
    """A turn without a special end teaches no stop; a template that rewrites earlier turns has no fixed prefix."""
    data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    common = [
        "--model_name_or_path",
        checkpoints["gpt2"],
        "--train_file",
        data,
        "--output_dir",
        tmp_path / "out",
    ]
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    assert "no token to stop at" in refused(
        script, capsys, [*common, "--chat_template", tmp_path / "plain.jinja"]
    )
    assert "no token to stop at" in refused(
        script, capsys, [*common, "--chat_template", ROOT / "chat_templates" / "dolly.jinja"]
    )  # no ### End there
    rewriting = "{% for m in messages %}{% if loop.last %}<|endoftext|>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "rewriting.jinja").write_text(rewriting)
    message = refused(script, capsys, [*common, "--chat_template", tmp_path / "rewriting.jinja"])
    assert "rewrites its prompts" in message or "no token to stop at" in message
    assert "Two ready templates lie in ../chat_templates" in refused(
        script, capsys, [*common, "--chat_template", "dolly"]
    )
    # other shapes do not use a template
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    more = [
        "--output_dir",
        tmp_path / "rows",
        "--max_steps",
        1,
        "--chat_template",
        tmp_path / "plain.jinja",
    ]
    script.main([str(word) for word in [*common, "--train_file", rows, *more]])


def test_what_is_dropped_is_counted(script, checkpoints, tmp_path, capsys):
    rows = [*ROWS, {"prompt": "空", "completion": ""}, {"prompt": "長い" * 100, "completion": "失"}]
    run(
        script,
        checkpoints["llama"],
        write_jsonl(tmp_path / "d.jsonl", rows),
        tmp_path / "o",
        "--max_steps",
        1,
    )
    out = capsys.readouterr().out
    assert "7 examples" in out
    assert "2 dropped" in out
    assert "[[約二時間半です。<|endoftext|>]]" in out
    # another file under the same name is read again
    write_jsonl(tmp_path / "d.jsonl", ROWS[:3])
    run(script, checkpoints["llama"], str(tmp_path / "d.jsonl"), tmp_path / "o2", "--max_steps", 1)
    assert "3 examples" in capsys.readouterr().out


def test_interrupted_equals_uninterrupted(script, checkpoints, train_file, tmp_path, capsys):
    """Going on from the middle of the second epoch ends with the very weights, losses and order of rows."""
    common = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file, "--learning_rate", "1e-3",
              "--num_train_epochs", "3", "--per_device_train_batch_size", "2", "--save_steps", "2",
              "--logging_steps", "1"]  # fmt: skip
    script.main([*common, "--output_dir", str(tmp_path / "whole")])
    assert results(tmp_path / "whole")["steps"] == 12
    whole, cut = tmp_path / "whole7", tmp_path / "cut"
    more = [*common, "--max_steps", "7"]
    script.main([*more, "--output_dir", str(whole)])
    # what a kill at step 7 leaves behind: the arguments and checkpoints, no result
    for checkpoint in ("checkpoint-4", "checkpoint-6", "checkpoint-7"):
        shutil.rmtree(cut, ignore_errors=True)
        cut.mkdir()
        shutil.copytree(whole / checkpoint, cut / checkpoint)
        arguments = yaml.safe_load((whole / "run_args.yaml").read_text()) | {"output_dir": str(cut)}
        (cut / "run_args.yaml").write_text(yaml.safe_dump(arguments))
        (cut / "checkpoint-9").mkdir()  # half written: no trainer_state.json
        (cut / "checkpoint-9" / "run_id").write_text(arguments["run"]["id"])
        capsys.readouterr()
        script.main([*more, "--output_dir", str(cut)])
        assert f"resume     {cut / checkpoint}" in capsys.readouterr().out
        assert results(cut)["steps"] == 7  # a run that had finished does not get one step more
        assert same_weights(whole, cut)
        assert results(cut)["train_loss"] == pytest.approx(results(whole)["train_loss"], abs=1e-9)
    # finished within the first epoch, then cut off
    short = [*common, "--max_steps", "2", "--output_dir", str(tmp_path / "short")]
    script.main(short)
    (tmp_path / "short" / "all_results.json").unlink()
    script.main(short)
    assert results(tmp_path / "short")["steps"] == 2


def test_a_finished_or_other_run_is_not_touched(script, checkpoints, tmp_path, capsys):
    train_file, out = write_jsonl(tmp_path / "t.jsonl", ROWS), tmp_path / "out"
    arguments = ["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file, "--output_dir", out,
                 "--max_steps", 2, "--save_steps", 1]  # fmt: skip
    script.main([str(word) for word in arguments])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in arguments])
    assert stop.value.code == 0
    assert "holds this run's result" in capsys.readouterr().out
    assert "--max_steps 2, now 3" in refused(script, capsys, [*arguments, "--max_steps", 3])
    write_jsonl(tmp_path / "t.jsonl", ROWS[:5])
    assert "other data" in refused(script, capsys, arguments)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    # another number of processes means other batches
    (out / "all_results.json").unlink()
    write_jsonl(tmp_path / "t.jsonl", ROWS)
    (out / "checkpoint-2" / "rng_state.pth").rename(out / "checkpoint-2" / "rng_state_0.pth")
    (out / "checkpoint-2" / "rng_state_1.pth").touch()
    mark = json.loads((out / "checkpoint-2" / "run_id").read_text())
    (out / "checkpoint-2" / "run_id").write_text(json.dumps(mark | {"files": {}}))
    assert "written by 2 processes" in refused(script, capsys, arguments)
    # a checkpoint named by the user may go on with other arguments; `false` starts anew, but not over a result
    more = [
        "--resume_from_checkpoint",
        out / "checkpoint-1",
        "--max_steps",
        3,
        "--output_dir",
        tmp_path / "longer",
    ]
    script.main([str(word) for word in [*arguments, *more]])
    assert results(tmp_path / "longer")["steps"] == 3
    message = refused(script, capsys, [*arguments, "--resume_from_checkpoint", "false"])
    assert "a new start" in message and "another --output_dir" in message
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


def test_what_a_run_leaves(script, checkpoints, train_file, tmp_path, capsys):
    """Also with --save_strategy no; run_args.yaml starts the same run again."""
    out, again = tmp_path / "out", tmp_path / "again"
    found = run(script, checkpoints["llama"], train_file, out, "--max_steps", 3, "--report_to", "tensorboard",
                "--validation_file", train_file, "--learning_rate", "1e-3", "--eval_strategy", "steps",
                "--eval_steps", 1, "--logging_steps", 1)  # fmt: skip
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
             "trainer_state.json", "all_results.json", "run_args.yaml"}  # fmt: skip
    assert names <= {path.name for path in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    assert (
        found["trainable_parameters"]
        == found["total_parameters"]
        == sum(p.numel() for p in weights(out).values())
    )
    assert {
        "train_loss",
        "train_tokens_per_second",
        "peak_memory_gib",
        "eval_loss",
        "eval_perplexity",
    } <= set(found)
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(steps) == 3
    assert re.fullmatch(
        r"step 3/3  loss [\d.]+  lr \S+  grad [\d.]+  [\d,]+ tok/s  [\d.]+ GiB  left \d+:\d\d:\d\d",
        steps[2],
    )
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    script.main([str(out / "run_args.yaml"), "--output_dir", str(again)])
    assert same_weights(out, again)
    # the tokenizer of the result adds BOS as before, and generation stops where training ended turns
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"][0] == 1
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] in (0, [0])


def test_options_of_trainer(script, checkpoints, train_file, tmp_path, capsys):
    """Gradient checkpointing changes no weight; 8-bit Adam runs; early stopping stops and keeps the best."""
    plain = ["--max_steps", 2, "--learning_rate", "1e-3"]
    for name, more in {
        "plain": [],
        "checkpointing": ["--activation_checkpointing", "true"],
    }.items():
        run(script, checkpoints["gpt_neox"], train_file, tmp_path / name, *plain, *more)
    assert same_weights(tmp_path / "plain", tmp_path / "checkpointing", atol=1e-6)
    run(
        script,
        checkpoints["gpt_neox"],
        train_file,
        tmp_path / "8bit",
        *plain,
        "--optim",
        "adamw_bnb_8bit",
    )
    assert not same_weights(checkpoints["gpt_neox"], tmp_path / "8bit", atol=1e-4)
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "甲", "completion": "乙丙丁"}])
    script.main(["--model_name_or_path", checkpoints["gpt2"], "--train_file", train_file, "--validation_file", other,
                 "--output_dir", str(tmp_path / "early"), "--early_stopping_patience", "2", "--save_steps", "1",
                 "--max_steps", "60", "--learning_rate", "0.05"])  # fmt: skip
    losses = [
        float(line.split()[4])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("eval ")
    ]
    found = results(tmp_path / "early")
    assert found["steps"] < 60
    assert found["eval_loss"] == pytest.approx(min(losses), abs=1e-3)


def test_fp16_shards_are_trained_in_fp32(script, checkpoints, train_file, tmp_path):
    """Several fp16 .bin shards with an index, as the real ones are published: every entry moves, in fp32."""
    source, old = tmp_path / "bin", weights(checkpoints["llama"])
    shutil.copytree(checkpoints["llama"], source, ignore=shutil.ignore_patterns("*.safetensors"))
    names, index = sorted(old), {}
    for part in (0, 1):
        file = f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: old[name].half() for name in names[part::2]}, source / file)
        index |= dict.fromkeys(names[part::2], file)
    (source / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))
    run(
        script,
        str(source),
        train_file,
        tmp_path / "out",
        "--max_steps",
        5,
        "--learning_rate",
        "1e-5",
    )
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        new = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    head = "lm_head.weight"
    assert (new[head] != old[head].half().float()).float().mean() > 0.99


def test_hub_data_set_and_parquet(script, checkpoints, tmp_path):
    """A directory stands in for the hub: the same load_dataset reads it."""
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "hub" / "validation.jsonl", ROWS[:3])
    base = [
        "--model_name_or_path",
        checkpoints["llama"],
        "--learning_rate",
        "0",
        "--num_train_epochs",
        "1",
    ]
    script.main(
        [*base, "--dataset_name", str(tmp_path / "hub"), "--output_dir", str(tmp_path / "out")]
    )
    found = results(tmp_path / "out")
    assert found["train_loss"] == pytest.approx(expected_loss(checkpoints["llama"], ROWS), abs=1e-4)
    assert found["eval_loss"] == pytest.approx(
        expected_loss(checkpoints["llama"], ROWS[:3]), abs=1e-4
    )
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(
        json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    for name in ("rows.parquet", "rows.json"):
        found = run(
            script, checkpoints["llama"], str(tmp_path / name), tmp_path / f"o_{name}", *ZERO
        )
        assert found["train_loss"] == pytest.approx(
            expected_loss(checkpoints["llama"], ROWS), abs=1e-4
        )


GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD_FILES = {
    "empty": ("", "has no rows"),
    "blank lines": ("\n\n", "has no rows"),
    "malformed": (GOOD + "{broken\n", "row 2: Expecting"),
    "malformed list": ('[{"prompt": "a",\n "completion": }]', "bad.jsonl: Expecting value: line 2"),
    "not an object": (GOOD + "[1, 2]\n", "row 2: a row must be an object"),
    "unknown columns": (
        '{"question": "a", "answer": "b"}\n',
        "columns question, answer are of no known form",
    ),
    "mixed shapes": (GOOD + '{"text": "a"}\n', "row 2: a row of another form (text)"),
    "number": (
        '{"prompt": "a", "completion": 3}\n',
        "prompt+completion must hold text, found {'prompt': 'a', 'completion': 3}",
    ),
    "null": ('{"text": null}\n', "text must hold text, found {'text': None}"),
    "messages": ('{"messages": "hello"}\n', "known form. Known: messages (a list)"),
    "empty messages": ('{"messages": []}\n', "nothing to learn from"),
    "nothing to learn": ('{"prompt": "a", "completion": ""}\n', "nothing to learn from"),
    "no assistant": ('{"messages": [{"role": "user", "content": "a"}]}\n', "nothing to learn from"),
    "not utf-8": (GOOD.encode() + "日本".encode("cp932"), "codec can't decode"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, script, checkpoints, tmp_path, capsys):
    content, message = BAD_FILES[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    base = [
        "--model_name_or_path",
        checkpoints["llama"],
        "--output_dir",
        tmp_path / "o",
        "--train_file",
        path,
    ]
    assert message in refused(script, capsys, base)
    assert not (tmp_path / "o" / "all_results.json").exists()


BAD_ARGUMENTS = {
    "missing file": (
        ["--train_file", "nowhere.jsonl"],
        "nowhere.jsonl of --train_file or --validation_file is no file here",
    ),
    "no data": (["--train_file"], "expected at least one argument"),
    "both sources": (["--dataset_name", "x"], "one of --train_file and --dataset_name"),
    "no model": (
        ["--model_name_or_path", "no/such/model/here"],
        "no/such/model/here is not here, nor a hub name",
    ),
    "misspelt": (["--learning_rat", "1"], "unrecognized arguments: --learning_rat"),
    "no number": (["--learning_rate", "fast"], "argument --learning_rate"),
    "batch": (
        ["--per_device_train_batch_size", "0"],
        "--per_device_train_batch_size cannot be 0",
    ),
    "max_length": (["--max_length", "65"], "does not fit the 64 positions"),
    "packing": (["--packing", "true"], "--packing is gone: leave it out"),
    "precision": (["--precision", "fp8"], "--precision is auto, bf16, fp16 or fp32"),
    "fp16 on CPU": (["--precision", "fp16"], "--precision fp16 does not work here: no GPU"),
    "contradiction": (["--precision", "fp32", "--bf16", "true"], "must not contradict"),
    "output": (["--output_dir", "/dev/null/x"], "Not a directory: '/dev/null/x'"),
    "onto the model": (
        ["--model_name_or_path", "same", "--output_dir", "./same"],
        "--output_dir holds the model",
    ),
    "report_to": (["--report_to", "wandb"], "pip install wandb"),
    "early stopping": (["--early_stopping_patience", "1"], "needs --validation_file"),
    "no checkpoints": (
        ["--early_stopping_patience", "1", "--save_strategy", "no"],
        "needs --save_strategy",
    ),
    "nothing to evaluate": (["--eval_strategy", "steps"], "needs --validation_file"),
    "label smoothing": (
        ["--label_smoothing_factor", "0.1"],
        "--label_smoothing_factor does not work",
    ),
    "checkpoint": (["--resume_from_checkpoint", "nowhere"], "is no complete checkpoint"),
    "deepspeed": (["--deepspeed", "../deepspeed_configs/none.json"], "existing deepspeed config"),
    "no launcher": (
        ["--deepspeed", str(ROOT / "deepspeed_configs" / "zero3.json")],
        "needs a launcher",
    ),
    "gone in 5.x": (["--evaluation_strategy", "steps"], "unrecognized arguments"),
    "steps": (["--logging_steps", "0"], "non-zero --logging_steps"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, script, checkpoints, train_file, tmp_path, capsys):
    more, message = BAD_ARGUMENTS[case]
    base = [
        "--model_name_or_path",
        checkpoints["llama"],
        "--train_file",
        train_file,
        "--output_dir",
        tmp_path / "o",
    ]
    assert message in refused(script, capsys, [*base, *more])


def test_settings_file(script, checkpoints, train_file, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    for text, message in {
        "- 1\n": "must hold lines",
        "a: [": "parsing a flow node",
        "nonsense: 3\n": "unrecognized",
    }.items():
        path.write_text(text)
        base = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file]
        assert message in refused(script, capsys, [path, *base])
    assert "No such file" in refused(script, capsys, [tmp_path / "none.yaml"])


def test_bad_models(script, checkpoints, train_file, tmp_path, capsys):
    """A checkpoint without some weights, ids past the embedding."""
    lacking, long = (tmp_path / name for name in ("lacking", "long"))
    for directory in (lacking, long):
        shutil.copytree(checkpoints["llama"], directory)
    state = weights(checkpoints["llama"])
    save_file(
        {n: t for n, t in state.items() if "layers.1.mlp" not in n},
        lacking / "model.safetensors",
        {"format": "pt"},
    )
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(50)])
    tokenizer.save_pretrained(long)
    for directory, message in ((lacking, "would be random"), (long, "past the end")):
        base = [
            "--model_name_or_path",
            directory,
            "--train_file",
            train_file,
            "--output_dir",
            tmp_path / "o",
        ]
        assert message in refused(script, capsys, base)


def test_template_that_rewrites_turns(script, checkpoints, tmp_path, capsys):
    """Like Qwen3's, which drops the reasoning of earlier turns: each answer makes an example."""
    model = tmp_path / "m"
    shutil.copytree(checkpoints["llama"], model)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and loop.last %}(think)"
                               "{% endif %}{{ m.content + eos_token }}{% endfor %}"
                               "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    tokenizer.save_pretrained(model)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    base = [
        "--model_name_or_path",
        model,
        "--output_dir",
        tmp_path / "o",
        "--max_steps",
        1,
        "--train_file",
    ]
    script.main(
        [str(word) for word in [*base, write_jsonl(tmp_path / "one.jsonl", [{"messages": turns}])]]
    )
    two = write_jsonl(tmp_path / "two.jsonl", [{"messages": turns * 2}])
    script.main([str(word) for word in [*base, two, "--output_dir", tmp_path / "o2"]])
    out = capsys.readouterr().out
    assert "1 examples" in out and "2 examples" in out
    examples = [*script.make_examples([two], AutoTokenizer.from_pretrained(model), 999)]
    learned = [[i for i in example["labels"] if i != -100] for example in examples]
    assert [tokenizer.decode(ids) for ids in learned] == ["(think)b<|endoftext|>"] * 2
    later = "<s>user:a<|endoftext|>assistant:b<|endoftext|>user:a<|endoftext|>assistant:(think)b"
    assert tokenizer.decode(examples[1]["input_ids"]) in (
        f"{later}<|endoftext|>",
        f"{later[3:]}<|endoftext|>",
    )


def test_a_spoilt_loss_ends_the_run(script, checkpoints, train_file, tmp_path, capsys):
    model = tmp_path / "nan"
    shutil.copytree(checkpoints["llama"], model)
    state = weights(checkpoints["llama"])
    state["model.norm.weight"][0] = torch.nan
    save_file(state, model / "model.safetensors", {"format": "pt"})
    base = [
        "--model_name_or_path",
        model,
        "--train_file",
        train_file,
        "--output_dir",
        tmp_path / "o",
        "--max_steps",
        5,
    ]
    assert "the loss is nan at step" in refused(script, capsys, base)


def test_alone_in_an_empty_directory(checkpoints, train_file, tmp_path):
    """Copied away it runs; a misspelt argument and --help import nothing beyond what TrainingArguments does."""
    shutil.copy(SCRIPT, tmp_path)
    base = [
        sys.executable,
        "finetune_full.py",
        "--model_name_or_path",
        checkpoints["llama"],
        "--train_file",
        train_file,
    ]
    done = subprocess.run([*base, "--max_steps", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "output" / "model.safetensors").is_file()
    probe = ("import sys, datasets, yaml; from transformers import TrainingArguments; before = set(sys.modules)\n"
             "import finetune_full\ntry: finetune_full.main(['--help'])\nexcept SystemExit: pass\n"
             "print(sorted({n.split('.')[0] for n in set(sys.modules) - before}))")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True
    )
    heavy = {"deepspeed", "peft", "bitsandbytes", "matplotlib", "tensorboard", "wandb", "triton"}
    assert not heavy & set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))


def test_a_head_with_another_name_in_the_file_is_loaded_again(
    script, checkpoints, train_file, tmp_path
):
    """gpt_neox's lm_head is embed_out in the file: going on, and keeping the best, must not start it anew."""
    whole, cut, best = tmp_path / "whole", tmp_path / "cut", tmp_path / "best"
    common = ["--model_name_or_path", checkpoints["gpt_neox"], "--train_file", train_file, "--learning_rate", "1e-3",
              "--max_steps", "4", "--save_steps", "2"]  # fmt: skip
    script.main([*common, "--output_dir", str(whole)])
    script.main(
        [*common, "--output_dir", str(cut), "--resume_from_checkpoint", str(whole / "checkpoint-2")]
    )
    assert same_weights(whole, cut)
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "甲", "completion": "乙丙丁"}])
    script.main([*common, "--output_dir", str(best), "--validation_file", other, "--early_stopping_patience", "2",
                 "--save_steps", "1", "--max_steps", "60", "--learning_rate", "0.05"])  # fmt: skip
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_global_step"] < state["global_step"]
    assert same_weights(best, state["best_model_checkpoint"])
