"""Ask a model JGLUE's questions: prompts, answers, scores with 95 % intervals, and a page of them.

evaluate_jglue.py imports this file where a model is given. What it asks with are make_prompts.py,
../generate_text/generate_text.py and score_choices.py, each in a process of its own. Beside the
answers, NAME_versions.json says which versions of the packages made them.
"""

import json
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from evaluate_jglue import (
    PASSED,
    SCORERS,
    TASKS,
    check_row,
    correlation,
    describe_data,
    fail,
    jsquad_values,
    jsts_values,
    ranks,
)

METHOD = """95 % intervals: of shares of right answers Wilson's; of F1 and correlations the
percentiles of 1,000 bootstrap samples of the questions (seed 0). Both take the questions for
independent. acc: the likeliest choice by the sum over its tokens; acc_norm: by that sum divided by
the choice's characters; acc_per_token: by its tokens."""


# ---- Asking ----


def complete(args):
    """Refuse what does nothing together; put in the defaults."""
    if args.output_file:
        fail("--output_file belongs to a --prediction_file. With a model, give --output_dir.")
    args.apply_chat_template = args.apply_chat_template == "true"
    for name in ("chat_template", "chat_template_kwargs"):
        if getattr(args, name) is not None and not args.apply_chat_template:
            fail(f"--{name} does nothing without --apply_chat_template. Add that.")
    for name, value in {"num_fewshot": 0, "seed": 42, "max_new_tokens": 32}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.data_dir = args.data_dir or Path("output")
    name = [part for part in Path(args.model_name_or_path).parts if part.strip("./")][-3:]
    args.output_dir = args.output_dir or args.data_dir / "scores" / "_".join(name)


def run(script, *words):
    """Run a script in a process of its own; what it prints is seen, a failure's status is ours."""
    if not script.is_file():
        fail(f"{script} is not there, and is needed to ask a model. Copy it along.")
    before = signal.getsignal(signal.SIGTERM)
    with subprocess.Popen([sys.executable, str(script), *map(str, words)]) as child:
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())  # it ends its batch, with 75
        status = child.wait()
    signal.signal(signal.SIGTERM, before)
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def ask_model(args, stem):
    """Make the prompts, let the model answer them; return the rows answered and those scored."""
    here, is_chat = Path(__file__).resolve().parent, args.apply_chat_template
    files = [Path(f"{stem}_{name}.jsonl") for name in ("prompts", "answers", "choices")]
    words = ["--task", args.task, "--data_dir", args.data_dir, "--output_file", files[0]]
    words += ["--num_fewshot", args.num_fewshot, "--seed", args.seed]
    words += ["--limit", args.limit] if args.limit is not None else []
    run(here / "make_prompts.py", *words, *(["--turns"] if is_chat else []))
    if not is_chat and Path(args.model_name_or_path, "chat_template.jinja").is_file():
        hint = "if it was trained on conversations, add --apply_chat_template true"
        print(f"the model has a chat template, and is asked by text: {hint}", file=sys.stderr)
    model = ["--model_name_or_path", args.model_name_or_path, "--prompt_file", files[0]]
    for name in PASSED:
        model += [f"--{name}", getattr(args, name)] if getattr(args, name) is not None else []
    script = here.parent / "generate_text" / "generate_text.py"
    answer(stem, files[1], script, *model, "--max_new_tokens", args.max_new_tokens)
    rows, scored = read_lines(files[1]), []
    if any("answer_choices" in row for row in rows):
        answer(stem, files[2], here / "score_choices.py", *model)
        scored = read_lines(files[2])
    return rows, scored


def answer(stem, output, script, *words):
    """Run a script that makes answers; keep with which versions of the packages it made them."""
    record, files = Path(f"{stem}_versions.json"), (output, Path(f"{output}.partial"))
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    versions["python"] = sys.version.split()[0]

    def sizes():
        return [file.stat().st_size if file.exists() else 0 for file in files]

    known, before = read_versions(stem), sizes()
    old = known.get(output.name, [dict.fromkeys(versions, "not recorded")]) if any(before) else []
    # Written before the first answer is: this process may be killed.
    now = [*old, versions] if versions not in old and not before[0] else old
    write(record, json.dumps(known | {output.name: now}, indent=1) + "\n")
    try:
        run(script, *words, "--output_file", output)
    finally:
        if sizes() == before:  # no answer came
            write(record, json.dumps(known | {output.name: old}, indent=1) + "\n")


def read_versions(stem):
    """Return {file of answers: the versions of each start that made some of them}."""
    with suppress(OSError, ValueError):
        return json.loads(Path(f"{stem}_versions.json").read_text("utf-8"))
    return {}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def describe(args, stem):
    """Return what the scores are of, for whoever compares them with others."""
    with_adapter, base = Path(args.model_name_or_path, "adapter_config.json"), None
    if with_adapter.is_file():
        base = json.loads(with_adapter.read_text("utf-8")).get("base_model_name_or_path")
    record = Path(f"{stem}_answers.jsonl.settings.json")  # generate_text.py's
    settings = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    names = "num_fewshot seed limit max_new_tokens apply_chat_template".split()
    facts = {name: getattr(args, name) for name in names}
    options = {name: getattr(args, name) for name in PASSED if getattr(args, name) is not None}
    found = {}  # of each package the versions, in the order in which they came
    for one in (one for starts in read_versions(stem).values() for one in starts):
        for name, version in one.items():
            found.setdefault(name, {})[version] = True
    versions = {name: " and ".join(each) for name, each in found.items()}
    facts |= {"precision": settings.get("precision"), "options": options, "versions": versions}
    return {"model": args.model_name_or_path, "adapter_on": base, **facts}


