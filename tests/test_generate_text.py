"""generate_text.py and chat.py against plain forward passes, their own restarts, and bad input."""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keep_answers
import pytest
import run_common
import torch
from conftest import CONFIGS, ROOT, ROWS, load_script, make_checkpoint, make_tokenizer, write_jsonl
from datasets import Dataset
from test_runs import NAMES
from tokenizers import Tokenizer
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

SCRIPT, CHAT = (ROOT / "generate_text" / name for name in ("generate_text.py", "chat.py"))
script, chat = load_script(SCRIPT), load_script(CHAT)
finetune = load_script(ROOT / "finetune_full" / "finetune_full.py")


@pytest.fixture(autouse=True)
def no_deadline(monkeypatch):
    monkeypatch.delenv("DEADLINE", raising=False)


def run(*arguments, main=script.main):
    """main() with keyword-like arguments; returns its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as leave:
        return leave.code
    finally:  # a process would end here: its handler, and with it its lock
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


def run_chat(monkeypatch, text, model, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return run("--model_name_or_path", model, *arguments, main=chat.main)


def run_file(model, prompts, output, *more, tokens=8):
    return run("--model_name_or_path", model, "--prompt_file", prompts, "--output_file", output,
               "--max_new_tokens", tokens, *more)  # fmt: skip


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def greedy(model, ids, count, stops, positions=64):
    """The likeliest next token, one whole forward pass each: no cache, no padding, no generate()."""
    new = []
    while len(new) < count and len(ids) + len(new) < positions:
        token = int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return new


def expected(directory, rows, count, adapter=None, positions=64):
    """Greedy answers to prompt rows, from the raw text on."""
    model = adapter or AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    eos = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    return [
        tokenizer.decode(greedy(model, ids, count, stops, positions), skip_special_tokens=True)
        for ids in prompts
    ]


# ---- Prompts ----

OWN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "短く答える。"},
    {"role": "user", "content": "空は?"},
    {"role": "assistant", "content": "青い"},
    {"role": "user", "content": "では海は?"},
    {"role": "assistant", "content": "もっと青い"},
]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("template", "chosen"),
    [(None, None), (OWN_TEMPLATE, None), (None, "rinna"), (OWN_TEMPLATE, "dolly")],
)
def test_prompt_has_the_ids_it_had_in_training(tmp_path, bos, template, chosen):
    """format_row and encode of the training script up to the last answer, whatever the template."""
    tokenizer = make_tokenizer(bos)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["### End"]})
    tokenizer.save_pretrained(tmp_path)
    CONFIGS["llama"](301).save_pretrained(tmp_path)
    args = script.parse(["--model_name_or_path", str(tmp_path), "--prompt", "a"])
    if chosen:
        args.chat_template = str(ROOT / "chat_templates" / f"{chosen}.jinja")
    script.check_arguments(args)
    tokenizer = script.load_tokenizer(args)
    args.max_length = None
    trained, _ = finetune.load_tokenizer(args)
    assert tokenizer.chat_template == trained.chat_template
    rows = [
        ROWS[0],
        {"prompt": "語 ", "completion": " 語"},
        {"instruction": "訳せ", "input": "", "output": "translate"},
        {"instruction": "訳せ", "input": "空", "output": "sky"},
        {"prompt": "見ない", "instruction": "訳せ", "output": "translate"},
        {"messages": CONVERSATION[1:3]},
        {"messages": CONVERSATION},
    ]
    for row in rows:
        form, (pieces,) = finetune.format_row(row, trained)
        while pieces[-1][1]:  # the answer, and what ends it
            pieces.pop()
        wanted, _ = finetune.encode(pieces, trained)
        assert script.encode_prompt(row, tokenizer) == (form, wanted)
        is_own = template is not None and chosen is None and form != "prompt"
        assert wanted.count(1) == int(bos or is_own)
        if form != "prompt":
            messages = row.get("messages") or [{"role": "user", "content": pieces[-1][0]}]
            if form == "messages":
                assert chat.encode_chat(messages[:-1], tokenizer) == wanted
        # An answer that is missing, or no text, makes no difference.
        for answer in ("completion", "output"):
            if answer in row and "見ない" not in row.values():
                unanswered = {name: value for name, value in row.items() if name != answer}
                assert script.encode_prompt(unanswered, tokenizer) == (form, wanted)
                assert script.encode_prompt(row | {answer: None}, tokenizer) == (form, wanted)
    asked = {"messages": CONVERSATION[:-1]}
    assert script.encode_prompt(asked, tokenizer) == script.encode_prompt(rows[-1], tokenizer)


def test_template_that_rewrites_earlier_turns_is_used_as_it_is():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}>"
    )
    form, ids = script.encode_prompt({"messages": CONVERSATION}, tokenizer)
    assert (form, tokenizer.decode(ids)) == ("messages", "4短く答える。3空は?2青い1では海は?>")
    form, ids = script.encode_prompt({"instruction": "訳せ", "input": "空"}, tokenizer)
    assert (form, tokenizer.decode(ids)) == ("instruction", "1訳せ\n\n空>")


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "空 \n\n  \n\u2028海\r\n山", ["空 ", "\u2028海", "山"]),
        ("a.txt", '\ufeff{"prompt": "空"}\n{"prompt": "海", "completion": null}', ["空", "海"]),
        ("noname", '[\n {"prompt": "空"}]', ["空"]),
        ("noname", "[問] 空\n{山}", ["[問] 空", "{山}"]),
        ("a.json", '[{"prompt": "空", "completion": 1}]'.replace("1", '"青"'), ["空"]),
    ],
)
def test_kinds_of_prompt_file(tmp_path, name, text, prompts):
    (tmp_path / name).write_bytes(text.encode())
    args = SimpleNamespace(prompt_file=str(tmp_path / name), positions=64)
    form, rows, ids = script.read_prompts(args, make_tokenizer())
    assert [row["prompt"] for row in rows] == prompts and form == "prompt"
    assert [make_tokenizer().decode(row) for row in ids] == prompts


def test_fields_and_order_are_kept_whatever_the_answer_column(tmp_path, checkpoints):
    rows = [
        {"id": i, "instruction": "問" * (7 - i % 7), "gold": {"a": [i, "\ud800"]}} for i in range(9)
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        run_file(checkpoints["llama"], prompts, tmp_path / "new" / "out.jsonl", "--batch_size", 4)
        == 0
    )
    found = read_jsonl(tmp_path / "new" / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "generated_text"} for row in found] == rows
    assert all(isinstance(row["generated_text"], str) for row in found)
    Dataset.from_list([{"prompt": row["instruction"], "id": row["id"]} for row in rows]).to_parquet(
        tmp_path / "p.parquet"
    )
    assert run_file(checkpoints["llama"], tmp_path / "p.parquet", tmp_path / "parquet.jsonl") == 0
    assert [row["id"] for row in read_jsonl(tmp_path / "parquet.jsonl")] == list(range(9))


def test_any_path(tmp_path, checkpoints, adapter, monkeypatch, capsys):
    """Every kind of name as model, adapter, prompts, template and output, absolute and relative."""
    monkeypatch.chdir(tmp_path)
    home, base = tmp_path / "home", adapter[1]
    monkeypatch.setenv("HOME", str(home))
    # A pattern would find these in place of the files named.
    write_jsonl(tmp_path / "run1.jsonl", ROWS[:1])
    Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "run1.PARQUET")
    turns = [{"instruction": row["completion"][:5]} for row in ROWS]
    for name in NAMES:
        here = tmp_path / f"{name}.d"
        here.mkdir()
        for kind, source in {"model": base, "adapter": adapter[0]}.items():
            shutil.copytree(source, here / f"{name}.{kind}")
        set_base(here / f"{name}.adapter", f"{name}.model/")
        write_jsonl(here / f"{name}.JSONL", ROWS)
        Dataset.from_list(turns).to_parquet(here / f"{name}.PARQUET")
        (here / f"{name}.jinja").write_text(script.CHAT_TEMPLATE.replace("応答", "A"), "utf-8")
        model, data = f"./{here.name}/{name}.adapter/", f"./{here.name}/{name}.JSONL"
        output = f"./{here.name}/out {name}"
        assert run_file(model, data, output, tokens=1) == 0, name
        assert len(read_jsonl(here / f"out {name}")) == 7
        template = ("--chat_template", here / f"{name}.jinja")
        model, data = here / f"{name}.model", here / f"{name}.PARQUET"
        capsys.readouterr()
        assert run_file(model, data, here / f"new {name}" / name, *template, tokens=1) == 0, name
        assert len(read_jsonl(here / f"new {name}" / name)) == 7
        assert "### A:" in capsys.readouterr().err
        assert run_chat(monkeypatch, "空", model, *template, "--max_new_tokens", 1) == 0, name
    (tmp_path / "home").symlink_to(tmp_path / "日本語.d")
    (tmp_path / "linked").symlink_to("日本語.d/there")
    (home / "~").write_text("空\n~/日本語.model", "utf-8")
    assert run_file("~/日本語.model", "~/~", "~/out", tokens=1) == 0
    assert [row["prompt"] for row in read_jsonl(home / "out")] == ["空", "~/日本語.model"]
    assert run_file("home/日本語.model/.", "home/~/", "linked", tokens=1) == 0
    assert (tmp_path / "linked").is_symlink() and len(read_jsonl(home / "there")) == 2
    monkeypatch.chdir(home / "日本語.model")
    assert run_file(".", "../~", "here", tokens=1) == 0 == run_file(".", "../~", "here", tokens=1)
    assert run("--model_name_or_path=.", "--prompt=~", "--max_new_tokens=1") == 0
    report = capsys.readouterr().err
    assert "finished" in report and "example    <s>~\n" in report


@pytest.mark.parametrize("suffix", ["", ".partial", ".tmp", ".settings.json"])
def test_files_of_others_are_kept(tmp_path, checkpoints, capsys, suffix):
    """Whatever stands where the answers go, or beside it, was not written by this run."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "空"}])
    kept = tmp_path / f"out{suffix}"
    kept.write_text('{"mine": 1}\n')
    before = sorted(tmp_path.iterdir())
    assert run_file(checkpoints["gpt2"], prompts, tmp_path / "out") == 2
    assert "holds other answers" in capsys.readouterr().err
    assert kept.read_text() == '{"mine": 1}\n' and sorted(tmp_path.iterdir()) == before


