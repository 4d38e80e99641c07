"""What repositories bring that transformers reads otherwise than it is meant, or not at all."""

import json
import shutil
import subprocess
import sys

import families
import model_text
import pytest
import seven_grid as grid
import test_published as published
import torch
from conftest import ROOT, ROWS, load_script, make_checkpoint, make_tokenizer, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, labels=None, attention_mask=None, use_cache=None, **kwargs):
        kwargs = {}
        out = super().forward(input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        if labels is not None:
            logits = out.logits[:, :-1].flatten(0, 1)
            out.loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return out
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("foreign") / "llama", "llama")


def refused(path, capsys, *words):
    """The one line that a script ends with."""
    with pytest.raises(SystemExit) as left:
        load_script(ROOT / path).main([str(word) for word in words])
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def own_code(folder, llama, code=OWN_CODE):
    shutil.copytree(llama, folder)
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig"}
    names["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
    config |= {"auto_map": names, "model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_own_code_with_another_loss(llama, tmp_path, capsys):
    """It shifts labels by itself, where they come shifted: the token after the next is learned."""
    model, data = own_code(tmp_path / "m", llama), write_jsonl(tmp_path / "d.jsonl", ROWS)
    words = ["--model_name_or_path", model, "--train_file", data, "--trust_remote_code", "true"]
    for lesson in ("full", "lora"):
        script = f"finetune_{lesson}/finetune_{lesson}.py"
        line = refused(script, capsys, *words, "--output_dir", tmp_path / lesson)
        assert "own code computes another loss than is asked for" in line
    right = OWN_CODE.replace("kwargs = {}", "kwargs['labels'] = labels")
    right = right.replace("if labels is not None", "if False")
    model = own_code(tmp_path / "right", llama, right)
    out = tmp_path / "trained"
    words = ["--model_name_or_path", model, "--train_file", data, "--trust_remote_code", "true"]
    more = ["--output_dir", out, "--max_steps", 1, "--learning_rate", 0, "--logging_steps", 1]
    more += ["--per_device_train_batch_size", len(ROWS)]
    load_script(ROOT / "finetune_full/finetune_full.py").main([str(w) for w in [*words, *more]])
    net, tokenizer = (
        AutoModelForCausalLM.from_pretrained(llama),
        AutoTokenizer.from_pretrained(llama),
    )
    assert grid.train_loss(out) == pytest.approx(grid.token_mean(net.eval(), tokenizer), abs=1e-4)
    capsys.readouterr()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "finetune_full/finetune_full.py", alone)
    command = [sys.executable, "finetune_full.py", *map(str, words), "--output_dir", "o"]
    line = subprocess.run(command, cwd=alone, capture_output=True, text=True).stderr
    assert "own code" in line and "../jobs" in line


@pytest.mark.parametrize("name", ["quantization_config", "hf_quant_config.json"])
def test_packed_as_transformers_does_not_know(name, llama, tmp_path, capsys, monkeypatch):
    """ModelOpt's FP8: the numbers would be taken for weights, without their scales.

    With `jobs` and without, wherever weights are read: what is there and not used is looked at.
    """
    data, model = write_jsonl(tmp_path / "d.jsonl", ROWS), tmp_path / "m"
    shutil.copytree(llama, model)
    stored = load_file(model / "model.safetensors")
    for key, weight in {**stored}.items():
        if key.endswith("_proj.weight"):
            stored[f"{key}_scale"] = scale = weight.abs().max() / 448
            stored[key] = (weight / scale).to(torch.float8_e4m3fn)
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "modelopt", "quant_algo": "FP8"}
    config = json.loads((model / "config.json").read_text())
    if name == "quantization_config":
        (model / "config.json").write_text(json.dumps(config | {name: how}))
    else:
        (model / name).write_text(json.dumps({"quantization": how}))
    words = ["--model_name_or_path", model, "--prompt", "a"]
    assert "packed ones" in refused("generate_text/generate_text.py", capsys, *words)
    words = ["--model_name_or_path", model, "--train_file", data, "--output_dir", tmp_path / "o"]
    wanted = "modelopt" if name == "quantization_config" else "packs weights"
    for lesson in ("full", "lora", "lastlayer"):
        line = refused(f"finetune_{lesson}/finetune_{lesson}.py", capsys, *words)
        assert wanted in line, line
    adapter = tmp_path / "adapter"
    lora = load_script(ROOT / "finetune_lora/finetune_lora.py")
    more = ["--train_file", data, "--output_dir", str(adapter), "--max_steps", "1"]
    lora.main(["--model_name_or_path", llama, *more])
    capsys.readouterr()
    words = ["--adapter_name_or_path", adapter, "--base_model_name_or_path", model]
    line = refused("finetune_lora/merge_lora.py", capsys, *words, "--output_dir", tmp_path / "n")
    assert ("modelopt" if name == "quantization_config" else "packed ones") in line


