"""finetune_lastlayer.py and show_model.py: what is frozen stays bit by bit, what is trained moves
as it should.
"""

import gc
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import CONFIGS, ROOT, ROWS, load_script, write_jsonl
from safetensors.torch import load_file, save_file
from test_finetune_full import ZERO, expected_loss, refused, results
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = ROOT / "finetune_lastlayer" / "finetune_lastlayer.py"
SHOW = SCRIPT.with_name("show_model.py")
NEW = ["--new_tokens", "<a>, <b>"]
TRAIN_NEW = ["--train", "new_tokens", *NEW]
NEW_ROWS = [
    {"prompt": "<a>" + row["prompt"], "completion": row["completion"] + "<b><a>"} for row in ROWS
]
TIED = {"gpt2", "falcon", "falcon_alibi", "mpt", "qwen3"}
# By hand, as the names stand in the file: where the embeddings, the blocks and the final norm are,
# and a middle part.
NAMES = {
    "gpt2": ("transformer.wte.", "lm_head.", "transformer.h.", "transformer.ln_f.", r"h\.0\.mlp"),
    "gpt_neox": ("gpt_neox.embed_in.", "embed_out.", "gpt_neox.layers.",
                 "gpt_neox.final_layer_norm.", r"0\.mlp"),
    "mpt": ("transformer.wte.", "lm_head.", "transformer.blocks.", "transformer.norm_f.",
            r"blocks\.0\.ffn"),
    "llama": ("model.embed_tokens.", "lm_head.", "model.layers.", "model.norm.", r"layers\.0\.mlp"),
    "qwen3": ("model.embed_tokens.", "lm_head.", "model.layers.", "model.norm.", r"layers\.0\.mlp"),
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    module = load_script(SCRIPT)
    gc.freeze()  # Trainer collects garbage at each start: what is imported need not be searched
    return module


@pytest.fixture(scope="module")
def new_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "new.jsonl", NEW_ROWS)


@pytest.fixture(scope="module")
def with_tokens(checkpoints, tmp_path_factory):
    """{kind: a copy of the checkpoint whose tokenizer has <a> and <b>, as rows 300 and 301}."""

    class Copies(dict):
        def __missing__(self, kind):
            directory = tmp_path_factory.mktemp("tokens") / kind
            self[kind] = add_tokens(checkpoints[kind], directory)
            return self[kind]

    return Copies()


def add_tokens(model, directory):
    load_script(SCRIPT.with_name("add_tokens.py")).main(
        ["--model_name_or_path", str(model), *NEW, "--output_dir", str(directory)]
    )
    return str(directory)


def run(script, model, train_file, output_dir, *more):
    script.main(["--model_name_or_path", model, "--train_file", train_file,
                 "--output_dir", str(output_dir), *map(str, more)])  # fmt: skip
    return results(output_dir)


def file_weights(directory):
    return load_file(f"{directory}/model.safetensors")


def expected_names(kind, train, names):
    """Which tensors of the file must have moved."""
    embedding, head, blocks, norm, part = NAMES[kind]
    ends = (embedding,) if kind in TIED else (embedding, head)  # tied ones stand once in the file
    parts = {"last_layer": (head,), "last_block": (head, norm, f"{blocks}1."), "input_output": ends,
             "new_tokens": ends, "embedding": (embedding,)}  # fmt: skip
    if train in parts:
        return {name for name in names if name.startswith(parts[train])}
    return {name for name in names if re.search(part, name)}


def start_rows(kind, base_dir):
    """The rows of <a> and <b> before training: the mean of the rows of their pieces.

    From the base alone, which knows nothing of them.
    """
    base, tokenizer = file_weights(base_dir), AutoTokenizer.from_pretrained(base_dir)
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in ("<a>", "<b>")]
    names = expected_names(kind, "new_tokens", base)
    return {name: torch.stack([base[name][ids].mean(0) for ids in pieces]) for name in names}


PARTS = ["last_layer", "last_block", "input_output", "new_tokens", "embedding", "part"]


