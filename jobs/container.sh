#!/bin/bash
# Run a job file inside a container. In the directory of the job file, in place of it:
#   qsub -P GROUP -v IMAGE=/my/image.sif,VENV=/opt/venv,MODEL=/my/model ../jobs/container.sh
# VENV is a virtual environment as seen inside, with the packages of requirements.txt; JOB another file than job.sh.
# What lies outside home and this collection has to be named: SINGULARITY_BIND=/groups
#PBS -N container
#PBS -q rt_HG
#PBS -l select=1
#PBS -l walltime=1:00:00
#PBS -j oe
#PBS -k oed
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR" || exit 2; fi
JOB=${JOB:-job.sh}
[[ -f ../jobs/env.sh && -f $JOB ]] ||
  { echo "error: no $JOB and ../jobs/env.sh in $PWD. Submit from the job file's directory" >&2; exit 2; }
[[ -f ${IMAGE:-} && -n ${VENV:-} ]] ||
  { echo "error: IMAGE=${IMAGE:-} is no file, or VENV is not set. Type: -v IMAGE=my.sif,VENV=/opt/venv" >&2; exit 2; }
# Out here for the deadline, since there is no PBS inside; the modules stay outside.
NEED_VENV=no source ../jobs/env.sh || exit
export VENV PYTHON_MODULE="" CUDA_MODULE="" MPI_MODULE=""
singularity exec --nv --bind "${PWD%/*},$CACHE_ROOT,$BUILD_CACHE" "$IMAGE" bash "$JOB" "$@"
