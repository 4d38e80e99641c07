"""Models as they are published today: image towers, chat templates that think, padded prompts.

The templates are written in the manner of each family's own; what is learned of a conversation is
compared with what generation asks, token by token.
"""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import families
import keep_answers
import pytest
import seven_grid as grid
import torch
from conftest import ROOT, ROWS, load_script, make_tokenizer, write_jsonl
from safetensors.torch import load_file
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

TURN = "{{- '<|im_start|>' + m.role + '\n' }}"
EMPTY = "<think>\n\n</think>\n\n"
# Thoughts are kept behind the last question only; an answer at the end always has a thought.
QWEN_3 = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set parts = m.content.split('</think>') -%}
{%- set thought = m.reasoning_content or (parts[0].split('<think>')[-1] if parts[1:] else '') -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- parts[-1].lstrip('\\n') + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}{%- endif -%}
"""
GEMMA = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- raise_exception('no system turn here') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
{%- if m.content is string -%}{{- m.content | trim -}}{%- else -%}
{%- for part in m.content -%}{{- part.text | trim -}}{%- endfor -%}{%- endif -%}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
LLAMA_3 = """
{%- if date_string is not defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nDate: ' + date_string -}}
{%- if messages[0].role == 'system' -%}{{- '\\n\\n' + messages[0].content -}}
{%- set messages = messages[1:] -%}{%- endif -%}{{- '<|eot_id|>' -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
LLM_JP = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content -}}
{%- elif m.role == 'user' -%}{{- '\\n\\n### 指示:\\n' + m.content -}}
{%- else -%}{{- '\\n\\n### 応答:\\n' + m.content + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### 応答:\\n' -}}{%- endif -%}
"""
HARMONY = """
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.thinking and loop.last -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}
{{- '<|return|>' if loop.last else '<|end|>' -}}
{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""
MISTRAL = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{% generation %}{{- ' ' + m.content + eos_token -}}{% endgeneration %}
{%- elif m.role == 'system' -%}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' -}}
{%- else -%}{{- '[INST]' + m.content + '[/INST]' -}}{%- endif -%}
{%- endfor -%}
"""
# Asks with an open or an empty thought, and writes answers without any.
NEMOTRON = """
{{- '<SPECIAL_10>System\\n' -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content + '\\n' -}}
{%- elif m.role == 'user' -%}{{- '<SPECIAL_11>User\\n' + m.content + '\\n' -}}
{%- else -%}{{- '<SPECIAL_11>Assistant\\n' + m.content.split('</think>')[-1] -}}
{{- '\\n<SPECIAL_12>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<SPECIAL_11>Assistant\\n' -}}
{{- '<think></think>' if enable_thinking is false else '<think>\\n' -}}{%- endif -%}
"""
# Asks with an empty thought that no earlier answer has.
GEMMA_4 = """
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim -}}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n<|channel>thought\\n<channel|>' -}}{%- endif -%}
"""
# Has a name like an argument of its own, and no argument.
NEMOTRON_2 = """
{%- set ns = namespace(enable_thinking=true) -%}
{%- for m in messages -%}
{%- if '/no_think' in m.content -%}{%- set ns.enable_thinking = false -%}{%- endif -%}
{%- endfor -%}
""" + NEMOTRON.replace("if enable_thinking is false else", "if not ns.enable_thinking else")
# family -> template, its special tokens, --chat_template_kwargs, what is learned of an answer,
# and how many examples two answers make.
FAMILIES = {
    "Qwen3": (QWEN_3, "<|im_start|> <|im_end|>", {}, EMPTY + "{}<|im_end|>\n", 2),
    "Qwen3 without thoughts": (QWEN_3, "<|im_start|> <|im_end|>", {"enable_thinking": False},
                               "{}<|im_end|>\n", 2),
    "Gemma": (GEMMA, "<start_of_turn> <end_of_turn>", {}, "{}<end_of_turn>\n", 1),
    "Llama 3": (LLAMA_3, "<|start_header_id|> <|end_header_id|> <|eot_id|>", {}, "{}<|eot_id|>", 1),
    "Llama 3 with a date": (LLAMA_3, "<|start_header_id|> <|end_header_id|> <|eot_id|>",
                            {"date_string": "1 Jan 2025 '\"元日"}, "{}<|eot_id|>", 1),
    "llm-jp": (LLM_JP, "", {}, "{}<|endoftext|>", 1),
    "gpt-oss": (HARMONY, "<|start|> <|message|> <|channel|> <|end|> <|return|>",
                {"reasoning_effort": "low"}, "<|channel|>final<|message|>{}<|return|>", 2),
    "Mistral": (MISTRAL, "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]", {},
                " {}<|endoftext|>", 1),
    "Nemotron": (NEMOTRON, "<SPECIAL_10> <SPECIAL_11> <SPECIAL_12>", {"enable_thinking": False},
                 "{}\n<SPECIAL_12>\n", 2),
    "Gemma 4": (GEMMA_4, "<|turn> <turn|> <|channel> <channel|>", {}, "{}<turn|>\n", 2),
}  # fmt: skip
TALK = [("system", "短く。"), ("user", "空は?"), ("assistant", "青い。"), ("user", "海\nは?"),
        ("assistant", "広い。\n深い。")]  # fmt: skip
TRAIN = load_script(ROOT / "finetune_full" / "finetune_full.py")
ASK = load_script(ROOT / "generate_text" / "generate_text.py")
CHAT = load_script(ROOT / "generate_text" / "chat.py")


def family(name, folder):
    """(tokenizer as training has it, as generation loads what training saved), of that family."""
    template, special, values, *_ = FAMILIES[name]
    tokenizer = make_tokenizer(bos="bos_token" in template)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special.split()])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    TRAIN.choose_chat_template(None, tokenizer, json.dumps(values))
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    ASK.choose_chat_template(None, loaded)
    return tokenizer, loaded


def conversation(name):
    turns = [{"role": role, "content": text} for role, text in TALK]
    return turns[1:] if name == "Gemma" else turns


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_ids_are_what_generation_asks(name, tmp_path):
    """Before each answer stand the ids of the template, with what --chat_template_kwargs said."""
    tokenizer, loaded = family(name, tmp_path)
    *_, values, answer, count = FAMILIES[name]
    messages = conversation(name)
    form, examples = TRAIN.format_row({"messages": messages}, tokenizer)
    assert (form, len(examples)) == ("messages", count)
    encoded, learned = [TRAIN.encode(pieces, tokenizer) for pieces in examples], []
    for ids, labels in encoded:
        for place in [i for i in range(1, len(ids)) if labels[i] != -100 == labels[i - 1]]:
            number = [n for n, m in enumerate(messages) if m["role"] == "assistant"][len(learned)]
            asked = copy.deepcopy(messages[:number])
            plain = copy.copy(tokenizer)
            plain.chat_template = FAMILIES[name][0]
            wanted = plain.apply_chat_template(asked, add_generation_prompt=True, **values)
            assert ids[:place] == wanted["input_ids"]
            assert ids[:place] == ASK.encode_prompt({"messages": asked}, loaded)[1]
            assert ids[:place] == CHAT.encode_chat(asked, loaded)
            end = next((i for i in range(place, len(ids)) if labels[i] == -100), len(ids))
            learned.append(tokenizer.decode(ids[place:end]))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert learned == [answer.format(text) for text in answers]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert tokenizer.decode(TRAIN.turn_end_id(tokenizer)) in special & {
        answer.split("{}")[1].strip()
    }


def learn(tokenizer, path, rows):
    return [*TRAIN.make_examples([write_jsonl(path / "rows.jsonl", rows)], tokenizer, 10**6)]


@pytest.mark.parametrize(("name", "key"), [("Qwen3", "reasoning_content"), ("gpt-oss", "thinking")])
def test_thoughts_are_learned_or_refused(name, key, tmp_path, capsys):
    """A thought in a column of its own is written by the template, or the row is refused."""
    tokenizer, _ = family(name, tmp_path)
    messages = conversation(name)
    for message in messages:
        if message["role"] == "assistant":
            message[key] = f"{message['content']}と思う"
    texts = []
    for example in learn(tokenizer, tmp_path, [{"messages": messages}]):
        texts.append(tokenizer.decode([label for label in example["labels"] if label != -100]))
    assert ["青い。と思う" in text for text in texts] == [True, False]
    assert ["深い。と思う" in text for text in texts] == [False, True]
    other, _ = family("llm-jp", tmp_path)
    with pytest.raises(SystemExit):
        learn(other, tmp_path, [{"messages": messages}])
    assert f"its {key} would be left out" in capsys.readouterr().err


def test_what_templates_refuse(tmp_path, capsys):
    """Gemma's system turn, an answer behind a thought that stays open, an argument nobody reads."""
    tokenizer, _ = family("Gemma", tmp_path)
    system = {"role": "system", "content": "s"}
    with pytest.raises(SystemExit):
        learn(tokenizer, tmp_path, [{"messages": [system, *conversation("Gemma")]}])
    assert "row 1: TemplateError('no system turn here')" in capsys.readouterr().err
    tokenizer.chat_template = NEMOTRON
    with pytest.raises(SystemExit):
        learn(tokenizer, tmp_path, [{"messages": conversation("Nemotron")}])
    assert "rewrites its prompts" in capsys.readouterr().err
    tokenizer.chat_template = QWEN_3
    wrong = {'{"enable_thought": false}': "not in the template", "{a}": "kwargs {a}: JSON",
             '["enable_thinking"]': "AttributeError"}  # fmt: skip
    for values, words in wrong.items():
        with pytest.raises(SystemExit):
            TRAIN.choose_chat_template(None, tokenizer, values)
        assert words in capsys.readouterr().err


def test_arguments_of_the_template(tmp_path):
    """What is given later wins: in generation, and by any other program."""
    _, loaded = family("Qwen3 without thoughts", tmp_path)
    asked, start = conversation("Qwen3")[:2], "<|im_start|>assistant\n"
    assert loaded.decode(CHAT.encode_chat(asked, loaded)).endswith(start + EMPTY)
    text = loaded.apply_chat_template(asked, tokenize=False, add_generation_prompt=True,
                                      enable_thinking=True)  # fmt: skip
    assert text.endswith(start)
    ASK.choose_chat_template(None, loaded, '{"enable_thinking": true}')
    assert loaded.decode(CHAT.encode_chat(asked, loaded)).endswith(start)
    loaded.chat_template = "\n{{ x }}{{ messages[0].content }}"
    ASK.choose_chat_template(None, loaded, '{"x": null}')
    assert loaded.apply_chat_template(asked, tokenize=False) == "\nNone短く。"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    kinds = (
        "gemma3",
        "gemma4",
        "mistral3",
        "minimax",
        "mamba",
        "mixtral",
        "llama4_text",
        "nemotron_h",
    )
    return {kind: families.make(kind, root / kind) for kind in kinds}


@pytest.mark.parametrize(
    ("kind", "method"),
    [("gemma3", "full"), ("gemma3", "last layer"), ("gemma3", "generate"), ("gemma4", "full"),
     ("mistral3", "full"), ("mistral3", "generate")],
)  # fmt: skip
def test_composites(kind, method, models, tmp_path):
    assert families.METHODS[method](kind, models[kind], tmp_path) == ""


@pytest.mark.parametrize(
    ("lesson", "option"),
    [("lastlayer", "train"), ("lora", "lora_target_modules"), ("lora", "modules_to_save")],
)
def test_what_text_does_not_pass_cannot_be_trained(lesson, option, models, tmp_path, capsys):
    """Asked for by name, too: it would get no gradient."""
    script = load_script(ROOT / f"finetune_{lesson}" / f"finetune_{lesson}.py")
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b c"}])
    words = ["--model_name_or_path", str(models["gemma3"]), "--train_file", str(data)]
    for name in ("vision_tower", "multi_modal_projector"):
        with pytest.raises(SystemExit) as stop:
            script.main([*words, "--output_dir", str(tmp_path / name), f"--{option}", name])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"error: --{option} {name}"), error