@pytest.mark.parametrize("train", PARTS)
@pytest.mark.parametrize("kind", NAMES)
def test_frozen_means_frozen(
    kind, train, script, checkpoints, with_tokens, new_file, tmp_path, capsys
):
    """In each saved checkpoint: the very bits of the base, but for what was to be trained.

    With weight decay, and for rows of new tokens with accumulation in its stead.
    """
    what = {"embedding": NAMES[kind][0].rstrip("."), "part": NAMES[kind][4]}.get(train, train)
    more = ["--train", what, "--max_steps", 3, "--save_steps", 1, "--learning_rate", "1e-2"]
    source = checkpoints[kind]
    if train == "new_tokens":
        source = with_tokens[kind]
        more += [*NEW, "--gradient_accumulation_steps", 3, "--per_device_train_batch_size", 1]
    else:
        more += ["--weight_decay", 0.1]
    found = run(script, source, new_file, tmp_path, *more)
    untied = kind in TIED and train in ("last_layer", "last_block", "embedding")
    assert ("was tied" in capsys.readouterr().out) == untied
    base, head = file_weights(checkpoints[kind]), NAMES[kind][1] + "weight"
    if untied:
        base[head] = base[NAMES[kind][0] + "weight"]
    moving = expected_names(kind, train, base)
    assert moving
    for directory in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-3", tmp_path):
        now = file_weights(directory)
        assert now.keys() == base.keys()
        for name, old in base.items():
            if train == "new_tokens" and name in moving:
                assert torch.equal(now[name][:300], old), name
                start = start_rows(kind, checkpoints[kind])[name]
                assert now[name].shape == (302, 32)
                assert ((now[name][300:] - start).abs() > 1e-3).all()
            else:
                assert torch.equal(now[name], old) == (name not in moving), name
    count = sum(base[name].numel() for name in moving)
    if train == "new_tokens":
        count = 64 * len(moving)
    assert found["trainable_parameters"] == count
    # Reloaded: tied where it was to stay so, and in all else the base model.
    directories = tmp_path, checkpoints[kind]
    model, first = (AutoModelForCausalLM.from_pretrained(d).eval() for d in directories)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == model.config.tie_word_embeddings == (kind in TIED and not untied)
    if train == "last_layer":
        model.get_output_embeddings().weight = first.get_output_embeddings().weight
        ids = torch.arange(3, 40)[None]
        assert torch.equal(model(ids).logits, first(ids).logits)


STEPS = [("gpt2", "last_layer"), ("gpt2", "new_tokens"), ("llama", "new_tokens")]


@pytest.mark.parametrize(("kind", "train"), STEPS)
def test_one_step_is_one_gradient_step(
    kind, train, script, checkpoints, with_tokens, new_file, tmp_path
):
    """Plain SGD along the gradient of the trained part.

    It is shortened by the length of that part's gradient alone.
    """
    has_rows = train == "new_tokens"
    source = with_tokens[kind] if has_rows else checkpoints[kind]
    run(script, source, new_file, tmp_path, "--train", train, *(NEW * has_rows), "--optim", "sgd",
        "--learning_rate", 1, "--max_grad_norm", 0.01, "--max_steps", 1,
        "--save_strategy", "no")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoints[kind])
    embedding = NAMES[kind][0] + "weight"
    if has_rows:
        starts = start_rows(kind, checkpoints[kind])
        model.resize_token_embeddings(302, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[300:] = starts[embedding]
            if kind not in TIED:
                model.lm_head.weight[300:] = starts["lm_head.weight"]
    else:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    losses = []
    for row in NEW_ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, tokenizer.eos_token_id][:64]
        log_p = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0], -1)
        losses += [-log_p[at - 1, ids[at]] for at in range(len(prompt), len(ids))]
    torch.stack(losses).mean().backward()
    ends = {"lm_head.weight": model.lm_head.weight, embedding: model.get_input_embeddings().weight}
    if not has_rows:
        del ends[embedding]
    elif kind in TIED:
        del ends["lm_head.weight"]
    start = 300 if has_rows else 0
    length = torch.stack([weight.grad[start:].norm() for weight in ends.values()]).norm()
    assert length > 0.05
    for name, weight in ends.items():
        wanted = weight.detach()[start:] - weight.grad[start:] * 0.01 / length
        found = file_weights(tmp_path)[name][start:]
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_train_loss_is_the_token_mean(kind, script, checkpoints, train_file, tmp_path):
    expected = expected_loss(checkpoints[kind], ROWS)
    zero = [*ZERO, "--save_strategy", "no", "--validation_file", train_file]
    for accumulation in (1, 4):
        more = [*zero, "--gradient_accumulation_steps", accumulation]
        found = run(script, checkpoints[kind], train_file, tmp_path / str(accumulation), *more)
        losses = found["train_loss"], found["eval_loss"]
        assert losses == pytest.approx((expected, expected), abs=1e-4)