def test_names_of_no_layer_alone(llama, tmp_path, capsys, monkeypatch):
    """PEFT passes over a name that matches nothing as long as another one does."""
    lora = load_script(ROOT / "finetune_lora/finetune_lora.py")
    monkeypatch.setattr(lora, "keep_run", None)
    monkeypatch.setattr(lora, "model_layers", None)
    words = ["--model_name_or_path", llama, "--train_file", write_jsonl(tmp_path / "d.jsonl", ROWS)]
    for names in ("q_proj,v_porj", "all-linear,q_proj"):
        more = ["--output_dir", str(tmp_path / "o"), "--lora_target_modules", names]
        with pytest.raises(SystemExit):
            lora.main([*words, *more])
        assert "no layer is named {'" in capsys.readouterr().err
    good = ["--lora_target_modules", "q_proj,v_proj", "--output_dir", str(tmp_path / "o")]
    lora.main([*words, *good, "--max_steps", "1"])


def test_a_tokenizer_of_other_files(llama, tmp_path, capsys):
    """vocab.json and merges.txt, as GPT-2 came first: nothing to compare with, and no error."""
    model = tmp_path / "gpt2"
    make_checkpoint(model, "gpt2")
    inner = json.loads((model / "tokenizer.json").read_text())["model"]
    (model / "vocab.json").write_text(json.dumps(inner["vocab"]))
    (model / "merges.txt").write_text("\n".join(" ".join(pair) for pair in inner["merges"]) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").unlink()
    words = ["--model_name_or_path", model, "--prompt", ROWS[0]["prompt"], "--max_new_tokens", 2]
    load_script(ROOT / "generate_text/generate_text.py").main([str(word) for word in words])
    data, out = write_jsonl(tmp_path / "d.jsonl", ROWS), tmp_path / "o"
    words = ["--model_name_or_path", model, "--train_file", data, "--output_dir", out]
    words = [str(word) for word in [*words, "--max_steps", 1]]
    load_script(ROOT / "finetune_full/finetune_full.py").main(words)


def test_numbers_that_transformers_suspects(llama, tmp_path, capsys):
    """Mistral's tokenizer.json joins digits that its makers split; converted, it does not."""
    model, new = tmp_path / "mistral", tmp_path / "new"
    shutil.copytree(llama, model)
    whole = json.loads((model / "tokenizer.json").read_text())
    inner, first = whole["model"], 1 + max(token["id"] for token in whole["added_tokens"])
    first = max(first, 1 + max(inner["vocab"].values()))
    names = ["20", "202", *(f"xx{number}" for number in range(100_000))]
    inner["vocab"] |= {name: first + number for number, name in enumerate(names)}
    inner["merges"] += [["2", "0"], ["20", "2"]]
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split | {"invert": False}, level | {"use_regex": False}]
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (model / "tokenizer.json").write_text(json.dumps(whole))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "transformers_version": "4.50.0", "vocab_size": 200_000}
    (model / "config.json").write_text(json.dumps(config))
    words = ["--model_name_or_path", model, "--prompt", "2026"]
    line = refused("generate_text/generate_text.py", capsys, *words)
    assert f"convert_tokenizer.py --model_name_or_path {model} --output_dir NEW" in line
    convert = load_script(ROOT / "generate_text/convert_tokenizer.py")
    convert.main(["--model_name_or_path", str(model), "--output_dir", str(new)])
    assert "numbers    are split as their makers do" in capsys.readouterr().out
    tokenizer = load_script(ROOT / "finetune_full/finetune_full.py").load_tokenizer(
        published.SimpleNamespace(model_name_or_path=str(new), trust_remote_code=False,
                                  chat_template=None, chat_template_kwargs="{}", max_length=8))[0]  # fmt: skip
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def test_an_answer_behind_its_markers(tmp_path):
    """gpt-oss writes `final` before an answer, and thoughts before that: names of special tokens."""
    tokenizer, _ = published.family("gpt-oss", tmp_path)
    start = model_text.start_of_answer
    told = {
        "<|channel|>final<|message|>青い。": "青い。",
        "<|channel|>analysis<|message|>空<|end|><|start|>assistant<|channel|>final<|message|>青い。": "青い。",
        "青い。": "青い。",
        "<|channel|>analysis<|message|>空": "analysis空",  # cut off: nothing is lost
    }  # fmt: skip
    for text, answer in told.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids[start(tokenizer, ids) :], skip_special_tokens=True) == answer
    other, _ = published.family("Qwen3", tmp_path / "other")
    ids = other("<think>\n空\n</think>\n\n青い。", add_special_tokens=False)["input_ids"]
    assert start(other, ids) == 0


