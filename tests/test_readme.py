"""The two READMEs say the same, their commands do what they show, and what they name is there.

A ```bash block is run, in order and in one shell, in a copy of the repository, and the ```text block behind it is what
it must print; below a line `<!-- test: first words -->` only the first word of each line counts. A block that cannot
run everywhere stands below a line `<!-- test: skip REASON -->`; of those the job files, variables and options are
checked.
"""

import ast
import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.en.md")
QUEUES = ("rt_HF", "rt_HG", "rt_HC")
LESSONS = sorted({path.parent.name for path in ROOT.glob("*/job.sh")})
ANYTHING = "(?:.*\n)*?"
# What may differ from run to run and from machine to machine, and what then fits in its place; "..." is anything.
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
VARYING = {r"\.\.\.": ".*", NUMBER: NUMBER, r"[^\x00-\x7f]+": r"[^\x00-\x7f]+", r"[ \t]+": r"[ \t]+"}

# Lines that only a slow machine prints, every half a minute or so.
SLOW = re.compile(r"^(reading|answer) .*\n", re.M)


@dataclass
class Element:
    """A heading, paragraph, list item, table row or fenced block of a README."""

    kind: str  # "#", "##", ..., "paragraph", "item", "row 4" (number of bars), "```bash", "```text", ...
    line: int
    text: str
    mark: str | None = None  # what a test comment above it says


@functools.cache
def read(name):
    """The elements of a README, in order."""
    elements, mark, fence = [], None, None
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").split("\n"), 1):
        if fence:
            if line == "```":
                elements.append(fence)
                fence = None
            else:
                fence.text += line + "\n"
        elif line.startswith("```"):
            fence, mark = Element(line, number, "", mark), None
        elif match := re.fullmatch(r"<!-- test: (skip .+|first words) -->", line):
            mark = match[1]
        elif line.startswith("|"):
            elements.append(Element(f"row {line.count('|')}", number, line))
        elif match := re.match(r"(#+) ", line):
            elements.append(Element(match[1], number, line[match.end() :]))
        elif re.match(r"([-*]|\d+\.) ", line):
            elements.append(Element("item", number, line))
        elif line.strip() and elements and elements[-1].kind in ("paragraph", "item") and follows(name, number):
            elements[-1].text += "\n" + line
        elif line.strip():
            elements.append(Element("paragraph", number, line))
    assert fence is None, f"{name}: the block of line {fence.line} has no end"
    return elements


@functools.cache
def lines_of(name):
    return (ROOT / name).read_text(encoding="utf-8").split("\n")


def follows(name, number):
    """Whether the line continues the one above it."""
    return bool(lines_of(name)[number - 2].strip())


def commands_of(name):
    """The blocks of commands."""
    return [element for element in read(name) if element.kind == "```bash"]


def prose_of(name):
    """Everything but headings and blocks."""
    return [element for element in read(name) if element.kind[0] not in "#`"]


def commands(block):
    """The command lines of a bash block as lists of words, without comments; continued lines are joined."""
    lines = block.text.replace("\\\n", " ").split("\n")
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# ---- (a) The two say the same ----


def test_both_have_the_same_structure():
    one, two = ([(element.kind, element) for element in read(name)] for name in READMES)
    for (kind_one, a), (kind_two, b) in zip(one, two, strict=False):
        assert kind_one == kind_two, f"line {a.line} ({a.text[:40]}) and line {b.line} ({b.text[:40]})"
    assert len(one) == len(two)


def test_both_show_the_same_commands_and_outputs():
    for a, b in zip(read(READMES[0]), read(READMES[1]), strict=True):
        if a.kind.startswith("```"):
            assert a.text == b.text, f"the blocks of line {a.line} and line {b.line}"
            assert a.mark == b.mark


def facts(text):
    """The numbers of two digits or more, the inline code and the addresses in a piece of prose."""
    numbers = re.findall(r"(?<![A-Za-z0-9_.])\d[\d,.]*\d", re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text))
    return Counter(re.findall(r"`[^`]+`", text) + re.findall(r"\]\((?!#|README)([^)]*)\)", text) + numbers)


def test_both_name_the_same_numbers_and_code():
    for a, b in zip(prose_of(READMES[0]), prose_of(READMES[1]), strict=True):
        assert facts(a.text) == facts(b.text), f"line {a.line} and line {b.line}"


