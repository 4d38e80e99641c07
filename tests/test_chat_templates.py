"""The chat templates write what they always wrote, with BOS where the tokenizer adds it."""

import itertools
from types import SimpleNamespace

import pytest
from conftest import CONFIGS, ROOT, load_script, make_tokenizer
from jinja2 import Environment
from transformers import AddedToken, AutoTokenizer

# The templates as they stood in the scripts, each on one line: what was trained with them goes on.
REFERENCE = {
    "alpaca": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '### 応答:\n' + m.content + eos_token + '\n' }}"
    "{% else %}{{ '### ' + ('指示' if m.role == 'user' else m.role) + ':\n' + m.content + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### 応答:\n' }}{% endif %}",
    "dolly": "{{ 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.' }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '### Response:\n' + m.content }}{{ '\n\n### End' }}{% else %}"
    "{{ '\n\n### Instruction:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    "rinna": "{% for m in messages %}{% set text = m.content | replace('\n', '<NL>') %}"
    "{% if m.role == 'assistant' %}{{ 'システム: ' + text + eos_token + '<NL>' }}{% else %}"
    "{{ 'ユーザー: ' + text + '<NL>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'システム: ' }}{% endif %}",
}
CONTENTS = ["一\n行\n", " 空 ", "{{ x }}{# y #}", "", "\n\n<s>"]
ROLES = [roles for length in (1, 2, 3, 4) for roles in
         itertools.product(("user", "assistant", "system"), repeat=length)]  # fmt: skip
INTRO = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
EOS = "<|endoftext|>"
# By hand: the beginning, one's turn before an answer, an answer's beginning and its end.
FORMS = {
    "alpaca": ("", "### 指示:\n{}\n\n", "### 応答:\n", "{}" + EOS + "\n"),
    "dolly": (INTRO, "\n\n### Instruction:\n{}\n\n", "### Response:\n", "{}\n\n### End"),
    "rinna": ("", "ユーザー: {}<NL>", "システム: ", "{}" + EOS + "<NL>"),
}
CONVERSATIONS = [
    [("user", "富士山の高さは?"), ("assistant", "3776m です。")],
    [("user", "一\n行"), ("assistant", "二\n行"), ("user", "三"), ("assistant", "四")],
    [("system", "短く。"), ("user", "空"), ("assistant", "青い")],
]


@pytest.fixture(scope="module")
def script():
    return load_script(ROOT / "finetune_full" / "finetune_full.py")


def template(script, name):
    if name == "alpaca":
        return script.CHAT_TEMPLATE
    return (ROOT / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def conversations():
    for roles in ROLES:
        pairs = zip(roles, CONTENTS, strict=False)
        yield [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("name", REFERENCE)
def test_same_text_as_before(name, script, tmp_path):
    """Every order of roles, by transformers and by plain Jinja, also after saving and loading."""
    text = template(script, name)
    assert len(text.splitlines()) > 8  # to be read by people
    old, new = make_tokenizer(), make_tokenizer()
    old.chat_template, new.chat_template = REFERENCE[name], text
    new.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    plain = [Environment().from_string(template) for template in (REFERENCE[name], text)]
    for messages, end in itertools.product(conversations(), (False, True)):
        arguments = {"tokenize": False, "add_generation_prompt": end}
        wanted = old.apply_chat_template(messages, **arguments)
        assert new.apply_chat_template(messages, **arguments) == wanted
        assert loaded.apply_chat_template(messages, **arguments) == wanted
        values = {"messages": messages, "add_generation_prompt": end, "eos_token": EOS}
        assert plain[0].render(values) == plain[1].render(values) == wanted


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{bos: directory} of a tokenizer and a configuration; `### End` is a token, as in Dolly's."""
    made = {}
    for bos in (False, True):
        made[bos] = tmp_path_factory.mktemp("tokenizer")
        tokenizer = make_tokenizer(bos)
        tokenizer.add_tokens([AddedToken("### End", special=True)])
        tokenizer.save_pretrained(made[bos])
        CONFIGS["llama"](len(tokenizer)).save_pretrained(made[bos])
    return made


def load_tokenizer(script, model, chat_template):
    arguments = {
        "chat_template": chat_template,
        "max_length": None,
        "trust_remote_code": False,
        "chat_template_kwargs": "{}",
    }
    found = script.load_tokenizer(SimpleNamespace(model_name_or_path=str(model), **arguments))
    return found[0]


def written(name, conversation):
    """A conversation as [(text, learned)], by hand."""
    first, before, begin, answer = FORMS[name]
    pieces, prompt = [], first
    for role, content in conversation:
        content = content.replace("\n", "<NL>") if name == "rinna" else content
        if role == "assistant":
            pieces += [(prompt + begin, False), (answer.format(content), True)]
            prompt = ""
        else:
            turn = before.format(content)
            is_named = role == "system" and name == "alpaca"
            prompt += turn.replace("指示", "system") if is_named else turn
    return pieces


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_same_ids_as_before(name, bos, script, models, tmp_path):
    """Prompts and answers tokenized apart, BOS once in front: a template may write it itself."""
    own = tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}" * bos + template(script, name), encoding="utf-8")
    given = "alpaca" if name == "alpaca" else str(ROOT / "chat_templates" / f"{name}.jinja")
    for choice in [given, str(own)] + [None] * (name == "alpaca"):
        tokenizer = load_tokenizer(script, models[bos], choice)
        for conversation in CONVERSATIONS:
            ids, labels = [1] * bos, [-100] * bos
            for text, learned in written(name, conversation):
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += new
                labels += new if learned else [-100] * len(new)
            messages = [{"role": role, "content": text} for role, text in conversation]
            (pieces,) = script.chat_pieces(messages=messages, tokenizer=tokenizer)
            assert script.encode(pieces=pieces, tokenizer=tokenizer) == (ids, labels)
            # The prompt of the first answer, as generation asks for it.
            prompt = messages[: 1 + (messages[0]["role"] == "system")]
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            begin = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert begin == ids[: len(begin)]
            assert labels[len(begin)] != -100 == labels[len(begin) - 1]