# ---- Answers ----


@pytest.mark.parametrize("kind", CONFIGS)
def test_batched_equals_one_by_one(tmp_path, capsys, checkpoints, train_file, kind):
    """Also for the prompt of 58 of 64 positions, whose answer has room for 6 of the 8 tokens, beside a shorter one."""
    lengths = []
    original = script.generate
    try:
        script.generate = lambda *a, **k: (lengths.append(len(a[3])), original(*a, **k))[1]
        assert (
            run_file(checkpoints[kind], train_file, tmp_path / "out.jsonl", "--batch_size", 4) == 0
        )
    finally:
        script.generate = original
    assert max(lengths) == 4 and "None" not in capsys.readouterr().err
    found = [row["generated_text"] for row in read_jsonl(tmp_path / "out.jsonl")]
    assert found == expected(checkpoints[kind], ROWS, 8)


def test_each_answer_has_the_room_its_own_prompt_leaves(tmp_path, checkpoints, train_file):
    assert (
        run_file(
            checkpoints["mpt"], train_file, tmp_path / "out.jsonl", "--batch_size", 4, tokens=40
        )
        == 0
    )
    found = [row["generated_text"] for row in read_jsonl(tmp_path / "out.jsonl")]
    assert found == expected(checkpoints["mpt"], ROWS, 40)


def test_longest_first(tmp_path, monkeypatch):
    """Too little memory shows at once; a prompt near the model's end is not padded by others."""
    prompts, asked = [[0] * n for n in (2, 8, 3, 8, 5, 7, 4)], []
    args = SimpleNamespace(
        batch_size=2, max_new_tokens=4, positions=10, output_file=str(tmp_path / "out"),
        deadline=math.inf, rank=0, ranks=1, slowest=0, looked=0,
    )  # fmt: skip

    def answer(args, model, tokenizer, batch, draw):
        asked.append((draw, [len(prompt) for prompt in batch]))
        return [{"generated_text": str(len(prompt))} for prompt in batch], 1, 0

    monkeypatch.setattr(script, "generate", answer)
    monkeypatch.setattr(keep_answers, "pads_well", lambda *given: True)
    script.answer_file(args, None, None, [{"id": i} for i in range(7)], prompts)
    assert asked == [(0, [8]), (1, [8]), (2, [7]), (3, [5, 4]), (5, [3, 2])]
    found = [(row["id"], row["generated_text"]) for row in read_jsonl(tmp_path / "out")]
    assert found == list(enumerate("2838574"))


def test_prompt_prints_the_answer_alone(capsys, checkpoints):
    assert (
        run(
            "--model_name_or_path",
            checkpoints["qwen3"],
            "--prompt",
            ROWS[1]["prompt"],
            "--max_new_tokens",
            8,
        )
        == 0
    )
    out, report = capsys.readouterr()
    assert out == expected(checkpoints["qwen3"], ROWS[1:2], 8)[0] + "\n"
    for name in ("model", "device", "prompts", "example", "tokens"):
        assert f"\n{name} " in "\n" + report


def test_same_seed_same_draws_also_after_a_restart(tmp_path, checkpoints, train_file, monkeypatch):
    def answers(name, *more):
        arguments = ("--do_sample", "--temperature", 1.5, "--top_p", 0.9, "--batch_size", 2, *more)
        assert run_file(checkpoints["llama"], train_file, tmp_path / name, *arguments) == 0
        return read_jsonl(tmp_path / name)

    first = answers("a", "--seed", 1)
    assert answers("b", "--seed", 1) == first != answers("c", "--seed", 2)
    assert answers("d", "--seed", 1, "--temperature", 0.01, "--top_p", 1) != first
    alike = write_jsonl(tmp_path / "alike.jsonl", [{"prompt": "空"}] * 2)
    more = ("--do_sample", "--batch_size", 1)
    assert run_file(checkpoints["llama"], alike, tmp_path / "two", *more) == 0
    one, two = read_jsonl(tmp_path / "two")
    assert one != two  # each batch draws anew
    # Killed behind the second batch and in the middle of a line, and once more a batch later.
    original, left, draws = script.generate, [0, 0, 1, 0], []

    def generate(*arguments):
        assert not left.pop(0), "killed"
        draws.append(arguments[4])
        return original(*arguments)

    (tmp_path / "b").unlink()
    monkeypatch.setattr(script, "generate", generate)
    with pytest.raises(AssertionError, match="killed"):
        answers("b", "--seed", 1)
    with (tmp_path / "b.partial").open("a") as file:
        file.write('\n[3, [{"gener')
    left[1:] = [1]
    with pytest.raises(AssertionError, match="killed"):
        answers("b", "--seed", 1)
    left[:] = [0] * 9
    assert answers("b", "--seed", 1) == first
    assert draws == [0, 1, 3, 5] and len(first) == 7


