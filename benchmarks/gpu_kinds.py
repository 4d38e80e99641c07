"""How gpu_check.py does an item of each kind; gpu_items.py has the table of them."""

import contextlib
import io
import json
import math
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LESSONS = {"full": "finetune_full", "last": "finetune_lastlayer", "lora": "finetune_lora"}
# The longest rows, in the order of the file: the same batches on any number of processes.
TINY = "--train_file {data} --max_length 128 --max_steps 4 --logging_steps 1 --save_strategy no "
TINY += "--per_device_train_batch_size 4 --train_sampling_strategy sequential --learning_rate 1e-3"
ON_CPU = "--use_cpu true --precision fp32"
IN_8BIT, IN_4BIT = "--load_in_8bit true", "--load_in_4bit true"
CHECKPOINTED = "--activation_checkpointing true"
SMALLER = "japanese-gpt-neox-3.6b"  # where a card is too small
GIB = 2**30


def read_json(path):
    return json.loads(Path(path).read_text("utf-8"))


# ---- Commands ----


def command_of(bench, lesson, model, more, out, gpus=1, inside=None):
    """A training as a user would type it; under gpu_inside.py where `inside` names its report."""
    script = [f"{ROOT}/{LESSONS[lesson]}/{LESSONS[lesson]}.py"]
    if inside:
        script = [f"{ROOT}/benchmarks/gpu_inside.py", *inside, *script]
    if gpus > 1 or "--deepspeed" in more or "--launched" in more:
        more = more.replace("--launched", "")
        launch = f"-m torch.distributed.run --standalone --nproc_per_node {gpus}"
        script = [*launch.split(), *script]
    words = f"--model_name_or_path {bench.work}/{model} --output_dir {out} {more}".split()
    return [*script, *words]


def asked(bench, item):
    """The arguments of the GPU's run, or what stands in their place on a CPU."""
    return item.on_cpu if bench.is_dry and item.on_cpu is not None else item.more


def start(bench, item, more, inside=False, env=None, gpus=1, fails=False):
    """Train a tiny model; returns the run, with .out, its directory, and .report."""
    lesson, model, *words = item.words.split()
    words = f"{TINY} {' '.join(words)} {more}".replace("{data}", str(bench.data))
    words, out = words.replace("{uneven}", str(bench.uneven)), bench.folder()
    report = [f"{out}.json", item.changes] if inside else None
    run = bench.run(command_of(bench, lesson, model, words, out, gpus, report), env, fails)
    run.out, run.report = out, read_json(report[0]) if inside else {}
    return run


def train(bench, item, more, inside=False, env=None, gpus=1):
    """The same with .steps and .results; what several items need is done once."""
    key = (item.words, more, inside and item.changes, repr(env), gpus)
    if key not in bench.done:
        run = start(bench, item, more, inside, env, gpus)
        log = read_json(run.out / "trainer_state.json")["log_history"]
        run.steps = [entry for entry in log if "loss" in entry]
        run.results = read_json(run.out / "all_results.json")
        bench.done[key] = run
    return bench.done[key]


def difference(run, reference, name, steps=slice(None)):
    """The largest relative difference; infinite where a value is no number: max() may skip it."""
    pairs = zip(run.steps[steps], reference.steps[steps], strict=True)
    found = [abs(one[name] - two[name]) / abs(two[name]) for one, two in pairs]
    return max(found) if all(map(math.isfinite, found)) else math.inf


# ---- Kinds of items ----


def exact(bench, item):
    """The losses of four steps, and the last gradient, against those of the same on a CPU."""
    reference = train(bench, item, ON_CPU)
    rows = f" --per_device_train_batch_size {4 // item.gpus}" if item.gpus > 1 else ""
    run = train(bench, item, asked(bench, item) + rows, gpus=item.gpus)
    loss = difference(run, reference, "loss")
    gradient = difference(run, reference, "grad_norm", slice(-1, None))
    good = loss <= item.limit and gradient <= 10 * item.limit
    return good, f"loss {loss:.1e}, gradient {gradient:.1e}"


