#!/bin/bash
# Make the virtual environment that every job uses (../.venv), install ../requirements.txt into it, and check it:
#   bash jobs/setup_venv.sh
# Run it on a login node (or anywhere with a network). Run again, it installs only what is missing and checks the rest.
# Variables: VENV (where), PYTHON (which Python makes it), and those of env.sh.
[[ -z ${VENV:-} || $VENV == [/~]* ]] || VENV=$PWD/$VENV
CDPATH='' cd -- "$(dirname -- "$0")" || exit 2
NEED_VENV=no source ./env.sh || exit

fail() {
  echo "error: $*" >&2
  exit 2
}

PYTHON=${PYTHON:-python3}
if [[ ! -x $VENV/bin/python ]]; then
  hint="Set PYTHON to a Python 3.11 or newer (on ABCI: PYTHON_MODULE to a module of one)"
  version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "there is no $PYTHON here. $hint"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$PYTHON is Python $version, which the packages do not support. $hint"
  echo "make      $VENV with Python $version"
  output=$("$PYTHON" -m venv "$VENV" 2>&1) || {
    rm -rf -- "$VENV" # half an environment would be taken for a whole one the next time
    fail "cannot make $VENV ($(tail -1 <<<"$output")). On Debian and Ubuntu: apt install python3-venv; else: df -h"
  }
fi
printf -v anew 'Make it anew: rm -r %q && bash %q' "$VENV" "$PWD/setup_venv.sh"
"$VENV/bin/python" -c '' 2>/dev/null || fail "the Python of $VENV does not start. $anew"
# shellcheck disable=SC1091
place=$(source "$VENV/bin/activate" && echo "${VIRTUAL_ENV:-$VENV}")
[[ $place -ef $VENV ]] || fail "$VENV was made as $place, and does not work elsewhere. $anew"

# --pins only looks at the installed versions, so that a second run is quick.
if ! "$VENV/bin/python" check_venv.py --pins >/dev/null; then
  [[ -f ../requirements.txt ]] || fail "there is no ${PWD%/*}/requirements.txt. Nothing tells what to install"
  echo "install   ${PWD%/*}/requirements.txt (some minutes; torch for a GPU is several GB)"
  log=$BUILD_CACHE/pip.log
  "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off -r ../requirements.txt 2>&1 |
    tee "$log" | grep --line-buffered -oE '^(Collecting [^ ]+|Installing collected packages|WARNING: Retrying)'
  if ((PIPESTATUS[0] != 0)); then
    if grep -qE 'No space left|Disk quota exceeded' "$log"; then
      fail "the disk is full (df -h $VENV; on ABCI: show_quota). Make room, or set VENV and CACHE_ROOT to another place"
    elif grep -qE 'Retrying|ConnectionError|Name or service not known|Temporary failure in name' "$log"; then
      fail "pip does not reach its package index. Use a machine with a network (on ABCI a login node); pip config list"
    fi
    fail "pip could not install ($(grep -m1 '^ERROR' "$log")). All it said is in $log"
  fi
fi
exec "$VENV/bin/python" check_venv.py