# ---- (b) The commands do what they show ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run all bash blocks without a skip mark in a copy of the repository: (copy, {line: output})."""
    folder = tmp_path_factory.mktemp("readme")
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "output", "__pycache__", "*.o[0-9]*"))
    (copy / ".venv").symlink_to(sys.prefix)
    script = ""
    for block in commands_of(READMES[0]):
        if block.mark is None:
            script += f"echo '@@ {block.line}'\n{block.text}\n"
    (folder / "script.sh").write_text(script, encoding="utf-8")
    ours = ("PBS_", "HF_", "CUDA_", "VENV", "CACHE_ROOT", "BUILD_CACHE", "MODEL", "ARGS", "GROUP", "OUTPUT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {name: str(folder / name.lower()) for name in ("HF_HOME", "CACHE_ROOT", "BUILD_CACHE")}
    # One thread: on a busy machine two wait for each other most of the time.
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        shell = ["bash", "-e", str(folder / "script.sh")]
        status = subprocess.run(shell, cwd=copy, env=environment, stdout=log, stderr=log, timeout=600).returncode
    text = (folder / "log").read_text(encoding="utf-8")
    assert status == 0, f"the last of these ended with {status}:\n{text[-3000:]}"
    parts = re.split(r"^@@ (\d+)\n", text, flags=re.M)[1:]
    return copy, dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


def pattern(line):
    """A regular expression for the lines of this shape: "..." alone is any number of lines."""
    if line == "...\n":
        return ANYTHING
    pieces = re.split("|".join(f"({varying})" for varying in VARYING), line.rstrip())
    width, fits = (
        len(VARYING) + 1,
        list(VARYING.values()),
    )  # split gives a text, and one group per kind, most of them None
    shape = ""
    for start in range(0, len(pieces), width):
        kind = next((n for n, piece in enumerate(pieces[start + 1 : start + width]) if piece), None)
        shape += re.escape(pieces[start]) + (fits[kind] if kind is not None else "")
    return shape + "[ \t]*\n"


def explain(shown, output):
    """The first line of the shown text that the output does not continue with."""
    lines = shown.splitlines(keepends=True)
    good = max(n for n in range(len(lines) + 1) if re.match("".join(map(pattern, lines[:n])), output))
    return lines[good] if good < len(lines) else "(the output goes on)"


def test_the_shape_of_an_output_is_compared():
    shown = "loss 1.25  left 0:00:10\n...\nanswer 東京, file ...\n"
    assert re.fullmatch(
        "".join(map(pattern, shown.splitlines(True))), "loss 2e-05 left 1:20:33\na\nb\nanswer 大阪, file x y\n"
    )
    for wrong in ("loss 1.25  left\nanswer 東京, file x\n", "loss x left 0:00:10\nanswer 東京, file x\n"):
        assert not re.fullmatch("".join(map(pattern, shown.splitlines(True))), wrong)
    assert explain(shown, "loss 1 left 0:00:10\nanswer Tokyo, file x\n").startswith("answer")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="the outputs shown are of a machine without a GPU")
def test_commands_print_what_is_shown(run):
    compared = 0
    for block, shown in itertools.pairwise(read(READMES[0])):
        if (block.kind, shown.kind) == ("```bash", "```text") and block.mark is None:
            output = SLOW.sub("", run[1][block.line])
            if shown.mark == "first words":
                assert first_words(output) == first_words(shown.text), output
            else:
                expected = "".join(map(pattern, shown.text.splitlines(keepends=True)))
                missing = explain(shown.text, output)
                assert re.fullmatch(expected, output), f"line {shown.line}: {missing!r} does not come in\n{output}"
            compared += 1
    assert compared >= 6


def first_words(text):
    """The first word of each line."""
    return [line.split()[0] for line in text.splitlines() if line.strip()]