def hidden(bench, item):
    """A node's driver, but no GPU in use, as in rt_HC: trained on the CPU, not refused."""
    reference = train(bench, item, ON_CPU)
    env = {"CUDA_VISIBLE_DEVICES": "", "PBS_QUEUE": "rt_HC"}
    loss = difference(train(bench, item, "", env=env), reference, "loss")
    return loss <= item.limit, f"loss {loss:.1e}"


def refused(bench, item):
    run = start(bench, item, item.more, fails=True)
    good = run.status == 2 and run.last.startswith(f"error: {item.more.split()[0]}")
    return good and "Traceback" not in run.log, f"status {run.status}: {run.last[:60]}"


def full(bench, item):
    """Memory that is full at this moment: the advice in one line, and status 2."""
    run = start(bench, item, asked(bench, item), inside=True, fails=True)
    good = run.status == 2 and "error: GPU memory is full. Try" in run.last
    return good and "Traceback" not in run.log, f"status {run.status}: {run.last[:40]}"


def saved(bench, item):
    """Nothing is learned at rate 0, so that what is saved must be what was read, unrounded."""
    from safetensors.torch import load_file

    found = load_file(start(bench, item, asked(bench, item)).out / "model.safetensors")
    first = load_file(bench.work / item.words.split()[1] / "model.safetensors")
    same = sum(found[n].dtype == t.dtype and bool((found[n] == t).all()) for n, t in first.items())
    return same == len(first), f"{same} of {len(first)} tensors"


def seen(bench, item):
    """A value that only the process itself sees."""
    good, text = LOOKS[item.name](train(bench, item, asked(bench, item), inside=True))
    return good or bench.is_dry, text


def merge_note(bench, item):
    """An adapter trained in bf16 on a base published in fp32: the rounding is gone, says a note."""
    out = start(bench, item, item.more).out
    words = ["--adapter_name_or_path", str(out), "--output_dir", f"{out}/merged", "--verify"]
    log = bench.run([f"{ROOT}/finetune_lora/merge_lora.py", *words]).log
    note = re.search(r"^note +(.* in bf16, whose rounding is gone.*)", log, re.M)
    return bool(note), note[1][:60] if note else "no note"


def answer(bench, item, more, gpus=1):
    """The answers of a model to 24 prompts."""
    out = bench.folder() / "answers.jsonl"
    script = [f"{ROOT}/generate_text/generate_text.py"]
    if gpus > 1:
        launch = f"-m torch.distributed.run --standalone --nproc_per_node {gpus}"
        script = [*launch.split(), *script]
    words = f"--model_name_or_path {bench.work}/{item.words} --prompt_file {bench.prompts} "
    words += f"--output_file {out} --max_new_tokens 8 {more}"
    key = (item.words, more, gpus)
    if key not in bench.done:
        out.parent.mkdir(parents=True)
        bench.run([*script, *words.split()])
        rows = [json.loads(line) for line in out.open(encoding="utf-8")]
        bench.done[key] = [row["generated_text"] for row in rows]
    return bench.done[key]


def answers(bench, item):
    """Greedy answers against a CPU's in fp32, or against another batch size on the same device."""
    found = answer(bench, item, asked(bench, item), item.gpus)
    batch = asked(bench, item).replace("--batch_size 24", "--batch_size 1")
    other = batch if batch != asked(bench, item) else "--device_map cpu --precision fp32"
    wanted = answer(bench, item, other)
    same = sum(one == two for one, two in zip(found, wanted, strict=True))
    return same >= item.limit * len(wanted), f"{same} of {len(wanted)} equal"


def elsewhere(bench, item):
    raise bench.LeftOut(item.what)


# ---- Models of real sizes ----