@pytest.mark.parametrize("method", ["DPO", "GRPO"])
def test_preferences_and_rewards(method, models, tmp_path):
    """Experts: TRL's DPO would add a loss of their routers. What TRL does not know is refused."""
    assert families.METHODS[method]("mixtral", models["mixtral"], tmp_path / "experts") == ""
    assert families.METHODS[method]("gemma3", models["gemma3"], tmp_path / "sees") == ""
    text = families.METHODS[method]("llama4_text", models["llama4_text"], tmp_path / "unknown")
    assert text.startswith("refused: TRL cannot score this model's answers: ")
    if method == "GRPO":  # its answers are written with padding before shorter prompts
        text = families.rewards("minimax", models["minimax"], tmp_path / "padded")
        assert text.startswith("refused: TRL cannot train this model by rewards: padding")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ends_that_the_makers_name_are_kept(method, models, tmp_path):
    """Such as the end of a tool's call, behind which no plain answer ends."""
    shutil.copytree(models["gemma3"], tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [0, 7, 9]}')
    out, error = grid.train(method, str(tmp_path / "base"), tmp_path / "run", *grid.ONCE)
    assert not error
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 7, 9]


def test_checkpoints_of_a_composite(models, tmp_path):
    """Each is one, too: it shows images with what its base shows them with."""
    more = ["--save_strategy", "steps", "--save_steps", 2]
    out, error = grid.train("lastlayer", models["gemma3"], tmp_path, *more)
    assert not error
    for directory in (out / "checkpoint-2", out):
        name = type(AutoImageProcessor.from_pretrained(directory)).__name__
        assert name.startswith("Gemma3ImageProcessor")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_processor_comes_along(method, models, tmp_path):
    """AutoProcessor, which other tools see with, reads a result, its checkpoints, a merged model."""
    base = tmp_path / "base"
    shutil.copytree(models["gemma3"], base)
    (base / "preprocessor_config.json").unlink()
    backend = make_tokenizer(bos=True).backend_tokenizer
    names = ("boi_token", "eoi_token", "image_token")
    more = dict(zip(names, map(backend.id_to_token, (290, 291, 292)), strict=True))
    roles = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=more, chat_template="{{ messages }}", **roles
    )
    processor = Gemma3Processor(Gemma3ImageProcessor(do_resize=False), tokenizer)
    processor.save_pretrained(base)
    own, steps = (
        AutoProcessor.from_pretrained(base),
        ["--save_strategy", "steps", "--save_steps", 2],
    )
    out, error = grid.train(method, str(base), tmp_path / "run", *steps)
    places = [out, out / "checkpoint-2"]
    if method == "lora":
        places.append(tmp_path / "merged")
        words = ["--adapter_name_or_path", out, "--output_dir", places[-1]]
        _, error = grid.call("finetune_lora/merge_lora.py", *words)
    assert not error
    for place in places:
        found = AutoProcessor.from_pretrained(place)
        assert type(found) is Gemma3Processor and found.image_token == own.image_token, place
        assert not found.image_processor.do_resize