@functools.cache
def options(script):
    """The options that a script takes: what --help names or, where that costs seconds, its dataclasses' fields."""
    text = script.read_text(encoding="utf-8")
    if "(TrainingArguments)" not in text:
        text = subprocess.run(
            [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
        ).stdout
        return set(re.findall(r"--[a-z]\w*", text))
    from transformers import TrainingArguments

    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    names = [line.target.id for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    return {f"--{name}" for name in [*names, *(field.name for field in fields(TrainingArguments))]}


def launched(job):
    """The scripts that a job file starts; what launches them, ../jobs/run_ranks.py, knows none of ARGS."""
    names = re.findall(r"(?:python|\}\"|torchrun) ([\w./]+\.py)", job.read_text(encoding="utf-8"))
    return [job.parent / name for name in names if not name.startswith("../jobs/")]


def check_job(place, job, assignments):
    """A job file is there, knows the variables it is given, and its scripts know the options in ARGS."""
    assert job.is_file(), f"{place}: {job} is not there"
    text = job.read_text(encoding="utf-8") + (ROOT / "jobs" / "env.sh").read_text(encoding="utf-8")
    for name, value in assignments.items():
        known = re.search(rf"\b{name}\b", text) or name.startswith(("HF_", "CUDA_", "USE_SSH"))
        assert known, f"{place}: {job.name} does not know {name}"
        if name == "ARGS":
            allowed = set().union(*map(options, launched(job)))
            unknown = set(re.findall(r"--[a-z]\w*", value)) - allowed
            assert not unknown, f"{place}: no script of {job} knows {unknown}"


def check_qsub(place, words, here):
    """Options of a qsub line: group, queue, walltime, variables; its job file."""
    given = {}
    while words and words[0].startswith("-"):
        if words[0] in ("-I", "-IX"):
            given[words.pop(0)] = True
        else:
            given.setdefault(words[0], []).append(words[1])
            words = words[2:]
    assert "-P" in given, f"{place}: qsub without a group"
    assert len(given.get("-v", [])) < 2, f"{place}: only the last -v counts"
    assert set(given.get("-q", [])) <= set(QUEUES), f"{place}: unknown resource type"
    # PBS takes quotes inside a value away; a comma inside them does not end it.
    variables = re.findall(r"""(\w+)=((?:"[^"]*"|'[^']*'|[^,])*)""", given.get("-v", [""])[0])
    if "-I" in given:
        assert "-q" in given and any(value.startswith("select=") for value in given["-l"]), place
    else:
        assert len(words) == 1, f"{place}: qsub takes one file and no arguments: {words}"
        check_job(place, here / words[0], dict(variables))


@pytest.mark.parametrize("name", READMES)
def test_files_variables_and_options_of_all_commands_exist(name):
    here, seen = ROOT, Counter()
    for block in commands_of(name):
        for words in commands(block):
            place = f"{name}, block of line {block.line}"
            assignments = {}
            while words and (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0], re.S)):
                assignments[match[1]] = match[2]
                words.pop(0)
            seen[words[0] if words else "="] += 1
            if words[:1] == ["cd"]:
                here = (here / words[1]).resolve()
                assert here.is_dir() and ROOT in (here, *here.parents), f"{place}: cd {words[1]}"
            elif words[:1] == ["qsub"]:
                check_qsub(place, words[1:], here)
            elif words[:1] == ["bash"] and Path(words[1]).name.startswith("job"):
                arguments = " ".join(words[2:])
                check_job(place, here / words[1], assignments | ({"ARGS": arguments} if arguments else {}))
            elif words[:1] == ["bash"]:
                assert (here / words[1]).is_file(), f"{place}: {words[1]}"
            elif script := next((word for word in words if word.endswith(".py")), None):
                assert (here / script).is_file(), f"{place}: {script}"
                given = {word for word in words[words.index(script) :] if word.startswith("--")}
                assert given <= options(here / script), f"{place}: {given - options(here / script)}"
    assert seen["qsub"] >= 8 and seen["python"] >= 5 and here == ROOT, (seen, here)


# ---- (c) What they name is there ----


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    anchors = {slug(element.text) for element in read(name) if element.kind.startswith("#")}
    links = [link for element in read(name) for link in re.findall(r"\]\(([^)\s]+)\)", element.text)]
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, f"{name}: {link} is no heading"
        elif not link.startswith("https://"):
            assert (ROOT / link.split("#")[0]).exists(), f"{name}: {link} is not there"
    assert links or name == "CONTRIBUTING.md"


def inline_code(name):
    return [(element.line, code) for element in prose_of(name) for code in re.findall(r"`([^`]+)`", element.text)]


def named_files(name):
    """(line, word): the words in inline code that look like paths of ours."""
    path = r"(\.\./)?[\w.-]+(/[\w.*-]+)*(/|\.(py|sh|json|jsonl|md|txt|ya?ml|toml|png))"
    return [(line, word) for line, code in inline_code(name) for word in code.split() if re.fullmatch(path, word)]


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md"])
def test_named_files_exist(name, run):
    places = [run[0], *(run[0] / lesson for lesson in (*LESSONS, "jobs", "deepspeed_configs"))]
    places += [path for path in [*run[0].glob("*/output"), *run[0].glob("*/output/*")] if path.is_dir()]
    count = 0
    for line, word in named_files(name):
        there = any(any(place.glob(word)) if "*" in word else (place / word).exists() for place in [ROOT, *places])
        assert there or fill(word) or by_quickstart(word), f"{name} line {line}: {word} is not there"
        count += 1
    assert count


def fill(word):
    """Names with a part for the reader to fill in, such as TASK_train.jsonl."""
    return re.match(r"(.*/)?(TASK_|NAME|DIR|my\b)", word)


def by_quickstart(word):
    """What quickstart.sh, which this test does not run, writes under output/quickstart."""
    script = (ROOT / "quickstart.sh").read_text(encoding="utf-8")
    name = re.fullmatch(r"output/quickstart/(.+?)/?", word)
    return name and f"$OUT/{name[1]}" in script


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md"])
def test_named_options_exist(name):
    scripts = [path for lesson in LESSONS for path in (ROOT / lesson).glob("*.py")]
    known = set().union(*map(options, [*scripts, ROOT / "tests" / "check_copies.py"]))
    known |= {"--nproc_per_node", "--standalone", "--help"}  # torchrun's; argparse's
    for line, code in inline_code(name):
        unknown = set(re.findall(r"(?<![\w-])--[a-z]\w*", code)) - known
        assert not unknown, f"{name} line {line}: {unknown}"
