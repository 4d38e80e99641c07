#!/bin/bash
# Submit a job file N times, each job after the one before, for a training that is longer than a walltime:
#   bash jobs/chain.sh 3 finetune_full/job.sh -P GROUP -v MODEL=/my/model,OUTPUT_DIR=output/my
# What follows the job file goes to qsub as it is. Each job goes on where the one before stopped; when the training is
# finished, those that are left see it and end at once. They start whatever became of the one before (afterany): after
# the walltime or a dead node that is wanted, and an error costs each of them no more than the way from the last
# checkpoint to it. Nothing looks at the status: a broken node and a wrong argument end alike. So a file STOP ends one
# job, and the next goes on: remove those first. In a container: from the lesson, ../jobs/container.sh is the job file.
fail() {
  echo "error: $*" >&2
  exit 2
}
usage="Type: bash jobs/chain.sh 3 finetune_full/job.sh -P GROUP"
[[ ${1:-} =~ ^[1-9][0-9]?$ ]] || fail "the number of jobs is ${1:-missing}, not one from 1 to 99. $usage"
[[ -f ${2:-} ]] || fail "there is no job file ${2:-named}. $usage"
command -v qsub >/dev/null || fail "no qsub here. Type this on a machine that submits jobs (on ABCI: a login node)"
number=$1 file=$2
if [[ ${file##*/} != container.sh ]]; then # which runs the job.sh of the directory where you are
  file=$(basename -- "$2")
  CDPATH='' cd -- "$(dirname -- "$2")" || exit 2 # a job file is submitted from its own directory
fi
shift 2

previous="" queued="" # newest first: to remove the first one would start the next
for ((i = 1; i <= number; i++)); do
  after=()
  [[ -z $previous ]] || after=(-W "depend=afterany:$previous")
  if ! id=$(qsub "$@" "${after[@]}" "$file") || [[ -z $id ]]; then
    fail "job $i of $number was not submitted. ${queued:+Those before are in the queue; remove them: qdel$queued}"
  fi
  echo "job $i      $id${previous:+, after $previous}"
  previous=$id queued=" $id$queued"
done
echo "chain      each goes on where the one before stopped; once all is done, the others see it and end at once"
echo "           remove them all, in this order: qdel$queued"
