#!/usr/bin/env python3
"""Show what trainings did, side by side: OUTPUT_DIR... -> report.md and report.png in the first.

What was trained, on what, how long, with how much memory, what it scored, and what was logged over
the steps. Also of a run that is still training or was cut off. Without matplotlib: no picture.

By hand       python ../jobs/report.py output
A sweep       python ../jobs/report.py output/my/* --output_file sweep.md
"""

import argparse
import functools
import logging
import math
import os
import warnings
from pathlib import Path

import yaml
from read_run import count_rows, is_number, read_run, show
from run_common import check, fail

SIGNATURE = "written by report.py"  # in each page and picture; a file without it is somebody else's
# Of what was logged, this is drawn first and the rest by name, as far as there is room.
FIRST = """loss rewards/margins rewards/accuracies reward kl completions/mean_length learning_rate
  tokens_per_second grad_norm""".split()
PANELS = 12
CROWD = 10  # more runs than this: validation gets panels of its own, and all get other colours
LOSSES = {"dpo": "DPO loss", "grpo": "GRPO loss"}  # of the others: per learned token
# Fonts with Japanese, for names; where there is none, boxes stand in their place.
FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic"]
WIDEST = 60  # characters of a name in the picture
SIDE_BY_SIDE = 4  # runs as columns; more of them become lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output_dir", nargs="+", help="the --output_dir of a training; several")
    where = "where the page goes (NAME.md; the picture: NAME.png). Default: OUTPUT_DIR/report.md"
    parser.add_argument("--output_file", help=where)
    args = parser.parse_args(argv)
    paths = list(dict.fromkeys(Path(os.path.expanduser(path)) for path in args.output_dir))
    for path in paths:
        check(path.exists(), f"{path} does not exist. Name the --output_dir of a training.")
    directories = [path for path in paths if path.is_dir()]  # output/* names files as well
    check(directories, f"{paths[0]} is no directory. Name the --output_dir of a training.")
    page = Path(os.path.expanduser(args.output_file or directories[0] / "report.md"))
    check(page.suffix == ".md", f"--output_file {page} must end in .md.")
    runs = [read_run(path) for path in directories]
    has_any = any(run["scores"] or run["facts"]["status"] != "nothing here" for run in runs)
    check(has_any, f"{directories[0]} holds no training. Name the --output_dir of one.")
    for number, (run, name) in enumerate(zip(runs, short_names(directories), strict=True), 1):
        run["label"] = f"{number}: {name}" if len(runs) > 1 else name
    picture = page.with_suffix(".png")
    for path in (page, picture):
        check_ours(path)
    note = write(picture, functools.partial(draw, runs))
    write(page, lambda path: path.write_text(make_page(runs, picture, note), "utf-8"))
    print(f"page       {page}")
    print(f"picture    {picture}: {note}" if picture.exists() else f"picture    none: {note}")


def check_ours(path):
    """Refuse to write over a file of somebody else."""
    problem = f"{path} was not written by this program. Rename it, or name an --output_file."
    try:
        check(not path.exists() or SIGNATURE.encode() in path.read_bytes(), problem)
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror}). Name another --output_file.")