def test_cold_sampling_is_greedy(tmp_path, checkpoints, train_file):
    arguments = ("--do_sample", "true", "--temperature", 1e-5)
    assert run_file(checkpoints["gpt2"], train_file, tmp_path / "out.jsonl", *arguments) == 0
    assert [r["generated_text"] for r in read_jsonl(tmp_path / "out.jsonl")] == expected(
        checkpoints["gpt2"], ROWS, 8
    )


@pytest.fixture(scope="module")
def ending(tmp_path_factory, checkpoints):
    """ending(token) makes a model whose third token is `token`; returns (directory, the answer up to there)."""

    def make(token, template=None, eos_in_config=False):
        directory = tmp_path_factory.mktemp("ending")
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["### End", "<|stop|>"]})
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])  # special, with no role
        tokenizer.chat_template = template
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"](len(tokenizer)))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        model.generation_config.eos_token_id = (
            tokenizer.convert_tokens_to_ids(token) if eos_in_config else None
        )
        ids = tokenizer("質問", add_special_tokens=False)["input_ids"]
        if template:
            ids = tokenizer("Q質問A", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            new = greedy(model, ids, 3, {})
            assert new[2] not in new[:2]
            row = model.lm_head.weight
            row[tokenizer.convert_tokens_to_ids(token)] = (
                1.01 * row[new[2]]
            )  # whose logit was the largest
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory, tokenizer.decode(new[:2])

    return make


CHATML = "{% for m in messages %}{{ 'Q' + m.content if m.role == 'user' else 'A' + m.content + '<|im_end|>' }}{% endfor %}"
CHATML += "{% if add_generation_prompt %}A{% endif %}"


@pytest.mark.parametrize("token", ["<|endoftext|>", "### End", "<|stop|>"])
def test_stops(capsys, ending, token):
    directory, answer = ending(token, eos_in_config=token == "<|stop|>")
    assert run("--model_name_or_path", directory, "--prompt", "質問", "--max_new_tokens", 8) == 0
    assert capsys.readouterr().out == answer + "\n"


def test_stops_at_the_end_of_a_turn_only_in_chats(capsys, monkeypatch, ending, tmp_path):
    directory, answer = ending("<|im_end|>", CHATML)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"instruction": "質問"}])
    assert run_file(directory, prompts, tmp_path / "out.jsonl") == 0
    assert read_jsonl(tmp_path / "out.jsonl")[0]["generated_text"] == answer
    capsys.readouterr()
    assert run_chat(monkeypatch, "質問\n", directory, "--max_new_tokens", 8) == 0
    assert capsys.readouterr().out == answer + "\n"
    assert run("--model_name_or_path", directory, "--prompt", "Q質問A", "--max_new_tokens", 8) == 0
    longer = capsys.readouterr().out
    assert longer.startswith(answer) and longer != answer + "\n"


@pytest.mark.parametrize("bos", [False, True])
def test_completions_come_back_exactly(bos):
    tokenizer = make_tokenizer(bos)
    tokenizer.clean_up_tokenization_spaces = True  # as published tokenizers have it
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    texts = [row["completion"] for row in ROWS] + [
        " a . b , it 's !",
        "\n二行\n",
        "鬱😀",
        "全角　空白  ",
        "１２３ｱｲｳ",
    ]
    args = SimpleNamespace(compare_base=False, seed=0, max_new_tokens=99, positions=99)
    args.form = "prompt"
    completions = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, completions)) + 1
    ends = [
        ids + [0] * (width - len(ids)) for ids in completions
    ]  # EOS, then padding with the same id
    model = SimpleNamespace(
        device="cpu",
        generation_config=GenerationConfig(eos_token_id=[0], pad_token_id=0),
        generate=lambda input_ids, **_: torch.cat([input_ids, torch.tensor(ends)], 1),
    )
    results, tokens, cut = script.generate(
        args, model, tokenizer, [[5] * (1 + i) for i in range(len(texts))]
    )
    assert [result["generated_text"] for result in results] == texts
    assert (tokens, cut) == (sum(map(len, completions)), 0)


def test_fine_tuned_answers_come_back(tmp_path, checkpoints):
    """Training and generation see the same prompt: what was learned by heart is given back, to the EOS."""
    rows = [
        row for row in ROWS if len(row["prompt"] + row["completion"]) < 30
    ]  # that fit into 64 tokens
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    arguments = "--num_train_epochs 80 --learning_rate 1e-2 --per_device_train_batch_size 8 --save_strategy no"
    arguments += " --lr_scheduler_type constant --use_cpu true --seed 1"
    finetune.main(["--model_name_or_path", checkpoints["llama"], "--train_file", train, "--output_dir",
                   str(tmp_path / "model"), *arguments.split()])  # fmt: skip
    assert run_file(tmp_path / "model", train, tmp_path / "out.jsonl", tokens=30) == 0
    found = read_jsonl(tmp_path / "out.jsonl")
    assert [row["generated_text"] for row in found] == [row["completion"] for row in rows] and len(
        rows
    ) > 3


# ---- Chat ----


def test_chat_remembers_what_was_said(capsys, monkeypatch, tmp_path):
    config = CONFIGS["llama"]
    monkeypatch.setitem(
        CONFIGS,
        "llama",
        lambda v: config(v).__class__(**{**config(v).to_dict(), "max_position_embeddings": 512}),
    )
    directory = make_checkpoint(tmp_path / "model", "llama")
    text = "空は?\n\n  海は?\nexit\n山は?\n"
    assert run_chat(monkeypatch, text, directory, "--max_new_tokens", 6) == 0
    first, second = capsys.readouterr().out.removesuffix("\n").split("\n")
    turns = [{"role": "user", "content": "空は?"}, {"role": "assistant", "content": first},
             {"role": "user", "content": "海は?"}]  # fmt: skip
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"messages": turns[:1]}, {"messages": turns}])
    assert run_file(directory, prompts, tmp_path / "out.jsonl", tokens=6) == 0
    assert [row["generated_text"] for row in read_jsonl(tmp_path / "out.jsonl")] == [first, second]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)  # streamed, and the same
    capsys.readouterr()
    assert run_chat(monkeypatch, text, directory, "--max_new_tokens", 6) == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_chat_goes_on_when_the_positions_are_full(capsys, monkeypatch, checkpoints):
    text = "空\n海\n" + "山" * 99 + "\n川\n"
    assert run_chat(monkeypatch, text, checkpoints["gpt2"], "--max_new_tokens", 9) == 0
    out, report = capsys.readouterr()
    assert "forgotten  空" in report and "too long" in report and out.count("\n") >= 3


