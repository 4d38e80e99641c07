"""Texts as token ids: marked copies of what the training scripts hold.

finetune_dpo.py and finetune_grpo.py import this file: the ids there are those of finetune_full.py.
"""

import json
import re
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from run_common import check, fail
from sentencepiece import SentencePieceProcessor

# Copied from finetune_full/finetune_full.py
CHAT_TEMPLATE = r"""
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '### 応答:\n' + message.content + eos_token + '\n' }}
    {%- else %}
        {{- '### ' + ('指示' if message.role == 'user' else message.role) + ':\n' }}
        {{- message.content + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### 応答:\n' }}
{%- endif %}
"""


# Copied from finetune_full/finetune_full.py
EMPTY_THOUGHT = r"(<think>|<\|channel>thought)\s*(</think>|<channel\|>)\s*$"


# Copied from finetune_full/finetune_full.py
def texts(row, *columns):
    """The texts in these columns of a row, or of a message."""
    for column in columns:
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise ValueError(f"{'+'.join(columns)} must hold text, found {str(row)[:60]}.")
    return [row[column] for column in columns]


# Copied from finetune_full/finetune_full.py
def chat_pieces(messages, tokenizer):
    """A conversation as pieces: what stands before each assistant's turn, and the turn.

    Where a template rewrites earlier turns (Qwen3's drops their thoughts), the next answer begins
    an example of its own, with the prompt that generation will give.
    """
    examples, done, render = [[]], "", tokenizer.apply_chat_template
    for number, message in enumerate(messages):
        (role, content), answer = texts(message, "role", "content"), ""
        if role == "assistant":
            if number:
                before = render(messages[:number], tokenize=False, add_generation_prompt=True)
            else:  # a conversation may begin with an answer
                before = render([{**message, "content": "\0"}], tokenize=False).split("\0")[0]
            after = render(messages[: number + 1], tokenize=False)
            # What asks may end in an empty thought, without which the answer is written (Nemotron).
            thought = not after.startswith(before) and re.search(EMPTY_THOUGHT, before)
            start = before[: thought.start()] if thought else before
            answer = after[len(start) :]
            if not after.startswith(start) or (thought and answer.startswith(thought[1])):
                raise ValueError("the template rewrites its prompts. Edit it (--chat_template).")
            if not before.startswith(done):
                examples, done = [*examples, []], ""
            examples[-1] += [(before[len(done) :], False), (answer, content != "")]
            done = before + answer
        for name, value in message.items():  # a template may write an answer's thoughts, say
            is_used = isinstance(value, str) and value.strip() in answer
            if name not in ("role", "content") and value not in (None, "", [], {}) and not is_used:
                raise ValueError(f"a turn is role and content: its {name} would be left out.")
    return examples


# Copied from finetune_full/finetune_full.py
def leading_ids(tokenizer):
    """The ids (a BOS, or none) that this tokenizer puts before every text."""
    text, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return ids[: ids.index(text[0])]


# Copied from finetune_full/finetune_full.py
def encode(pieces, tokenizer, first=None):
    """Return (ids, labels) of pieces, with BOS once in front where the tokenizer adds it."""
    first = leading_ids(tokenizer) if first is None else first
    # Each piece is tokenized apart, so that a prompt has the same ids in generation.
    ids, labels, texts = [], [], [text for text, _ in pieces]
    "".join(texts).encode()  # raises on half a surrogate pair, which JSON can write
    found = texts and tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for (_, learned), new in zip(pieces, found, strict=True):
        if not ids and new[: len(first)] != first:
            ids, labels = list(first), [-100] * len(first)
        ids += new
        labels += new if learned else [-100] * len(new)
    return ids, labels


# Copied from finetune_full/finetune_full.py
def choose_chat_template(name, tokenizer, values="{}"):
    """Set the template named, or ours where the tokenizer has none, with BOS where it adds one."""
    what, is_known = f"--chat_template {name}", name in (None, "alpaca")
    try:
        if name is not None or tokenizer.chat_template is None:
            template = CHAT_TEMPLATE if is_known else Path(name).read_text("utf-8-sig")
            tokenizer.chat_template, first = template, leading_ids(tokenizer)
            text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
            if tokenizer(text, add_special_tokens=False)["input_ids"][: len(first)] != first:
                tokenizer.chat_template = "{{ bos_token }}" + template
        what = f"--chat_template_kwargs {values}"
        for key, value in json.loads(values).items():  # in the template: generation has them, too
            text = tokenizer.get_chat_template()  # not ns.KEY, nor namespace(KEY=true)
            check(re.search(rf"[^.\w]{key}\b(?!\s*=[^=])", text), f"{what}: not in the template.")
            default = f"{{% if {key} is not defined %}}{{% set {key} = {value!r} %}}{{% endif %}}"
            tokenizer.chat_template = default + "{{ '' }}" + text
    except Exception as error:  # a template can raise anything
        fail(f"{what}: {error!r}. Two ready templates lie in ../chat_templates.")


