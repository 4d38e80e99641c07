"""finetune_lastlayer.py and show_model.py: what is frozen stays bit by bit, what is trained moves as it should."""

import gc
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import CONFIGS, ROOT, ROWS, write_jsonl
from safetensors.torch import load_file, save_file
from test_finetune_full import PACKS, ZERO, expected_loss, load_script, refused, results
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

SCRIPT = ROOT / "finetune_lastlayer" / "finetune_lastlayer.py"
SHOW = SCRIPT.with_name("show_model.py")
NEW = "<a>, <b>"
NEW_ROWS = [{**row, "prompt": "<a>" + row["prompt"], "completion": row["completion"] + "<b><a>"} for row in ROWS]
TIED = {"gpt2", "falcon", "falcon_alibi", "mpt", "qwen3"}
# By hand, as the names stand in the file: where the embeddings, the blocks and the final norm are, and a middle part.
NAMES = {
    "gpt2": ("transformer.wte.", "lm_head.", "transformer.h.", "transformer.ln_f.", r"h\.0\.mlp"),
    "gpt_neox": ("gpt_neox.embed_in.", "embed_out.", "gpt_neox.layers.", "gpt_neox.final_layer_norm.", r"0\.mlp"),
    "mpt": ("transformer.wte.", "lm_head.", "transformer.blocks.", "transformer.norm_f.", r"blocks\.0\.ffn"),
    "llama": ("model.embed_tokens.", "lm_head.", "model.layers.", "model.norm.", r"layers\.0\.mlp"),
    "qwen3": ("model.embed_tokens.", "lm_head.", "model.layers.", "model.norm.", r"layers\.0\.mlp"),
}


@pytest.fixture(scope="module")
def script():
    module = load_script(SCRIPT)
    gc.freeze()  # Trainer collects garbage at each start; what is imported need not be searched each time
    return module


@pytest.fixture
def no_picture(script, monkeypatch):
    monkeypatch.setattr(script, "draw_loss", lambda history, path: None)


@pytest.fixture(scope="module")
def new_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "new.jsonl", NEW_ROWS)


def run(script, model, train_file, output_dir, *more):
    script.main(["--model_name_or_path", model, "--train_file", train_file, "--output_dir", str(output_dir),
                 *map(str, more)])  # fmt: skip
    return results(output_dir)


def file_weights(directory):
    return load_file(f"{directory}/model.safetensors")


def expected_names(kind, train, names):
    """Which tensors of the file must have moved."""
    embedding, head, blocks, norm, part = NAMES[kind]
    ends = (embedding,) if kind in TIED else (embedding, head)  # tied ones stand once in the file
    starts = {"last_layer": (head,), "last_block": (head, norm, f"{blocks}1."), "input_output": ends,
              "new_tokens": ends, "embedding": (embedding,)}.get(train, ())  # fmt: skip
    return {name for name in names if name.startswith(starts)} if starts else {n for n in names if re.search(part, n)}


def start_rows(kind, base_dir):
    """The rows of <a> and <b> before training: the mean of the rows of their pieces, from the base alone."""
    base, tokenizer = file_weights(base_dir), AutoTokenizer.from_pretrained(base_dir)
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in ("<a>", "<b>")]
    return {n: torch.stack([base[n][p].mean(0) for p in pieces]) for n in expected_names(kind, "new_tokens", base)}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("train", ["last_layer", "last_block", "input_output", "new_tokens", "embedding", "part"])
