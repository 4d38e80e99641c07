"""jobs/draw_loss.py: what it draws, under which names, and what it refuses."""

import json
import os
import sys
import warnings

import pytest
from conftest import ROOT, load_script
from matplotlib.figure import Figure

HISTORY = [
    {"step": 10, "loss": 3.5, "learning_rate": 1e-3},
    {"step": 20, "loss": 2.25},
    {"step": 20, "eval_loss": 2.5, "eval_perplexity": 12.2},
    {"step": 30, "loss": float("nan")},
    {"step": 30, "eval_loss": 2.0},
    {"step": 30, "train_loss": 2.8},
]
NAMES = ["a$\\x$b", "100%_#^{}", "$", "日本語の出力", "[1]*?~", "x" * 250, " "]


@pytest.fixture(scope="module")
def script():
    return load_script(ROOT / "jobs" / "draw_loss.py")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: (saved.append(a[0]), save(*a, **k))[1])
    return saved


def make_run(directory, history=HISTORY):
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"log_history": history})
    (directory / "trainer_state.json").write_text(text, encoding="utf-8")
    return directory


def refused(script, capsys, *arguments):
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    return err


def test_lines_and_names(script, figures, tmp_path, capsys):
    """Each logged loss at its step; a name is drawn as it stands, and no warning is given."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for name in NAMES:
            script.main([str(make_run(tmp_path / name))])
    assert [str(warning.message) for warning in given] == []
    assert capsys.readouterr().err == ""
    for name, figure in zip(NAMES, figures, strict=True):
        (axes,) = figure.axes
        title = axes.get_title()
        assert title == (f"{name}: loss" if len(name) < 60 else f"{'x' * 60}: loss")
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        assert drawn["validation"] == [[20, 2.5], [30, 2.0]]
        assert drawn["training"][:2] == [[10, 3.5], [20, 2.25]]
        assert (tmp_path / name / "loss.png").read_bytes().startswith(b"\x89PNG")
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"trainer_state.json", "loss.png"}


def test_paths_and_replacing(script, tmp_path, capsys, monkeypatch):
    """~, a link, a trailing slash and `.`; the second picture says that it replaces the first."""
    run = make_run(tmp_path / "run", HISTORY[:2])
    (tmp_path / "link").symlink_to(run)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run)
    script.main(["~/run"])
    assert capsys.readouterr().out == f"picture    {run}/loss.png: training loss\n"
    first = (run / "loss.png").read_bytes()
    make_run(run)
    for name, shown in ((f"{tmp_path}/link/", f"{tmp_path}/link/"), (".", "")):
        script.main([name])
        wanted = (
            f"picture    {shown}loss.png: training and validation loss; replaces the one before"
        )
        assert capsys.readouterr().out.strip() == wanted
    assert (run / "loss.png").read_bytes() != first


def test_since(script, tmp_path, capsys):
    """Losses that are older than the job are left alone, and so is their picture."""
    run = make_run(tmp_path / "run")
    os.utime(run / "trainer_state.json", (1000, 1000))
    for place in (run, tmp_path / "nowhere"):
        script.main([str(place), "--since", "1001"])
        assert capsys.readouterr().out.startswith("picture    none: this job wrote no ")
    assert not (run / "loss.png").exists()
    script.main([str(run), "--since", "1000"])
    assert (run / "loss.png").exists()


BAD_STATES = {
    "no JSON": "{",
    "a list": "[]",
    "no history": "{}",
    "null": '{"log_history": null}',
    "words": '{"log_history": ["loss"]}',
    "text for a loss": '{"log_history": [{"step": 1, "loss": "low"}]}',
    "no step": '{"log_history": [{"loss": 1.0}]}',
}


def test_what_cannot_be_drawn(script, tmp_path, capsys, monkeypatch):
    assert "nowhere/trainer_state.json cannot be read" in refused(
        script, capsys, tmp_path / "nowhere"
    )
    run = make_run(tmp_path / "run", [{"step": 1, "train_runtime": 1.0}])
    assert "holds no loss" in refused(script, capsys, run)
    for text in BAD_STATES.values():
        (run / "trainer_state.json").write_text(text)
        assert "trainer_state.json cannot be read" in refused(script, capsys, run)
    (run / "trainer_state.json").write_bytes(b"\xff\xfe\x00")
    assert "trainer_state.json cannot be read" in refused(script, capsys, run)
    make_run(run)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert "Type: pip install matplotlib" in refused(script, capsys, run)
    with monkeypatch.context() as patch:

        def full(*_, **__):
            (run / ".loss.partial.png").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        patch.setattr(Figure, "savefig", full)
        assert "cannot be written (No space left" in refused(script, capsys, run)
    assert [path.name for path in run.iterdir()] == ["trainer_state.json"]


def test_a_file_of_somebody_else_stays(script, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "loss.png").write_bytes(b"mine")
    assert "was not drawn by this program" in refused(script, capsys, run)
    assert (run / "loss.png").read_bytes() == b"mine"
    (run / "loss.png").unlink()
    (run / "loss.png").mkdir()
    assert "cannot be written" in refused(script, capsys, run)
