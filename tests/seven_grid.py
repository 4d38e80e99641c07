"""The grid of methods and models for matrix.py: an independent calculation in each cell.

A cell is "ok", the script's own refusal, or what is wrong. No function of the project computes what
is compared with.
"""

import contextlib
import io
import json

import seven_models
import torch
from conftest import ROOT, ROWS, load_script, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW = "<新>,<語>"
ONCE = ["--learning_rate", 0, "--max_steps", -1, "--num_train_epochs", 1]
MESSAGES = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in ROWS[:3]]


def call(script, *words):
    """Run a script's main(); return (stdout, its line of error or "")."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            load_script(ROOT / script).main([str(word) for word in words])
        except SystemExit as stop:
            return out.getvalue(), err.getvalue().strip().splitlines()[-1] if stop.code else ""
    return out.getvalue(), ""


def train(script, model, folder, *more, rows=ROWS):
    """One training of three steps with weight decay; returns (directory, error)."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_jsonl(folder / "train.jsonl", rows)
    out = folder / "out"
    words = ["--model_name_or_path", model, "--train_file", data, "--output_dir", out,
             "--learning_rate", 1e-2, "--weight_decay", 0.1, "--max_steps", 3,
             "--per_device_train_batch_size", 3, "--logging_steps", 1,
             "--save_strategy", "no", *more]  # fmt: skip
    _, error = call(f"finetune_{script}/finetune_{script}.py", *words)
    return out, error


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def prompt_ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


@torch.no_grad()
def token_mean(model, tokenizer, rows=ROWS, limit=128):
    """Mean loss over the answers' tokens, one example at a time."""
    total, count = 0.0, 0
    for row in rows:
        prompt = prompt_ids(tokenizer, row["prompt"])
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, tokenizer.eos_token_id][:limit]
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        wanted, first = torch.tensor(ids[1:]), max(len(prompt), 1)
        losses = torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none")
        total, count = total + losses[first - 1 :].sum().item(), count + len(ids) - first
    return total / count


@torch.no_grad()
def greedy(model, ids, count, stops):
    """Token by token, without a cache."""
    ids = list(ids)
    new = []
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return new


# ---- The cells: each returns "" where all is well ----


def as_published(model, folder, _):
    """The repository as it is: its tokenizer is exact, or refused with the command for it."""
    return train("full", model, folder)[1]


GENERATE = "generate_text/generate_text.py"


def generate(model, folder, original):
    """Single prompts: the text of an independent greedy loop."""
    tokenizer, net = AutoTokenizer.from_pretrained(model), load(model)
    ends = net.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, net.config.eos_token_id}
    stops.update(ends if isinstance(ends, list) else [ends])
    stops.add(tokenizer.get_vocab().get("### End"))
    for row in ROWS[:3]:
        words = ["--model_name_or_path", model, "--prompt", row["prompt"], "--max_new_tokens", 8]
        out, error = call(GENERATE, *words)
        answer = greedy(net, prompt_ids(tokenizer, row["prompt"]), 8, stops)
        wanted = tokenizer.decode(answer, skip_special_tokens=True)
        if error or out.rstrip("\n") != wanted.rstrip("\n"):
            return error or f"{out!r} instead of {wanted!r}"
    return ""


