"""Tools, their calls, and parts of text: what is learned and asked is what the template itself gives.

The templates are written in the manner of each family's own.
"""

import copy
import json
from pathlib import Path

import chat_turns
import pytest
import trl
from conftest import ROOT, load_script, make_tokenizer, write_jsonl
from transformers import AddedToken

TRAIN = load_script(ROOT / "finetune_full" / "finetune_full.py")
ASK = load_script(ROOT / "generate_text" / "generate_text.py")
DPO = load_script(ROOT / "finetune_dpo" / "finetune_dpo.py")
GRPO = load_script(ROOT / "finetune_grpo" / "finetune_grpo.py")

CALL = """
{%- for call in m.tool_calls or [] -%}{%- if call.function -%}{%- set call = call.function -%}{%- endif -%}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}ARGUMENTS{{- '}\\n</tool_call>' -}}
{%- endfor -%}"""
TURNS = """
{%- if tools -%}{{- '<|im_start|>system\\n' -}}{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}
{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}CONTENTCALLS{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
EACH = "{%- for part in m.content -%}{{- part.text | trim -}}{%- endfor -%}"
CONTENTS = {
    "text": "{{- m.content -}}",
    "either": "{%- if m.content is string -%}{{- m.content | trim -}}{%- else -%}" + EACH + "{%- endif -%}",
    "parts": "{%- for part in m.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}"
             "{%- endfor -%}",
}  # fmt: skip
ARGUMENTS = {
    "an object": "{{- call.arguments | tojson -}}",
    "a text": "{{- call.arguments + '' -}}",
    "either": "{{- call.arguments if call.arguments is string else call.arguments | tojson -}}",
    "as it prints": "{{- call.arguments -}}",  # an object as Python writes it: not to be learned
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "天気",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip


def template(content="text", arguments="either", turns=TURNS):
    calls = CALL.replace("ARGUMENTS", ARGUMENTS[arguments]) if arguments else ""
    return turns.replace("CONTENT", CONTENTS[content]).replace("CALLS", calls)


def tokenizer_of(text):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = text
    chat_turns.find_template("", None, tokenizer, print)
    return tokenizer


def talk(arguments=None, content=None):
    """Two questions, each answered by a call of a tool, and what it said in the user's words."""
    arguments = arguments or {"city": "東京 \"23区\"\n", "days": 3, "snow": True}  # fmt: skip
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "get_weather", "arguments": arguments}
    return [{"role": "user", "content": "東京の天気は?"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "name": "get_weather", "content": "晴れ"},
            {"role": "assistant", "content": "晴れです。"}]  # fmt: skip


def learn(tokenizer, folder, rows):
    return [*TRAIN.make_examples([write_jsonl(folder / "rows.jsonl", rows)], tokenizer, 10**6)]


