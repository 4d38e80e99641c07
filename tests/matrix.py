#!/usr/bin/env python3
"""Run whole grids of combinations, print each as a table and write them to tests/matrix.md.

Not part of pytest.

deepspeed   five configurations x three scripts x five architectures, two CPU processes. A cell is
            ok when
            - the losses of 20 steps are those of one process without DeepSpeed (within 0.1 %),
            - what was saved equals what was trained, and nothing is missing or empty,
            - loaded without DeepSpeed it has the loss that the run reported,
            - going on from the checkpoint of step 10 gives the losses of the run that was not
              interrupted.

combinations  optimizers, quantised bases and rows under each configuration, compared so, too

seven       the seven models of README and three of today's, small but with their own switches,
            tokenizers and files, x every method: each cell compares with an independent calculation
            (seven_grid.py), or is refused on purpose

coverage    LoRA on architectures with experts, Mamba layers or routers: losses, gradients, reloaded
            and merged answers against a calculation by hand (coverage_grid.py)

families    small models of today's architectures, and of those that see, x every method
            (families.py); LoRA's cells say which share of the layers' weights it stands beside

tokenizers  every class that a tokenizer's files may name x every kind of tokenizer, each under 50
            types of model: the ids are those of tokenizer.json. "ok 7": in 7 types AutoTokenizer
            does not read what was saved, and a line says what does (test_tokenizers.py)

By hand     python tests/matrix.py                        everything
            python tests/matrix.py --only 'zero3 .* mpt'  the cells with this regular expression
            python tests/matrix.py families --only '^(qwen|gemma)' --merge    a piece at a time
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import coverage_grid
import families
import seven_grid
import test_tokenizers
import torch
import transformers
import yaml
from conftest import ROOT, ROWS, load_script, make_checkpoint, write_jsonl
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

# ---- Runs: many in one launch, since imports take longer than they do ----


def say(text):
    print(text, flush=True)


def script_path(name):
    return ROOT / name / f"{name}.py"


def launch(runs, folder, note=None):
    """Run [SCRIPT, ARGUMENT, ...] lists with two CPU processes; return each one's error or ""."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps([[str(word) for word in run] for run in runs]))
    outcomes = folder / "outcomes.jsonl"
    outcomes.write_text("")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", ROOT / "tests" / "many_runs.py", "runs", folder / "runs.json"]  # fmt: skip
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | settings | {"OUTCOMES": str(outcomes)}
        )
        done = 0
        while process.poll() is None:
            time.sleep(0.5)
            if note and len(outcomes.read_text().splitlines()) > done:
                done = len(outcomes.read_text().splitlines())
                note(done)
    errors = [json.loads(line)["error"] for line in outcomes.read_text().splitlines()]
    missing = len(runs) - len(errors)
    return errors + [f"the launch ended early, see {folder / 'log.txt'}"] * missing


# ---- DeepSpeed: what a run is compared with ----

CONFIGS = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
RATES = {"finetune_full": "3e-3", "finetune_lastlayer": "1e-2", "finetune_lora": "1e-2"}
MODELS = ["gpt2", "gpt_neox", "falcon", "mpt", "llama"]


def prepare(folder, kinds):
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", ROWS)
    for kind in kinds:
        make_checkpoint(folder / "models" / kind, kind)


def prepare_tokens(folder, kind):
    """models/KIND_tokens: that model with the tokens of NEW, by the step that adds them."""
    models, tokens = folder / "models", NEW[1]
    with contextlib.redirect_stdout(io.StringIO()):
        load_script(ROOT / "finetune_lastlayer" / "add_tokens.py").main(
            ["--model_name_or_path", str(models / kind), "--new_tokens", tokens,
             "--output_dir", str(models / f"{kind}_tokens")])  # fmt: skip


def arguments(folder, script, kind, batch, steps):
    """20 steps of 4 examples, in the order of the file; the models have no dropout."""
    data = folder / "train.jsonl"
    return ["--model_name_or_path", folder / "models" / kind, "--train_file", data,
            "--validation_file", data, "--learning_rate", RATES[script], "--logging_steps", 1,
            "--max_steps", steps, "--save_steps", steps // 2,
            "--train_sampling_strategy", "sequential",
            "--per_device_train_batch_size", batch]  # fmt: skip