def test_generation_and_rewards_see_the_answer_alone(tmp_path, monkeypatch, capsys):
    """The text that is written, what a chat goes on with, and what is rewarded."""
    model = families.make("llama", tmp_path / "m")
    tokenizer, _ = published.family("gpt-oss", tmp_path / "t")
    net = AutoModelForCausalLM.from_pretrained(model)
    net.resize_token_embeddings(len(tokenizer))
    net.save_pretrained(model)
    tokenizer.save_pretrained(model)
    text = "<|channel|>final<|message|>青い。"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, input_ids, **kwargs):
        new = torch.tensor([[*ids, self.generation_config.eos_token_id[0]]] * len(input_ids))
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", answer)
    rows = write_jsonl(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "空は?"}]}])
    out = tmp_path / "out.jsonl"
    words = ["--model_name_or_path", model, "--prompt_file", rows, "--output_file", str(out)]
    words += ["--batch_size", "1"]
    load_script(ROOT / "generate_text/generate_text.py").main(words)
    assert json.loads(out.read_text())["generated_text"] == "青い。"
    lines = iter(["空は?", "exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    load_script(ROOT / "generate_text/chat.py").main(["--model_name_or_path", model])
    assert capsys.readouterr().out.splitlines()[-1] == "青い。"


def test_no_think_turns(tmp_path, capsys):
    """Nemotron Nano 2 opens a thought, but for a turn that says /no_think."""
    tokenizer, _ = published.family("Nemotron", tmp_path)
    tokenizer.chat_template = published.NEMOTRON_2
    turns = published.conversation("Nemotron")
    turns[0]["content"] = "/no_think"
    examples = published.learn(tokenizer, tmp_path, [{"messages": turns}])
    learned = [tokenizer.decode([i for i in e["labels"] if i != -100]) for e in examples]
    assert learned == ["青い。\n<SPECIAL_12>\n", "広い。\n深い。\n<SPECIAL_12>\n"]
    with pytest.raises(SystemExit):
        published.learn(tokenizer, tmp_path, [{"messages": turns[1:]}])
    assert "rewrites its prompts" in capsys.readouterr().err
    template = tokenizer.chat_template.replace("<SPECIAL_12>", "")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + template
    with pytest.raises(SystemExit):
        published.learn(tokenizer, tmp_path, [{"messages": turns, "tools": [tool]}])
    assert "no token to stop at" in capsys.readouterr().err


def test_a_name_that_is_no_argument(tmp_path, capsys):
    """`namespace(enable_thinking=...)` reads nothing that --chat_template_kwargs gives."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = published.NEMOTRON_2
    with pytest.raises(SystemExit):
        published.TRAIN.choose_chat_template(None, tokenizer, '{"enable_thinking": false}')
    assert "not in the template" in capsys.readouterr().err
    for text in (
        "{%- if (enable_thinking is defined) %}{% endif -%}",
        "{{ enable_thinking }}",
        "{% if enable_thinking==false %}{% endif %}",
    ):
        tokenizer.chat_template = text
        published.TRAIN.choose_chat_template(None, tokenizer, '{"enable_thinking": false}')


# ---- Edits ----


def write(path, text):
    """An edited copy of a script in a directory of its own, with `jobs` beside that."""
    path.parent.mkdir(exist_ok=True)
    jobs = path.parent.parent / "jobs"
    if not jobs.exists():
        jobs.symlink_to(ROOT / "jobs")
    path.write_text(text)
    return path


def test_edits_that_generation_would_not_share(llama, tmp_path, capsys):
    """Other ends in format_row; a CHAT_TEMPLATE beside the model's own; another generate_text.py."""
    rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in ROWS]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    text = (ROOT / "finetune_full/finetune_full.py").read_text()
    words = ["--model_name_or_path", llama, "--train_file", data, "--max_steps", 1]
    old = 'return "instruction", chat_pieces(turns, tokenizer)'
    new = 'return "instruction", [[(question, False), (answer + "<|im_end|>", True)]]'
    assert text.count(old) == 1
    script = write(tmp_path / "lesson" / "rows.py", text.replace(old, new))
    line = refused(script, capsys, *words, "--output_dir", tmp_path / "one")
    assert "row 1: wrong end. Edit the template." in line
    chatml = tmp_path / "chatml"  # whose questions hold the end, too
    tokenizer, _ = published.family("Qwen3 without thoughts", chatml)
    new = 'return "instruction", [[(f"<|im_start|>user\\n{question}<|im_end|>\\n", False), (answer, True)]]'
    edited = load_script(write(tmp_path / "lesson" / "chatml.py", text.replace(old, new)))
    with pytest.raises(SystemExit):
        [*edited.make_examples([data], tokenizer, 999)]
    assert "row 1: wrong end. Edit the template." in capsys.readouterr().err
    script = write(tmp_path / "lesson" / "template.py", text.replace("### 応答", "### 答え"))
    own = tmp_path / "own"
    shutil.copytree(llama, own)
    (own / "chat_template.jinja").write_text(published.LLM_JP)
    words[1], said = own, "template   the model's own; the edited one is used with"
    for more, is_said in (([], True), (["--chat_template", "alpaca"], False)):
        out = ["--output_dir", tmp_path / f"two{is_said}"]
        load_script(script).main([str(word) for word in [*words, *out, *more]])
        assert (said in capsys.readouterr().out) == is_said
    asking = (ROOT / "generate_text/generate_text.py").read_text()
    script = write(tmp_path / "lesson" / "asking.py", asking)
    prompts, out = write_jsonl(tmp_path / "p.jsonl", rows[:2]), tmp_path / "answers.jsonl"
    words = ["--model_name_or_path", llama, "--prompt_file", prompts, "--output_file", out]
    load_script(script).main([str(word) for word in [*words, "--max_new_tokens", 2]])
    asking = asking.replace("decode(new[start:end], **plain)", "decode(new[:1], **plain)")
    script = write(tmp_path / "lesson" / "other.py", asking)
    line = refused(script, capsys, *words, "--max_new_tokens", 2)
    assert "holds other answers: choose another." in line and "script was" in line


def test_an_edit_that_trains_nothing(llama, tmp_path, capsys, monkeypatch):
    script, data = load_script(ROOT / "finetune_full/finetune_full.py"), tmp_path / "d.jsonl"
    load = script.load_model
    monkeypatch.setattr(script, "load_model", lambda *args: load(*args).requires_grad_(False))
    words = ["--model_name_or_path", llama, "--train_file", write_jsonl(data, ROWS)]
    line = refused("finetune_full/finetune_full.py", capsys, *words, "--output_dir", tmp_path / "o")
    assert "nothing is trained: no parameter has requires_grad." in line
