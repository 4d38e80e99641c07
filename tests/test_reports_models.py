"""Models and templates that are right at first sight: tables of garbage, and the day in a prompt."""

import argparse
import datetime
import json
import shutil
import time

import datasets
import keep_answers
import published
import pytest
import torch
import transformers
from conftest import ROOT, ROWS, load_script, make_checkpoint, write_jsonl
from test_foreign import own_code
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

TABLES = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnRotary(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.rand(1)  # the script's own numbers must not move by this
        angles = 1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x, position_ids):
        turned = position_ids[..., None].float() * self.angles
        turned = torch.cat([turned, turned], -1)
        return turned.cos().to(x.dtype), turned.sin().to(x.dtype)


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = OwnRotary(config.hidden_size // config.num_attention_heads)
        self.post_init()
        assert self.lm_head.weight.is_meta  # no memory for weights a second time
"""
ANGLES = [1, 0.1, 0.01, 0.001]  # 10000 ** (-2 i / 8)
DATED = """
{{- 'Today: ' + strftime_now('%d %b %Y') + eos_token -}}
{%- for m in messages -%}{{- m.role + ': ' + m.content + eos_token -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}
"""
SHORT = [row for row in ROWS if len(row["prompt"]) < 16]
CHATS = [{"instruction": row["prompt"], "output": row["completion"]} for row in SHORT]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("reports") / "llama", "llama")


def main(script, *words):
    load_script(ROOT / script).main([str(word) for word in words])


# ---- A repository's own code ----


@pytest.fixture
def own(llama, tmp_path, monkeypatch):
    """Code of its own that is the llama again; memory that nobody filled holds threes."""
    empty = torch.empty_like

    def threes(like, **options):
        made = empty(like, **options)
        return made.fill_(3) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(transformers.modeling_utils.torch, "empty_like", threes)
    return own_code(tmp_path / "own", llama, TABLES)


def test_tables_of_own_code(own):
    """What its __init__ computes and no file holds, through all ways that load a model."""
    config = AutoConfig.from_pretrained(own, trust_remote_code=True)
    packed = BitsAndBytesConfig(load_in_4bit=True)
    for more in (
        {},
        {"dtype": torch.bfloat16},
        {"quantization_config": packed},
        {"device_map": "cpu"},
    ):
        for load in published.prepare(config, own, {}), keep_answers.prepare(config, {}):
            before = torch.get_rng_state()
            model, _ = load.from_pretrained(own, output_loading_info=True, trust_remote_code=True, **more)  # fmt: skip
            assert model.model.rotary_emb.angles.tolist() == pytest.approx(ANGLES), more
            assert torch.equal(torch.get_rng_state(), before)
            assert not any(weight.is_meta for weight in model.parameters())
    merge, args = load_script(ROOT / "finetune_lora/merge_lora.py"), argparse.Namespace()
    args.trust_remote_code = True
    assert merge.load_base(args, own).model.rotary_emb.angles.tolist() == pytest.approx(ANGLES)
    native = AutoConfig.for_model("llama")
    assert published.prepare(native, "", {}) is transformers.AutoModelForCausalLM


def test_own_code_does_as_the_llama(own, llama, tmp_path, capsys):
    """Loss, answers and the merged model: a llama's, which transformers computes by itself."""
    data, found = write_jsonl(tmp_path / "d.jsonl", ROWS), {}
    for model in own, llama:
        adapter, merged = tmp_path / "lora" / model[-3:], tmp_path / "merged" / model[-3:]
        remote = ["--trust_remote_code", str(model == own).lower()]
        words = ["--train_file", data, "--max_steps", 1, "--learning_rate", 0.01, *remote]
        words += ["--output_dir", adapter, "--model_name_or_path", model]
        main("finetune_lora/finetune_lora.py", *words)
        loss = json.loads((adapter / "all_results.json").read_text())["train_loss"]
        words = ["--adapter_name_or_path", adapter, "--output_dir", merged, "--verify", *remote]
        capsys.readouterr()
        main("finetune_lora/merge_lora.py", *words)
        figures = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "largest" in line]  # fmt: skip
        words = ["--model_name_or_path", merged, "--prompt", "空は", "--max_new_tokens", 9, *remote]
        main("generate_text/generate_text.py", *words)
        found[model] = [loss, figures, capsys.readouterr().out]
    assert found[own] == found[llama]


def test_own_code_that_cannot_be_made_again(llama, tmp_path, capsys, monkeypatch):
    """Refused in a line: its tables would be garbage."""
    once = "if not angles.is_meta: raise OSError('no second time')\n        self.register"
    model = own_code(tmp_path / "once", llama, TABLES.replace("self.register", once))
    with pytest.raises(SystemExit):
        words = ["--model_name_or_path", model, "--trust_remote_code", "--prompt", "a"]
        main("generate_text/generate_text.py", *words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot compute model.rotary_emb.angles again (OSError('no second time'))" in line
    merge = load_script(ROOT / "finetune_lora/merge_lora.py")
    monkeypatch.setattr(merge, "published", None)  # copied alone
    with pytest.raises(SystemExit):
        merge.load_base(argparse.Namespace(trust_remote_code=True), model)
    assert "needs `jobs` beside" in capsys.readouterr().err.splitlines()[-1]


# ---- The day in a prompt ----


@pytest.fixture
def calendar(monkeypatch):
    """Call it to let another day begin: the clock of two places that never share one."""
    places, days = iter(["AAA+12", "BBB-14"]), []  # 26 hours apart

    def turn():
        monkeypatch.setenv("TZ", next(places))
        time.tzset()
        days.append(datetime.datetime.now().strftime("%d %b %Y"))
        return days

    yield turn
    monkeypatch.delenv("TZ")
    time.tzset()


@pytest.fixture
def dated(llama, tmp_path):
    folder = tmp_path / "dated"
    shutil.copytree(llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_goes_on_with_its_first_day(dated, tmp_path, calendar, capsys, monkeypatch):
    """The cache of the examples is gone, too; a new run has today, from no older cache."""
    script = load_script(ROOT / "finetune_full/finetune_full.py")
    begin, seen = script.begin, []
    monkeypatch.setattr(script, "begin", lambda *args: (seen.append(text(args[1])), begin(*args)))
    data, out = write_jsonl(tmp_path / "d.jsonl", CHATS), tmp_path / "out"
    words = ["--model_name_or_path", dated, "--train_file", data, "--max_steps", 2]

    def start(place, cache):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / cache)
        script.main([str(word) for word in [*words, "--output_dir", place]])

    out.mkdir()
    (first,) = calendar()
    (out / "STOP").touch()
    with pytest.raises(SystemExit):
        start(out, "one")
    assert "checkpoint-1" in {path.name for path in out.iterdir()}
    _, second = calendar()
    start(out, "two")
    start(tmp_path / "new", "one")
    assert [[day in each for day in (first, second)] for each in seen] == [[1, 0], [1, 0], [0, 1]]
    assert "template   may write the day into prompts: 20" in capsys.readouterr().out
    saved = AutoTokenizer.from_pretrained(out)
    assert saved.chat_template == DATED and not hasattr(saved, "template_day")


def text(trainer):
    return trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])