def alone(folder, script, kind, more=(), steps=20):
    """What one process without DeepSpeed makes of it; return the directory of the result."""
    out = folder / "alone" / script / kind / "-".join(map(str, more))
    words = [*arguments(folder, script, kind, 4, steps), *more]
    words += ["--save_strategy", "no", "--output_dir", out]
    if (out / "all_results.json").is_file():
        return out
    with contextlib.redirect_stdout(io.StringIO()):
        load_script(script_path(script)).main([str(word) for word in words])
    return out


def together(folder, config, script, kind, more=(), steps=20):
    """Return (OUT, [the run to OUT/whole, the run to OUT/resumed that goes on from its middle])."""
    out = folder / Path(config).stem / script / kind / "-".join(map(str, more))
    words = [script_path(script), *arguments(folder, script, kind, 2, steps), *more]
    file = ROOT / "deepspeed_configs" / f"{config}.json"
    words += ["--deepspeed", config if isinstance(config, Path) else file]
    resume = ["--resume_from_checkpoint", out / "whole" / f"checkpoint-{steps // 2}"]
    return out, [
        [*words, "--output_dir", out / "whole"],
        [*words, "--output_dir", out / "resumed", *resume],
    ]


def logged(directory, name="loss"):
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def auto_class(directory):
    """The class that a model was published as."""
    sees = type(AutoConfig.from_pretrained(directory))
    sees = sees in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def load(directory):
    """The result as generate_text.py loads it: a plain model, or an adapter on its base."""
    if not (directory / "adapter_config.json").is_file():
        auto = auto_class(directory)
        model, info = auto.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"], info["missing_keys"]
        return model
    from peft import PeftModel

    given = yaml.safe_load((directory / "run_args.yaml").read_text())
    dtype = torch.bfloat16 if given.get("precision") == "bf16" else torch.float32
    base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if given.get(name)}
    if bits:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        bits = {"quantization_config": BitsAndBytesConfig(**bits, **nf4), "device_map": {"": "cpu"}}
    base = auto_class(base).from_pretrained(base, dtype=dtype, **bits)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # else an evaluation repacks the weights
    return PeftModel.from_pretrained(base, directory)


@torch.no_grad()
def mean_loss(model, directory):
    """Over the learned tokens of the run's validation file, a row at a time, from the raw rows."""
    given = yaml.safe_load((directory / "run_args.yaml").read_text())
    tokenizer, losses = AutoTokenizer.from_pretrained(directory), []
    (file,) = given["validation_file"]
    for row in map(json.loads, Path(file).read_text().splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, tokenizer.eos_token_id][:64]  # 64 positions
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        wanted = torch.tensor(ids[1:])
        loss = torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none")
        losses.append(loss[max(len(prompt), 1) - 1 :])
    return torch.cat(losses).mean().item()


def differ(found, wanted):
    """The largest relative difference of two lists of losses."""
    assert len(found) == len(wanted) and all(wanted), f"{len(found)} losses, not {len(wanted)}"
    return max(abs(f - w) / abs(w) for f, w in zip(found, wanted, strict=True))


def compare(out, reference=None, tolerance=1e-3):
    """What is wrong with the result of a run under DeepSpeed in OUT (see the top), or ""."""
    whole, wrong = out / "whole", []
    if reference and (apart := differ(logged(whole), logged(reference))) > tolerance:
        wrong.append(f"losses differ from one process by {apart:.1e}")
    first, *_, last, _ = logged(whole)  # of the last two steps: an epoch has one step or two
    if reference and last > (1 - 3 * tolerance) * first:
        wrong.append(f"it did not learn ({first} to {last}), so equal losses prove nothing")
    saved = load_file(next(whole.glob("*model.safetensors")))
    is_good = {name: t.numel() and t.isfinite().all() for name, t in saved.items()}
    if empty := [name for name, good in is_good.items() if not good]:
        wrong.append(f"empty or not finite: {empty[:3]}")
    model, trained = load(whole), torch.load(whole / "gathered.pt")
    loaded, unequal = dict(model.named_parameters()), []
    if missing := sorted(trained.keys() ^ loaded.keys()):
        return f"not in both model and result: {missing[:3]}"
    for name, tensor in trained.items():
        # PEFT reads a head of fp32 into one of 16 bit where the base is.
        least = loaded[name].dtype if tensor.dtype != torch.bfloat16 else torch.bfloat16
        same = [t.to(least) if t.is_floating_point() else t for t in (tensor, loaded[name])]
        unequal += [] if torch.equal(*same) else [name]
    if unequal:
        wrong.append(f"saved otherwise than trained: {sorted(unequal)[:3]}")
    apart = differ([mean_loss(model, whole)], logged(whole, "eval_loss")[-1:])
    is_exact = "precision: bf16" not in (whole / "run_args.yaml").read_text()
    if apart > (tolerance / 10 if is_exact else 1e-3):
        wrong.append(f"without DeepSpeed the loss differs by {apart:.1e}")
    if (out / "resumed").is_dir():
        apart = differ(logged(out / "resumed"), logged(whole))
        if apart > tolerance / 10:
            wrong.append(f"resumed losses differ by {apart:.1e}")
    return "; ".join(wrong)


