"""The READMEs say the same in both languages, their commands do what they show, and what they
name is there.

Every page has ```bash blocks. Those of the Japanese pages are run, from the top README through the
lessons in order, in a copy of the repository; each page starts in the top directory. The ```text
block behind one is what it must print; below a line `<!-- test: first words -->` only the first
word of each line counts. A block that cannot run everywhere stands below a line
`<!-- test: skip REASON -->`; of those the job files, variables and options are checked. A command
that was run before is not run again: a repeated block must show the same output as text.
"""

import ast
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from conftest import load_script

ROOT = Path(__file__).resolve().parent.parent
TOP = (ROOT / "README.md").read_text(encoding="utf-8")
# In the order in which the top README lists them.
LESSONS = re.findall(r"^\[\*\*\d+\. [^\]]+\]\((\w+)/README\.md\)", TOP, re.M)
PAGES = ["README.md", *(f"{lesson}/README.md" for lesson in LESSONS)]
# Beside the lessons; run after them, and compared like them.
MORE = ["jobs/REPORT.md", "benchmarks/README.md", "benchmarks/GPU_CHECK.md"]
ENGLISH = {page: page.replace(".md", ".en.md") for page in [*PAGES, *MORE]}
BOTH = [*PAGES, *(ENGLISH[page] for page in PAGES)]
ALL = [*ENGLISH, *ENGLISH.values()]
PAIR = pytest.mark.parametrize("page", ENGLISH)
QUEUES = ("rt_HF", "rt_HG", "rt_HC")
ANYTHING = "(?:.*\n)*?"
# What may differ from run to run and from machine to machine, and what then fits in its place;
# "..." is anything.
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
VARYING = {
    r"\.\.\.": ".*",
    NUMBER: NUMBER,
    r"[^\x00-\x7f]+": r"[^\x00-\x7f]+",
    r"[ \t]+": r"[ \t]+",
}
# Lines that only a slow machine prints, every half a minute or so.
SLOW = re.compile(r"^(reading|answer) .*\n", re.M)


@dataclass
class Element:
    """A heading, paragraph, list item, table row or fenced block of a README."""

    kind: str  # "#", "##", ..., "paragraph", "item", "row 4" (number of bars), "```bash", ...
    line: int
    text: str
    mark: str | None = None  # what a test comment above it says


@functools.cache
def read(name):
    """The elements of a README, in order."""
    elements, mark, fence, before = [], None, None, ""
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
        elif line.strip() and before.strip() and elements[-1].kind in ("paragraph", "item"):
            elements[-1].text += "\n" + line
        elif line.strip():
            elements.append(Element("paragraph", number, line))
        before = line
    assert fence is None, f"{name}: the block of line {fence.line} has no end"
    return elements


def commands_of(name):
    """The blocks of commands."""
    return [element for element in read(name) if element.kind == "```bash"]


def prose_of(name):
    """Everything but headings and blocks."""
    return [element for element in read(name) if element.kind[0] not in "#`"]


def commands(block):
    """[(as it stands, its words)] of a bash block, without comments."""
    sources = re.findall(r"(?:.*\\\n)*.*\n", block.text)
    words = [shlex.split(source.replace("\\\n", " "), comments=True) for source in sources]
    return [pair for pair in zip(sources, words, strict=True) if pair[1]]