def batched(model, folder, original, rows=ROWS):
    """A file of prompts in batches gives what it gives one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    data, texts = write_jsonl(folder / "prompts.jsonl", rows), []
    for size in (1, 4):
        out = folder / f"by{size}.jsonl"
        words = ["--model_name_or_path", model, "--prompt_file", data, "--output_file", out]
        _, error = call(GENERATE, *words, "--max_new_tokens", 8, "--batch_size", size)
        if error:
            return error
        lines = out.read_text().splitlines()
        texts.append([json.loads(line)["generated_text"] for line in lines])
    return "" if texts[0] == texts[1] else f"{texts[0]} one by one, {texts[1]} batched"


def chat(model, folder, original):
    return batched(model, folder, original, MESSAGES)


def full(model, folder, original):
    """train_loss at learning rate 0 is the mean over tokens.

    At another rate every weight moves, and fp32 is saved.
    """
    out, error = train("full", model, folder / "zero", *ONCE)
    if error:
        return error
    found, wanted = train_loss(out), token_mean(load(model), tokens(out))
    if abs(found - wanted) > 1e-4:
        return f"loss {found} instead of {wanted}"
    out, error = train("full", model, folder / "moved")
    before, after = load(model).state_dict(), load(out).state_dict()
    still = [name for name in after if torch.equal(before[name], after[name])]
    kinds = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    if error or still or kinds != {torch.float32}:
        return error or f"did not move: {still[:3]}; saved as {kinds}"
    is_cached = json.loads((out / "config.json").read_text())["use_cache"]
    return "" if is_cached else "use_cache false was saved"


def train_loss(directory):
    return json.loads((directory / "all_results.json").read_text())["train_loss"]


def tokens(directory):
    return AutoTokenizer.from_pretrained(directory)


def resume(model, folder, original):
    """Six steps, and three that go on for three: bit-identical weights."""
    steps = ["--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3]
    whole, error = train("full", model, folder / "whole", *steps)
    checkpoint = whole / "checkpoint-3"
    half, other = train(
        "full", model, folder / "half", *steps, "--resume_from_checkpoint", checkpoint
    )
    if error or other:
        return error or other
    one, two = (load_file(out / "model.safetensors") for out in (whole, half))
    is_same = all(torch.equal(one[name], two[name]) for name in one)
    return "" if is_same else "the resumed run ends elsewhere"


def part(choice):
    def cell(model, folder, original):
        """What --train names has moved, and nothing else."""
        out, error = train("lastlayer", model, folder, "--train", choice)
        if error:
            return error
        before, after = load(model), load(out)
        old, new = dict(before.named_parameters()), dict(after.named_parameters())
        head, embedding = names_of_ends(after)
        old.setdefault(head, old.get(embedding))
        new.setdefault(head, new.get(embedding))
        last = {n for n in new if ".1." in n}  # the second of two blocks
        expected = {"last_layer": {head}, "input_output": {head, embedding},
                    "last_block": {head} | last | final_norm(after)}[choice]  # fmt: skip
        moved = {n for n in new if not torch.equal(old[n], new[n])}
        return "" if moved == expected else f"moved {sorted(moved ^ expected)[:4]}, not as named"

    return cell


def names_of_ends(model):
    """The names of the head's weight and of the input embedding's."""
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return names[model.get_output_embeddings()], names[model.get_input_embeddings()]


def new_tokens(model, folder, original):
    """The rows of the new tokens have moved, apart from each other, and nothing else has."""
    source, error = add_tokens(model, folder / "with_tokens")
    both, (first, _) = NEW.replace(",", ""), NEW.split(",")
    rows = [{"prompt": row["prompt"] + both, "completion": row["completion"] + first}
            for row in ROWS]  # fmt: skip
    more = ["--train", "new_tokens", "--new_tokens", NEW, "--weight_decay", 0]
    out, other = train("lastlayer", source, folder, *more, rows=rows)
    if error or other:
        return error or other
    before, start, after = load(model), load(source), load(out)
    ids, ends = tokens(out).convert_tokens_to_ids(NEW.split(",")), names_of_ends(after)
    for name, now in after.named_parameters():
        old, first = before.get_parameter(name), start.get_parameter(name)
        # Spare rows of the model are used before it grows.
        kept = [row for row in range(len(old)) if name not in ends or row not in ids]
        if not torch.equal(now[kept], old[kept]):
            return f"{name} has moved"
        if name in ends and ((now[ids] == first[ids]).any() or torch.equal(*now[ids])):
            return f"the new rows of {name} have not moved, or are the same"
    return ""


def add_tokens(model, directory):
    """A copy of the model with the tokens of NEW, by the step that adds them; (path, error)."""
    words = ["--model_name_or_path", model, "--new_tokens", NEW, "--output_dir", directory]
    return str(directory), call("finetune_lastlayer/add_tokens.py", *words)[1]


def final_norm(model):
    """Parameters of the norm behind the last block: all but blocks, embeddings and head."""
    skip = (*(f".{block}." for block in range(9)), "embed", "wte", "wpe", "lm_head")
    return {n for n, _ in model.named_parameters() if not any(part in n for part in skip)}


def lora(*more):
    def cell(model, folder, original):
        """At rate 0 the base's own loss (if it is not quantised); then every matrix has moved."""
        if not more:
            out, error = train("lora", model, folder / "zero", *ONCE)
            if error:
                return error
            found, wanted = train_loss(out), token_mean(load(model), tokens(out))
            if abs(found - wanted) > 1e-4:
                return f"loss {found} instead of {wanted}"
        out, error = train("lora", model, folder / "moved", *more)
        if error:
            return error
        adapter = load_file(out / "adapter_model.safetensors")
        zero = [name for name, tensor in adapter.items() if not tensor.any()]
        kinds = ("Linear", "Conv1D", "FalconLinear")
        linear = [m for m in load(model).modules() if type(m).__name__ in kinds]
        if zero or len(adapter) != 2 * (len(linear) - 1):  # all but the head
            return f"{len(adapter)} matrices for {len(linear) - 1} layers; still zero: {zero[:3]}"
        return ""

    return cell