def test_chat_draws_by_its_seed(capsys, monkeypatch, checkpoints):
    found = []
    for seed in (1, 1, 2):
        more = ("--do_sample", "--seed", seed, "--max_new_tokens", 9)
        assert run_chat(monkeypatch, "空", checkpoints["mpt"], *more) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_chat_copied_out(tmp_path, capsys, monkeypatch, checkpoints):
    """It needs generate_text.py beside it, which it says in one line, and nothing else of ours."""
    shutil.copy(CHAT, tmp_path)
    for name in ("generate_text", "chat", "finetune_full", "keep_answers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    ours = {str(ROOT), *map(str, ROOT.glob("*"))}
    elsewhere = [path for path in sys.path if path not in ours]  # .venv may lie inside ROOT
    monkeypatch.setattr(sys, "path", elsewhere)
    monkeypatch.setattr(sys, "stdin", io.StringIO("空\n"))
    words = ["--model_name_or_path", checkpoints["gpt2"], "--max_new_tokens", "3"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "chat.py"), *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert stopped.value.code == 2
    assert "chat.py needs generate_text.py beside it" in capsys.readouterr().err
    shutil.copy(SCRIPT, tmp_path)
    sys.modules.pop("generate_text", None)  # the directory, which is no module
    # Not syspath_prepend: undone last, it would leave the path as it is here to all later tests.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert sys.modules.pop("generate_text").keep_answers is None
    out, report = capsys.readouterr()
    assert out.count("\n") == 1
    assert [line.split()[0] for line in report.splitlines()] == ["model", "device"]


# ---- Restarting ----


def test_killed_and_started_again(tmp_path, checkpoints, capsys):
    """Copied beside `jobs`, killed in mid-run and mid-line, started again: as if nothing had happened."""
    rows = [{"prompt": ROWS[i % 7]["prompt"][: 10 + i % 9], "id": i} for i in range(200)]
    prompts, output = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    (tmp_path / "empty").mkdir()
    shutil.copy(SCRIPT, tmp_path / "empty")
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    command = [sys.executable, "generate_text.py", "--model_name_or_path", checkpoints["llama"], "--prompt_file",
               prompts, "--output_file", str(output), "--max_new_tokens", "20", "--batch_size", "1"]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=tmp_path / "empty",
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": ""},
    )
    deadline = time.time() + 120
    while not partial.exists() or partial.read_bytes().count(b"]\n") < 3:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    # While it lives, a second process is refused; killed, it leaves nothing that would be in the way.
    assert run_file(checkpoints["llama"], prompts, output, "--batch_size", 50, tokens=20) == 2
    assert "another process is writing" in capsys.readouterr().err.splitlines()[-1]
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    before = partial.read_bytes()
    partial.write_bytes(before + b'\n[3, [{"generated_text": "half a li')
    done, asked, kept, original = before.count(b"]\n"), [], [], script.generate
    try:
        script.generate = lambda *a: (
            kept.append(partial.read_bytes().count(b"]\n")),
            asked.append(a[3]),
            original(*a),
        )[2]
        assert run_file(checkpoints["llama"], prompts, output, "--batch_size", 50, tokens=20) == 0
    finally:
        script.generate = original
    assert 3 <= done < 200 and sum(map(len, asked)) == 200 - done
    # Each batch is on the disk before the next.
    assert kept == [done + i for i in range(len(asked))]
    found = read_jsonl(output)
    assert [row["id"] for row in found] == list(range(200)) and not partial.exists()
    assert [row["generated_text"] for row in found[::9]] == expected(
        checkpoints["llama"], rows[::9], 20
    )


def test_two_processes_share_a_file(tmp_path, checkpoints):
    """Started by torchrun, stopped by a file, started again: the answers of one process, in order."""
    rows = [{"prompt": ROWS[i % 7]["prompt"][: 3 + i % 11], "id": i} for i in range(90)]
    prompts, output = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out"
    more = (*DRAWN, "--batch_size", 2)
    assert run_file(checkpoints["llama"], prompts, tmp_path / "one", *more) == 0
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", 2]
    words = ["--model_name_or_path", checkpoints["llama"], "--prompt_file", prompts]
    words += ["--output_file", output, "--max_new_tokens", 8, *more]
    command = [sys.executable, ROOT / "jobs" / "run_ranks.py", *torchrun, SCRIPT, *words]
    command, env = [str(word) for word in command], os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    first, second = tmp_path / "out.partial", tmp_path / "out.partial.1"
    while not (first.exists() and second.exists()):
        assert process.poll() is None
        time.sleep(0.01)
    (tmp_path / "STOP").touch()
    report = process.communicate()[1]
    assert process.returncode == 75, report
    assert report.count("stopped    by ") == report.count(" (llama), ") == 1
    assert not output.exists() and not (tmp_path / "STOP").exists()
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert output.read_bytes() == (tmp_path / "one").read_bytes()
    assert not list(tmp_path.glob("out.partial*"))
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "finished   " in run.stderr


def test_alone_it_answers_once(tmp_path, checkpoints, capsys, monkeypatch):
    """Without `jobs` beside it no answer is ever replaced, and none is mixed with others."""
    monkeypatch.setattr(script, "keep_answers", None)
    prompts, output = write_jsonl(tmp_path / "p.jsonl", ROWS), tmp_path / "out.jsonl"
    assert run_file(checkpoints["llama"], prompts, output) == 0
    assert "alone " in capsys.readouterr().err
    before = output.read_bytes()
    found = [row["generated_text"] for row in read_jsonl(output)]
    assert found == expected(checkpoints["llama"], ROWS, 8)
    assert run_file(checkpoints["llama"], prompts, output) == 2
    assert f"{output} would be replaced" in capsys.readouterr().err
    output.rename(tmp_path / "out.jsonl.tmp")
    assert run_file(checkpoints["llama"], prompts, output) == 2
    assert f"{output}.tmp would be replaced" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.tmp").read_bytes() == before


@pytest.fixture
def finished(tmp_path, checkpoints):
    shutil.copytree(checkpoints["llama"], tmp_path / "model")
    prompts, output = write_jsonl(tmp_path / "p.jsonl", ROWS), tmp_path / "out.jsonl"
    assert run_file(tmp_path / "model", prompts, output) == 0
    return tmp_path, prompts, output


def test_finished_is_said_and_nothing_loaded(finished, capsys, monkeypatch):
    tmp_path, prompts, output = finished
    before = output.read_bytes()
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("loaded"))
    assert (
        run_file(tmp_path / "model", prompts, output, "--batch_size", 3, "--device_map", "cpu") == 0
    )
    assert "finished" in capsys.readouterr().err and output.read_bytes() == before


@pytest.mark.parametrize("change", ["tokens", "sampling", "prompts", "model", "foreign", "itself"])
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_other_settings_are_never_mixed(finished, capsys, change, state):
    tmp_path, prompts, output = finished
    if state == "interrupted":
        output.unlink()
        output = output.with_name("out.jsonl.partial")
        output.write_text(json.dumps([{"generated_text": "x"}]) + "\n")
    if change == "prompts":
        write_jsonl(Path(prompts), ROWS[:-1])
    if change == "model":
        weights = tmp_path / "model" / "model.safetensors"
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    if change == "foreign":
        (tmp_path / "out.jsonl.settings.json").write_text('{"a": 1}')
    target = prompts if change == "itself" else tmp_path / "out.jsonl"
    before, files = output.read_bytes(), sorted(tmp_path.iterdir())
    more = ["--do_sample"] if change == "sampling" else []
    assert (
        run_file(tmp_path / "model", prompts, target, *more, tokens=9 if change == "tokens" else 8)
        == 2
    )
    message = "is the --prompt_file" if change == "itself" else "holds other answers"
    assert message in capsys.readouterr().err
    assert output.read_bytes() == before and sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16"}, {"load_in_8bit": True}, {"do_sample": True}]
)
def test_where_answers_hang_on_the_batch(changes, tmp_path):
    """A file keeps the size of a batch that it began with, but greedy ones in fp32 do not hang on it."""
    file = write_jsonl(tmp_path / "p.jsonl", ROWS)
    words = f"--model_name_or_path m --prompt_file {file} --output_file o --batch_size 4".split()
    args = script.parse(words)
    args.base, args.recorded = "m", ""
    plain = {"precision": "fp32"}
    assert keep_answers.describe(args, "fp32", [[1]], __file__)["batch_size"] is None
    for name, value in changes.items():
        plain, args.__dict__[name] = plain | {name: value}, value
    assert keep_answers.describe(args, plain["precision"], [[1]], __file__)["batch_size"] == 4


