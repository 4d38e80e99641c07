"""Scripts stay short enough to be read before they are copied; a limit is raised where it stands, on purpose."""

import ast
import subprocess

import pytest
from conftest import ROOT

# Physical lines; whatever is not named here may have 300.
LIMITS = {
    "finetune_full/finetune_full.py": 560,
    "finetune_lora/finetune_lora.py": 640,
    "finetune_lastlayer/finetune_lastlayer.py": 640,
    "generate_text/generate_text.py": 440,
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