def merge(model, folder, original):
    """Logits of the merged model against base + B A, computed from the files."""
    out, error = train("lora", model, folder, "--learning_rate", 0.1)
    if error:
        return error
    words = ["--adapter_name_or_path", out, "--output_dir", folder / "merged", "--dtype", "fp32"]
    _, error = call("finetune_lora/merge_lora.py", *words)
    if error:
        return error
    config = json.loads((out / "adapter_config.json").read_text())
    adapter, scale = (
        load_file(out / "adapter_model.safetensors"),
        config["lora_alpha"] / config["r"],
    )
    base, ids = load(model), torch.tensor([[5, 9, 20, 7, 30, 11]])
    with torch.no_grad():
        plain = base(input_ids=ids, use_cache=False).logits
        for name in [name for name in adapter if ".lora_A" in name]:
            place = name.removeprefix("base_model.model.").split(".lora_A")[0]
            change = adapter[name.replace("lora_A", "lora_B")] @ adapter[name] * scale
            module = base.get_submodule(place)
            module.weight += change.T if type(module).__name__ == "Conv1D" else change
        wanted = base(input_ids=ids, use_cache=False).logits
        found = load(folder / "merged")(input_ids=ids, use_cache=False).logits
    apart, change = (wanted - found).abs().max().item(), (wanted - plain).abs().max().item()
    is_good = apart < 1e-5 and change > 1e-2
    return "" if is_good else f"logits differ by {apart:.1e}, the adapter changes {change:.1e}"


METHODS = {
    "as published": as_published, "generate": generate, "batched": batched, "chat": chat,
    "full": full, "resume": resume, "last layer": part("last_layer"),
    "last block": part("last_block"), "input+output": part("input_output"),
    "new tokens": new_tokens, "LoRA": lora(), "LoRA 8 bit": lora("--load_in_8bit", "true"),
    "LoRA 4 bit": lora("--load_in_4bit", "true"), "merge": merge,
}  # fmt: skip


# What is refused on purpose, by these words, or the cell is wrong. With what that command writes
# all is well.
REFUSED = {("japanese-gpt-neox-3.6b", "as published"): "convert_tokenizer.py"}
ZERO = {"ZeRO-2": "zero2", "ZeRO-3": "zero3"}


def seven(folder, wanted):
    """{model: {method: text}}; the texts are "ok", "refused", or what is wrong."""
    table = {}
    for name in seven_models.NAMES:
        methods = [method for method in [*METHODS, *ZERO] if wanted(f"{name} {method}")]
        if not methods:
            continue
        original = model = seven_models.make(name, folder / name / "published")
        if name == "japanese-gpt-neox-3.6b":  # lossy as it is: what the table of models says to do
            model = str(folder / name / "converted")
            words = ["--model_name_or_path", original, "--output_dir", model]
            call("generate_text/convert_tokenizer.py", *words)
        table[name] = dict.fromkeys(methods, "")
        (folder / "models").mkdir(exist_ok=True)
        (folder / "models" / name).symlink_to(model)
        for method in filter(METHODS.get, methods):
            used, place = original if method == "as published" else model, method.replace(" ", "_")
            try:
                text = METHODS[method](used, folder / name / place, original) or "ok"
            except Exception as error:  # a cell must not end the grid
                text = f"{type(error).__name__}: {error}"
            if words := REFUSED.get((name, method)):
                text = "refused" if words in text else f"not refused: {text}"
            table[name][method] = text
            print(f"{name}, {method}: {text}", flush=True)
    zero(folder, table)
    return table


def zero(folder, table):
    """Fill in the columns of DeepSpeed: full fine-tuning, compared as in matrix.py's own grid."""
    import matrix

    write_jsonl(folder / "train.jsonl", ROWS)
    short = ["--max_length", 64]
    for method, config in ZERO.items():
        pairs = {}
        for name in [name for name, row in table.items() if method in row]:
            pairs[name] = matrix.together(folder, config, "finetune_full", name, short)
        runs = [run for _, pair in pairs.values() for run in pair]
        errors = matrix.launch(runs, folder / config) if runs else []
        for i, (name, (out, _)) in enumerate(pairs.items()):
            reference = matrix.alone(folder, "finetune_full", name, short)
            table[name][method] = matrix.check(errors[2 * i : 2 * i + 2], out, reference)
            print(f"{name}, {method}: {table[name][method]}", flush=True)
