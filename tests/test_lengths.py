"""Scripts stay short enough to be read before they are copied; a limit is raised where it stands, on purpose."""

import ast
import subprocess

import pytest
from conftest import ROOT

# Physical lines; whatever is not named here may have 300. The aim for those that are named is
# 625, 705, 705, 505 and 300: a limit here goes down with each cut, and up only on purpose.
LIMITS = {
    "finetune_full/finetune_full.py": 638,
    "finetune_lora/finetune_lora.py": 725,
    "finetune_lastlayer/finetune_lastlayer.py": 741,
    "finetune_dpo/finetune_dpo.py": 331,
    "generate_text/generate_text.py": 550,
    "jglue/evaluate_jglue.py": 511,
    "generate_text/chat.py": 393,
    "generate_text/convert_tokenizer.py": 330,
    "finetune_lora/merge_lora.py": 355,
}
# Lines in which `diff` finds a script other than finetune_full.py: the lesson and little else.
DIFFERENCES = {
    "finetune_lora/finetune_lora.py": 120,
    "finetune_lastlayer/finetune_lastlayer.py": 130,
}
FILES = subprocess.run(
    ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
SCRIPTS = [file for file in FILES if not file.startswith(("tests/", "benchmarks/"))]


@pytest.mark.parametrize("file", SCRIPTS)
def test_lengths(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= LIMITS.get(file, 300), f"{file} has {len(lines)} lines"
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 45, f"{file}: {node.name} has {length} lines"


@pytest.mark.parametrize("file", DIFFERENCES)
def test_differences(file):
    command = ["diff", "finetune_full/finetune_full.py", file]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    changed = sum(line.startswith(("<", ">")) for line in out.splitlines())
    assert changed <= DIFFERENCES[file], f"{file}: {changed} lines differ"