def write(path, fill):
    """Let fill(path) write a file beside it and put that in its place; return what it says."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        note = fill(partial)
        if partial.exists():
            partial.replace(path)
        else:
            path.unlink(missing_ok=True)  # an earlier picture would be a wrong one
        return note
    except OSError as error:
        return fail(f"{path} cannot be written ({error.strerror}). Name another --output_file.")
    finally:
        partial.unlink(missing_ok=True)


def short_names(directories):
    """The names without what all of them begin with; of a single one, its last part."""
    whole = [path.resolve() for path in directories]
    start = os.path.commonpath(whole) if len(set(whole)) > 1 else whole[0].parent
    return [os.path.relpath(path, start) for path in whole]


# ---- The page ----


def make_page(runs, picture, note):
    """The Markdown text."""
    lines = [f"<!-- {SIGNATURE}, which writes it anew -->", "# Report of trainings", ""]
    table, same = make_table(runs)
    lines += ["## What was trained", "", *draw_table(table), ""]
    if same:
        same = "; ".join(f"{name} {plain(text)}" for name, text in same.items())
        lines += [f"In all of them: {same}.", ""]
    files = {}
    for number, run in enumerate(runs, 1):
        for file in run["files"]:
            files.setdefault(describe(file, run), []).append(str(number))
    if files:
        table = [["use", "file", "size", "rows", "sha256", "runs"]]
        table += [[*file, ", ".join(numbers)] for file, numbers in files.items()]
        if len(runs) == 1:
            table = [row[:-1] for row in table]
        lines += ["## On what", "", *draw_table(table), ""]
    link = f"![What was logged](<{picture.name}>)\n\n{plain(note)}."
    lines += ["## Over the steps", "", link if picture.exists() else f"No picture: {note}.", ""]
    lines += arguments_of(runs)
    notes = [note for run in runs for note in run["notes"]]
    if len({LOSSES.get(run["kind"]) for run in runs if run["curves"]}) > 1:
        notes.append("losses of different methods measure different things: compare scores")
    if notes:
        lines += ["## Notes", "", *(f"- {plain(note)}" for note in notes), ""]
    return "\n".join(lines)


def describe(entry, run):
    """(use, name, size, rows, sha256) of a data file as recorded; rows if it is still the same."""
    name, digest, size = (entry.get(key) for key in ("file", "sha256", "bytes"))
    rows = None
    if path := locate(str(name), Path(run["facts"]["directory"]), run["given"]):
        rows, found = count_rows(path, path.stat().st_mtime_ns)
        rows = "changed since" if found != digest else rows and f"{rows:,}"
    size = f"{size / 1e6:,.1f} MB" if is_number(size) and size >= 1e5 else f"{show(size)} bytes"
    return entry.get("use", "train"), str(name), size, rows, str(digest)[:12]


def locate(name, directory, given):
    """A relative path starts where the run was started, which its output_dir tells; or here."""
    starts, whole = [Path()], directory.resolve().parts
    part = Path(str(given.get("output_dir", ""))).parts
    if part and whole[-len(part) :] == part:
        starts.insert(0, Path(*whole[: -len(part)]))
    return next((start / name for start in starts if (start / name).is_file()), None)


def make_table(runs):
    """(the facts, runs as columns; of many, as lines, {name: text} of what all have alike)."""
    found = [{**run["facts"], **run["scores"]} for run in runs]
    names = dict.fromkeys(
        name for part in ("facts", "scores") for run in runs for name in run[part]
    )
    names = [name for name in names if any(one.get(name) for one in found)]
    if len(runs) <= SIDE_BY_SIDE:
        lines = [[name, *(one.get(name) for one in found)] for name in names]
        return [["run", *(run["label"] for run in runs)], *lines], {}
    same = {name: found[0].get(name) for name in names}
    same = {n: v for n, v in same.items() if all(one.get(n) == v for one in found)}
    names = [name for name in names if name not in same]
    lines = [[run["label"], *map(one.get, names)] for run, one in zip(runs, found, strict=True)]
    return [["run", *names], *lines], same


def arguments_of(runs):
    """The arguments of a single run, or those in which several differ."""
    if len(runs) == 1:
        if not runs[0]["given"]:
            return []
        text = yaml.safe_dump(runs[0]["given"], sort_keys=False, allow_unicode=True)
        return ["## Arguments (all others: their defaults)", "", "```yaml", text + "```", ""]
    runs = [run for run in runs if run["given"]]
    table = [["run"], *([run["label"]] for run in runs)]
    for name in dict.fromkeys(name for run in runs for name in run["given"]):
        values = [run["given"].get(name) for run in runs]
        if name != "output_dir" and any(value != values[0] for value in values):
            for row, value in zip(table, [name, *values], strict=True):
                row.append(value)
    has_any = len(table) > 1 and len(table[0]) > 1
    if len(runs) <= SIDE_BY_SIDE:
        table = [list(line) for line in zip(*table, strict=True)]
    return ["## Arguments in which they differ", "", *draw_table(table), ""] * has_any


def draw_table(table):
    """Lines of a Markdown table."""
    cells = [["–" if cell in (None, "") else plain(cell) for cell in row] for row in table]
    rows = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return [f"| {' | '.join(row)} |" for row in rows]


def plain(text):
    """A text that Markdown shows as it stands, in one line."""
    text = " ".join(str(text).split())
    for sign in "\\`*<|[":
        text = text.replace(sign, f"\\{sign}")
    return text


# ---- The picture ----


def draw(runs, path):
    """Draw what was logged, a panel each; return a line about it."""
    panels = make_panels(runs)
    if not panels:
        return "nothing was logged"
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word about caches and fonts
    warnings.filterwarnings("ignore", "Glyph .* missing")  # of Japanese names; boxes will do
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"matplotlib does not load ({error}). Type: pip install matplotlib"
    names, left_out = list(panels)[:PANELS], list(panels)[PANELS:]
    columns = min(len(names), 2 if len(names) <= 4 else 3)
    lines, label = math.ceil(len(names) / columns), max(len(run["label"]) for run in runs)
    in_a_line = max(1, int(5 * columns / (0.6 + 0.08 * min(label, WIDEST))))  # of the legend
    legend = 0.19 * math.ceil(len(runs) / in_a_line) if len(runs) > 1 else 0
    palette = matplotlib.colormaps["turbo" if len(runs) > CROWD else "tab10"]
    colours = [palette(n / (len(runs) - 1) if len(runs) > CROWD else n) for n in range(len(runs))]
    with matplotlib.rc_context({"font.family": FONTS}):
        figure = Figure(figsize=(5 * columns, 3 * lines + legend), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes in grid[len(names) :]:
            axes.remove()
        for axes, name in zip(grid, names, strict=False):
            draw_panel(axes, name, panels[name], colours)
        add_names(figure, runs, colours, in_a_line)
        figure.savefig(path, dpi=110, metadata={"Software": SIGNATURE})
    note = f"{len(names)} panels of {len(runs)} run{'s' * (len(runs) > 1)}"
    return f"{note}; not drawn: {', '.join(left_out)}" if left_out else note


def make_panels(runs):
    """{title: [(number of the run, is it of an evaluation, points), ...]} in the order drawn."""
    panels, places = {}, {}
    for number, run in enumerate(runs):
        for name, points in run["curves"].items():
            title, is_evaluation = name.removeprefix("eval_"), name.startswith("eval_")
            place = FIRST.index(title) if title in FIRST else len(FIRST)
            if title == "loss":
                title = LOSSES.get(run["kind"], "loss per learned token (nats)")
            elif place == len(FIRST) and len({value for _, value in points}) == 1:
                place += 1  # it never changed: last
            title = title.replace("tokens_per_second", "tokens/s").replace("_", " ")
            if is_evaluation and len(runs) > CROWD:
                title, is_evaluation = f"validation: {title}", False
            places[title] = min(places.get(title, (place, title)), (place, title))
            panels.setdefault(title, []).append((number, is_evaluation, points))
    return {title: panels[title] for title in sorted(panels, key=places.get)}


def draw_panel(axes, title, lines, colours):
    """One logged value of all runs; what is not finite leaves a gap."""
    for number, is_evaluation, points in lines:
        steps = [step for step, _ in points]
        values = [value if math.isfinite(value) else math.nan for _, value in points]
        form = {"color": colours[number], "linewidth": 1.2, "markersize": 3}
        axes.plot(
            steps, values, "o--" if is_evaluation else "-" if len(steps) > 40 else ".-", **form
        )
    if any(is_evaluation for _, is_evaluation, _ in lines):
        title += "  (dashed: validation)"
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel("step", fontsize=9)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def add_names(figure, runs, colours, in_a_line):
    """The run's name above, or a legend of several below."""
    from matplotlib.lines import Line2D

    labels = [run["label"] for run in runs]
    labels = [f"{n[:5]}…{n[5 - WIDEST :]}" if len(n) > WIDEST else n for n in labels]
    labels = [label.replace("$", r"\$") for label in labels]  # no formulas
    if len(runs) == 1:
        figure.suptitle(labels[0], fontsize=11)
        return
    handles = [Line2D([], [], color=colour) for colour in colours]
    shown = [n for n, run in enumerate(runs) if run["curves"]]
    handles, labels = [handles[n] for n in shown], [labels[n] for n in shown]
    place = {"loc": "outside lower center", "ncols": in_a_line, "fontsize": 9}
    figure.legend(handles, labels, **place)


if __name__ == "__main__":
    main()