def check(errors, out, *more):
    """The text of a cell."""
    try:
        return "; ".join(filter(None, errors)) or compare(out, *more) or "ok"
    except (AssertionError, OSError, StopIteration, KeyError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def deepspeed(folder, wanted):
    """{row: {column: text}}; one launch per configuration."""
    cells = [(c, s, k) for c in CONFIGS for s in RATES for k in MODELS if wanted(f"{c} {s} {k}")]
    prepare(folder, sorted({kind for *_, kind in cells}))
    references = {pair: alone(folder, *pair) for pair in dict.fromkeys(cell[1:] for cell in cells)}
    table, began, ended = {}, time.time(), 0
    for config in dict.fromkeys(c for c, *_ in cells):
        mine = {cell: together(folder, *cell) for cell in cells if cell[0] == config}

        def note(done, config=config, before=ended):
            left = (time.time() - began) / (before + done) * (2 * len(cells) - before - done)
            say(f"{config}: {before + done} of {2 * len(cells)} runs, {left / 60:.0f} min left")

        errors = launch([run for _, runs in mine.values() for run in runs], folder / config, note)
        for i, ((_, script, kind), (out, _)) in enumerate(mine.items()):
            text = check(errors[2 * i : 2 * i + 2], out, references[script, kind])
            table.setdefault(f"{script}, {config}", {})[kind] = text
            say(f"{config} {script} {kind}: {text}")
        ended += 2 * len(mine)
    return table


BF16, NEW = ["--precision", "bf16"], ["--new_tokens", "東京,書店", "--learning_rate", "0.1"]
IN_8BIT, IN_4BIT = ["--load_in_8bit", "true"], ["--load_in_4bit", "true"]
HEAD = ["--lora_target_modules", "none", "--modules_to_save", "lm_head"]
ZERO3 = ["zero3", "zero3_offload"]
# What goes with DeepSpeed beside plain training:
# (script, model, arguments, configurations that are refused)
COMBINATIONS = {
    "8-bit optimizer": ("finetune_full", "gpt2", ["--optim", "adamw_bnb_8bit"], []),
    "LoRA on 8 bit": ("finetune_lora", "gpt_neox", [*IN_8BIT, *BF16], ZERO3),
    "LoRA on 4 bit": ("finetune_lora", "llama", [*IN_4BIT, *BF16], ZERO3),
    "LoRA, whole head": ("finetune_lora", "gpt_neox", ["--modules_to_save", "lm_head"], []),
    "LoRA, new tokens": ("finetune_lora", "llama_tokens", NEW[:2], ZERO3),
    "last layer, new tokens": (
        "finetune_lastlayer",
        "gpt2_tokens",
        ["--train", "new_tokens", *NEW],
        [],
    ),
    "last layer on 8 bit": ("finetune_lora", "llama", [*HEAD, *IN_8BIT, *BF16], ZERO3),
}


def combinations(folder, wanted):
    """{combination: {configuration: text}}; the texts are "ok", "refused", or what is wrong."""
    table, steps = {}, 8
    prepare(folder, ["gpt2", "gpt_neox", "llama"])
    for kind in ("gpt2", "llama"):
        prepare_tokens(folder, kind)
    for config in CONFIGS:
        names = [name for name in COMBINATIONS if wanted(f"{config} {name}")]
        runs = {name: together(folder, config, *COMBINATIONS[name][:3], steps) for name in names}
        wholes = [whole for _, (whole, _) in runs.values()]
        errors = launch(wholes, folder / config) if names else []
        for (name, (out, _)), error in zip(runs.items(), errors, strict=True):
            *case, refused = COMBINATIONS[name]
            if config in refused:
                text = "refused" if error.startswith("error: ") else f"not refused: {error}"
            else:
                few = 1e-4 if "new tokens" in name else 1e-3  # few rows change the loss little
                text = check([error], out, alone(folder, *case, steps), few)
            table.setdefault(name, {})[config] = text
            say(f"{config} {name}: {text}")
    return table


# ---- The command ----

# A further grid is a further function(folder, wanted) -> {row: {column: text}}.
GRIDS = {"deepspeed": deepspeed, "combinations": combinations, "seven": seven_grid.seven,
         "coverage": coverage_grid.coverage, "families": families.run,
         "tokenizers": test_tokenizers.grid}  # fmt: skip
RESULTS = ROOT / "tests" / "matrix.md"


def as_markdown(name, table, day):
    """A section of the results: how many cells are what, when it was run with which versions."""
    texts = [text for row in table.values() for text in row.values()]
    good, refused = (sum(text.startswith(word) for text in texts) for word in ("ok", "refused"))
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cells.get(c, "") for c in columns)] for row, cells in table.items()]
    title = f"## {name}: {good} of {len(texts)} ok, {refused} refused on purpose"
    lines = ["| " + " | ".join(line).replace("\n", " ") + " |" for line in lines]
    return "\n".join([title, "", day, "", *lines])


