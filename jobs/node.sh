#!/usr/bin/env bash
# One node's part of a job on several nodes: one process per GPU. mpirun starts it once on each node:
#   bash ../jobs/node.sh SCRIPT.py ARGUMENTS...
# It is told by variables: NODES, MASTER_ADDR (the first node), MASTER_PORT, and which of the nodes this is by mpirun
# or NODE_RANK. NPROC_PER_NODE overrides the number of GPUs; without a GPU it is 1.

# ---- Timeouts, in seconds, all of them here ----
# How long the nodes wait for each other at the start. Starting Python from a busy shared disk takes minutes; a node
# that is down never comes, and the others should not eat the walltime.
START_TIMEOUT=${START_TIMEOUT:-600}
# How long a rank waits for the others in NCCL and Gloo (Trainer's --ddp_timeout, which DeepSpeed takes too). One rank
# prepares the data and collects the weights at a save, and the others wait meanwhile: it must be longer than these.
COLLECTIVE_TIMEOUT=${COLLECTIVE_TIMEOUT:-21600}

NODE_RANK=${OMPI_COMM_WORLD_RANK:-${NODE_RANK:-}}
for name in NODES MASTER_ADDR MASTER_PORT NODE_RANK; do
  [[ -n ${!name:-} ]] || { echo "error: $name is not set. This is started by job_multinode.sh" >&2; exit 2; }
done
[[ $NODE_RANK =~ ^[0-9]+$ ]] || { echo "error: NODE_RANK=$NODE_RANK is no number" >&2; exit 2; }
unset ARGS_FILE # the job file has read its line
trap : TERM     # mpirun's, which torchrun gets too: wait for it
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" >/dev/null || exit # its line stands in the log once, from the job file
unset "${!OMPI_@}" "${!PMIX_@}" # else the training would take itself for an MPI program
PATH=$PATH:/usr/sbin:/sbin      # a shell that mpirun starts has not always `ip` in its path

# The interface that leads to the first node (on ABCI not InfiniBand's: that is NCCL's own affair, see below).
network() {
  local master
  master=$(getent ahostsv4 "$MASTER_ADDR" | awk 'NR == 1 { print $1 }')
  INTERFACE=$(ip -o -4 addr show | awk -v a="$master" '{ split($4, x, "/") } x[1] == a { print $2; exit }')
  [[ -n $INTERFACE ]] || INTERFACE=$(ip -o -4 route get "$master" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  # Some Linux machines know their own name as 127.0.1.1, where no other node could reach them.
  if [[ $INTERFACE == lo && $MASTER_ADDR != localhost && $master != 127.0.0.1 ]]; then
    INTERFACE=$(ip -o -4 route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p;q')
  fi
  ADDRESS=$(ip -o -4 addr show dev "$INTERFACE" | awk '{ split($4, x, "/"); print x[1]; exit }')
}
network 2>/dev/null
[[ -n ${ADDRESS:-} ]] ||
  { echo "error: $(hostname) finds no way to MASTER_ADDR=$MASTER_ADDR. See: ip route get $MASTER_ADDR" >&2; exit 2; }
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
# ABCI's eight ports between compute nodes have these names; the ninth leads to the storage.
if compgen -G "/sys/class/infiniband/mlx5_ibn*" >/dev/null; then export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5_ibn}; fi
# An MPI module may put a plug-in for another NCCL than torch's own into the library path.
export NCCL_NET_PLUGIN=${NCCL_NET_PLUGIN:-none}

if [[ -z ${NPROC_PER_NODE:-} ]]; then
  NPROC_PER_NODE=$(python -c 'import torch; print(torch.cuda.device_count() or 1)') || exit
fi
[[ " $* " == *" --ddp_timeout"* ]] || set -- "$@" --ddp_timeout "$COLLECTIVE_TIMEOUT"
((NODE_RANK == 0)) && IS_HOST=true || IS_HOST=false # said, not guessed from names
echo "node       $(hostname), $((NODE_RANK + 1)) of $NODES: $NPROC_PER_NODE process(es), $INTERFACE $ADDRESS," \
  "first node $MASTER_ADDR:$MASTER_PORT, InfiniBand ${NCCL_IB_HCA:-as NCCL finds it}"
torchrun --nnodes "$NODES" --nproc_per_node "$NPROC_PER_NODE" --max_restarts 0 --local_addr "$ADDRESS" \
  --rdzv_backend c10d --rdzv_id "${PBS_JOBID:-$MASTER_PORT}" --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" \
  --rdzv_conf "is_host=$IS_HOST,join_timeout=$START_TIMEOUT,read_timeout=$START_TIMEOUT" \
  --no-python setpriv --pdeathsig KILL python "$@" # a rank ends with its torchrun, even one that waits for the dead
status=$?
((status == 0)) || echo "node       $(hostname): torchrun ended with status $status" >&2
exit "$status"