def links_of(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


# ---- (a) The pages have their form, and both languages say the same ----


def test_every_directory_is_a_lesson():
    known = {path.parent.name for path in ROOT.glob("*/job.sh")} | {"jobs", "deepspeed_configs"}
    assert sorted(LESSONS) == sorted(known - {"benchmarks"})


@pytest.mark.parametrize("name", ALL)
def test_pages_are_short(name):
    limit = 150 if "/" in name else 300
    lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
    assert lines <= limit, f"{name} has {lines} lines"


@pytest.mark.parametrize("number", range(len(LESSONS)))
def test_a_lesson_links_its_sibling_and_the_next_lesson(number):
    page, language = f"{LESSONS[number]}/README.md", {"README.md": "README.en.md"}
    language |= {"README.en.md": "README.md"}
    following = (*LESSONS, "")[number + 1]
    for name in (page, ENGLISH[page]):
        first, last = read(name)[1], read(name)[-1]
        assert links_of(first.text)[0] == language[Path(name).name], name
        assert links_of(last.text)[-1] == str(Path("..", following, Path(name).name)), name
        title = read(name)[0]
        assert title.kind == "#" and title.text.startswith(f"{number + 1}. "), name


@pytest.mark.parametrize("name", BOTH)
def test_a_page_leads_to_pages_of_its_language(name):
    others = [link for element in read(name) for link in links_of(element.text)]
    others = [link for link in others if "README" in link and Path(name).name not in link]
    assert len(others) == 1, f"{name}: {others} (one is the sibling at the top)"


@PAIR
def test_both_have_the_same_structure(page):
    one, two = read(page), read(ENGLISH[page])
    for a, b in zip(one, two, strict=False):
        assert a.kind == b.kind, f"line {a.line} ({a.text[:40]}) and line {b.line} ({b.text[:40]})"
    assert len(one) == len(two)


@PAIR
def test_both_show_the_same_commands_and_outputs(page):
    for a, b in zip(read(page), read(ENGLISH[page]), strict=True):
        if a.kind.startswith("```"):
            assert a.text == b.text, f"the blocks of line {a.line} and line {b.line}"
            assert a.mark == b.mark


def facts(text):
    """The numbers of two digits or more, the inline code and the links in a piece of prose."""
    bare = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    numbers = re.findall(r"(?<![A-Za-z0-9_.])\d[\d,.]*\d", bare)
    page = r"(README|REPORT|GPU_CHECK)(\.en)?(\.md)|#.*"
    links = [re.sub(page, r"\1", link) for link in links_of(text)]
    return Counter(re.findall(r"`[^`]+`", text) + links + numbers)


@PAIR
def test_both_name_the_same_numbers_code_and_links(page):
    for a, b in zip(prose_of(page), prose_of(ENGLISH[page]), strict=True):
        assert facts(a.text) == facts(b.text), f"line {a.line} and line {b.line}"


# ---- (b) The commands do what they show ----


@dataclass
class Run:
    """A block of commands that is run, and what of it."""

    page: str
    block: Element
    shown: Element | None  # the text behind it
    keys: tuple  # its commands, comparable between directories
    shell: str  # the commands that were not run before; empty: none is left
    is_whole: bool  # none of them was run before

    @property
    def place(self):
        return f"{self.page} line {self.block.line}"


def comparable(words, here):
    """The words of a command with their paths as seen from the top directory."""
    result = []
    for word in words:
        is_path = "/" in word or word.endswith((".py", ".sh"))
        result.append(os.path.relpath(here / word, ROOT) if is_path else word)
    return tuple(result)


@functools.cache
def plan():
    """The blocks without a skip mark as a list of Run, in order."""
    runs, done = [], set()
    for page in ENGLISH:
        here, elements = ROOT, read(page)
        for block, behind in zip(elements, [*elements[1:], None], strict=True):
            if block.kind != "```bash":
                continue
            shell, keys, is_whole = f"cd '{here.relative_to(ROOT)}'\n", [], True
            for source, words in commands(block):
                if words[0] in ("cd", "source"):  # they change the shell that runs the others
                    here = (here / words[1]).resolve() if words[0] == "cd" else here
                    shell += source
                    continue
                keys.append(comparable(words, here))
                is_new = keys[-1] not in done
                shell += source if is_new else ""
                is_whole &= is_new
            if block.mark:
                continue
            has_new = not done.issuperset(keys)
            done.update(keys)
            shown = behind if behind and behind.kind == "```text" else None
            runs.append(Run(page, block, shown, tuple(keys), shell if has_new else "", is_whole))
    return runs


@pytest.fixture(scope="module")
def python_server(tmp_path_factory):
    """(environment, shell text) for scripts whose imports are there already: warm_python.py."""
    folder = tmp_path_factory.mktemp("readme")
    ours = ("PBS_", "HF_", "CUDA_", "VENV", "CACHE_ROOT", "BUILD_CACHE", "MODEL", "ARGS", "GROUP")
    ours += ("OUTPUT", "TRAIN_FILE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    for name in ("HF_HOME", "CACHE_ROOT", "BUILD_CACHE"):
        environment[name] = str(folder / name.lower())
    # One thread: on a busy machine two wait for each other most of the time.
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
    environment |= {"OMP_NUM_THREADS": "1"}
    script, path = str(ROOT / "tests" / "warm_python.py"), folder / "socket"
    with subprocess.Popen([sys.executable, script, str(path)], env=environment) as server:
        while not path.exists() and server.poll() is None:
            time.sleep(0.1)
        client = shlex.join([sys.executable, "-S", script, str(path)])
        function = 'python() { if [[ $1 == *.py ]]; then %s "$@"; else command python "$@"; fi; }\n'
        yield environment, function % client
        server.terminate()


def run_shell(text, copy, python_server):
    """What the commands print, in one stream; they must succeed."""
    environment, function = python_server
    shell = ["bash", "-e", "-c", function + text]
    log = copy.parent / "log"
    with log.open("w") as file:
        streams = {"stdout": file, "stderr": file}
        status = subprocess.run(shell, cwd=copy, env=environment, timeout=600, **streams).returncode
    output = log.read_text(encoding="utf-8")
    assert status == 0, f"the last of these ended with {status}:\n{output[-3000:]}"
    return output


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, python_server):
    """Run what plan() says in a copy of the repository: (copy, {place: output})."""
    copy = tmp_path_factory.mktemp("run") / "copy"
    ignored = shutil.ignore_patterns(".*", "output", "__pycache__", "*.o[0-9]*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / ".venv").symlink_to(sys.prefix)
    text = ""
    for run in plan():
        text += f"echo '@@ {run.place}'\ncd '{copy}'\n{run.shell}\n" if run.shell else ""
    parts = re.split(r"^@@ (.+)\n", run_shell(text, copy, python_server), flags=re.M)[1:]
    return copy, dict(zip(parts[::2], parts[1::2], strict=True))


def pattern(line):
    """A regular expression for the lines of this shape: "..." alone is any number of lines."""
    if line == "...\n":
        return ANYTHING
    # split gives a text, and one group per kind, most of them None
    pieces = re.split("|".join(f"({varying})" for varying in VARYING), line.rstrip())
    width, fits = len(VARYING) + 1, list(VARYING.values())
    shape = ""
    for start in range(0, len(pieces), width):
        groups = pieces[start + 1 : start + width]
        kind = next((n for n, piece in enumerate(groups) if piece), None)
        shape += re.escape(pieces[start]) + (fits[kind] if kind is not None else "")
    return shape + "[ \t]*\n"


def patterns(text):
    return "".join(map(pattern, text.splitlines(keepends=True)))


def explain(shown, output):
    """The first line of the shown text that the output does not continue with."""
    lines = shown.splitlines(keepends=True)
    fits = [n for n in range(len(lines) + 1) if re.match(patterns("".join(lines[:n])), output)]
    return lines[max(fits)] if max(fits) < len(lines) else "(the output goes on)"


def test_the_shape_of_an_output_is_compared():
    shown = "loss 1.25  left 0:00:10\n...\nanswer 東京, file ...\n"
    right = "loss 2e-05 left 1:20:33\na\nb\nanswer 大阪, file x y\n"
    assert re.fullmatch(patterns(shown), right)
    for wrong in (right.replace(" 1:20:33", ""), right.replace("2e-05", "x")):
        assert not re.fullmatch(patterns(shown), wrong)
    assert explain(shown, right.replace("大阪", "Osaka")).startswith("answer")


def test_a_command_is_run_once():
    keys = [key for run in plan() for key in run.keys]
    sources = Counter(source for run in plan() for source in run.shell.splitlines(keepends=True))
    assert len(keys) > len(set(keys)) >= 15
    for run in plan():
        for source, words in commands(run.block):
            is_long = words[0] in ("python", "torchrun", "bash")
            assert sources[source.splitlines(keepends=True)[0]] <= 1 or not is_long, source


def test_a_repeated_block_shows_the_same_output():
    first = {}
    for run in plan():
        if run.is_whole:
            first[run.keys] = run
        elif run.shown:
            original = first.get(run.keys)
            assert original, f"{run.place}: repeats a part of another block, but shows an output"
            assert original.shown.text == run.shown.text, f"{run.place} and {original.place}"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="the outputs are of a machine without")
def test_commands_print_what_is_shown(outputs):
    compared = 0
    for run in plan():
        if not run.shown or not run.is_whole:
            continue
        output, shown = SLOW.sub("", outputs[1][run.place]), run.shown.text
        if run.shown.mark == "first words":
            assert first_words(output) == first_words(shown), output
        else:
            fits = re.fullmatch(patterns(shown), output)
            place = f"{run.page} line {run.shown.line}"
            assert fits, f"{place}: {explain(shown, output)!r} does not come in\n{output}"
        compared += 1
    assert compared >= 9


def first_words(text):
    """The first word of each line."""
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def test_the_edits_that_the_page_shows(outputs, python_server):
    """In a copy of the script alone in an empty folder, on a model with biases."""
    copy, _ = outputs
    page = read("finetune_full/README.md")
    form, biases = next(e.text for e in page if e.kind == "```python").split("\n\n")
    script = (ROOT / "finetune_full" / "finetune_full.py").read_text(encoding="utf-8")
    # The first edit replaces the line that begins alike, the second one goes above the return.
    line = form.splitlines()[1] + "\n"
    start, end = line[: line.index("[")], "    return model"
    (old,) = [other for other in script.splitlines(keepends=True) if other.startswith(start)]
    loading = re.search(r"^def load_model\(.*?^    return model", script, re.M | re.S)[0]
    assert loading.count(end) == 1
    script = script.replace(loading, loading.replace(end, f"{biases}{end}")).replace(old, line)
    (copy.parent / "alone").mkdir()
    (copy.parent / "alone" / "mine.py").write_text(script, "utf-8")
    output = run_shell(
        "source .venv/bin/activate\nMODEL_TYPE=gpt_neox bash tiny_model/job.sh\ncd ../alone\n"
        "python mine.py --model_name_or_path ../copy/tiny_model/output/gpt_neox --train_file "
        "../copy/jglue/output/jsquad_validation.jsonl --max_steps 2 --lr_scheduler_type cosine\n",
        copy,
        python_server,
    )
    assert "### 問題\\n題名" in output
    trained = int(re.search(r"parameters, ([\d,]+) of them trained", output)[1].replace(",", ""))
    assert 0 < trained < 10_000 and "done " in output


# ---- (c) What the commands that are not run name is there ----


@functools.cache
def options(script):
    """The options that a script takes: what --help names or, where that costs seconds, its
    dataclasses' fields."""
    text = script.read_text(encoding="utf-8")
    if "(TrainingArguments)" not in text:
        if "def main(argv=None)" in text:  # in this process, since some import torch
            with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
                load_script(script).main(["--help"])
            assert not stop.value.code
            return set(re.findall(r"--[a-z]\w*", out.getvalue()))
        command = [sys.executable, str(script), "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"--[a-z]\w*", text))
    from transformers import TrainingArguments

    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    lines = [line for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    names = [line.target.id for line in lines] + [field.name for field in fields(TrainingArguments)]
    return {f"--{name}" for name in names}


def launched(job):
    """The scripts that a job file starts; those of ../jobs/ know none of ARGS."""
    text = job.read_text(encoding="utf-8")
    names = re.findall(r"(?:python|\}\"|torchrun) ([\w./]+\.py)", text)
    return [job.parent / name for name in names if not name.startswith("../jobs/")]


def check_job(place, job, assignments):
    """A job file is there, knows the variables it is given, and its scripts the options in ARGS."""
    assert job.is_file(), f"{place}: {job} is not there"
    text = job.read_text(encoding="utf-8")
    text += (ROOT / "jobs" / "env.sh").read_text(encoding="utf-8")
    for name, value in assignments.items():
        is_known = re.search(rf"\b{name}\b", text) or name.startswith(("HF_", "CUDA_", "USE_SSH"))
        assert is_known, f"{place}: {job.name} does not know {name}"
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
    assigned = given.get("-v", [""])[0]
    variables = re.findall(r"""(\w+)=((?:"[^"]*"|'[^']*'|[^,])*)""", assigned)
    if "-I" in given:
        assert "-q" in given and any(value.startswith("select=") for value in given["-l"]), place
    else:
        assert len(words) == 1, f"{place}: qsub takes one file and no arguments: {words}"
        check_job(place, here / words[0], dict(variables))


def check_command(place, words, here):
    """The files of a command are there, and its script knows the options."""
    assignments = {}
    while words and (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0], re.S)):
        assignments[match[1]] = match[2]
        words = words[1:]
    script = next((word for word in words if word.endswith(".py")), None)
    if words[:1] == ["qsub"]:
        check_qsub(place, words[1:], here)
    elif words[:1] == ["bash"] and Path(words[1]).name.startswith("job"):
        arguments = {"ARGS": " ".join(words[2:])} if words[2:] else {}
        check_job(place, here / words[1], assignments | arguments)
    elif words[:1] == ["bash"]:
        file = words[1].removeprefix("abci_llm/")  # as which the top README clones it
        assert (here / file).is_file(), f"{place}: {words[1]}"
    elif script:
        assert (here / script).is_file(), f"{place}: {script}"
        given = {word for word in words[words.index(script) :] if word.startswith("--")}
        assert given <= options(here / script), f"{place}: {given - options(here / script)}"


def test_files_variables_and_options_of_all_commands_exist():
    seen = Counter()
    for page in ENGLISH:
        here = ROOT
        for block in commands_of(page):
            for _, words in commands(block):
                place = f"{page}, block of line {block.line}"
                seen[words[0]] += 1
                if words[0] == "cd":
                    here = (here / words[1]).resolve()
                    inside = ROOT in (here, *here.parents)
                    assert here.is_dir() and inside, f"{place}: cd {words[1]}"
                else:
                    check_command(place, words, here)
    assert seen["qsub"] >= 20 and seen["python"] >= 15, seen


# ---- (d) What the text names is there ----


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(name):
    return {slug(element.text) for element in read(name) if element.kind.startswith("#")}


@pytest.mark.parametrize("name", [*ALL, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    links = [link for element in read(name) for link in links_of(element.text)]
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link} is not there"
        if anchor:
            known = anchors(str(target.resolve().relative_to(ROOT)))
            assert anchor in known, f"{name}: {link} is no heading"
    assert links


def inline_code(name):
    texts = [(element.line, element.text) for element in prose_of(name)]
    return [(line, code) for line, text in texts for code in re.findall(r"`([^`]+)`", text)]


def named_files(name):
    """(line, word): the words in inline code that look like paths of ours."""
    suffixes = r"(/|\.(py|sh|json|jsonl|jinja|md|txt|ya?ml|toml|png))"
    path = re.compile(r"(\.\./)?[\w.-]+(/[\w.*-]+)*" + suffixes)
    words = [(line, word) for line, code in inline_code(name) for word in code.split()]
    return [(line, word) for line, word in words if path.fullmatch(word)]


@pytest.mark.parametrize("name", [*ALL, "CONTRIBUTING.md"])
def test_named_files_exist(name, outputs):
    copy, _ = outputs
    places = [ROOT, copy, *(copy / name for name in (*LESSONS, "benchmarks"))]
    written = [*copy.glob("*/output"), *copy.glob("*/output/*")]
    places += [path for path in written if path.is_dir()]
    for line, word in named_files(name):
        if "*" in word:
            is_there = any(any(place.glob(word)) for place in places)
        else:
            is_there = any((place / word).exists() for place in places)
        is_known = is_there or fill(word) or by_quickstart(word) or of_deepspeed(word)
        assert is_known, f"{name} line {line}: {word} is not there"


def fill(word):
    """Names with a part for the reader to fill in, such as TASK_train.jsonl."""
    return re.match(r"(.*/)?(TASK_|NAME|DIR|my\b|scores\.json)", word)


def by_quickstart(word):
    """What quickstart.sh, which this test does not run, writes under output/quickstart."""
    script = (ROOT / "quickstart.sh").read_text(encoding="utf-8")
    name = re.fullmatch(r"output/quickstart/(.+?)/?", word)
    return name and f"$OUT/{name[1]}" in script


def of_deepspeed(word):
    """A file of the package, named with the version that was read."""
    return word.startswith("runtime/")


@pytest.mark.parametrize("name", [*ALL, "CONTRIBUTING.md"])
def test_named_options_exist(name):
    scripts = [path for lesson in LESSONS for path in (ROOT / lesson).glob("*.py")]
    scripts = [path for path in scripts if "rgumentParser" in path.read_text(encoding="utf-8")]
    measuring = (ROOT / "benchmarks").glob("*.py")
    scripts += [path for path in measuring if "argparse" in path.read_text(encoding="utf-8")]
    known = set().union(*map(options, [*scripts, ROOT / "tests" / "check_copies.py"]))
    known |= {"--generation", "--apply_chat_template"}  # vLLM's --generation-config, lm_eval's
    known |= {
        "--nproc_per_node",
        "--standalone",
        "--help",
        "--nv",
    }  # torchrun, argparse, singularity
    for line, code in inline_code(name):
        unknown = set(re.findall(r"(?<![\w-])--[a-z]\w*", code)) - known
        assert not unknown, f"{name} line {line}: {unknown}"
