"""Keep the answers to a file of prompts: they go on where they were cut off, and stop in time.

generate_text.py imports this file where `jobs` lies beside its directory, ../jglue/score_choices.py
always. Beside OUT, the answers so far are in OUT.partial (of a second process in OUT.partial.1),
what they were made with in OUT.settings.json, which is the lock, too. Of several processes, started
by torchrun, each answers its share of the batches; where one must stop, it leaves OUT.partial.stop
for the others.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import template_day
from chat_turns import find_template, plain  # noqa: F401 -- for generate_text.py
from model_text import start_of_answer as behind_the_marks
from run_common import check, fail, read_deadline


# Copied from generate_text/generate_text.py
def note(name, text):
    if os.environ.get("RANK", "0") == "0":
        print(f"{name:<11}{text}", file=sys.stderr)  # stdout holds answers only


def set_template(name, args, tokenizer, note, given):
    """As find_template; answers that were begun on another day go on with that day's prompts."""
    if args.output_file:
        output, day = Path(args.output_file).resolve(), None
        if output.exists() or Path(f"{output}.tmp").exists() or partial_files(args):
            with suppress(OSError, ValueError, AttributeError):
                day = json.loads(Path(f"{output}.settings.json").read_text("utf-8")).get("day")
        template_day.set_day(day)
    find_template(name, args.chat_template, tokenizer, note, given)


def claim_output(args, precision, prompts, script):
    """Refuse to mix answers, or to replace a file of others; a finished run ends here.

    `precision`, the ids of the prompts and the script's text are compared with those of the
    answers so far.
    """
    is_one_node = int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks)) == args.ranks
    check(is_one_node, "several processes must be on one node. Split the file for several nodes.")
    args.deadline, args.slowest, args.looked = read_deadline(), 0, 0
    signal.signal(signal.SIGTERM, lambda *_: setattr(args, "deadline", 0))
    output = Path(args.output_file).resolve()
    settings = describe(args, precision, prompts, script)
    record = Path(f"{output}.settings.json")
    if args.rank > 0:
        wait_for_first(args, output)
        return
    ends = [output.exists(), Path(f"{output}.tmp").exists(), *partial_files(args)]
    text = record.read_bytes() if record.is_file() else b"{}"
    before = None if text or any(ends) else {}
    with suppress(ValueError):
        before = json.loads(text)
    check(isinstance(before, dict), f"{record} is damaged: remove it and .partial to begin anew.")
    pairs = [(name, before.get(name), value) for name, value in settings.items()]
    changed = [f"{name} was {was}, now {now}" for name, was, now in pairs if was != now]
    is_free = not any(ends) and (not before or "prompts" in before)
    check(is_free or not changed, f"{output} holds other answers: choose another. {changed}")
    if output.exists():
        note("finished", f"{output} holds these answers; remove it to make them again")
        raise SystemExit(0)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        args.lock = record.open("a")  # the system frees it, in whatever way this process ends
        try:
            fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # where there are no locks, two will write the same answers
            is_held = isinstance(error, BlockingIOError)
            check(not is_held, f"another process is writing {output}. Wait, or choose another.")
        if changed:
            record.write_text(json.dumps(settings, indent=1, ensure_ascii=False), "utf-8")
    except OSError as error:
        fail(f"--output_file {output} cannot be written: {error}")
    Path(f"{output}.tmp").unlink(missing_ok=True)  # of a run that was killed at its end
    stop_if_asked(args)
    args.looked = 0  # loading the model is no batch
    tell(args, "claimed")


def describe(args, precision, prompts, script):
    """What decides the answers: arguments, prompts, the script, and the files of the model."""
    text = Path(args.prompt_file).read_bytes() + json.dumps(prompts).encode()
    settings = vars(args) | {"precision": precision, "prompts": hashlib.sha256(text).hexdigest()}
    settings["script"] = hashlib.sha256(Path(script).read_bytes()).hexdigest()[:16]
    settings["day"] = template_day.LAST.get("day")  # or None: the template writes none
    free = "device_map prompt_file output_file deadline rank ranks slowest looked".split()
    # In 16 and 8 bit, near ties can hang on the batch.
    if precision == "fp32" and not (args.do_sample or args.load_in_8bit):
        free.append("batch_size")
    settings |= dict.fromkeys(free)  # they change no answer
    for directory in (args.base, args.model_name_or_path):
        for name in ("*.safetensors", "*.bin", "*config.json"):
            stats = [(file.name, file.stat()) for file in sorted(Path(directory).glob(name))]
            settings[f"{directory}/{name}"] = [[n, s.st_size, s.st_mtime_ns] for n, s in stats]
    return settings


def wait_for_first(args, output):
    """Until the first process holds the lock: what it refuses, no other process begins."""
    while heard(args, "claimed") is None:
        if output.exists():
            raise SystemExit(0)
        time.sleep(0.1)


def tell(args, what, text=""):
    """Leave a note for the processes of this start; an old one is nobody's."""
    if args.ranks > 1:
        partial(args, what).write_text(f"{this_start()}\n{text}", "utf-8")


def heard(args, what):
    """The text of a note, or None."""
    with suppress(OSError):
        run, _, text = partial(args, what).read_text("utf-8").partition("\n")
        return text if run == this_start() else None


def this_start():
    """A name that the processes of one torchrun share, and no other start."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def start_of_answer(args, tokenizer, ids):
    """Where the text of an answer begins; a prompt of one's own is answered as it stands."""
    return 0 if args.form == "prompt" else behind_the_marks(tokenizer, ids)