def test_new_tokens(script, checkpoints, new_file, tmp_path, capsys):
    """One id each, in the saved tokenizer too; spare rows are used before the embeddings grow."""
    spare = tmp_path / "spare"  # 320 rows for 300 tokens, like MPT and others
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.resize_token_embeddings(320)
    model.save_pretrained(spare)
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(spare)
    for name, base, rows in (("grown", checkpoints["llama"], 302), ("spare", str(spare), 320)):
        out = tmp_path / f"{name}_out"
        found = run(script, add_tokens(base, tmp_path / f"{name}_in"), new_file, out, *TRAIN_NEW,
                    *ZERO)  # fmt: skip
        tokenizer, now, old = (
            AutoTokenizer.from_pretrained(out),
            file_weights(out),
            file_weights(base),
        )
        assert tokenizer("<a>x<b>", add_special_tokens=False)["input_ids"][::2] == [300, 301]
        text = tokenizer.decode([300, 301], skip_special_tokens=True)
        assert text.replace(" ", "") == "<a><b>"
        assert found["train_loss"] == pytest.approx(expected_loss(str(out), NEW_ROWS), abs=1e-4)
        for key, start in start_rows("llama", base).items():
            assert now[key].shape == (rows, 32)
            assert torch.equal(now[key][300:302], start)  # learning rate 0
            assert (start[0] - start[1]).abs().max() > 0.01
            assert torch.equal(now[key][302:], old[key][302:])
    assert "row        <a> = 300\nrow        <b> = 301\n" in capsys.readouterr().out


