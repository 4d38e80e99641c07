"""The grid of methods and models for matrix.py: each cell compares a run with an independent calculation.

A cell is "ok", the script's own refusal, or what is wrong. No function of the project computes what is compared with.
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
    words = ["--model_name_or_path", model, "--train_file", data, "--output_dir", out, "--learning_rate", 1e-2,
             "--weight_decay", 0.1, "--max_steps", 3, "--per_device_train_batch_size", 3, "--logging_steps", 1,
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
        ids = prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = ids[:limit]
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        total, count = total + losses[max(len(prompt), 1) - 1 :].sum().item(), count + len(ids) - max(len(prompt), 1)
    return total / count


@torch.no_grad()
def greedy(model, ids, count, stops):
    """Token by token, without a cache."""
    ids = list(ids)
    new = []
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return new


# ---- The cells: each returns "" where all is well ----


def as_published(model, folder, _):
    """The repository as it is: its tokenizer is exact, or refused with the command that repairs it."""
    return train("full", model, folder)[1]


def generate(model, folder, original):
    """Single prompts: the text of an independent greedy loop."""
    tokenizer, net = AutoTokenizer.from_pretrained(model), load(model)
    for row in ROWS[:3]:
        out, error = call("generate_text/generate_text.py", "--model_name_or_path", model, "--prompt", row["prompt"],
                          "--max_new_tokens", 8)  # fmt: skip
        stops = {tokenizer.eos_token_id, net.config.eos_token_id, *stop_ids(net, tokenizer)}
        wanted = tokenizer.decode(greedy(net, prompt_ids(tokenizer, row["prompt"]), 8, stops), skip_special_tokens=True)
        if error or out.rstrip("\n") != wanted.rstrip("\n"):
            return error or f"{out!r} instead of {wanted!r}"
    return ""


def stop_ids(net, tokenizer):
    ends = net.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {*ends, *(tokenizer.convert_tokens_to_ids([t for t in ("### End",) if t in tokenizer.get_vocab()]))} - {None}


def batched(model, folder, original, rows=ROWS):
    """A file of prompts in batches gives what it gives one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    data, texts = write_jsonl(folder / "prompts.jsonl", rows), []
    for size in (1, 4):
        out = folder / f"by{size}.jsonl"
        _, error = call("generate_text/generate_text.py", "--model_name_or_path", model, "--prompt_file", data,
                        "--output_file", out, "--max_new_tokens", 8, "--batch_size", size)  # fmt: skip
        if error:
            return error
        texts.append([json.loads(line)["generated_text"] for line in out.read_text().splitlines()])
    return "" if texts[0] == texts[1] else f"{texts[0]} one by one, {texts[1]} batched"


def chat(model, folder, original):
    return batched(model, folder, original, MESSAGES)


def full(model, folder, original):
    """train_loss at learning rate 0 is the mean over tokens; at another rate every weight moves, and fp32 is saved."""
    out, error = train("full", model, folder / "zero", "--learning_rate", 0, "--max_steps", -1, "--num_train_epochs", 1)
    if error:
        return error
    found, wanted = (
        json.loads((out / "all_results.json").read_text())["train_loss"],
        token_mean(load(model), tokens(out)),
    )
    if abs(found - wanted) > 1e-4:
        return f"loss {found} instead of {wanted}"
    out, error = train("full", model, folder / "moved")
    before, after = load(model).state_dict(), load(out).state_dict()
    still = [name for name in after if torch.equal(before[name], after[name])]
    kinds = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    if error or still or kinds != {torch.float32}:
        return error or f"did not move: {still[:3]}; saved as {kinds}"
    return "" if json.loads((out / "config.json").read_text())["use_cache"] else "use_cache false was saved"


def tokens(directory):
    return AutoTokenizer.from_pretrained(directory)