# Copied from finetune_full/finetune_full.py
def turn_end_id(tokenizer):
    """The special token that ends an assistant's turn in the chat template, or None."""
    turns, text = [{"role": r, "content": "yes!"} for r in ("user", "assistant")], ""
    with suppress(Exception):  # a template may not take these turns, and rows may need none
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text.rpartition("yes!")[2], add_special_tokens=False)["input_ids"]
    # all_special_ids has only those with a role, such as eos_token; Gemma's <end_of_turn> has none.
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids)
    return next((i for i in reversed(ids) if i in special and text.count("yes!") == 2), None)


# Copied from finetune_full/finetune_full.py
def exact_tokenizer(name, rows, say, grown=False, **remote):
    """The tokenizer with the ids of the model's own file, which AutoTokenizer may not give."""
    from transformers.models.auto import tokenization_auto as auto

    off = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    names, off = ("tokenizer.json", "spiece.model", "tokenizer.model"), dict.fromkeys(off, False)
    exact, *models = (auto.cached_file(name, file, **off) for file in names)
    text, wanted, plain = "", [], {"add_special_tokens": False, "verbose": False}
    if file := exact or next(filter(None, models), None):  # compared on a text of its own pieces
        own = auto.TokenizersBackend(tokenizer_file=file) if exact else SentencePieceProcessor(file)
        text = "It's WE'LL 1234567  e\u0301ＡＢ鬱😀\n\n\n\tｱ" + own.decode([*range(0, len(own), 7)])
        wanted = own.encode(text, **(plain if exact else {}))
    for load in (auto.AutoTokenizer, auto.TokenizersBackend)[: 2 if exact else 1]:
        with suppress(TypeError if exact else ()):  # a class may not even take in the file
            tokenizer = load.from_pretrained(name, **remote)
            if same := tokenizer(text, **plain)["input_ids"] == wanted:
                break
    command = f"python ../generate_text/convert_tokenizer.py --model_name_or_path {name}"
    remedy = f"Convert it once: {command} --output_dir NEW, and use NEW."
    check(same, f"the tokenizer of {name} gives other ids than {file} itself. {remedy}")
    if load is auto.TokenizersBackend:
        say("tokenizer", f"PreTrainedTokenizerFast.from_pretrained({name!r}), not AutoTokenizer")
    last, given = max(tokenizer.get_vocab().values()), auto.get_tokenizer_config(name)
    past = f"{name}'s tokenizer gives ids up to {last}, past the end of the embedding's {rows} rows"
    check(last < max(rows, grown * len(tokenizer)), f"{past}. {remedy}")
    # transformers 4 put BOS before a text where a Llama tokenizer does not say; 5 does not.
    asked = given.get("add_bos_token", not exact and "Llama" in str(given.get("tokenizer_class")))
    has = not asked or leading_ids(tokenizer) == [tokenizer.bos_token_id]
    check(has, f"the tokenizer of {name} gives no BOS, which its files ask for. {remedy}")
    return tokenizer


def start_of_answer(tokenizer, ids):
    """Where an answer's text begins: behind what the template writes before it, as gpt-oss's does.

    Thoughts that the model wrote before are left out with it.
    """
    opening = opening_of(tokenizer, str(tokenizer.chat_template))
    places = [k for k in range(len(ids)) if opening and ids[k : k + len(opening)] == opening]
    return places[-1] + len(opening) if places else 0


@cache
def opening_of(tokenizer, _template):
    """The ids between a prompt and its answer, where special tokens are among them; else none."""
    turns, ids = [{"role": role, "content": "yes!"} for role in ("user", "assistant")], []
    with suppress(Exception):  # a template may not take these turns
        render = partial(tokenizer.apply_chat_template, tokenize=False)
        before, after = render(turns[:1], add_generation_prompt=True), render(turns)
        text = after.removeprefix(before).partition("yes!")[0] if after.startswith(before) else ""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids if added & {*ids} else []