@pytest.mark.parametrize("kind", NAMES)
def test_frozen_means_frozen(kind, train, script, checkpoints, new_file, tmp_path, capsys):
    """In each saved checkpoint, with weight decay: the very bits of the base, but for what was to be trained."""
    what = {"embedding": NAMES[kind][0].rstrip("."), "part": NAMES[kind][4]}.get(train, train)
    more = ["--new_tokens", NEW] if train == "new_tokens" else []
    found = run(script, checkpoints[kind], new_file, tmp_path, "--train", what, *more, "--max_steps", 3, "--save_steps",
                1, "--weight_decay", 0.1, "--learning_rate", "1e-2")  # fmt: skip
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
            rows = len(old) if train == "new_tokens" and name in moving else None
            assert torch.equal(now[name][:rows], old) == (name not in moving or rows is not None), name
            if rows is not None:
                assert ((now[name][rows:] - start_rows(kind, checkpoints[kind])[name]).abs() > 1e-3).all()
    count = 64 * len(moving) if train == "new_tokens" else sum(base[name].numel() for name in moving)
    assert found["trainable_parameters"] == count
    # Reloaded: tied where it was to stay so, and in all else the base model.
    model, first = (AutoModelForCausalLM.from_pretrained(d).eval() for d in (tmp_path, checkpoints[kind]))
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == model.config.tie_word_embeddings == (kind in TIED and not untied)
    if train == "last_layer":
        model.get_output_embeddings().weight = first.get_output_embeddings().weight
        ids = torch.arange(3, 40)[None]
        assert torch.equal(model(ids).logits, first(ids).logits)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(("kind", "train"), [("gpt2", "last_layer"), ("gpt2", "new_tokens"), ("llama", "new_tokens")])