def plan_of(bench, item, model, more, lesson):
    """What jobs/estimate.py computes for this training: an object with .need and .counts."""
    from estimate import complete, fit, parse

    words = more.replace("--launched", "").split()
    method = {"lora": "lora"}.get(lesson, "full")
    method = "lora_8bit" if IN_8BIT in more else "qlora" if IN_4BIT in more else method
    known = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps")
    known += ("activation_checkpointing", "precision", "deepspeed")
    pairs = list(zip(words[::2], words[1::2], strict=True))
    kept = [word for name, value in pairs if name[2:] in known for word in (name, value)]
    stage = [] if "--deepspeed" in more else ["--zero_stage", "none"]
    where = ["--model_name_or_path", str(bench.work / model), "--method", method]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            words = [*where, *kept, *stage, "--nodes", "1", "--gpus", str(item.gpus)]
            return fit(complete(parse(words)))
    except SystemExit:  # it could not be computed: the other items can
        raise bench.Failed(said.getvalue().strip()) from None


def place(bench, item):
    """(model, arguments, plan, note): the first choice that fits this card."""
    lesson, model, *words = item.words.split()
    words = " ".join([*words, asked(bench, item), bench.real])
    choices = [(model, words)]
    if CHECKPOINTED not in words:
        choices.append((model, f"{words} {CHECKPOINTED}"))
    choices.append((SMALLER, choices[-1][1]))
    note = ""
    for model, more in choices:
        bench.make_real(model)
        plan = plan_of(bench, item, model, more, lesson)
        if plan.need <= bench.card:
            return model, more, plan, note
        checkpointed = ", checkpointed," if CHECKPOINTED in more else ""
        needs = f"needs {plan.need / GIB:.0f} GiB, has {bench.card / GIB:.0f} GiB"
        note += f"{model}{checkpointed} {needs}; "
    raise bench.LeftOut(note.strip("; "))


def real(bench, item, env=(), texts=None):
    """Speed, MFU and memory of a training, beside what jobs/estimate.py computes for it."""
    from estimate import OPERATIONS

    lesson = item.words.split()[0]
    model, more, plan, note = place(bench, item)
    out = bench.folder()
    inside = [f"{out}.json", item.changes]
    more += f" --train_file {texts or bench.texts} --logging_steps 1 --save_strategy no"
    command = command_of(bench, lesson, model, more, out, item.gpus, inside)
    run = bench.run(command, dict(env))
    speeds = [
        float(s.replace(",", "")) for s in re.findall(r"^step .* ([\d,]+) tok/s", run.log, re.M)
    ]
    speed = statistics.median(speeds[2:])  # the first steps find their kernels and their memory
    report, results = read_json(inside[0]), read_json(out / "all_results.json")
    matmul = report["matmul"]
    mfu = OPERATIONS[plan.method] * plan.counts.base * speed / item.gpus / matmul
    peak, reserved = results["peak_memory_gib"], results["peak_reserved_gib"]
    computed = (plan.need - plan.items["CUDA, NCCL"]) / GIB
    bench.figures |= {
        "model": model, "tokens_per_second": speed, "mfu": mfu, "matmul_tflops": matmul / 1e12,
        "peak_memory_gib": peak, "peak_reserved_gib": reserved, "computed_gib": computed,
        "bytes_per_parameter": peak * GIB / results["total_parameters"],
    }  # fmt: skip
    text = f"{note}{model}: {speed:,.0f} tok/s, MFU {mfu:.0%} of {matmul / 1e12:,.0f} TFLOP/s, "
    text += (
        f"{peak:.1f} GiB ({bench.figures['bytes_per_parameter']:.1f} bytes a parameter in all), "
    )
    text += f"{reserved:.1f} reserved, {computed:.1f} computed"
    good = bench.is_dry or (mfu >= item.limit and peak <= 1.1 * computed)
    return good, text


