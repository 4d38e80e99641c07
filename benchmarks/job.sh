#!/bin/bash
# Check a GPU: exactness, memory, speed. From this directory: qsub -P GROUP job.sh   (by hand: bash job.sh)
#PBS -N gpu_check
#PBS -q rt_HG
#PBS -l select=1
#PBS -l walltime=0:45:00
#PBS -j oe
#PBS -k oed
# A job is a copy of this file in the spool of PBS; by hand, $0 tells the directory.
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR"; else CDPATH='' cd "$(dirname "$0")"; fi || exit 2
[[ -f ../jobs/env.sh && -f gpu_check.py ]] ||
  { echo "error: no gpu_check.py and ../jobs/env.sh in $PWD. Submit from this job file's directory" >&2; exit 2; }
source ../jobs/env.sh || exit

# Edit here, or set it at submission: qsub -P GROUP -v ARGS="--minutes 10" job.sh   (submitted again, it goes on)
read -r -d '' -a WORDS <<<"${ARGS:-}" # split into words; nothing in them is executed or expanded

python gpu_check.py "${WORDS[@]}" "$@"