def test_composite_is_whole(models, tmp_path):
    """Saved as what it was, the tower bit by bit; the last block is the text's."""
    out, error = grid.train("lastlayer", models["gemma3"], tmp_path, "--train", "last_block")
    (before, towers), (after, _) = (
        families.load("gemma3", path) for path in (models["gemma3"], out)
    )
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    moved = {name for name, weight in old.items() if not torch.equal(new[name], weight)}
    text = "model.language_model."
    block = {name for name in old if name.startswith((f"{text}layers.1.", f"{text}norm."))}
    assert not error and moved == block and towers
    assert type(after).__name__ == "Gemma3ForConditionalGeneration"
    assert type(AutoImageProcessor.from_pretrained(out)).__name__.startswith("Gemma3ImageProcessor")
    log, error = grid.call("finetune_lastlayer/show_model.py", "--model_name_or_path", out,
                           "--train", "layers")  # fmt: skip
    marked = [line.split()[1] for line in log.splitlines() if line.startswith("*")]
    assert not error and marked and all("language_model" in name for name in marked)


def test_adapter_and_merge_of_a_composite(models, tmp_path):
    """LoRA stands on the text alone; the merged model is base + B A, and sees as its base did."""
    model = models["gemma3"]
    out, error = grid.train("lora", model, tmp_path, "--learning_rate", 0.1)
    assert not error
    adapter = load_file(out / "adapter_model.safetensors")
    scale = 2  # alpha / r
    words = ["--adapter_name_or_path", out, "--output_dir", tmp_path / "merged", "--dtype", "fp32"]
    _, error = grid.call("finetune_lora/merge_lora.py", *words)
    assert not error, error
    base, _ = families.load("gemma3", model)
    names = [name for name in adapter if ".lora_A" in name]
    assert len(names) == 14 and all(".language_model." in name for name in names)
    for name in names:
        place = name.removeprefix("base_model.model.").split(".lora_A")[0]
        change = adapter[name.replace("lora_A", "lora_B")] @ adapter[name] * scale
        base.get_submodule(place).weight.data += change
    merged, _ = families.load("gemma3", tmp_path / "merged")
    ids = torch.tensor([[5, 19, 20, 17, 30, 21]])
    with torch.no_grad():
        difference = base(input_ids=ids).logits - merged(input_ids=ids).logits
    assert difference.abs().max() < 1e-5
    file = "preprocessor_config.json"
    assert (tmp_path / "merged" / file).read_text() == Path(model, file).read_text()
    tokens, error = grid.add_tokens(model, tmp_path / "more")
    assert not error and Path(tokens, file).is_file()
    assert type(families.load("gemma3", tokens)[0]).__name__ == "Gemma3ForConditionalGeneration"