def segments(bench, item):
    """What is reserved but not used, of rows of unequal lengths, without and with the setting."""
    gaps = []
    for value in ("expandable_segments:False", "expandable_segments:True"):
        real(bench, item, {"PYTORCH_ALLOC_CONF": value}, bench.uneven_long)
        gaps.append(bench.figures["peak_reserved_gib"] - bench.figures["peak_memory_gib"])
    bench.figures["reserved_not_used_gib"] = gaps
    good = bench.is_dry or gaps[1] <= gaps[0]
    return good, f"{gaps[0]:.1f} GiB without, {gaps[1]:.1f} GiB with"


def generation(bench, item):
    """64 answers at once, the default of a GPU, against one at a time; the weights are random."""
    model = item.words
    bench.make_real(model)
    need = bench.weights(model)
    if need > 0.9 * bench.card:
        raise bench.LeftOut(f"needs {need / GIB:.0f} GiB, has {bench.card / GIB:.0f} GiB")
    speeds = []
    for prompts, more in ((bench.many_prompts, ""), (bench.few_prompts, "--batch_size 1")):
        out = bench.folder()
        out.mkdir(parents=True)
        command = [f"{ROOT}/benchmarks/gpu_inside.py", f"{out}.json", item.changes]
        command += [f"{ROOT}/generate_text/generate_text.py", "--model_name_or_path"]
        command += [f"{bench.work}/{model}", "--prompt_file", str(prompts), "--output_file"]
        words = f"--max_new_tokens {8 if bench.is_dry else 64} {more}".split()
        run, report = bench.run([*command, f"{out}/a.jsonl", *words]), read_json(f"{out}.json")
        speeds.append(float(re.search(r", ([\d,]+) tok/s", run.log)[1].replace(",", "")))
        if not more:
            peak = f"{report['allocated_gib']:.1f} GiB, {report['reserved_gib']:.1f} reserved"
            rows = report["rows"]
            names = ("allocated_gib", "reserved_gib")
            bench.figures |= {"rows": rows, **{name: report[name] for name in names}}
    bench.figures["tokens_per_second"] = speeds
    text = f"{rows} at once {speeds[0]:,.0f} tok/s, one {speeds[1]:,.0f} tok/s, {peak}"
    return bench.is_dry or (rows == 64 and speeds[0] >= item.limit * speeds[1]), text


# ---- What gpu_inside.py saw ----


def count_8bit_warnings(run):
    count = run.log.count("MatMul8bitLt")
    return count == 0, f"{count} lines"


def kinds_of_gradients(run):
    kinds = run.report["gradients_8bit"]
    return kinds == ["bfloat16"], ", ".join(kinds) or "none seen"


def memory_is_told(run):
    told = run.results["peak_memory_gib"], run.results["peak_reserved_gib"]
    own = run.report["allocated_gib"], run.report["reserved_gib"]
    is_same = all(abs(one - two) < 0.05 for one, two in zip(told, own, strict=True))
    return is_same and 0 < told[0] <= told[1], f"{told[0]:.2f} GiB, {told[1]:.2f} reserved"


def graphs_are_few(run):
    """The second width makes a variable of it: however many widths, there are a few graphs."""
    widths, graphs = run.report["widths"], run.report["graphs"]
    good = len(widths) > 3 and graphs <= 8
    return good, f"{len(widths)} widths ({widths[0]} to {widths[-1]}), {graphs} graphs"


LOOKS = {
    "8bit_warnings": count_8bit_warnings,
    "8bit_gradients": kinds_of_gradients,
    "memory_told": memory_is_told,
    "compile_widths": graphs_are_few,
    "workers": lambda run: (run.report["workers"] == 2, f"{run.report['workers']} workers"),
    "ddp_timeout": lambda run: (
        run.report["ddp_timeout"] >= 6 * 3600,
        f"{run.report['ddp_timeout']:,} s",
    ),
}