class Clock:
    """The module time with a clock of its own, on which each batch takes as long as a test says."""

    def __init__(self, monkeypatch, *seconds):
        self.now, self.seconds, self.batches = 1_000_000_000.0, seconds or (20,), 0
        original = script.generate
        for module in (script, keep_answers, run_common):
            monkeypatch.setattr(module, "time", self)
        monkeypatch.setattr(script, "generate", lambda *a: (self.tick(), original(*a))[1])

    def __getattr__(self, name):
        return getattr(time, name)

    def time(self):
        return self.now

    def tick(self):
        self.now += self.seconds[min(self.batches, len(self.seconds) - 1)]
        self.batches += 1


MANY = [{"prompt": ROWS[i % 7]["prompt"][: 3 + i % 11], "id": i} for i in range(23)]
DRAWN = ("--do_sample", "--seed", "3", "--temperature", "1.3", "--top_p", "0.9")


@pytest.mark.parametrize("more", [(), DRAWN], ids=["greedy", "drawn"])
def test_stopped_again_and_again_is_as_unbroken(tmp_path, checkpoints, monkeypatch, capsys, more):
    """By the clock, by SIGTERM and by a file STOP, each several times: in the end, the same bytes."""
    prompts, output = write_jsonl(tmp_path / "p.jsonl", MANY), tmp_path / "out"
    more = (*more, "--batch_size", 2)
    assert run_file(checkpoints["llama"], prompts, tmp_path / "unbroken", *more) == 0
    clock, original, codes, done = Clock(monkeypatch), script.generate, [], []
    assert len(MANY) // 2 + 1 == 12  # batches

    def generate(*arguments):
        if len(codes) % 3 == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of a batch, which is kept
        if len(codes) in (2, 5):
            (tmp_path / "STOP").touch()
        return original(*arguments)

    monkeypatch.setattr(script, "generate", generate)
    while codes[-1:] != [0]:
        # 20 seconds a batch and 10 for the rest: the third would end too late.
        deadline = clock.now + 65 if len(codes) % 3 == 0 else clock.now + 9e6
        monkeypatch.setenv("DEADLINE", str(int(deadline)))
        before, _ = clock.batches, capsys.readouterr()
        codes.append(run_file(checkpoints["llama"], prompts, output, *more))
        done.append(clock.batches - before)
        line = capsys.readouterr().err.splitlines()[-1]
        if codes[-1]:
            reason = ("DEADLINE", "SIGTERM", str(tmp_path / "STOP"))[(len(codes) - 1) % 3]
            assert line.startswith("stopped    by " + reason)
            assert f"; {min(2 * sum(done), 23)} of 23 rows are answered; to go on, type" in line
        assert not (tmp_path / "STOP").exists() and output.exists() == (codes[-1] == 0)
    assert codes == [75] * 8 + [0] and done == [2, 1, 1, 2, 1, 1, 2, 1, 1]
    assert output.read_bytes() == (tmp_path / "unbroken").read_bytes()
    names = {"p.jsonl", *(f"{name}{end}" for name in ("out", "unbroken") for end in ("", ".settings.json"))}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("left", "batches"),
    [(9, 0), (11, 1), (49, 1), (51, 2), (229, 2), (231, 3), (249, 3), (251, 4)],
)
def test_margin_is_that_of_the_slowest_batch(tmp_path, checkpoints, monkeypatch, left, batches):
    """And 10 seconds; a deadline nearer than these ends the run before the model is loaded."""
    prompts, clock = write_jsonl(tmp_path / "p.jsonl", MANY), Clock(monkeypatch, 20, 100, 20)
    monkeypatch.setenv("DEADLINE", str(int(clock.now) + left))
    if not batches:
        monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("loaded"))
    assert run_file(checkpoints["gpt2"], prompts, tmp_path / "out", "--batch_size", 2) == 75
    assert clock.batches == batches


