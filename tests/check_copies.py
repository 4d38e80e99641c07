#!/usr/bin/env python3
"""Compare every marked copy in the repository's Python files with its original.

A mark is a comment line `# Copied from DIR/FILE.py` directly above a top-level function, class or
assignment. What stands below it must be, byte for byte, the object of the same name in that file.
With `, down to the next headline` behind it, that holds for all that follows as far as the next
comment line `# ---- ... ----`: it must be what stands there from that object on in the original.
Exit code 1 when one differs.

By hand       python tests/check_copies.py            (--fix writes the differing copies again)
"""

import argparse
import ast
import difflib
import io
import os
import sys
import tokenize
from pathlib import Path

MARK, REST, HEADLINE = "# Copied from ", ", down to the next headline", "# ---- "


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--fix", action="store_true", help="Write the differing copies again from their originals."
    )
    parser.add_argument(
        "--root", default=Path(__file__).resolve().parent.parent, type=Path, help="Where to look."
    )
    args = parser.parse_args(argv)
    count, problems = 0, 0
    for path in python_files(args.root):
        copies, left = check_file(args.root, path, args.fix)
        count, problems = count + copies, problems + left
    if problems:
        print(f"{problems} of {count} copies differ or have no original", file=sys.stderr)
        raise SystemExit(1)
    print(f"{count} copies agree with their originals")


def python_files(root):
    """All *.py files below root, outside hidden directories and output/."""
    for directory, names, files in os.walk(root):
        names[:] = sorted(
            name
            for name in names
            if not name.startswith(".") and name not in ("output", "__pycache__")
        )
        yield from (Path(directory, name) for name in sorted(files) if name.endswith(".py"))


def check_file(root, path, fix):
    """Report the file's differing copies, or rewrite them; return (copies, copies left wrong)."""
    text, wrong = path.read_text(encoding="utf-8"), 0
    try:
        marks, lines, objects = find_marks(text), list(io.StringIO(text)), top_level(text)
    except (SyntaxError, tokenize.TokenError) as error:
        print(f"error: {path.relative_to(root)} is no Python: {error}")
        return 0, 1
    for line, source in reversed(
        marks
    ):  # from the end, so that a rewrite moves no mark that is still to come
        place = f"{path.relative_to(root)}:{line}"
        found = next(((name, *span) for name, span in objects.items() if span[0] == line), None)
        if found is None:
            print(f"error: {place}: no function, class or assignment directly below the mark")
            wrong += 1
            continue
        name, start, end = found
        original = read_object(root / source.removesuffix(REST), name, source.endswith(REST))
        if source.endswith(REST):
            source, end = source.removesuffix(REST), end_of_section(lines, start)
        if original is None:
            print(f"error: {place}: {source} has no {name} to compare with")
            wrong += 1
        elif original != lines[start:end] and fix:
            print(f"{place}: {name} written again from {source}")
            lines[start:end] = original
            path.write_text("".join(lines), encoding="utf-8")
        elif original != lines[start:end]:
            print(f"{place}: {name} differs from {source}")
            print(
                "".join(
                    difflib.unified_diff(
                        original, lines[start:end], source, str(path.relative_to(root)), n=1
                    )
                )
            )
            wrong += 1
    return len(marks), wrong


def find_marks(text):
    """[(line number, named file)] of the marks: real comments only, not the word in a string."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        (token.start[0], token.string[len(MARK) :].strip())
        for token in tokens
        if token.type == tokenize.COMMENT and token.string.startswith(MARK)
    ]


def top_level(text):
    """{name: (first, behind the last)} line indices of a module's objects."""
    objects = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            objects[node.name] = (first - 1, node.end_lineno)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                objects[target.id] = (node.lineno - 1, node.end_lineno)
    return objects


def end_of_section(lines, start):
    """The index of the next headline's line, or behind the last line."""
    ends = (i for i in range(start, len(lines)) if lines[i].startswith(HEADLINE))
    return next(ends, len(lines))


def read_object(path, name, and_rest=False):
    """The lines of a top-level object, and of the section's rest; None where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        lines, (start, end) = list(io.StringIO(text)), top_level(text)[name]
        return lines[start : end_of_section(lines, start) if and_rest else end]
    except (OSError, SyntaxError, KeyError):
        return None


if __name__ == "__main__":
    main()
