"""Test helper: many_runs.py SCRIPT RUNS.json calls SCRIPT's main() once for each list of arguments."""

import importlib
import json
import sys
from pathlib import Path

script, runs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
sys.argv = [str(script)]
sys.path.insert(0, str(script.parent))
module = importlib.import_module(script.stem)
for arguments in runs:
    module.main(arguments)
