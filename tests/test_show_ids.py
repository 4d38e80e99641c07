"""show_ids.py on a hub name: the same files give the same answer as in a directory.

On directories: test_report.py.
"""

import json
import shutil

import pytest
from conftest import ROOT, load_script, make_tokenizer


@pytest.mark.parametrize("ends", [0, 5])  # <|endoftext|>, at which training ends; another token
def test_ends_of_a_hub_name_are_compared(ends, checkpoints, tmp_path, monkeypatch, capsys):
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--me--chatty" / "snapshots" / commit
    shutil.copytree(checkpoints["llama"], snapshot)
    (snapshot / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (tmp_path / "models--me--chatty" / "refs").mkdir()
    (tmp_path / "models--me--chatty" / "refs" / "main").write_text(commit)
    assert make_tokenizer().eos_token_id == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answers = []
    for name in ("me/chatty", str(snapshot)):
        with pytest.raises(SystemExit) as stop:
            words = ["--model_name_or_path", name, "--prompt", "水"]
            load_script(ROOT / "jobs" / "show_ids.py").main(words)
        out = capsys.readouterr().out
        answers.append((stop.value.code, out))
        assert ("does not end at <|endoftext|> (0)" in out) == (ends == 5) == stop.value.code
    assert answers[0] == answers[1]
