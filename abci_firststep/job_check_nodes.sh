#!/bin/bash
# Check every GPU and the network between the nodes before an expensive job. From here: qsub -P GROUP job_check_nodes.sh
# As many nodes as that job will have: qsub -P GROUP -l select=4 job_check_nodes.sh
#PBS -N check_nodes
#PBS -q rt_HF
#PBS -l select=2
#PBS -l walltime=0:15:00
#PBS -j oe
#PBS -k oed
# A job is a copy of this file in the spool of PBS; by hand, $0 tells the directory.
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR"; else CDPATH='' cd "$(dirname "$0")"; fi || exit 2
[[ -f ../jobs/env.sh && -f check_nodes.py ]] ||
  { echo "error: no check_nodes.py and ../jobs/env.sh in $PWD. Submit from this job file's directory" >&2; exit 2; }
MPI_MODULE=${MPI_MODULE-hpcx/2.20}
source ../jobs/env.sh || exit
source ../jobs/multinode.sh || exit # how many nodes there are, and LAUNCH, which starts a script on each

# A check waits for nobody: a node that has not come after this many seconds is the finding.
export START_TIMEOUT=${START_TIMEOUT:-180} COLLECTIVE_TIMEOUT=${COLLECTIVE_TIMEOUT:-120}
read -r -d '' -a WORDS <<<"${ARGS:-}" # split into words; nothing in them is executed or expanded
"${LAUNCH[@]}" check_nodes.py "${WORDS[@]}" "$@"