def test_answers_go_on_with_their_first_day(dated, tmp_path, calendar, monkeypatch):
    """Once they are complete and removed, the next ones have today."""
    script = load_script(ROOT / "generate_text/generate_text.py")
    read, seen = script.read_prompts, []

    def read_prompts(args, tokenizer):
        found = read(args, tokenizer)
        seen.append(tokenizer.decode(found[2][0]))
        return found

    monkeypatch.setattr(script, "read_prompts", read_prompts)
    data, out = write_jsonl(tmp_path / "d.jsonl", CHATS), tmp_path / "out.jsonl"
    words = ["--model_name_or_path", dated, "--prompt_file", data, "--output_file", out]
    words = [str(word) for word in [*words, "--max_new_tokens", 3, "--batch_size", 2]]
    (first,) = calendar()
    generate = script.generate
    monkeypatch.setattr(
        script, "generate", lambda *a: (generate(*a), (tmp_path / "STOP").touch())[0]
    )
    with pytest.raises(SystemExit):
        script.main(words)
    monkeypatch.setattr(script, "generate", generate)
    _, second = calendar()
    script.main(words)
    assert len(out.read_text().splitlines()) == len(CHATS)
    out.unlink()
    script.main(words)
    assert [[day in each for day in (first, second)] for each in seen] == [[1, 0], [1, 0], [0, 1]]