def read_results():
    """{grid: (the line that says when, {row: {column: text}})} of the file as it is."""
    found = {}
    for section in RESULTS.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, day, _, head, _, *lines = section.strip().splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in [head, *lines]]
        names, table = rows[0][1:], {}
        for row, *cells in rows[1:]:
            table[row] = {n: text for n, text in zip(names, cells, strict=True) if text}
        found[title.partition(":")[0]] = day, table
    return found


def write_results(tables, is_piece):
    """Put these grids, or these cells of them, into the file; the others stay as they are."""
    found, packages = read_results(), ("torch", "transformers", "accelerate", "peft", "deepspeed",
                                       "bitsandbytes")  # fmt: skip
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    for name, table in tables.items():
        day = f"Run on {date.today()}: {versions}."
        if is_piece and name in found:
            before, old = found[name]
            table = {row: old.get(row, {}) | table.get(row, {}) for row in {**old, **table}}
            first = before.split()[2].rstrip(":")
            day = day.replace("on", f"from {first} to", 1) if first != str(date.today()) else day
        found[name] = day, table
    parts = [as_markdown(name, *found[name][::-1]) for name in GRIDS if name in found]
    head = "# What works\n\nWritten by `python tests/matrix.py`, on CPU; each grid says when."
    RESULTS.write_text("\n\n".join([head, *parts]) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    grids = f"From {', '.join(GRIDS)}; or all."
    parser.add_argument("grids", nargs="*", default=[*GRIDS], metavar="GRID", help=grids)
    only = "Regular expression: the cells to run; writes no file without --merge."
    parser.add_argument("--only", default="", help=only)
    parser.add_argument("--merge", action="store_true", help="Write the cells of --only, too.")
    args = parser.parse_args()
    if unknown := set(args.grids) - set(GRIDS):
        parser.error(f"no grid {', '.join(unknown)}; there are {', '.join(GRIDS)}")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    tables, failed = {}, 0
    folder = Path(tempfile.mkdtemp(prefix="matrix"))
    os.environ["HF_HOME"] = str(folder / "hf")
    for grid in args.grids:
        tables[grid] = GRIDS[grid](folder / grid, lambda name: re.search(args.only, name))
        texts = [text for row in tables[grid].values() for text in row.values()]
        failed += sum(not text.startswith(("ok", "refused")) for text in texts)
        print(as_markdown(grid, tables[grid], str(date.today())))
    if failed:
        print(f"{failed} not ok; what they left is in {folder}")
    else:
        shutil.rmtree(folder)
    if args.merge or not args.only:
        write_results(tables, bool(args.only))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
