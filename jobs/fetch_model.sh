#!/bin/bash
# Fetch a model once, on a login node or any machine with a network, so that jobs run without one:
#   bash jobs/fetch_model.sh rinna/japanese-gpt-neox-3.6b
#   bash jobs/fetch_model.sh MODEL --revision NAME
# It ends with the MODEL=... to give to a job. For a gated model accept its conditions at the hub, then "hf auth login".
here=$(CDPATH='' cd "$(dirname "$0")" && pwd) || exit 2
# shellcheck source=env.sh
source "$here/env.sh" || exit
exec python "$here/fetch_model.py" "$@"