def test_a_head_that_only_the_configuration_ties(script, tmp_path, checkpoints, new_file):
    """Falcon's published files hold a head of their own: new rows and saving must not tie it."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints["falcon"], base)
    weights = file_weights(base)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].flip(0).contiguous()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    source, out = add_tokens(base, tmp_path / "source"), tmp_path / "out"
    run(script, source, new_file, out, *TRAIN_NEW, "--max_steps", 2)
    now = file_weights(out)
    for name in ("lm_head.weight", "transformer.word_embeddings.weight"):
        assert torch.equal(now[name][:300], weights[name])
        assert not torch.equal(now[name][300:], file_weights(source)[name][300:])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    # and where the configuration of the file to start from still says so
    out = tmp_path / "layer"
    run(script, str(base), new_file, out, "--train", "last_layer", "--max_steps", 2)
    now = file_weights(out)
    assert torch.equal(now.pop("transformer.word_embeddings.weight"),
                       weights["transformer.word_embeddings.weight"])  # fmt: skip
    assert not torch.equal(now["lm_head.weight"], weights["lm_head.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


INTERRUPTED = [("gpt2", "new_tokens"), ("gpt2", "last_layer"), ("gpt_neox", "last_layer")]


@pytest.mark.parametrize(("kind", "train"), INTERRUPTED)
def test_interrupted_equals_uninterrupted(
    kind, train, script, checkpoints, with_tokens, new_file, tmp_path
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--max_steps", 4, "--save_steps", 2, "--learning_rate", "1e-2", "--train", train]
    source = checkpoints[kind]
    if train == "new_tokens":
        source = with_tokens[kind]
        more += NEW
    else:
        more += ["--weight_decay", 0.1]
    loss = run(script, source, new_file, whole, *more)["train_loss"]
    cut.mkdir()
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    arguments = yaml.safe_load((whole / "run_args.yaml").read_text()) | {"output_dir": str(cut)}
    (cut / "run_args.yaml").write_text(yaml.safe_dump(arguments))
    found = run(script, source, new_file, cut, *more)
    assert found["train_loss"] == pytest.approx(loss, abs=1e-9)
    assert found["trainable_parameters"] == results(whole)["trainable_parameters"]
    one, other = file_weights(whole), file_weights(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_best_is_kept(script, with_tokens, new_file, tmp_path):
    """The best checkpoint's rows come back, and the others are those of the base."""
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "甲", "completion": "乙丙丁<b>"}])
    run(script, with_tokens["llama"], new_file, tmp_path / "early", *TRAIN_NEW,
        "--validation_file", other, "--early_stopping_patience", 1, "--save_steps", 1,
        "--max_steps", 40, "--learning_rate", 0.3)  # fmt: skip
    state = json.loads((tmp_path / "early" / "trainer_state.json").read_text())
    assert state["best_global_step"] < state["global_step"] < 40
    best = file_weights(state["best_model_checkpoint"])
    now, base = file_weights(tmp_path / "early"), file_weights(with_tokens["llama"])
    for name, tensor in now.items():
        assert torch.equal(tensor, best[name])
        assert torch.equal(tensor[:300], base[name][:300])