def test_one_step_is_one_gradient_step(kind, train, script, checkpoints, new_file, tmp_path):
    """Plain SGD along the gradient of the trained part, shortened by the length of that part's gradient alone."""
    more = ["--new_tokens", NEW] if train == "new_tokens" else []
    run(script, checkpoints[kind], new_file, tmp_path, "--train", train, *more, "--optim", "sgd", "--learning_rate", 1,
        "--max_grad_norm", 0.01, "--max_steps", 1, "--save_strategy", "no")  # fmt: skip
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(checkpoints[kind])
    if train == "new_tokens":
        model.resize_token_embeddings(302)
        with torch.no_grad():
            for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                weight[300:] = start_rows(kind, checkpoints[kind])[NAMES[kind][0 if len(weight) else 1] + "weight"]
        if kind not in TIED:
            with torch.no_grad():
                model.lm_head.weight[300:] = start_rows(kind, checkpoints[kind])["lm_head.weight"]
    else:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    losses = []
    for row in NEW_ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        log_p = torch.log_softmax(model(torch.tensor([(prompt + answer)[:64]]), use_cache=False).logits[0], -1)
        losses += [-log_p[len(prompt) + i - 1, token] for i, token in enumerate(answer) if len(prompt) + i < 64]
    torch.stack(losses).mean().backward()
    start = 300 if train == "new_tokens" else 0
    ends = {"lm_head.weight": model.lm_head.weight, NAMES[kind][0] + "weight": model.get_input_embeddings().weight}
    if train == "last_layer":
        del ends[NAMES[kind][0] + "weight"]
    if train == "new_tokens" and kind in TIED:
        del ends["lm_head.weight"]
    length = torch.stack([weight.grad[start:].norm() for weight in ends.values()]).norm()
    assert length > 0.05
    for name, weight in ends.items():
        wanted = weight.detach()[start:] - weight.grad[start:] * 0.01 / length
        torch.testing.assert_close(file_weights(tmp_path)[name][start:], wanted, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("kind", CONFIGS)
def test_train_loss_is_the_token_mean(kind, script, checkpoints, train_file, tmp_path):
    expected = expected_loss(checkpoints[kind], ROWS)
    zero = [*ZERO, "--save_strategy", "no", "--validation_file", train_file, "--gradient_accumulation_steps"]
    for accumulation in (1, 4):
        found = run(script, checkpoints[kind], train_file, tmp_path / str(accumulation), *zero, accumulation)
        assert (found["train_loss"], found["eval_loss"]) == pytest.approx((expected, expected), abs=1e-4)
    if PACKS[kind]:
        found = run(script, checkpoints[kind], train_file, tmp_path / "packed", *zero, 4, "--packing", "true")
        assert found["train_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("no_picture")
def test_new_tokens(script, checkpoints, new_file, tmp_path, capsys):
    """One id each, in the saved tokenizer too; spare rows are used before the embeddings grow."""
    spare = tmp_path / "spare"  # 320 rows for 300 tokens, like MPT and others
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.resize_token_embeddings(320)
    model.save_pretrained(spare)
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(spare)
    for name, base, rows in (("grown", checkpoints["llama"], 302), ("spare", str(spare), 320)):
        out = tmp_path / f"{name}_out"
        found = run(script, base, new_file, out, "--train", "new_tokens", "--new_tokens", NEW, *ZERO)
        tokenizer, now, old = AutoTokenizer.from_pretrained(out), file_weights(out), file_weights(base)
        assert tokenizer("<a>x<b>", add_special_tokens=False)["input_ids"][::2] == [300, 301]
        assert tokenizer.decode([300, 301], skip_special_tokens=True).replace(" ", "") == "<a><b>"
        assert found["train_loss"] == pytest.approx(expected_loss(str(out), NEW_ROWS), abs=1e-4)
        for key, start in start_rows("llama", base).items():
            assert now[key].shape == (rows, 32)
            assert torch.equal(now[key][300:302], start)  # learning rate 0
            assert (start[0] - start[1]).abs().max() > 0.01
            assert torch.equal(now[key][302:], old[key][302:])
    assert "<a> = 300, 13 times in the data" in capsys.readouterr().out  # one of 14 is cut off


@pytest.mark.usefixtures("no_picture")
def test_a_head_that_only_the_configuration_ties(script, tmp_path, checkpoints, new_file):
    """Falcon's published files hold a head of their own: new rows and saving must not tie it."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints["falcon"], base)
    weights = file_weights(base)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].flip(0).contiguous()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    run(script, str(base), new_file, tmp_path / "out", "--train", "new_tokens", "--new_tokens", NEW, "--max_steps", 2)
    now = file_weights(tmp_path / "out")
    for name in ("lm_head.weight", "transformer.word_embeddings.weight"):
        assert torch.equal(now[name][:300], weights[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt2", ["--train", "new_tokens", "--new_tokens", NEW]),
        ("gpt2", ["--train", "last_layer"]),
        ("gpt_neox", ["--train", "last_layer"]),
        ("llama", ["--load_in_8bit", "true"]),
    ],
)
def test_interrupted_equals_uninterrupted(kind, more, script, checkpoints, new_file, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = [*more, "--max_steps", 4, "--save_steps", 2, "--learning_rate", "1e-2", "--weight_decay", 0.1]
    loss = run(script, checkpoints[kind], new_file, whole, *more)["train_loss"]
    cut.mkdir()
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    arguments = yaml.safe_load((whole / "run_args.yaml").read_text()) | {"output_dir": str(cut)}
    (cut / "run_args.yaml").write_text(yaml.safe_dump(arguments))
    assert run(script, checkpoints[kind], new_file, cut, *more)["train_loss"] == pytest.approx(loss, abs=1e-9)
    name = "adapter_model.safetensors" if "--load_in_8bit" in more else "model.safetensors"
    one, other = load_file(whole / name), load_file(cut / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_8bit_base(kind, script, checkpoints, train_file, tmp_path, capsys):
    """The head alone is trained and saved; on the same 8-bit base it gives the loss that training reports."""
    from peft import PeftModel

    in_8bit = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(checkpoints[kind], **in_8bit).eval()
    old = base.get_output_embeddings().weight.detach().clone()
    more = ["--load_in_8bit", "true", "--validation_file", train_file, "--max_steps", 3, "--learning_rate", "1e-2"]
    found = run(script, checkpoints[kind], train_file, tmp_path, *more, "--save_steps", 1, "--weight_decay", 0.1)
    assert f"base       {8 if kind != 'llama' else 14} layers in 8 bit" in capsys.readouterr().out
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (head,) = saved.values()
    assert head.shape == old.shape
    assert ((head - old).abs() > 1e-4).float().mean() > 0.99
    assert found["trainable_parameters"] == old.numel()
    assert not (tmp_path / "model.safetensors").exists()
    facts = json.loads((tmp_path / "base_model.json").read_text())
    assert (facts["base_model"], facts["trained_on"]) == (checkpoints[kind], "8 bit")
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(model.get_output_embeddings()(torch.eye(32)), head.T.contiguous())
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    tokenizer, losses = AutoTokenizer.from_pretrained(tmp_path), []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([(prompt + answer)[:64]])).logits[0], -1)
        losses += [-log_p[len(prompt) + i - 1, token] for i, token in enumerate(answer) if len(prompt) + i < 64]
    assert found["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_8bit_on_an_old_gpu_is_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    arguments = SimpleNamespace(train="last_layer", new_tokens=None, load_in_8bit=True)
    with pytest.raises(SystemExit):
        script.check_choice(arguments, SimpleNamespace(deepspeed=None, device=torch.device("cuda")))
    assert "needs compute capability 7.5" in capsys.readouterr().err


BAD_ARGUMENTS = {
    "matches nothing": (
        ["--train", "lastlayer"],
        r"in no parameter's name.*embed_tokens.weight, .*lm_head.weight",
    ),
    "no regular expression": (["--train", "layers.(1"], "is no regular expression"),
    "checkpointing": (["--activation_checkpointing", "true"], "only costs time"),
    "checkpointing, old name": (["--gradient_checkpointing", "true", "--train", "last_block"], "only costs time"),
    "checkpointing, regex": (["--activation_checkpointing", "true", "--train", r"layers\.1\."], "only costs time"),
    "no new tokens": (["--train", "new_tokens"], "needs --new_tokens"),
    "empty new tokens": (["--train", "new_tokens", "--new_tokens", " , "], "needs --new_tokens"),
    "new tokens for nothing": (["--new_tokens", "<a>"], "needs --train new_tokens or input_output"),
    "known token": (["--train", "new_tokens", "--new_tokens", "<s>,<a>"], "<s> is in the vocabulary already"),
    "token not in data": (["--train", "new_tokens", "--new_tokens", "<zzz>"], "<zzz> does not occur"),
    "8 bit elsewhere": (["--load_in_8bit", "true", "--train", "last_block"], "goes with --train last_layer alone"),
    "no bool": (["--load_in_8bit", "maybe"], "load_in_8bit"),
    "misspelt": (["--trian", "last_block"], "unrecognized arguments: --trian"),
    "missing file": (["--train_file", "nowhere.jsonl"], "nowhere.jsonl is not there"),
    "no model": (["--model_name_or_path", "no/such/model/here"], "is no model here, nor could it be fetched"),
    "max_length": (["--max_length", "65"], "does not fit the 64 positions"),
    "output": (["--output_dir", "/dev/null/x"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, script, checkpoints, train_file, tmp_path, capsys, monkeypatch):
    arguments, message = BAD_ARGUMENTS[case]
    monkeypatch.setattr(script.AutoModelForCausalLM, "from_pretrained", None)  # nothing is loaded before the refusal
    base = ["--model_name_or_path", checkpoints["llama"], "--output_dir", tmp_path / "o", "--train_file", train_file]
    assert re.search(message, refused(script, capsys, [*base, *arguments]))
    assert not (tmp_path / "o" / "all_results.json").exists()


def test_bad_checkpoints(script, checkpoints, new_file, tmp_path, capsys):
    """Falcon is never turned into 8 bit; a tokenizer longer than its embedding is not mended by new tokens."""
    base = ["--output_dir", tmp_path / "o", "--train_file", new_file, "--model_name_or_path"]
    found = refused(script, capsys, [*base, checkpoints["falcon"], "--load_in_8bit", "true"])
    assert "no layer of this model (falcon) was turned into 8 bit" in found
    shutil.copytree(checkpoints["llama"], tmp_path / "long")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    tokenizer.add_tokens([f"<old{i}>" for i in range(5)])
    tokenizer.save_pretrained(tmp_path / "long")
    more = ["--train", "new_tokens", "--new_tokens", NEW]
    assert "past the end" in refused(script, capsys, [*base, tmp_path / "long", *more])


@pytest.mark.usefixtures("no_picture")
def test_checkpointing_where_it_helps(script, checkpoints, train_file, tmp_path):
    for value in ("true", "false"):
        run(script, checkpoints["qwen3"], train_file, tmp_path / value, "--train", "input_output", "--max_steps", 2,
            "--activation_checkpointing", value)  # fmt: skip
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
            assert float(share.rstrip("%")) == pytest.approx(100 * size / model.num_parameters(), abs=0.01)
    assert found == {name: [*p.shape] for name, p in model.named_parameters(remove_duplicate=False)}
    assert f"{model.num_parameters():,} parameters" in head


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_show_model_says_what_training_does(kind, show, script, checkpoints, train_file, tmp_path, capsys):
    for train in ("last_layer", "last_block", "input_output", r"\.0\.mlp"):
        arguments = ["--model_name_or_path", checkpoints[kind], "--train", train]
        capsys.readouterr()
        show.main(arguments)
        shown = capsys.readouterr().out
        found = run(script, checkpoints[kind], train_file, tmp_path / train[-7:], *arguments[2:], "--max_steps", 1)
        trained, total = found["trainable_parameters"], found["total_parameters"]
        assert f"trained    * {trained:,} of {total:,} parameters ({trained / total:.2%})" in shown
        assert ("was tied" in shown) == (kind == "qwen3" and train.startswith("last"))
        assert f"memory     {(4 * total + 12 * trained) / 1e6:.1f} MB" in shown


def test_show_model_ranges_and_refusals(show, checkpoints, capsys):
    assert show.ranges([0, 1, 2, 9, 4, 5, 11]) == "0-2,4-5,9,11"
    assert show.ranges([-1]) == ""
    show.main(["--model_name_or_path", checkpoints["llama"], "--train", r"layers\.1\."])
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"\*  model\.layers\.1\.mlp\.up_proj\.weight  +Linear  +1 ", line) for line in lines)
    assert any(re.match(r"   model\.layers\.0\.mlp\.up_proj\.weight  +Linear  +1 ", line) for line in lines)
    base = ["--model_name_or_path", checkpoints["llama"]]
    assert "in no parameter's name" in refused(show, capsys, [*base, "--train", "embed_out"])
    assert "is no regular expression" in refused(show, capsys, [*base, "--train", "("])
    assert "is no causal language model here" in refused(show, capsys, ["--model_name_or_path", "no/such/model/here"])
    assert "unrecognized arguments" in refused(show, capsys, [*base, "--tr", "last_layer"])


def test_alone_in_an_empty_directory_on_two_processes(script, checkpoints, new_file, tmp_path):
    """Copied away it runs; two processes train the new rows as one does, and keep the others in place."""
    shutil.copy(SCRIPT, tmp_path)
    common = ["--model_name_or_path", checkpoints["llama"], "--train_file", new_file, "--train", "new_tokens",
              "--new_tokens", NEW, "--max_steps", "3", "--learning_rate", "1e-2", "--weight_decay", "0.1",
              "--train_sampling_strategy", "sequential"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT.name]
    done = subprocess.run(
        [*command, *common, "--per_device_train_batch_size", "4"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "loss.png", "all_results.json"} <= {p.name for p in (tmp_path / "output").iterdir()}
    script.main([*common, "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8"])
    two, one, base = (file_weights(d) for d in (tmp_path / "output", tmp_path / "one", checkpoints["llama"]))
    for name, old in base.items():
        assert torch.equal(two[name][: len(old)], old)
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)


def test_show_model_alone(checkpoints, tmp_path, capsys):
    """Copied away it runs; its --help imports next to nothing."""
    shutil.copy(SHOW, tmp_path)
    code = ("import sys, show_model\ntry: show_model.main(['--help'])\nexcept SystemExit: pass\n"
            "print({'torch', 'transformers'} & set(sys.modules))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nset()\n")
    load_script(tmp_path / "show_model.py").main(["--model_name_or_path", checkpoints["llama"]])
    assert capsys.readouterr().out.startswith("model ")
