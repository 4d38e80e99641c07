#!/usr/bin/env bash
# Runs all tests: bash run_tests.sh [arguments for pytest]. Installs first what they need, into .venv (VENV=DIR: elsewhere).
set -uo pipefail
CDPATH='' cd "$(dirname "$0")" || exit 2
# A broken environment is mended by setup_venv.sh; where nothing changed it is a matter of seconds.
bash jobs/setup_venv.sh || exit
VENV=${VENV:-$PWD/.venv}
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt || exit
for program in shellcheck mpirun; do # without mpirun its tests are left out
  command -v "$program" >/dev/null && continue
  package=${program/mpirun/openmpi-bin}
  echo "$program is not installed; trying apt-get install $package" >&2
  { apt-get install -y -qq "$package" || { apt-get update -qq && apt-get install -y -qq "$package"; }; } >/dev/null 2>&1
done

status=0
step() { echo "== $1" && shift && "$@" || status=1; }
step "ruff check" "$VENV/bin/ruff" check .
step "ruff format" "$VENV/bin/ruff" format --check .
mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
if command -v shellcheck >/dev/null; then
  step "shellcheck" shellcheck -x "${scripts[@]}"
else
  echo "error: shellcheck could not be installed. As root: apt-get install shellcheck" >&2
  status=1
fi
step "copies" "$VENV/bin/python" tests/check_copies.py
# Whole files side by side: most tests use one core, and models made for a file are made once.
step "pytest" "$VENV/bin/python" -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile "$@"
exit "$status"