@pytest.mark.parametrize(("kind", "is_exact"), [("minimax", False), ("mamba", True)])
def test_padded_prompts(kind, is_exact, models, tmp_path, capsys):
    """Where padding changes an answer, prompts are answered one by one, and a line says so."""
    net, _ = families.load(kind, models[kind])
    net.generation_config.pad_token_id = 0
    assert keep_answers.pads_well(net, [40, 50, 60, 70, 80, 90]) == is_exact
    assert families.generate(kind, models[kind], tmp_path) == ""


@pytest.mark.parametrize("kind", ["mamba", "nemotron_h"])
def test_four_bit_where_weights_are_read_past_their_layers(kind, models, tmp_path, monkeypatch):
    """Mamba's dt_proj and out_proj, say, stay as they are: their code would read packed numbers."""
    found = families.four_bit(kind, models[kind], tmp_path)
    assert found == ("refused: only 48.5% can be in 4 bit; right if allowed", "")[kind != "mamba"]
    words = ["--model_name_or_path", models[kind], "--prompt", "a", "--max_new_tokens", "2"]
    script, rounded = load_script(ROOT / "generate_text" / "generate_text.py"), []
    original = script.set_generation

    def set_generation(args, model, *more, **named):
        rounded.extend(n for n, m in model.named_modules() if "4bit" in type(m).__name__)
        original(args, model, *more, **named)

    monkeypatch.setattr(script, "set_generation", set_generation)
    script.main([*words, "--load_in_4bit", "--allow_partly_quantized"])
    ends = {name.rpartition(".")[2] for name in rounded}
    wanted = {"in_proj"} if kind == "mamba" else {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert ends - {"up_proj", "down_proj", "gate_proj"} == wanted


def test_an_adapter_that_would_not_load_again(tmp_path, capsys):
    """Laguna's shared experts get other names in PEFT's loading: refused before anything is spent."""
    base = families.make("laguna", tmp_path / "base")
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)
    script = load_script(ROOT / "finetune_lora" / "finetune_lora.py")
    words = [
        "--model_name_or_path",
        base,
        "--train_file",
        data,
        "--output_dir",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as left:
        script.main(words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and "PEFT cannot load what it saves beside down_proj, gate" in line
    script.main([*words, "--lora_target_modules", "q_proj,v_proj", "--max_steps", "1"])


def test_gated_model(monkeypatch, capsys, tmp_path):
    """What transformers says of a gated repository, and what to type: one line."""
    text = (
        "You are trying to access a gated repo.\nMake sure to have access to it at "
        "https://huggingface.co/google/gemma-3-4b-it.\n401 Client Error."
    )

    def gated(*args, **kwargs):
        raise OSError(text)

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", gated)
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)
    scripts = {
        "finetune_full/finetune_full.py": ["--train_file", data, "--output_dir", tmp_path / "out"],
        "generate_text/generate_text.py": ["--prompt", "a"],
        "generate_text/chat.py": [],
        "finetune_lastlayer/show_model.py": [],
    }
    for script, words in scripts.items():
        words = ["--model_name_or_path", "google/gemma-3-4b-it", *words]
        error = grid.call(script, *words)[1]
        assert error.startswith("error: ") and "https://huggingface.co/google" in error
        assert error.endswith("Accept its licence there, then type: hf auth login"), script


def test_limits_of_a_composite(models):
    """Positions and rows stand in the text's part of the configuration; Mamba has no limit."""
    for kind, length, good in ("gemma3", 128, True), ("gemma3", 129, False), ("mamba", 5000, True):
        args = SimpleNamespace(model_name_or_path=models[kind], max_length=length,
                               trust_remote_code=False, chat_template=None,
                               chat_template_kwargs="{}")  # fmt: skip
        if good:
            assert TRAIN.load_tokenizer(args)[1] == length
        else:
            with pytest.raises(SystemExit):
                TRAIN.load_tokenizer(args)