def packing(model, folder, original):
    """Packed rows: the loss of one example at a time, or refused."""
    out, error = train("full", model, folder, "--learning_rate", 0, "--max_steps", -1, "--num_train_epochs", 1,
                       "--packing", "true", "--max_length", 128)  # fmt: skip
    if error:
        return error
    found, wanted = (
        json.loads((out / "all_results.json").read_text())["train_loss"],
        token_mean(load(model), tokens(out)),
    )
    return "" if abs(found - wanted) < 1e-4 else f"loss {found} instead of {wanted}"


def resume(model, folder, original):
    """Six steps, and three that go on for three: bit-identical weights."""
    steps = ["--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3]
    whole, error = train("full", model, folder / "whole", *steps)
    checkpoint = whole / "checkpoint-3"
    half, other = train("full", model, folder / "half", *steps, "--resume_from_checkpoint", checkpoint)
    if error or other:
        return error or other
    one, two = (load_file(out / "model.safetensors") for out in (whole, half))
    return "" if all(torch.equal(one[name], two[name]) for name in one) else "the resumed run ends elsewhere"


def part(choice):
    def cell(model, folder, original):
        """What --train names has moved, and nothing else."""
        more = ["--new_tokens", NEW] if choice == "new_tokens" else []
        rows = [
            {"prompt": row["prompt"] + NEW.replace(",", ""), "completion": row["completion"] + NEW.split(",")[0]}
            for row in ROWS
        ]
        out, error = train("lastlayer", model, folder, "--train", choice, *more, rows=rows if more else ROWS)
        if error:
            return error
        before, after = load(model), load(out)
        old, new = dict(before.named_parameters()), dict(after.named_parameters())
        head = next(n for n, m in after.named_modules() if m is after.get_output_embeddings()) + ".weight"
        embedding = next(n for n, m in after.named_modules() if m is after.get_input_embeddings()) + ".weight"
        old.setdefault(head, old.get(embedding))
        new.setdefault(head, new.get(embedding))
        last = {n for n in new if ".1." in n}  # the second of two blocks
        expected = {"last_layer": {head}, "input_output": {head, embedding}, "new_tokens": set(),
                    "last_block": {head} | last | final_norm(after)}[choice]  # fmt: skip
        count = len(old[embedding])
        moved = {n for n in new if not torch.equal(old[n][:count], new[n][: len(old[n])])}
        if moved != expected:
            return f"moved {sorted(moved ^ expected)[:4]} otherwise than named"
        if choice == "new_tokens":
            ids = tokens(out).convert_tokens_to_ids(NEW.split(","))
            grown = new[embedding][ids]
            if torch.equal(grown[0], grown[1]):
                return "the new rows are the same"
        return ""

    return cell


def final_norm(model):
    """Parameters of the norm behind the last block: those outside of any block, but for embeddings and head."""
    skip = ("embed", "wte", "wpe", "lm_head")
    return {
        n
        for n, _ in model.named_parameters()
        if not any(f".{i}." in n for i in range(9)) and not any(s in n for s in skip)
    }


def lora(*more):
    def cell(model, folder, original):
        """At rate 0 the base's own loss (where it is not quantised); trained, every matrix has moved."""
        if not more:
            out, error = train("lora", model, folder / "zero", "--learning_rate", 0, "--max_steps", -1,
                               "--num_train_epochs", 1)  # fmt: skip
            if error:
                return error
            found = json.loads((out / "all_results.json").read_text())["train_loss"]
            wanted = token_mean(load(model), tokens(out))
            if abs(found - wanted) > 1e-4:
                return f"loss {found} instead of {wanted}"
        out, error = train("lora", model, folder / "moved", *more)
        if error:
            return error
        adapter = load_file(out / "adapter_model.safetensors")
        zero = [name for name, tensor in adapter.items() if not tensor.any()]
        linear = [m for m in load(model).modules() if type(m).__name__ in ("Linear", "Conv1D", "FalconLinear")]
        if zero or len(adapter) != 2 * (len(linear) - 1):  # all but the head
            return f"{len(adapter)} matrices for {len(linear) - 1} layers; still zero: {zero[:3]}"
        return ""

    return cell


def merge(model, folder, original):
    """Logits of the merged model against base + B A, computed from the files."""
    out, error = train("lora", model, folder, "--learning_rate", 0.1)
    if error:
        return error
    _, error = call(
        "finetune_lora/merge_lora.py",
        "--adapter_name_or_path",
        out,
        "--output_dir",
        folder / "merged",
        "--dtype",
        "fp32",
    )
    if error:
        return error
    config, adapter = (
        json.loads((out / "adapter_config.json").read_text()),
        load_file(out / "adapter_model.safetensors"),
    )
    base, ids = load(model), torch.tensor([[5, 9, 20, 7, 30, 11]])
    plain = base(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        for name, a in adapter.items():
            if ".lora_A" in name:
                module = base.get_submodule(name.removeprefix("base_model.model.").split(".lora_A")[0])
                change = adapter[name.replace("lora_A", "lora_B")] @ a * (config["lora_alpha"] / config["r"])
                module.weight += change.T if type(module).__name__ == "Conv1D" else change
        wanted, found = (net(input_ids=ids, use_cache=False).logits for net in (base, load(folder / "merged")))
    apart, change = (wanted - found).abs().max().item(), (wanted - plain).abs().max().item()
    return "" if apart < 1e-5 and change > 1e-2 else f"logits differ by {apart:.1e}, the adapter changes {change:.1e}"


METHODS = {
    "as published": as_published, "generate": generate, "batched": batched, "chat": chat, "full": full,
    "packing": packing, "resume": resume, "last layer": part("last_layer"), "last block": part("last_block"),
    "input+output": part("input_output"), "new tokens": part("new_tokens"), "LoRA": lora(),
    "LoRA 8 bit": lora("--load_in_8bit", "true"), "LoRA 4 bit": lora("--load_in_4bit", "true"), "merge": merge,
}  # fmt: skip


# What is refused on purpose: by these words, or the cell is wrong.
REFUSED = {
    ("japanese-gpt-neox-3.6b", "as published"): "convert_tokenizer.py",  # and with what that writes all is well
    ("falcon-7b", "packing"): "would see each other",
    ("mpt-7b", "packing"): "would see each other",
}
ZERO = {"ZeRO-2": "zero2", "ZeRO-3": "zero3"}


def seven(folder, wanted):
    """{model: {method: text}}; the texts are "ok", "refused", or what is wrong."""
    table = {}
    for name in seven_models.NAMES:
        methods = [method for method in [*METHODS, *ZERO] if wanted(f"{name} {method}")]
        if not methods:
            continue
        original = model = seven_models.make(name, folder / name / "published")
        if name == "japanese-gpt-neox-3.6b":  # its tokenizer is lossy as it is: what README says to do
            model = str(folder / name / "converted")
            call("generate_text/convert_tokenizer.py", "--model_name_or_path", original, "--output_dir", model)
        table[name] = dict.fromkeys(methods, "")
        (folder / "models").mkdir(exist_ok=True)
        (folder / "models" / name).symlink_to(model)
        for method in filter(METHODS.get, methods):
            used = original if method == "as published" else model
            try:
                text = METHODS[method](used, folder / name / method.replace(" ", "_"), original) or "ok"
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
        names = [name for name, row in table.items() if method in row]
        runs = {name: matrix.together(folder, config, "finetune_full", name, short) for name in names}
        errors = matrix.launch([run for _, pair in runs.values() for run in pair], folder / config) if runs else []
        for i, (name, (out, _)) in enumerate(runs.items()):
            reference = matrix.alone(folder, "finetune_full", name, short)
            table[name][method] = matrix.check(errors[2 * i : 2 * i + 2], out, reference)
            print(f"{name}, {method}: {table[name][method]}", flush=True)
