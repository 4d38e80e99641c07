"""The comparison of marked copies finds what differs, mends it, and says what it cannot compare."""

import subprocess
import sys

import check_copies
import pytest
from conftest import ROOT

ORIGINAL = '''"""Says # Copied from a/a.py without being a mark."""
TABLE = {
    "a": 1,
}


@str
def name():
    return "\\u2028 # Copied from a/a.py"


class Thing:
    x = 1  # why
'''
MARK = "# Copied from a/a.py\n"


def parts(text):
    """The three objects of the original, as they stand in the file."""
    table, rest = text.split("\n\n\n@str")
    name, thing = ("@str" + rest).split("\n\n\nclass")
    return [table.split('"""\n')[-1] + "\n", name + "\n", "class" + thing]


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.py").write_text(ORIGINAL)
    table, name, thing = parts(ORIGINAL)
    (tmp_path / "b.py").write_text(
        "import a\n" + MARK + table + "\n" + MARK + name + "own = 1\n" + MARK + thing
    )
    for hidden in (".venv", "output"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "c.py").write_text("# Copied from gone.py\nx = 1\n")
    return tmp_path


def check(tree, capsys, *more):
    try:
        check_copies.main(["--root", str(tree), *more])
        code = 0
    except SystemExit as leave:
        code = leave.code
    return code, capsys.readouterr().out


def test_all_agree(tree, capsys):
    assert check(tree, capsys) == (0, "3 copies agree with their originals\n")


@pytest.mark.parametrize(
    ("old", "new", "line", "name"),
    [
        ('"a": 1', '"a": 2', 2, "TABLE"),
        ("@str\n", "", 7, "name"),
        ("# why", "#  why", 12, "Thing"),
        ("x = 1", "x = 1\n    y = 2", 12, "Thing"),
    ],
)
def test_a_broken_copy_is_found_and_mended(tree, capsys, old, new, line, name):
    good = (tree / "b.py").read_text()
    (tree / "b.py").write_text(good.replace(old, new, 1))
    code, out = check(tree, capsys)
    assert (
        code == 1 and out.startswith(f"b.py:{line}: {name} differs from a/a.py\n") and "\n@@" in out
    )
    assert (tree / "b.py").read_text() != good  # looked at, not touched
    code, out = check(tree, capsys, "--fix")
    assert code == 0 and f"{name} written again" in out
    assert (tree / "b.py").read_text() == good


def test_several_broken_copies_are_mended_at_once(tree, capsys):
    good = (tree / "b.py").read_text()
    (tree / "b.py").write_text(
        good.replace('    "a": 1,\n', "")
        .replace("@str\n", "@str\n@str\n")
        .replace("x = 1", "x = 2")
    )
    assert check(tree, capsys)[0] == 1
    assert check(tree, capsys, "--fix")[0] == 0
    assert (tree / "b.py").read_text() == good


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "# Copied from a/a.py\nTABLE",
            "# Copied from a/gone.py\nTABLE",
            "b.py:2: a/gone.py has no TABLE",
        ),
        ("def name", "def nome", "b.py:7: a/a.py has no nome"),
        ("a/a.py\nclass", "a/a.py\n\nclass", "directly below the mark"),
        (
            "own = 1",
            "def own():\n    # Copied from a/a.py\n    return 1",
            "directly below the mark",
        ),
        ("own = 1", "own = (", "b.py is no Python"),
    ],
)
def test_what_cannot_be_compared_is_an_error_that_fix_leaves(tree, capsys, old, new, message):
    (tree / "b.py").write_text((tree / "b.py").read_text().replace(old, new, 1))
    before = (tree / "b.py").read_text()
    for more in ([], ["--fix"]):
        code, out = check(tree, capsys, *more)
        assert code == 1 and "error: " in out and message in out
    assert (tree / "b.py").read_text() == before


def test_this_repository():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "tests" / "check_copies.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert int(result.stdout.split()[0]) >= 10
    assert "torch" not in result.stderr and "transformers" not in result.stderr


def test_the_rest_of_a_section(tmp_path, capsys):
    """One mark for all that follows, as far as the next headline and no further."""
    section = "def f():\n    return 1\n\n\ndef g():\n    return 2\n\n\n"
    original = f"# ---- 1. One ----\n\n\n{section}# ---- 2. Two ----\n\nx = 1\n"
    mark = "# Copied from a.py, down to the next headline\n"
    (tmp_path / "a.py").write_text(original)
    copy = original.replace("def f", mark + "def f").replace("x = 1", "x = 2")
    (tmp_path / "b.py").write_text(copy)
    assert check(tmp_path, capsys) == (0, "1 copies agree with their originals\n")
    (tmp_path / "b.py").write_text(copy.replace("return 2", "return 3"))
    code, out = check(tmp_path, capsys)
    assert code == 1
    assert "b.py:4: f differs from a.py" in out and "return 3" in out
    assert check(tmp_path, capsys, "--fix")[0] == 0
    assert (tmp_path / "b.py").read_text() == copy
