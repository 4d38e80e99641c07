# shellcheck shell=bash
# Sourced by job_multinode.sh after env.sh: how to start a script on every node of the job. It sets LAUNCH, so that
#   "${LAUNCH[@]}" finetune_full.py ...     runs on all of them: mpirun starts ../jobs/node.sh once per node.
# mpirun, because ssh between the nodes of a job is off on ABCI unless asked for. Of the nodes:
#   HOSTFILE   one host a line; default: PBS_NODEFILE, without PBS this machine alone
#   NODES      how many of them; default: all
#   MAP_BY     Open MPI's placement; default ppr:1:node, one launcher per node
HOSTFILE=${HOSTFILE:-${PBS_NODEFILE:-}}
if ! command -v mpirun >/dev/null; then
  echo "error: no mpirun here. Set MPI_MODULE to a module that has it (see: module avail), or install Open MPI" >&2
  exit 2
fi
if [[ -n $HOSTFILE && ! -s $HOSTFILE ]]; then
  echo "error: HOSTFILE=$HOSTFILE is not there or empty" >&2
  exit 2
fi
# A node has as many lines as it has slots.
HOSTS=(localhost)
[[ -z $HOSTFILE ]] || mapfile -t HOSTS < <(awk 'NF && !seen[$1]++ { print $1 }' "$HOSTFILE")
export NODES=${NODES:-${#HOSTS[@]}} MASTER_ADDR=${HOSTS[0]}
# From the job's number, so that two jobs do not meet; below the ports that the system gives out by itself.
job_number=${PBS_JOBID:-$$}
export MASTER_PORT=${MASTER_PORT:-$((10000 + ${job_number%%[!0-9]*} % 20000))}

# When PBS ends a job it sends SIGTERM to mpirun and to all else on the first node, and 10 s later SIGKILL. By itself
# mpirun would signal again after 1 s and disturb the ranks in what they save. A failed job ends that much later.
export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-5}

LAUNCH=(python ../jobs/run_ranks.py mpirun -np "$NODES" -map-by "${MAP_BY:-ppr:1:node}" -bind-to none)
[[ -z $HOSTFILE ]] || LAUNCH+=(-hostfile "$HOSTFILE")
# mpirun passes on what is named here and nothing else; the rest, each node's env.sh finds out anew.
for name in NODES MASTER_ADDR MASTER_PORT NPROC_PER_NODE START_TIMEOUT COLLECTIVE_TIMEOUT \
  PBS_JOBID PBS_ENVIRONMENT DEADLINE DEADLINE_OF \
  PYTHON_MODULE VENV GROUP CACHE_ROOT HF_HOME HF_TOKEN HF_TOKEN_PATH HF_HUB_OFFLINE WANDB_API_KEY \
  BUILD_CACHE OMP_NUM_THREADS PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF \
  "${!CUDA_@}" "${!HF_DATASETS_@}" "${!NCCL_@}" "${!GLOO_@}" "${!TORCH_NCCL_@}"; do
  [[ ! $name =~ ^CUDA_(VISIBLE_DEVICES|HOME|PATH|CACHE_PATH)$ ]] || continue # each node's own
  if [[ -n ${!name+set} ]]; then
    export "${name?}"
    LAUNCH+=(-x "$name")
  fi
done
LAUNCH+=(-x RUN_RANKS bash ../jobs/node.sh) # RUN_RANKS is set by run_ranks.py