def prepare(config, options):
    """What to load a model by, and what is not to be rounded, as in training."""
    from published import keep_read_past, loader

    keep_read_past(config, options)
    if hasattr(config.get_text_config(), "output_router_logits"):
        config.get_text_config().output_router_logits = False  # for a loss; padding breaks it
    return loader(config)


def share_quantised(args, model, layers):
    """Which share of the layers' weights these hold, as a text; refused below a half."""
    from model_layers import share_rounded

    share, asked = share_rounded(model, layers), args.load_in_8bit or args.load_in_4bit
    problem = f"only {share:.1%} of the layers' weights can be in 8 or 4 bit. Leave --load_in_..."
    good = share >= 0.5 or args.allow_partly_quantized or not asked  # or published so
    check(good, f"{problem} out, or add --allow_partly_quantized true.")
    return f", {share:.1%} of the layers' weights"


def check_gpu():
    """Refuse a machine with a GPU that torch does not see."""
    import torch

    visible, queue = (os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "PBS_QUEUE"))
    is_hidden = visible == "" or queue == "rt_HC"  # ABCI's queue without GPUs
    problem = f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not see the GPU."
    is_there = Path("/dev/nvidiactl").exists() and not is_hidden
    check(not is_there, f"{problem} nvidia-smi? Or --device_map cpu.")


def exact_batch(args, model, prompts):
    """The size of a batch: 1 where the model's answers change with padding."""
    if args.batch_size > 1 and not pads_well(model, min(prompts, key=len)[:8]):
        note("batch", "prompts are answered one by one: this model is not exact on padded ones")
        return 1
    return args.batch_size


def pads_well(model, prompt):
    """Whether padding on the left leaves the next two tokens' logits as they are without it."""
    import torch

    more, size = {"output_logits": True, "return_dict_in_generate": True}, len(prompt)
    more |= {"do_sample": False, "min_new_tokens": 2, "max_new_tokens": 2}
    ids = torch.tensor([[0] * size + prompt, prompt * 2]).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :size] = 0
    padded = model.generate(input_ids=ids, attention_mask=mask, **more)
    alone = model.generate(input_ids=ids[:1, size:], attention_mask=mask[:1, size:], **more)
    is_same = padded.sequences[0, -2] == alone.sequences[0, -2]  # if not, by rounding alone
    pairs = [*zip(padded.logits, alone.logits, strict=True)][: 1 + is_same]
    return all((one[0] - two[0]).std() < 0.1 * two[0].std() for one, two in pairs)


def stop_if_asked(args, done=""):
    """Leave with 75, "not finished", where a batch like the slowest must not begin any more.

    Under run_ranks.py with 0, which gives the job 75: launchers take all else for a failure.
    """
    file, until = Path(args.output_file).resolve().with_name("STOP"), args.deadline
    other = heard(args, "stop")
    now = time.time()
    args.slowest = max(args.slowest, now - args.looked if args.looked else 0)
    args.looked = now
    if file.exists() or other or now + args.slowest + 10 > until:
        why = "SIGTERM" if until == 0 else other or file
        if not file.exists() and not other and until:
            why = f"DEADLINE {time.ctime(until)}"
        tell(args, "stop", why)
        file.unlink(missing_ok=True)
        what = "to go on, type the same command or submit the same job"
        note("stopped", "; ".join(filter(None, [f"by {why}", done, what])))
        raise SystemExit(0 if "RUN_RANKS" in os.environ else 75)


def partial(args, end):
    """OUT.partial.END; of the first process, whose END is 0, OUT.partial."""
    return Path(f"{Path(args.output_file).resolve()}.partial{f'.{end}' if end else ''}")


def partial_files(args):
    """The answers so far, of all processes: OUT.partial, OUT.partial.1 ..."""
    first = partial(args, 0)
    others = first.parent.glob(f"{glob.escape(first.name)}.[0-9]*")
    return [file for file in (first, *others) if file.exists()]


def read_answers(args):
    """{number of a row: answer}; damaged lines are left out, and made again."""
    answers = {}
    for file in partial_files(args):
        for line in file.read_bytes().split(b"\n"):
            with suppress(ValueError, TypeError):
                numbers, results = json.loads(line)
                pairs = zip(numbers, results, strict=True)
                answers |= {number + 0: dict(result) for number, result in pairs}
    return answers


def add_answers(args, numbers, results):
    """Add a batch's answers to the file of this process."""
    with partial(args, args.rank).open("a") as file:
        file.write(f"\n{json.dumps([numbers, results])}\n")


def wait_for_all(args):
    """The answers of all processes as soon as they are there."""
    args.slowest = args.looked = 0  # no batch begins here any more
    while any(heard(args, f"end{rank}") is None for rank in range(1, args.ranks)):
        stop_if_asked(args, "another process has rows left")
        time.sleep(1)
    return read_answers(args)


def finish(args, rows, answers):
    """Write all rows with their answers, of all processes, and remove the answers so far."""
    if args.rank > 0:
        tell(args, f"end{args.rank}")
        return
    if args.ranks > 1:
        answers = wait_for_all(args)
    output = Path(args.output_file).resolve()
    new = Path(f"{output}.tmp")
    with new.open("x", encoding="utf-8", errors="backslashreplace") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps(row | answers[i], ensure_ascii=False, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())  # or a crash might leave neither these nor what they replace
    new.replace(output)
    name = glob.escape(f"{output.name}.partial")
    for file in [*output.parent.glob(name), *output.parent.glob(f"{name}.*")]:
        if re.fullmatch(r"(\.(\d+|claimed|stop|end\d+))?", file.name.removeprefix(output.name)[8:]):
            file.unlink()