def evaluate_model(args):
    """Ask the model, score its answers, and write a JSON and a Markdown file."""
    complete(args)
    stem = args.output_dir / f"{args.task}_{args.num_fewshot}shot"
    stem = f"{stem}_chat" if args.apply_chat_template else stem
    stem = f"{stem}_limit{args.limit}" if args.limit else stem
    rows, scored = ask_model(args, stem)
    result = {**describe(args, stem), "method": " ".join(METHOD.split()), "tasks": {}}
    for task in TASKS if args.task == "all" else [args.task]:
        own = [row for row in rows if row["task"] == task]
        for number, row in enumerate(own, 1):
            check_row(row, task, f"{stem}_answers.jsonl, question {number} of {task}")
        scores = SCORERS[task](own)
        file = args.data_dir / f"{task}_validation.jsonl"
        entry = {"rows": len(own), "data": describe_data(file, read_lines(file))}
        entry |= {"examples": own[0]["examples"], **scores}
        limits = intervals(task, own, scores)
        if with_choices := [row for row in scored if row["task"] == task]:
            likeliest = score_choices(with_choices)
            entry |= likeliest
            names = [name for name in likeliest if name.startswith("acc")]
            limits |= {name: wilson(likeliest[name], len(own)) for name in names}
        result["tasks"][task] = entry | {"intervals": limits}
    page = make_page(result)
    write(Path(f"{stem}.json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write(Path(f"{stem}.md"), page)
    print(f"{page}\nwritten         {stem}.json and {stem}.md")


def make_page(result):
    """Return the scores as a Markdown page."""
    how = "turns of the chat template" if result["apply_chat_template"] else "plain text"
    facts = f"{result['num_fewshot']}-shot, asked by {how}, at most {result['max_new_tokens']} "
    facts += f"new tokens, {result['precision']}, seed {result['seed']}"
    facts += f", --limit {result['limit']}" if result["limit"] else ""
    names = "Task|Score|Value|95 % interval|Commonest label|Questions|Unreadable".split("|")
    data = [entry["data"] for entry in result["tasks"].values()]
    data = [f"{d['file']} ({d['rows']:,} rows, sha256 {d['questions_sha256'][:12]})" for d in data]
    lines = [f"# JGLUE: {result['model']}", "", f"{facts}.", "", f"Data: {', '.join(data)}.", ""]
    lines += [row_of(names), "|---" * 7 + "|"]
    for task, entry in result["tasks"].items():
        for name, limits in entry["intervals"].items():
            span = " to ".join(map(number, limits)) if limits else "undefined"
            value, label = number(entry[name]), entry.get("commonest_label")
            unread = entry["unreadable"] if not name.startswith("acc_") and name != "acc" else ""
            cells = [task, name, value, span, "" if label is None else number(label)]
            lines.append(row_of([*cells, f"{entry['rows']:,}", unread]))
    ties = sum(entry.get("ties", 0) for entry in result["tasks"].values())
    if ties:
        lines += ["", f"{ties} questions had several likeliest choices; the first of them counts."]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*lines, "", f"{result['method']} {versions}."]) + "\n"


def row_of(cells):
    return f"| {' | '.join(map(str, cells))} |"


def number(value):
    return "undefined" if value is None else f"{value:.4f}"


def write(path, text):
    """Write a file under another name first, so that a killed run leaves no half of it."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror}). Name another --output_dir.")


# ---- The likeliest choice, and intervals ----


def score_choices(rows):
    """Return the accuracies of the likeliest choice: of its sum, and of that by its length."""
    right = {"acc": 0, "acc_norm": 0, "acc_per_token": 0}
    ties = 0
    for row in rows:
        choices, sums = row["answer_choices"], row["choice_logprobs"]
        pairs = list(zip(choices, sums, strict=True))
        ties += sums.count(max(sums)) > 1
        by_token = [a / n for a, n in zip(sums, row["choice_tokens"], strict=True)]
        values = {"acc": sums, "acc_norm": [a / len(text) for text, a in pairs]}
        for name, value in {**values, "acc_per_token": by_token}.items():
            right[name] += choices[value.index(max(value))] == row["completion"]
    return {"ties": ties, **{name: count / len(rows) for name, count in right.items()}}


def wilson(share, count):
    """Return Wilson's interval of a share of `count` independent questions."""
    square = 1.959964**2 / count
    middle, spread = share + square / 2, share * (1 - share) * square + square**2 / 4
    return [(middle - spread**0.5) / (1 + square), (middle + spread**0.5) / (1 + square)]


def bootstrap(score, *columns):
    """Return the percentiles of a score over 1,000 samples of the questions, or None.

    None where the score is undefined, or the same in all samples: they then say nothing.
    """
    import numpy as np

    columns = [np.asarray(column, dtype=np.float64) for column in columns]
    rng, count = np.random.default_rng(0), len(columns[0])
    samples = (rng.integers(count, size=count) for _ in range(1000))
    values = [score(*(column[sample] for column in columns)) for sample in samples]
    values = [value for value in values if value is not None]
    if len(values) < 950 or min(values) == max(values):
        return None
    return np.percentile(values, [2.5, 97.5]).tolist()


def intervals(task, rows, scores):
    """Return {name of a score: [low, high]} for the scores of generated answers."""
    if task == "jsquad":
        best = jsquad_values(rows)[2]
        exact = wilson(scores["exact_match"], len(rows))
        return {"exact_match": exact, "f1": bootstrap(lambda values: values.mean(), best)}
    if task != "jsts":
        return {"accuracy": wilson(scores["accuracy"], len(rows))}
    _, answers, golds = jsts_values(rows)
    by_rank = bootstrap(lambda a, b: correlation(ranks(a), ranks(b)), answers, golds)
    return {"pearson": bootstrap(correlation, answers, golds), "spearman": by_rank}