TOGETHER = "--train new_tokens and --new_tokens .* go together"
OTHER_ROWS = "new tokens need --weight_decay 0 and --optim adamw_torch_fused"
BAD_ARGUMENTS = {
    "matches nothing": (
        ["--train", "lastlayer"],
        r"names nothing that text passes.*embed_tokens.weight .*lm_head.weight",
    ),
    "no regular expression": (["--train", "layers.(1"], "is no regular expression"),
    "checkpointing": (["--activation_checkpointing", "true"], "only costs time"),
    "checkpointing, old name": (
        ["--gradient_checkpointing", "true", "--train", "last_block"],
        "only costs time",
    ),
    "checkpointing, regex": (
        ["--activation_checkpointing", "true", "--train", r"layers\.1\."],
        "only costs time",
    ),
    "no new tokens": (["--train", "new_tokens"], TOGETHER),
    "empty new tokens": (["--train", "new_tokens", "--new_tokens", " , "], TOGETHER),
    "new tokens for nothing": (["--new_tokens", "<a>"], TOGETHER),
    "new tokens and others": (["--train", "input_output", *NEW], TOGETHER),
    "unknown token": (TRAIN_NEW, "<a>: ../finetune_lastlayer/add_tokens.py"),
    "token not in data": (
        ["--train", "new_tokens", "--new_tokens", "<|pad|>"],
        r"<\|pad\|>: it does not occur in the training data",
    ),
    "weight decay": ([*TRAIN_NEW, "--weight_decay", "0.1"], OTHER_ROWS),
    "8-bit Adam": ([*TRAIN_NEW, "--optim", "adamw_bnb_8bit"], OTHER_ROWS),
    "other 8-bit Adam": ([*TRAIN_NEW, "--optim", "paged_adamw_8bit"], OTHER_ROWS),
    "Adafactor": ([*TRAIN_NEW, "--optim", "adafactor"], OTHER_ROWS),
    "8 bit": (
        ["--load_in_8bit", "true"],
        "gone: type finetune_lora.py --lora_target_modules none --modules_to_save lm_head "
        "--load_in_8bit true",
    ),
    "packing": (["--packing", "true"], "--packing is gone: leave it out"),
    "packing length": (["--packing_length=99"], "--packing_length is gone: leave it out"),
    "no bool": (["--trust_remote_code", "maybe"], "trust_remote_code"),
    "misspelt": (["--trian", "last_block"], "unrecognized arguments: --trian"),
    "missing file": (["--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
    "no model": (["--model_name_or_path", "no/such/model/here"], "is not here, nor a hub name"),
    "max_length": (["--max_length", "65"], "does not fit the 64 positions"),
    "output": (["--output_dir", "/dev/null/x"], "/dev/null/x"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, script, checkpoints, train_file, tmp_path, capsys, monkeypatch):
    arguments, message = BAD_ARGUMENTS[case]
    # Nothing is loaded before the refusal.
    monkeypatch.setattr(script.AutoModelForCausalLM, "from_pretrained", None)
    base = ["--model_name_or_path", checkpoints["llama"], "--train_file", train_file]
    base += ["--output_dir", tmp_path / "o"]
    assert re.search(message, refused(script, capsys, [*base, *arguments]))
    assert not (tmp_path / "o" / "all_results.json").exists()


def test_a_settings_file_with_an_option_that_went(
    script, checkpoints, train_file, tmp_path, capsys
):
    """run_args.yaml of an earlier version."""
    settings = {"model_name_or_path": checkpoints["llama"], "train_file": train_file}
    path = tmp_path / "run_args.yaml"
    path.write_text(yaml.safe_dump({**settings, "load_in_8bit": True}))
    assert "--load_in_8bit is gone: type finetune_lora.py" in refused(script, capsys, [path])


def test_bad_checkpoints(script, checkpoints, new_file, tmp_path, capsys):
    """A tokenizer that is longer than its embedding is not mended by new tokens."""
    shutil.copytree(checkpoints["llama"], tmp_path / "long")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    tokenizer.add_tokens([f"<old{i}>" for i in range(5)] + ["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path / "long")
    base = ["--output_dir", tmp_path / "o", "--train_file", new_file]
    words = [*base, "--model_name_or_path", tmp_path / "long", *TRAIN_NEW]
    assert "past the end" in refused(script, capsys, words)


def test_checkpointing_where_it_helps(script, checkpoints, train_file, tmp_path):
    for value in ("true", "false"):
        run(script, checkpoints["qwen3"], train_file, tmp_path / value, "--train", "input_output",
            "--max_steps", 2, "--activation_checkpointing", value)  # fmt: skip
    one, other = file_weights(tmp_path / "true"), file_weights(tmp_path / "false")
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)


@pytest.fixture(scope="module")
def show():
    return load_script(SHOW)


@pytest.mark.parametrize("kind", CONFIGS)
def test_show_model_lists_every_tensor(kind, show, checkpoints, tmp_path, capsys):
    """From the configuration alone; names, numbers, shapes and counts against the loaded model."""
    shutil.copy(f"{checkpoints[kind]}/config.json", tmp_path)
    show.main(["--model_name_or_path", str(tmp_path)])
    head, _, *lines = capsys.readouterr().out.splitlines()
    model, found = AutoModelForCausalLM.from_pretrained(checkpoints[kind]), {}
    for line in lines:
        pattern, module, tensors, shape, dtype, count, share = re.fullmatch(
            r" +(\S+)  +(\w+)  +(\d+)  +([\dx ]*\d)  (\w+)  +([\d,]*) +(.*)", line
        ).groups()
        names = [pattern.replace(".0-1.", f".{i}.") for i in range(int(tensors))]
        for name in names:
            found[name] = [int(n) for n in shape.split(" x ")]
            assert type(model.get_submodule(name.rpartition(".")[0])).__name__ == module
        assert dtype == "float32"
        if share.startswith("is "):
            assert model.get_parameter(share[3:]) is model.get_parameter(pattern)
        else:
            size = sum(model.get_parameter(name).numel() for name in names)
            assert int(count.replace(",", "")) == size
            wanted = 100 * size / model.num_parameters()
            assert float(share.rstrip("%")) == pytest.approx(wanted, abs=0.01)
    shapes = {name: [*p.shape] for name, p in model.named_parameters(remove_duplicate=False)}
    assert found == shapes
    assert f"{model.num_parameters():,} parameters" in head


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_show_model_says_what_training_does(
    kind, show, script, checkpoints, train_file, tmp_path, capsys
):
    for train in ("last_layer", "last_block", "input_output", r"\.0\.mlp"):
        arguments = ["--model_name_or_path", checkpoints[kind], "--train", train]
        capsys.readouterr()
        show.main(arguments)
        shown, out = capsys.readouterr().out, tmp_path / train[-7:]
        more = [*arguments[2:], "--max_steps", 1]
        found = run(script, checkpoints[kind], train_file, out, *more)
        trained, total = found["trainable_parameters"], found["total_parameters"]
        share = f"{trained / total:.2%}"
        assert f"trained    * {trained:,} of {total:,} parameters ({share})" in shown
        assert ("was tied" in shown) == (kind == "qwen3" and train.startswith("last"))
        assert f"memory     {(4 * total + 12 * trained) / 1e6:.1f} MB" in shown


def test_show_model_ranges_and_refusals(show, checkpoints, capsys):
    assert show.ranges([0, 1, 2, 9, 4, 5, 11]) == "0-2,4-5,9,11"
    assert show.ranges([-1]) == ""
    show.main(["--model_name_or_path", checkpoints["llama"], "--train", r"layers\.1\."])
    lines = capsys.readouterr().out.splitlines()
    for mark, block in (("*", 1), (" ", 0)):
        name = rf"model\.layers\.{block}\.mlp\.up_proj\.weight"
        assert any(re.match(rf"{re.escape(mark)}  {name}  +Linear  +1 ", line) for line in lines)
    base = ["--model_name_or_path", checkpoints["llama"]]
    assert "names nothing that text passes" in refused(
        show, capsys, [*base, "--train", "embed_out"]
    )
    assert "is no regular expression" in refused(show, capsys, [*base, "--train", "("])
    words = ["--model_name_or_path", "no/such/model/here"]
    assert "is no causal language model here" in refused(show, capsys, words)
    assert "unrecognized arguments" in refused(show, capsys, [*base, "--tr", "last_layer"])


def test_alone_in_an_empty_directory_on_two_processes(script, with_tokens, new_file, tmp_path):
    """Copied away it runs; two processes train the new rows as one does, and no others."""
    shutil.copy(SCRIPT, tmp_path)
    common = ["--model_name_or_path", with_tokens["llama"], "--train_file", new_file, *TRAIN_NEW,
              "--max_steps", "3", "--learning_rate", "1e-2",
              "--train_sampling_strategy", "sequential"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", SCRIPT.name, *common, "--per_device_train_batch_size", "2",
               "--gradient_accumulation_steps", "2"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "output").iterdir()}
    assert {"model.safetensors", "all_results.json"} <= names
    one = [*common, "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8"]
    script.main(one)
    directories = tmp_path / "output", tmp_path / "one", with_tokens["llama"]
    two, one, base = (file_weights(directory) for directory in directories)
    for name, old in base.items():
        assert torch.equal(two[name][:300], old[:300])
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
        assert torch.equal(two[name], old) == (
            name not in ("lm_head.weight", "model.embed_tokens.weight")
        )


def test_show_model_alone(checkpoints, tmp_path, capsys):
    """Copied away it runs; its --help imports next to nothing."""
    shutil.copy(SHOW, tmp_path)
    code = ("import sys, show_model\ntry: show_model.main(['--help'])\nexcept SystemExit: pass\n"
            "print({'torch', 'transformers'} & set(sys.modules))")  # fmt: skip
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nset()\n")
    copy = load_script(tmp_path / "show_model.py")
    copy.main(["--model_name_or_path", checkpoints["llama"]])
    assert capsys.readouterr().out.startswith("model ")