@pytest.fixture
def in_tokyo(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_forms_of_the_deadline(in_tokyo, monkeypatch, capsys):
    noon, clock = 1_700_017_200, Clock(monkeypatch)  # 2023-11-15 12:00 there
    clock.now = noon + 0.5
    clock.localtime = lambda: time.localtime(clock.now)
    for text, wanted in {"12:01": 60, "12:00": 86400, "0:00": 43200, "23:59": 43140}.items():
        monkeypatch.setenv("DEADLINE", text)
        assert run_common.read_deadline() == noon + wanted, text
    monkeypatch.setenv("DEADLINE", "1700017260")
    assert run_common.read_deadline() == noon + 60
    monkeypatch.setenv("DEADLINE", "")
    assert run_common.read_deadline() > noon + 10**12
    for text in ("24:00", "12:60", "12:", ":30", "12:00:00", "noon", "-1", "nan", "0x1"):
        monkeypatch.setenv("DEADLINE", text)
        with pytest.raises(SystemExit) as stop:
            run_common.read_deadline()
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith(f"error: DEADLINE={text} is no time"), text


# ---- Damage ----


NUL = b"\0" * 300


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda lines: [*lines, NUL], 5),  # behind the last answer
        (lambda lines: [*lines[:-1], lines[-1][:-9], NUL], 4),
        (lambda lines: [*lines[:-1], lines[-1][:7]], 4),  # cut off
        (lambda lines: [*lines[:2], NUL, *lines[2:]], 5),  # in between
        (lambda lines: [*lines[:2], b"\0" * len(lines[2]), *lines[3:]], 4),
        (
            lambda lines: [lines[0], lines[0], lines[2], *lines[1:], *lines[1:]],
            5,
        ),  # of two processes
        (lambda lines: [NUL], 0),
        (lambda lines: [b'[{"generated_text": "x"}]\n[1, 2]\n3\nnull\n{"0": [], "1": 2}\n'], 0),
    ],
)
def test_a_damaged_partial_file(tmp_path, checkpoints, monkeypatch, damage, kept):
    """What is whole is used, what is not is made again, and the result is the same; also next time."""
    prompts, more = write_jsonl(tmp_path / "p.jsonl", MANY), (*DRAWN, "--batch_size", 2)
    assert run_file(checkpoints["llama"], prompts, tmp_path / "unbroken", *more) == 0
    clock, partial = Clock(monkeypatch, 20), tmp_path / "out.partial"
    monkeypatch.setenv("DEADLINE", str(int(clock.now) + 115))
    assert run_file(checkpoints["llama"], prompts, tmp_path / "out", *more) == 75
    lines = partial.read_bytes().splitlines(keepends=True)
    lines = [b"".join(pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
    assert len(lines) == 5
    partial.write_bytes(b"".join(damage(lines)))
    monkeypatch.setenv("DEADLINE", str(int(clock.now) + 45))
    for left in (45, 9e6):
        monkeypatch.setenv("DEADLINE", str(int(clock.now + left)))
        clock.batches = 0
        code = run_file(checkpoints["llama"], prompts, tmp_path / "out", *more)
        assert (code, clock.batches) == ((75, 1) if left == 45 else (0, 12 - kept - 1))
    assert (tmp_path / "out").read_bytes() == (tmp_path / "unbroken").read_bytes()


@pytest.mark.parametrize("content", [b"", NUL, b'{"prompts": "1', b'{"prompts": "1"\0', b"[]"])
def test_a_damaged_record(tmp_path, checkpoints, monkeypatch, capsys, content):
    """Whose answers these are is not known then: nothing is touched, and the line says what to do."""
    prompts, clock = write_jsonl(tmp_path / "p.jsonl", MANY), Clock(monkeypatch, 20)
    monkeypatch.setenv("DEADLINE", str(int(clock.now) + 45))
    assert run_file(checkpoints["gpt2"], prompts, tmp_path / "out") == 75
    record, partial = tmp_path / "out.settings.json", tmp_path / "out.partial"
    record.write_bytes(content)
    before, _ = partial.read_bytes(), capsys.readouterr()
    monkeypatch.delenv("DEADLINE")
    assert run_file(checkpoints["gpt2"], prompts, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {record} is damaged: remove it and .partial to begin anew."
    assert partial.read_bytes() == before and record.read_bytes() == content
    partial.unlink()
    if content:  # without answers, an empty one is what a full disk left, and in nobody's way
        record.unlink()
    assert run_file(checkpoints["gpt2"], prompts, tmp_path / "out") == 0


def test_file_systems_without_locks(tmp_path, checkpoints, monkeypatch, capsys):
    prompts = write_jsonl(tmp_path / "p.jsonl", MANY[:2])
    for number, kept in ((errno.ENOSYS, False), (errno.EWOULDBLOCK, True)):
        monkeypatch.setattr(
            fcntl, "flock", lambda *_, n=number: (_ for _ in ()).throw(OSError(n, "no"))
        )
        code = run_file(checkpoints["gpt2"], prompts, tmp_path / str(number))
        assert (code == 2) == ("another process" in capsys.readouterr().err) == kept


def test_a_lock_is_freed_with_its_holder(tmp_path, checkpoints, capsys):
    prompts, record = write_jsonl(tmp_path / "p.jsonl", MANY[:2]), tmp_path / "out.settings.json"
    with record.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_file(checkpoints["gpt2"], prompts, tmp_path / "out") == 2
        assert "another process is writing" in capsys.readouterr().err
        assert record.read_bytes() == b"" and not (tmp_path / "out.partial").exists()
    assert run_file(checkpoints["gpt2"], prompts, tmp_path / "out") == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB; leave(pages) fills it up to so many pages of 4 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")

    def leave(pages):
        (place / "full").unlink(missing_ok=True)
        (place / "full").write_bytes(b"x" * 4096 * (os.statvfs(place).f_bavail - pages))

    yield place, leave
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk(tmp_path, checkpoints, capsys, small_disk):
    """At whichever write the disk is full: one line, and with room again the same answers."""
    (place, leave), rows, results = small_disk, [row | {"more": "x" * 500} for row in MANY], set()
    prompts = write_jsonl(tmp_path / "p.jsonl", rows)
    assert run_file(checkpoints["gpt2"], prompts, tmp_path / "unbroken", "--batch_size", 2) == 0
    output = place / "out"
    for pages in (0, 1, 2, 3, 4, 5, 6, 7, 15):
        leave(pages)
        capsys.readouterr()
        code = run_file(checkpoints["gpt2"], prompts, output, "--batch_size", 2)
        errors = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
        assert code in (0, 2) and len(errors) == (code == 2)
        partial = place / "out.partial"
        if code:
            assert "No space left on device" in errors[0] and str(output) in errors[0]
            results.add(partial.read_bytes().count(b"]\n") if partial.exists() else "no record")
        leave(15 - pages)
        leave(15)
        assert run_file(checkpoints["gpt2"], prompts, output, "--batch_size", 2) == 0
        assert output.read_bytes() == (tmp_path / "unbroken").read_bytes()
        for path in place.glob("out*"):
            path.unlink()
    assert {"no record", 12} < results  # and between them


# ---- Models ----


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, checkpoints):
    """(adapter directory, its base): a LoRA with weights that change the answers; the base has a relative path."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("adapter")
    shutil.copytree(checkpoints["llama"], root / "base")
    torch.manual_seed(5)
    settings = LoraConfig(
        r=4,
        lora_alpha=32,
        init_lora_weights=False,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), settings)
    model.save_pretrained(root / "adapter")
    set_base(root / "adapter", "../base")
    return root / "adapter", root / "base", model.merge_and_unload()


def set_base(directory, base):
    record = directory / "adapter_config.json"
    record.write_text(
        json.dumps(json.loads(record.read_text()) | {"base_model_name_or_path": base})
    )


def test_adapter_beside_its_base(tmp_path, capsys, adapter, train_file, monkeypatch):
    directory, base, merged = adapter
    assert run_file(directory, train_file, tmp_path / "out.jsonl", "--compare_base", "true") == 0
    found = read_jsonl(tmp_path / "out.jsonl")
    with_adapter, without = expected(base, ROWS, 8, merged), expected(base, ROWS, 8)
    assert with_adapter != without
    assert [row["generated_text"] for row in found] == with_adapter
    assert [row["base_generated_text"] for row in found] == without
    capsys.readouterr()
    assert run("--model_name_or_path", directory, "--prompt", ROWS[0]["prompt"], "--max_new_tokens", 8,
               "--compare_base") == 0  # fmt: skip
    assert (
        capsys.readouterr().out
        == f"--- generated_text\n{with_adapter[0]}\n--- base_generated_text\n{without[0]}\n"
    )
    # Below the adapter's parent, then where we stand.
    for start, name in ((tmp_path, "base"), (base.parent, "base")):
        monkeypatch.chdir(start)
        set_base(directory, name)
        args = script.parse(["--model_name_or_path", str(directory), "--prompt", "a"])
        script.check_arguments(args)
        assert Path(args.base).samefile(base) and args.recorded == name
    set_base(directory, "../base")
    capsys.readouterr()
    assert run_chat(monkeypatch, "空", directory, "--max_new_tokens", 3) == 0
    report = capsys.readouterr().err
    assert f"adapter on {directory}/../base, trained on ../base" in report


def test_adapter_may_bring_its_tokenizer_and_stop_tokens(tmp_path, capsys, adapter):
    directory, base, merged = adapter
    shutil.copytree(directory, tmp_path / "adapter")
    set_base(tmp_path / "adapter", str(base))
    tokenizer = make_tokenizer(bos=False)  # the base's adds a BOS
    tokenizer.save_pretrained(tmp_path / "adapter")
    new = greedy(merged, tokenizer("質問")["input_ids"], 4, {})
    GenerationConfig(eos_token_id=[new[3], 2]).save_pretrained(tmp_path / "adapter")
    assert (
        run("--model_name_or_path", tmp_path / "adapter", "--prompt", "質問", "--max_new_tokens", 8)
        == 0
    )
    end = new.index(new[3])
    assert (
        end > 0
        and capsys.readouterr().out == tokenizer.decode(new[:end], skip_special_tokens=True) + "\n"
    )


def test_adapter_that_brings_new_tokens_is_to_be_merged(tmp_path, capsys, checkpoints):
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    tokenizer.add_tokens(["<甲>", "<乙>"])
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.resize_token_embeddings(302, mean_resizing=False)
    rows = {name: [300, 301] for name in ("embed_tokens", "lm_head")}
    settings = LoraConfig(target_modules="all-linear", trainable_token_indices=rows)
    get_peft_model(model, settings).save_pretrained(tmp_path, save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path)
    for run_it in (run, chat.main):
        words = ["--model_name_or_path", str(tmp_path)]
        with contextlib.suppress(SystemExit):
            run_it(*words, "--prompt", "質問") if run_it is run else run_it(words)
        command = f"merge_lora.py --adapter_name_or_path {tmp_path} --output_dir NEW, and use NEW."
        assert command in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["llama", "falcon"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(capsys, checkpoints, kind, bits):
    arguments = ("--prompt", ROWS[0]["prompt"], "--max_new_tokens", 4, f"--load_in_{bits}bit")
    assert run("--model_name_or_path", checkpoints[kind], *arguments) == 0
    layers = {"llama": 14, "falcon": 8}[kind]  # two blocks of seven and of four
    report = capsys.readouterr().err
    total = sum(
        parameter.numel()
        for parameter in AutoModelForCausalLM.from_pretrained(checkpoints[kind]).parameters()
    )
    assert f"{layers} layers quantised, 100.0% of the layers' weights\n" in report
    assert f"{total:,} parameters" in report
    assert [line.split()[0] for line in report.splitlines()] == [
        "model",
        "device",
        "prompts",
        "example",
        "tokens",
    ]


@pytest.mark.parametrize(
    ("capability", "wanted", "result"),
    [
        ((9, 0), "auto", "bf16"),
        ((7, 0), "auto", "fp16"),
        ((7, 0), "fp32", "fp32"),
        ((7, 0), "bf16", None),
    ],
)
def test_precision_of_gpus(monkeypatch, capability, wanted, result):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    args = SimpleNamespace(precision=wanted, device_map=None)
    if result is None:
        with pytest.raises(SystemExit):
            script.choose_precision(args)
    else:
        assert script.choose_precision(args) == (
            result,
            "compute capability {}.{}".format(*capability),
        )


def test_a_driver_without_a_visible_gpu_is_no_cpu_node(monkeypatch, capsys):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit) as leave:
        script.choose_precision(SimpleNamespace(precision="auto", device_map=None))
    assert leave.value.code == 2 and torch.__version__ in capsys.readouterr().err
    assert script.choose_precision(SimpleNamespace(precision="auto", device_map="cpu"))[0] == "fp32"
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "PBS_QUEUE": "rt_HC"}.items():
        with monkeypatch.context() as patch:  # no GPU was asked for
            patch.setenv(name, value)
            args = SimpleNamespace(precision="auto", device_map=None)
            assert script.choose_precision(args)[0] == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_weights_have_the_precision(checkpoints, precision):
    args = script.parse(["--model_name_or_path", checkpoints["gpt2"], "--precision", precision])
    args.base, args.recorded = args.model_name_or_path, None
    model = script.load_model(args, script.choose_precision(args)[0], range(300))
    assert model.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


# ---- Bad input ----

FILES = {
    "empty.jsonl": b"",
    "empty.txt": b" \n\n",
    "broken.jsonl": '{"prompt": "空"}\n{"prompt": '.encode(),
    "sjis.txt": "空は?\n".encode("cp932"),
    "sjis.jsonl": '{"prompt": "空"}\n'.encode("cp932"),
    "columns.jsonl": b'{"question": "a", "reply": "b"}',
    "text.jsonl": b'{"text": "a"}',
    "string.jsonl": b'"a"\n',
    "number.jsonl": b'{"prompt": 3}',
    "null.jsonl": b'{"prompt": "a"}\n{"prompt": null}',
    "instruction.jsonl": b'{"instruction": 3}',
    "turns.jsonl": b'{"messages": [{"role": "user"}]}',
    "no_turn.jsonl": b'{"messages": [{"role": "assistant", "content": "a"}]}',
    "mixed.jsonl": b'{"prompt": "a"}\n{"instruction": "a", "output": "b"}',
    "surrogate.jsonl": b'{"prompt": "\\ud800"}',
    "long.jsonl": ('{"prompt": "a"}\n' * 2 + '{"prompt": "' + "b " * 70 + '"}\n').encode(),
    "blank.jsonl": b'{"prompt": "a"}\n{"prompt": ""}',
    "good.jsonl": b'{"prompt": "a"}',
    "bad.jinja": b"{% if %}",
}
ONE = "--model_name_or_path {gpt2} --prompt a "
GOOD = "--model_name_or_path {gpt2} --prompt_file {tmp}/good.jsonl "
BAD_FILES = {
    "none.jsonl": "none.jsonl is no file",
    "empty.jsonl": "has no prompts",
    "empty.txt": "has no prompts",
    "broken.jsonl": "broken.jsonl, row 2: Expecting value",
    "sjis.txt": "sjis.txt: 'utf-8' codec",
    "sjis.jsonl": "sjis.jsonl: 'utf-8' codec",
    "columns.jsonl": "no messages, prompt or instruction in the columns question, reply",
    "text.jsonl": "no messages, prompt or instruction in the columns text",
    "string.jsonl": "row 1: a row must be an object",
    "number.jsonl": "row 1: prompt must hold text, found {'role': 'user', 'content': 3}",
    "null.jsonl": "row 2: prompt must hold text",
    "turns.jsonl": "row 1: messages must hold text, found {'role': 'user'}",
    "instruction.jsonl": "sequence item 0: expected str instance, int found",
    "no_turn.jsonl": "row 1: the conversation has no turn",
    "mixed.jsonl": "row 2: another form (instruction) than the rows before (prompt)",
    "surrogate.jsonl": "surrogate.jsonl, row 1: ",
    "long.jsonl": "row 3: 140 tokens, of 64 positions at most",
    "blank.jsonl": "row 2: the prompt is empty",
}
FILE = "--model_name_or_path {{gpt2}} --prompt_file {{tmp}}/{} --output_file {{tmp}}/out"
BAD = [
    *((FILE.format(name), message) for name, message in BAD_FILES.items()),
    ("--model_name_or_path /none/model --prompt a", "/none/model"),
    ("--model_name_or_path {tmp} --prompt a", "{tmp}: "),
    ("--model_name_or_path {cut} --prompt a", "{cut}: "),
    ("--model_name_or_path {lacking} --prompt a", "lacks weights"),
    ("--model_name_or_path {foreign} --prompt <|im_end|>", "ids up to 300, past the end of the"),
    ("--model_name_or_path {old} --prompt a", "{old}: "),
    ("--model_name_or_path {lost} --prompt a", "adapter on ../lost of this adapter"),
    ("--model_name_or_path {hub} --prompt a", "adapter on no/such, trained on no/such: "),
    ("--model_name_or_path {broken} --prompt a", "adapter_config.json names no base"),
    ("--model_name_or_path {baseless} --prompt a", "adapter_config.json names no base"),
    ("--model_name_or_path {misfit} --prompt a", "Target modules {"),
    ("--model_name_or_path {shapes} --prompt a", "size mismatch"),
    ("--model_name_or_path {vocabulary} --prompt a", "another vocabulary"),
    ("--model_name_or_path {empty_adapter} --prompt a", "missing adapter keys"),
    ("--model_name_or_path {gpt2}", "one of --prompt and --prompt_file"),
    (GOOD + "--output_file x --prompt a", "one of --prompt and --prompt_file"),
    ("--model_name_or_path {gpt2} --chat", "python chat.py --model_name_or_path MODEL"),
    (ONE + "--chat true", "python chat.py --model_name_or_path MODEL"),
    (ONE + "--chat_template dolly", "Two ready templates lie in ../chat_templates."),
    (ONE + "--chat_template rinna", "Two ready templates lie in ../chat_templates."),
    (ONE + "--chat_template none.jinja", "none.jinja"),
    (ONE + "--chat_template {tmp}/bad.jinja", "Expected an expression"),
    (ONE + "--output_file x", "needs an --output_file"),
    (ONE + "--batch_size 0", "--batch_size must be 1 or more"),
    (ONE + "--max_new_tokens -1", "--max_new_tokens must be 1 or more"),
    (ONE + "--temperature 0.5", "do nothing without"),
    (ONE + "--do_sample --temperature 0", "must be above 0"),
    (ONE + "--do_sample --temperature nan", "must be above 0"),
    (ONE + "--do_sample --temperature inf", "must be above 0"),
    (ONE + "--do_sample --top_p 1.5", "must be above 0"),
    (ONE + "--precision fp16", "fp16 does not work here"),
    (ONE + "--precision fp8", "invalid choice"),
    (ONE + "--load_in_8bit --load_in_4bit", "load_in_4bit and load_in_8bit are both True"),
    (ONE + "--compare_base", "needs an adapter"),
    (ONE + "--max_new_token 3", "unrecognized arguments"),
    (ONE + "--do_sample maybe", "Truthy value expected: got maybe"),
    (GOOD + "--output_file {tmp}/good.jsonl/x", "good.jsonl"),
    (GOOD + "--output_file {tmp}", "holds other answers"),
]
BAD_CHAT = [
    ("--model_name_or_path /none/model", "/none/model"),
    ("--model_name_or_path {lacking}", "lacks weights"),
    ("--model_name_or_path {vocabulary}", "another vocabulary"),
    ("--model_name_or_path {foreign}", "ids up to 300, past the end of the"),
    ("--model_name_or_path {gpt2} --max_new_tokens 0", "must be 1 or more"),
    ("--model_name_or_path {gpt2} --temperature 0.5", "do nothing without"),
    ("--model_name_or_path {gpt2} --do_sample --top_p 0", "must be above 0"),
    ("--model_name_or_path {gpt2} --chat_template none.jinja", "none.jinja"),
    ("--model_name_or_path {gpt2} --prompt a", "unrecognized arguments"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, checkpoints, adapter):
    """Directories with everything that can be wrong."""
    from safetensors.torch import load_file, save_file

    tmp = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (tmp / name).write_bytes(content)
    for name in ("cut", "lacking", "foreign", "old"):
        shutil.copytree(checkpoints["gpt2"], tmp / name)
    for name in "lost baseless hub broken misfit shapes vocabulary empty_adapter".split():
        shutil.copytree(adapter[0], tmp / name)
    weights = tmp / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    weights = load_file(tmp / "lacking" / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp / "lacking" / "model.safetensors", {"format": "pt"})
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(tmp / "foreign")
    (tmp / "old" / "config.json").write_text('{"model_type": "RefinedWebModel"}')
    set_base(tmp / "lost", "../lost of this adapter")
    set_base(tmp / "baseless", None)
    set_base(tmp / "hub", "no/such")
    (tmp / "broken" / "adapter_config.json").write_text("{")
    set_base(tmp / "misfit", checkpoints["gpt2"])
    set_base(tmp / "shapes", checkpoints["qwen3"])
    set_base(tmp / "empty_adapter", str(adapter[1]))
    set_base(tmp / "vocabulary", str(adapter[1]))
    other = make_tokenizer(bos=True).backend_tokenizer.to_str().replace('"<|pad|>"', '"<|new|>"')
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(other), eos_token="<s>")
    other.save_pretrained(tmp / "vocabulary")
    save_file({}, tmp / "empty_adapter" / "adapter_model.safetensors")
    return {
        "tmp": tmp,
        "gpt2": checkpoints["gpt2"],
        **{path.name: path for path in tmp.iterdir() if path.is_dir()},
    }


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [(script.main, *case) for case in BAD] + [(chat.main, *case) for case in BAD_CHAT],
)
def test_bad_input(places, capsys, monkeypatch, main, arguments, message):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries to reach the hub
    before = sorted(places["tmp"].rglob("*"))
    assert run(*arguments.format(**places).split(" "), main=main) == 2
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]
    for name in ("tmp", "gpt2", "cut", "old"):
        message = message.replace("{" + name + "}", str(places[name]))
    assert out == "" and message in last and "error: " in last
    assert len(error.splitlines()) == 1 or error.startswith("usage: ")
    assert sorted(places["tmp"].rglob("*")) == before  # nothing written, nothing lost


def test_nothing_quantised_is_refused(monkeypatch, capsys, checkpoints):
    from transformers import BitsAndBytesConfig

    def skipping(**options):
        return BitsAndBytesConfig(**options, llm_int8_skip_modules=["model", "lm_head"])

    monkeypatch.setattr(script, "BitsAndBytesConfig", skipping)
    assert run("--model_name_or_path", checkpoints["llama"], "--prompt", "a", "--load_in_8bit") == 2
    assert "no layer was quantised" in capsys.readouterr().err.splitlines()[-1]


def test_out_of_memory_says_what_helps(monkeypatch, capsys, checkpoints):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(script, "generate", full)
    assert run("--model_name_or_path", checkpoints["llama"], "--prompt", "a") == 2
    assert "--batch_size" in capsys.readouterr().err.splitlines()[-1]


def test_an_old_note_is_nobody_s(tmp_path, monkeypatch, capsys):
    """torchrun without --standalone calls each start "none": what another left must not stop this one."""
    args = SimpleNamespace(output_file=str(tmp_path / "out"), rank=1, ranks=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getppid", lambda: -7)
        for what in ("claimed", "stop", "end1"):
            keep_answers.tell(args, what, "earlier")
            assert keep_answers.heard(args, what) == "earlier"
    assert [keep_answers.heard(args, what) for what in ("claimed", "stop", "end1")] == [None] * 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of two: the other is on another node
    args.__dict__.update(prompt_file=str(tmp_path / "out"), base="m", model_name_or_path="m")
    with pytest.raises(SystemExit):
        keep_answers.claim_output(args, "fp32", [], __file__)
    assert "on one node" in capsys.readouterr().err


def test_who_waits_for_another_begins_no_batch(tmp_path, monkeypatch):
    """Its slowest batch would not end before the deadline, but the other's last one may."""
    now = time.time()
    args = SimpleNamespace(output_file=str(tmp_path / "out"), rank=0, ranks=2, deadline=now + 40)
    args.__dict__.update(slowest=55, looked=now)
    monkeypatch.setattr(keep_answers.time, "sleep", lambda _: keep_answers.tell(args, "end1"))
    assert keep_answers.wait_for_all(args) == {}
    args.slowest = 55
    with pytest.raises(SystemExit):
        keep_answers.stop_if_asked(args)