def answers(example, tokenizer):
    """The stretches of an example that carry loss."""
    found, labels = [], example["labels"]
    for i, label in enumerate(labels):
        if label != -100:
            if i == 0 or labels[i - 1] == -100:
                found.append([])
            found[-1].append(label)
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("form", ["an object", "a text"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("content", ["text", "either"])
def test_calls_of_tools(content, arguments, form, tmp_path):
    """Learned as the template writes them; each prompt is its beginning, in generation, too."""
    text = template(content, arguments)
    tokenizer, turns = tokenizer_of(text), talk()
    inner = turns[1]["tool_calls"][0]["function"]
    written = json.dumps(inner["arguments"], ensure_ascii=False)
    given = copy.deepcopy(turns)
    if form == "a text":
        given[1]["tool_calls"][0]["function"]["arguments"] = written
    (example,) = learn(tokenizer, tmp_path, [{"messages": given, "tools": [TOOL]}])
    call = f'<tool_call>\n{{"name": "get_weather", "arguments": {written}}}\n</tool_call>'
    assert answers(example, tokenizer) == [f"{call}<|im_end|>\n", "晴れです。<|im_end|>\n"]
    for turn in turns:  # by hand, as this template wants it
        turn["content"] = turn["content"] or ""
    if arguments in ("a text", "as it prints"):
        inner["arguments"] = written
    whole = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == whole
    for number in (1, 3):
        row = {"messages": given[:number], "tools": json.dumps([TOOL])}
        asked = ASK.encode_prompt(*chat_turns.plain(row, tokenizer))[1]
        before = tokenizer.apply_chat_template(
            turns[:number], tools=[TOOL], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(asked) == before
        assert asked == example["input_ids"][: len(asked)]
        assert GRPO.prompt_of(*chat_turns.plain(row, tokenizer))[1] == asked
    assert chat_turns.plain({"messages": given}, tokenizer)[0]["messages"][3] == given[3]


# In the manner of a family: its template, its special tokens, what is learned of the call.
FAMILIES = {
    "Llama 3.1": (
        """{{- bos_token -}}
{%- if tools -%}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{%- for t in tools -%}{{- t | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}{{- '<|eot_id|>' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' -}}
{%- elif 'tool_calls' in m -%}
{%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call at once') -}}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' -}}
{{- call.arguments | tojson + '}<|eom_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}""",
        "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>",
        '{"name": "get_weather", "parameters": ARGUMENTS}<|eom_id|>',
    ),
    "Mistral": (
        """{{- bos_token -}}
{%- for m in messages -%}
{%- if loop.first and tools -%}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{%- if m.role == 'tool' -%}{{- '[TOOL_RESULTS]' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' -}}
{%- elif m.tool_calls is defined and m.tool_calls is not none -%}
{{- '[TOOL_CALLS][' -}}{%- for call in m.tool_calls -%}{{- call.function | tojson -}}{%- endfor -%}
{{- ']' + eos_token -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}
{%- else -%}{{- '[INST]' + m.content + '[/INST]' -}}{%- endif -%}{%- endfor -%}""",
        "[INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": ARGUMENTS}]<|endoftext|>',
    ),
    "gpt-oss": (
        """{%- if tools -%}{{- '<|start|>developer<|message|>' -}}
{%- for t in tools -%}{{- 'type ' + t.function.name + ' = (_: any) => any;' -}}{%- endfor -%}
{{- '<|end|>' -}}{%- endif -%}
{%- set ns = namespace(name='') -%}
{%- for m in messages -%}
{%- if m.tool_calls -%}{%- set ns.name = m.tool_calls[0].function.name -%}
{{- '<|start|>assistant to=functions.' + ns.name + '<|channel|>commentary json<|message|>' -}}
{{- m.tool_calls[0].function.arguments | tojson + '<|call|>' -}}
{%- elif m.role == 'tool' -%}
{{- '<|start|>functions.' + ns.name + ' to=assistant<|message|>' + m.content | tojson + '<|end|>' -}}
{%- elif m.role == 'assistant' -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' -}}
{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}""",
        "<|start|> <|message|> <|channel|> <|end|> <|return|> <|call|>",
        " to=functions.get_weather<|channel|>commentary json<|message|>ARGUMENTS<|call|>",
    ),
    "Qwen3-Coder": (
        """{%- if tools -%}{{- '<|im_start|>system\\n' -}}
{%- for t in tools -%}{{- '<name>' + t.function.name + '</name>' -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') -}}
{%- for call in m.tool_calls or [] -%}{{- '<function=' + call.function.name + '>' -}}
{%- for key, value in call.function.arguments | items -%}
{{- '<parameter=' + key + '>' + (value | string) + '</parameter>' -}}{%- endfor -%}{{- '</function>' -}}
{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}""",
        "<|im_start|> <|im_end|>",
        '<function=get_weather><parameter=city>東京 "23区"\n</parameter><parameter=days>3</parameter>'
        "<parameter=snow>True</parameter></function><|im_end|>\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_in_the_manner_of_a_family(name, tmp_path):
    """What is learned of a call, and that each prompt is the beginning of what was learned."""
    text, special, wanted = FAMILIES[name]
    tokenizer = make_tokenizer(bos="bos_token" in text)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special.split()])
    tokenizer.chat_template = text
    turns = talk()
    (example,) = learn(tokenizer, tmp_path, [{"messages": turns, "tools": [TOOL]}])
    arguments = turns[1]["tool_calls"][0]["function"]["arguments"]
    call, last = answers(example, tokenizer)
    assert call == wanted.replace("ARGUMENTS", json.dumps(arguments, ensure_ascii=False))
    assert "晴れです。" in last and "晴れ" in tokenizer.decode(example["input_ids"]).split(call)[1]
    for number, turn in ((1, call), (3, last)):
        row = {"messages": turns[:number], "tools": [TOOL]}
        asked = ASK.encode_prompt(*chat_turns.plain(row, tokenizer))[1]
        assert asked == example["input_ids"][: len(asked)]
        assert tokenizer.decode(example["input_ids"][len(asked) :]).startswith(turn)


REAL = Path(trl.__file__).parent / "chat_templates"  # as their makers published them
# Those of two answers or more would be others' manners; these take no calls, or not ours.
WITHOUT_CALLS = """cohere cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 idefics3 lfm2 llama3 llava_next phi3 phi3_5
    qwen2_5_vl smolvlm"""


def test_calls_in_published_templates(tmp_path):
    """Learned whole or refused: the conversation as the template itself writes it, cut at its answers."""
    done, refused = set(), set()
    for file in sorted(REAL.glob("*.jinja")):
        if file.stem.endswith("_training"):
            continue
        tokenizer = make_tokenizer(bos=True)
        tokenizer.chat_template = file.read_text()
        if file.stem.startswith("nemotron"):  # else what asks for an answer is no beginning of it
            TRAIN.choose_chat_template(None, tokenizer, '{"enable_thinking": false}')
        turns = talk('{"city": "東京", "days": 3}', content="")
        turns[1]["tool_calls"][0]["id"] = turns[2]["tool_call_id"] = "abcdefghi"
        row = {"messages": turns, "tools": [TOOL]}
        try:
            _, examples = TRAIN.format_row(*chat_turns.plain(row, tokenizer))
        except Exception:  # of a template, anything
            refused.add(file.stem)
            continue
        done.add(file.stem)
        learned = [text for pieces in examples for text, is_learned in pieces if is_learned]
        assert len(learned) == 2 and "get_weather" in learned[0] and "東京" in learned[0], file.stem
        assert "晴れです。" in learned[1] and "{'" not in learned[0], (file.stem, learned)
        for number, pieces in zip((1, 3), (examples[0], examples[-1]), strict=True):
            row = {"messages": turns[:number], "tools": [TOOL]}
            asked = ASK.encode_prompt(*chat_turns.plain(row, tokenizer))[1]
            before = pieces[:1] if number == 1 else pieces[:-1]
            assert asked == TRAIN.encode(before, tokenizer)[0], file.stem
    assert len(done) > 15 and refused == set(WITHOUT_CALLS.split()), (done, refused)


def test_templates_with_names(tmp_path):
    """A tokenizer may hold one for tools beside its own."""
    tokenizer, plain = tokenizer_of(template()), tokenizer_of(template())
    tokenizer.chat_template = {"default": "{{ raise_exception('no') }}", "tool_use": template()}
    row = {"messages": talk(), "tools": [TOOL]}
    found, wanted = (TRAIN.format_row(*chat_turns.plain(row, t)) for t in (tokenizer, plain))
    assert found == wanted


def test_what_parquet_fills_up(tmp_path):
    """Names that other rows have: nothing in a tool, but who can say in a call's arguments?"""
    tokenizer, nulls = tokenizer_of(template()), copy.deepcopy(TOOL)
    nulls["function"] |= {"strict": None}
    rows = [{"messages": talk(), "tools": tools} for tools in ([TOOL], [nulls])]
    one, other = learn(tokenizer, tmp_path, rows)
    assert one == other
    rows = [{"messages": talk('{"city": null}')}, {"messages": talk({"city": None})}]
    (example,) = learn(tokenizer, tmp_path, rows[:1])
    assert '{"city": null}' in answers(example, tokenizer)[0]
    with pytest.raises(ValueError, match="an argument of get_weather is null, as Parquet"):
        chat_turns.plain(rows[1], tokenizer)


@pytest.mark.parametrize("content", CONTENTS)
def test_parts(content, tmp_path):
    """One part is a text, several are what the template makes of them; an answer of parts, too."""
    tokenizer = tokenizer_of(template(content, None))
    parts = [
        [{"type": "text", "text": t} for t in texts] for texts in (["空 ", "は?"], ["青", "い"])
    ]
    several = [
        {"role": role, "content": c} for role, c in zip(("user", "assistant"), parts, strict=True)
    ]
    (example,) = learn(tokenizer, tmp_path, [{"messages": several}])
    assert answers(example, tokenizer) == ["青い<|im_end|>\n"]
    assert "user\n空 は?<|im_end|>" in tokenizer.decode(example["input_ids"])
    texts = [{"role": "user", "content": "空は?"}, {"role": "assistant", "content": "青い"}]
    single = [
        {**turn, "content": [{"type": "text", "text": turn["content"], "image": None}]}
        for turn in texts
    ]
    rows = [{"messages": texts}, {"messages": single}]
    one, other = learn(tokenizer, tmp_path, rows)
    assert one == other and answers(one, tokenizer) == ["青い<|im_end|>\n"]
    asked = [
        ASK.encode_prompt(*chat_turns.plain({"messages": turns[:1]}, tokenizer))
        for turns in (texts, single)
    ]
    assert asked[0] == asked[1] and asked[0][1] == one["input_ids"][: len(asked[0][1])]
    pair = {
        "prompt": single[:1],
        "chosen": single[1:],
        "rejected": [{"role": "assistant", "content": "赤"}],
    }
    file = write_jsonl(tmp_path / "pairs.jsonl", [pair])
    (both,) = DPO.make_examples([file], tokenizer, 10**6)
    assert answers(both, tokenizer) == ["青い<|im_end|>\n", "赤<|im_end|>\n"]
    assert both["input_ids"][: len(one["input_ids"])] == one["input_ids"]


def test_a_template_of_parts_is_saved_for_both(tmp_path):
    """What other programs give it, texts or parts, comes out the same."""
    tokenizer = tokenizer_of(template("parts", None))
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    found = {loaded.apply_chat_template([{"role": "user", "content": c}], tokenize=False)
             for c in ("空", [{"type": "text", "text": "空"}])}  # fmt: skip
    assert found == {"<|im_start|>user\n空<|im_end|>\n"}


def test_the_processors_template(tmp_path):
    """Of a model that sees it may stand in chat_template.json alone."""
    text = template("parts", None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    tokenizer, said = make_tokenizer(), []
    TRAIN.choose_chat_template(None, tokenizer)
    chat_turns.find_template(str(tmp_path), None, tokenizer, lambda *words: said.append(words))
    assert said == [("template", str(tmp_path / "chat_template.json"))]
    assert tokenizer.chat_template == chat_turns.AS_PARTS + text
    (tmp_path / "none").mkdir()
    other = make_tokenizer()
    TRAIN.choose_chat_template(None, other)
    ours = other.chat_template
    for place, asked in ((tmp_path / "none", None), (tmp_path, "alpaca")):
        chat_turns.find_template(str(place), asked, other, print)
        assert other.chat_template == ours


# Writes a call only where the content is none, which transformers takes out of every turn.
DEEPSEEK = """{{- bos_token -}}
{%- for t in tools or [] -%}{{- t | tojson + '\\n' -}}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|User|>' + m.content -}}
{%- elif m.role == 'tool' -%}{{- '<|out|>' + m.content + '<|/out|>' -}}
{%- elif m.content is none -%}
{{- '<|Assistant|><|call|>' + m.tool_calls[0].function.name + '\\n```json\\n' -}}
{{- m.tool_calls[0].function.arguments + '\\n```<|/call|>' + eos_token -}}
{%- else -%}{{- '<|Assistant|>' + m.content + eos_token -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|>' -}}{%- endif -%}"""
TWICE = "{{- call.arguments | tojson if call.arguments is string else raise_exception('no') -}}"
LEFT_OUT = {
    "a text within a text": (
        template().replace(ARGUMENTS["either"], TWICE),
        {"messages": talk()},
        "leaves out calls of tools, or their arguments",
    ),
    "DeepSeek": (DEEPSEEK, {"messages": talk(), "tools": [TOOL]}, "leaves out calls of tools"),
    "calls": (template(arguments=None), {"messages": talk()}, "leaves out calls of tools"),
    "one argument": (
        template().replace(ARGUMENTS["either"], "{{- '{}' -}}"),
        {"messages": talk()},
        "leaves out calls of tools, or their arguments",
    ),
    "tools": (
        template(turns=TURNS.replace("if tools", "if false")),
        {"messages": talk()[:1] + talk()[3:], "tools": [TOOL]},
        "leaves out 'get_weather'",
    ),
    "tools beside text": (template(), {"prompt": "a", "completion": "b", "tools": [TOOL]}, "tools would be left"),
    "what a tool said": (
        "{%- for m in messages -%}{%- if m.role != 'tool' -%}{{- m.content -}}"
        + CALL.replace("ARGUMENTS", ARGUMENTS["either"]) + "{{- '<|im_end|>' -}}{%- endif -%}{%- endfor -%}",
        {"messages": talk()},
        "leaves out '晴れ' of what tools said",
    ),
    "an image": (
        template("parts"),
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        "parts must be text",
    ),
    "an image beside text": (
        template("either"),
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
        "parts must be text",
    ),
    "an image with a text": (
        template("either"),
        {"messages": [{"role": "user", "content": [{"type": "image", "text": "a cat", "image": "a.png"}]}]},
        "parts must be text",
    ),
    "what is said beside a call": (
        template().replace("{{- m.content -}}", "{{- m.content if not m.tool_calls else '' -}}"),
        {"messages": talk(content="CCC")},
        "leaves out 'CCC' of what is said beside calls",
    ),
    "one argument, whose value the tool names": (
        template().replace(ARGUMENTS["either"], "{{- call.arguments | tojson | replace('fast', '...') -}}"),
        {"messages": talk('{"mode": "fast"}'), "tools": [TOOL, {"name": "fast"}]},
        "leaves out 'fast' of calls",
    ),
    "an argument without JSON": (template(), {"messages": talk("{'city': 'x'}")}, "are no JSON: {'city'"),
    "a tool without a name": (template(), {"messages": talk(), "tools": [{"type": "search"}]}, "one has no name"),
    "no turns": (template(), {"messages": "a", "tools": [TOOL]}, "tools would be left out"),
    "tools that are none": (template(), {"messages": talk(), "tools": "get_weather"}, "Expecting value"),
    "calls that are none": (
        template(),
        {"messages": [*talk()[:1], {"role": "assistant", "tool_calls": 3}]},
        "row 1: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_refused(case, tmp_path, capsys):
    text, row, words = LEFT_OUT[case]
    tokenizer = tokenizer_of(text)
    with pytest.raises(SystemExit) as stop:
        learn(tokenizer, tmp_path, [row])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    with pytest.raises(Exception) as raised:  # generation ends in the same way
        ASK.encode_prompt(*chat_turns.plain(row, tokenizer))
    assert case == "no turns" or words.removeprefix("row 1: ") in str(raised.value)


def test_alone_they_are_refused(tmp_path, capsys, monkeypatch):
    """Without `jobs` nothing is rendered, and nothing is left out silently."""
    monkeypatch.setattr(TRAIN, "keep_run", None)
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
    ]
    for row in (
        {"messages": talk()},
        {"messages": talk()[3:], "tools": [TOOL]},
        {"messages": parts},
    ):
        with pytest.raises(SystemExit):
            learn(tokenizer_of(template()), tmp_path, [row])
        assert "row 1: " in capsys.readouterr().err
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = template("parts", None)  # as it is, an answer would be lost
    with pytest.raises(SystemExit):
        learn(tokenizer, tmp_path, [{"messages": [{"role": "user", "content": "a"}, talk()[3]]}])
    assert "no token to stop at" in capsys.readouterr().err
