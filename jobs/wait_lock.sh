#!/bin/bash
# Wait until the run before this one is over; the job files do it first: bash ../jobs/wait_lock.sh OUTPUT_DIR
# A training touches OUTPUT_DIR/lock (its host, process and job) every 30 seconds. Killed, it leaves the lock behind: that
# is free at once where its process is known to be gone, else when nobody has touched it for 2 minutes and PBS does not
# know its job as running. A living run is an error: two would write the same files.
lock=${1:?type: bash wait_lock.sh OUTPUT_DIR}/lock
first=$(stat -c %Y -- "$lock" 2>/dev/null) || exit 0
while touched=$(stat -c %Y -- "$lock" 2>/dev/null); do
  read -r host pid job <"$lock" 2>/dev/null || [[ -n ${host:-} ]] || host=unknown
  age=$(($(date +%s) - touched)) runs=no
  [[ $host == "$(hostname)" && ${pid:-0} =~ ^[0-9]+$ && ! -d /proc/$pid ]] && break
  if [[ ${job:-${PBS_JOBID:-}} != "${PBS_JOBID:-}" ]]; then
    PATH=$PATH:/opt/pbs/bin timeout 20 qstat "$job" >/dev/null 2>&1 && runs=yes
  fi
  ((age > 120)) && [[ $runs == no ]] && break
  if ((touched > first)) || { ((age > 120)) && [[ $runs == yes ]]; }; then
    echo "error: ${lock%/lock} is being written by process ${pid:-?} on $host${job:+, job $job}. Set another OUTPUT_DIR" >&2
    exit 2
  fi
  [[ -n ${said:-} ]] || echo "waiting    up to 2 minutes: $lock may be of a run that was killed (process ${pid:-?} on $host)"
  said=yes
  sleep 5
done
exit 0
