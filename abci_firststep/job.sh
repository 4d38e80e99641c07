#!/bin/bash
# The simplest job: show what a job sees. From this directory: qsub -P GROUP job.sh   (by hand: bash job.sh)
#PBS -N first_step
#PBS -q rt_HG
#PBS -l select=1
#PBS -l walltime=0:10:00
#PBS -j oe
#PBS -k oed
# A job is a copy of this file in the spool of PBS; by hand, $0 tells the directory.
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR"; else CDPATH='' cd "$(dirname "$0")"; fi || exit 2
[[ -f ../jobs/env.sh && -f first_step.py ]] ||
  { echo "error: no first_step.py and ../jobs/env.sh in $PWD. Submit from this job file's directory" >&2; exit 2; }
source ../jobs/env.sh || exit

# Edit here, or set it at submission: qsub -P GROUP -v ARGS="--seconds 5" job.sh
read -r -d '' -a WORDS <<<"${ARGS:-}" # split into words; nothing in them is executed or expanded

python first_step.py "${WORDS[@]}" "$@"
