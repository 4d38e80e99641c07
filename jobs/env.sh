# shellcheck shell=bash
# The environment of every job, on ABCI 3.0 and on any Linux machine (no modules, no PBS, no GPU needed). To be sourced:
#   source ../jobs/env.sh || exit
# It prints one line with what it chose. Each choice is a variable that you can set before, in the shell or by qsub -v:
#   PYTHON_MODULE, CUDA_MODULE  modules to load where there are modules; empty loads none
#   MPI_MODULE                  module with mpirun, for jobs on several nodes; by default none is loaded
#   VENV                        virtual environment, made by jobs/setup_venv.sh
#   CACHE_ROOT                  models and packages to keep: /groups/GROUP/USER/cache where GROUP is set or the path of
#                               the working directory shows a group area, else ~/.cache
#   BUILD_CACHE                 compiled code, on the node's own disk: many small files, of no use to another node
#   DEADLINE                    when the scripts must have saved and stopped, HH:MM or seconds since 1970; in a job PBS
#                               is asked for its end
#   ARGS_FILE                   in a job of an array: the file whose line PBS_ARRAY_INDEX joins ARGS
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  echo "error: this file is sourced, not run. Type: source ${BASH_SOURCE[0]}" >&2
  exit 2
fi

_env_error() {
  local text="error: $*"
  echo "${text//$'\n'/ }" >&2
  return 2
}

# _env_module VARIABLE: load the module that the variable names.
_env_module() {
  local name=${!1} message versions
  [[ -n $name ]] || return 0
  # Tried in a subshell first: a module that is missing then gives one line of ours, not a screen of theirs.
  if ! message=$(module load "$name" 2>&1); then
    message=$(grep -m1 '[^[:space:]]' <<<"$message")
    versions=$(module -t avail "${name%%/*}" 2>&1 | grep "^${name%%/*}/" | tr '\n' ' ')
    _env_error "module $name does not load (${message:-no reason given}). Set $1 to one that is there" \
      "(${versions:-see: module avail}) or to nothing, e.g. qsub -v $1=..."
    return
  fi
  module load "$name" >/dev/null 2>&1
}

_env_modules() {
  local libraries status strict=$-
  set +eu # not every site's module scripts were written for set -eu
  # A job script starts without the shell functions of a login shell.
  # shellcheck disable=SC1091
  [[ -f /etc/profile.d/modules.sh ]] && source /etc/profile.d/modules.sh
  status=0
  if type module >/dev/null 2>&1; then
    module purge >/dev/null 2>&1
    _env_module PYTHON_MODULE && libraries=${LD_LIBRARY_PATH-} && _env_module CUDA_MODULE
    status=$?
    # The CUDA module is for nvcc, which DeepSpeed's extensions need. torch's wheel brings its own CUDA libraries and
    # must find those, not the module's, which may be older: so the library path stays as it was.
    if [[ -n $libraries ]]; then export LD_LIBRARY_PATH=$libraries; else unset LD_LIBRARY_PATH; fi
    # mpirun does need its own libraries; what it starts comes here anew, without the module.
    ((status != 0)) || _env_module MPI_MODULE || status=$?
  else
    PYTHON_MODULE="" CUDA_MODULE="" MPI_MODULE=""
  fi
  [[ $strict != *e* ]] || set -e
  [[ $strict != *u* ]] || set -u
  return "$status"
}

# _env_writable VARIABLE WHAT-TO-DO: make the directory that the variable names, and write a file there.
_env_writable() {
  local directory=${!1} probe=""
  # A real file: on a full disk or with a used-up quota a directory still looks writable.
  { mkdir -p -- "$directory" && probe=$(mktemp "$directory/.write_test.XXXXXX") && echo ok >|"$probe"; } 2>/dev/null ||
    _env_error "cannot write to $1=$directory. $2"
  local status=$?
  [[ -z $probe ]] || rm -f -- "$probe"
  return "$status"
}

# qsub -v passes a ~ on as it stands; Python's scripts know it, bash does not.
_env_homes() {
  local name
  for name in VENV CACHE_ROOT BUILD_CACHE HF_HOME CONFIG ARGS_FILE MODEL TRAIN_FILE OUTPUT_DIR JGLUE_DIR TEXT_FILE; do
    [[ ${!name:-} != [~]/* ]] || export "$name=$HOME/${!name:2}"
  done
}

_env_caches() {
  local group=${GROUP:-} user=${USER:-$(id -un)} name problem
  if [[ -z $group && $PWD/ =~ ^/groups/([^/]+)/ ]]; then group=${BASH_REMATCH[1]}; fi
  if [[ -z ${CACHE_ROOT:-} ]]; then
    if [[ -n $group ]]; then CACHE_ROOT=/groups/$group/$user/cache; else CACHE_ROOT=$HOME/.cache; fi
  fi
  export CACHE_ROOT BUILD_CACHE=${BUILD_CACHE:-${PBS_LOCALDIR:-${TMPDIR:-/tmp}}/build_cache_$(id -u)}
  _env_writable CACHE_ROOT "Set CACHE_ROOT to a directory of yours (on ABCI, show_quota tells the room left)" || return
  _env_writable BUILD_CACHE "Set BUILD_CACHE to a directory of yours on this machine's own disk" || return
  # What lies there gets executed: in a shared /tmp, somebody else's directory of that name would be a trap.
  [[ -O $BUILD_CACHE ]] || _env_error "BUILD_CACHE=$BUILD_CACHE is not yours. Set it to a directory of yours" || return
  # The token stays where "hf auth login" puts it: it is yours, not the group's.
  export HF_TOKEN_PATH=${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token}
  export HF_HOME=${HF_HOME:-$CACHE_ROOT/huggingface} PIP_CACHE_DIR=${PIP_CACHE_DIR:-$CACHE_ROOT/pip}
  export HF_XET_CACHE=${HF_XET_CACHE:-$HF_HOME/xet} TORCH_HOME=${TORCH_HOME:-$CACHE_ROOT/torch}
  export TORCH_EXTENSIONS_DIR=$BUILD_CACHE/torch_extensions TORCHINDUCTOR_CACHE_DIR=$BUILD_CACHE/inductor
  export TRITON_CACHE_DIR=$BUILD_CACHE/triton CUDA_CACHE_PATH=$BUILD_CACHE/cuda
  if ! problem=$(_env_writable HF_HOME "Set HF_HOME to a directory of yours, or unset it" 2>&1); then
    [[ ${HF_HUB_OFFLINE:-} == 1 && -d $HF_HOME ]] || { echo "$problem" >&2; return 2; }
    # Models of others, to be read only: what is written besides goes elsewhere.
    export HF_DATASETS_CACHE=${HF_DATASETS_CACHE:-$CACHE_ROOT/datasets}
    export HF_MODULES_CACHE=${HF_MODULES_CACHE:-$CACHE_ROOT/modules} HF_XET_CACHE=$CACHE_ROOT/xet
  fi
  for name in HF_XET_CACHE PIP_CACHE_DIR TORCH_HOME \
    TORCH_EXTENSIONS_DIR TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR CUDA_CACHE_PATH; do
    _env_writable "$name" "Set $name to a directory of yours, or unset it" || return
  done
}

# PBS sets OMP_NUM_THREADS to all CPUs of a node, 192, and nproc obeys it. 16 is one GPU's share of an ABCI node.
_env_threads() {
  local cpus
  if [[ -n ${PBS_ENVIRONMENT:-} || -z ${OMP_NUM_THREADS:-} ]]; then # else a user set it
    cpus=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) || cpus=1
    if [[ ${NCPUS:-} =~ ^[1-9][0-9]*$ ]] && ((NCPUS < cpus)); then cpus=$NCPUS; fi
    export OMP_NUM_THREADS=$((cpus < 16 ? cpus : 16))
  fi
  export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-$OMP_NUM_THREADS} # the fast tokenizers' threads
  export MAX_JOBS=${MAX_JOBS:-$OMP_NUM_THREADS}                   # compilers at once when an extension is built
}

# _env_walltime: set text to the end of this job as PBS knows it, in seconds since 1970, or to nothing.
_env_walltime() {
  local try start seconds now=$1 s='[[:space:]]*'
  for try in 1 2 3; do # a busy server may not answer at once
    text=$(PATH=$PATH:/opt/pbs/bin timeout -k 5 20 qstat -f -F json "$PBS_JOBID" 2>/dev/null) && break
    ((try == 3 || $? == 127)) || sleep "$((3 * try))"
  done
  # Not by a JSON parser: what users put into variables can spoil it. They come last; a line is an attribute.
  text=${text%%\"Variable_List\"*} start="" seconds=0
  [[ ! $text =~ $'\n'$s\"stime\":$s\"([^\"]+)\" ]] || start=$(date -d "${BASH_REMATCH[1]}" +%s 2>/dev/null) || true
  [[ ! $text =~ $'\n'$s\"Resource_List\":[^}]*\"walltime\":$s\"([0-9]+):([0-9]+):([0-9]+)\" ]] ||
    seconds=$((10#${BASH_REMATCH[1]} * 3600 + 10#${BASH_REMATCH[2]} * 60 + 10#${BASH_REMATCH[3]}))
  text=""
  # A time that cannot be (a wrong clock) would stop every job at its first step: none is better.
  [[ -z $start ]] || ((start > now + 60 || now >= start + seconds)) || text=$((start + seconds))
}

# PBS kills a job at its walltime without a warning. So ask it once when that is: DEADLINE, in seconds since 1970.
_env_deadline() {
  local text now
  now=$(date +%s)
  # DEADLINE_OF: the job that PBS was asked about. Another job's DEADLINE comes along by qsub -V.
  [[ -z ${DEADLINE_OF:-} || $DEADLINE_OF == "${PBS_JOBID:-}" ]] || unset DEADLINE DEADLINE_OF
  if [[ ${DEADLINE:-} =~ ^([01]?[0-9]|2[0-3]):[0-5][0-9]$ ]]; then
    text=$DEADLINE
    DEADLINE=$(date -d "$text" +%s)
    ((DEADLINE > now)) || DEADLINE=$(date -d "tomorrow $text" +%s)
  elif [[ ! ${DEADLINE:-} =~ ^([1-9][0-9]{8,10})?$ ]]; then
    _env_error "DEADLINE=$DEADLINE is no time. Set it to HH:MM or seconds since 1970 (date +%s), or unset it" || return
  fi
  if [[ -n ${PBS_JOBID:-} && -z ${DEADLINE_OF:-} ]]; then
    _env_walltime "$now" # of the two, the earlier
    [[ -z $text ]] || { [[ -n ${DEADLINE:-} ]] && ((DEADLINE < text)); } || DEADLINE=$text
    DEADLINE_OF=$PBS_JOBID
  fi
  export DEADLINE=${DEADLINE:-} DEADLINE_OF=${DEADLINE_OF:-}
}

# What stands in CONFIG is not to be given a second time, and lost.
_env_config() {
  local name
  [[ -n ${CONFIG:-} ]] || return 0
  for name in MODEL TRAIN_FILE OUTPUT_DIR; do
    [[ -z ${!name:-} ]] || _env_error "CONFIG=$CONFIG stands in place of $name=${!name}. Leave one of them out" || return
  done
}

# A sweep, qsub -J 1-N -v ARGS_FILE=sweep.txt: each job of the array has its line of the file and its OUTPUT_DIR.
_env_sweep() {
  local line
  [[ -n ${ARGS_FILE:-} ]] || return 0
  [[ ${PBS_ARRAY_INDEX:-} =~ ^[1-9][0-9]{0,5}$ ]] ||
    _env_error "ARGS_FILE needs the number of a line. Submit with -J 1-N, or by hand set PBS_ARRAY_INDEX=1" || return
  [[ -r $ARGS_FILE ]] || _env_error "ARGS_FILE=$ARGS_FILE is no file, seen from $PWD" || return
  line=$(sed -n "$PBS_ARRAY_INDEX{s/\r\$//;p}" -- "$ARGS_FILE" 2>/dev/null) || true
  [[ $line == *[![:space:]]* ]] ||
    _env_error "there is no line $PBS_ARRAY_INDEX in ARGS_FILE=$ARGS_FILE, or nothing in it" || return
  [[ -z ${CONFIG:-} || $line == *--output_dir* ]] ||
    _env_error "CONFIG has one output_dir for all. Put an --output_dir into each line of $ARGS_FILE" || return
  export ARGS="${ARGS:+$ARGS }$line"
  [[ -n ${CONFIG:-} ]] || export OUTPUT_DIR=${OUTPUT_DIR:-output}/$PBS_ARRAY_INDEX # else the line has one
  echo "sweep     line $PBS_ARRAY_INDEX of $ARGS_FILE: $line"
  unset ARGS_FILE # done; what sources this file again below this job keeps ARGS and OUTPUT_DIR
}

# _env_venv DIRECTORY-OF-THIS-FILE: activate the virtual environment; sets _env_python to its version.
_env_venv() {
  local make anew
  printf -v make 'bash %q' "$1/setup_venv.sh"
  printf -v anew 'rm -r %q && %s' "$VENV" "$make"
  [[ -f $VENV/bin/activate ]] || _env_error "no virtual environment at $VENV. Make it: $make (or set VENV)" || return
  _env_python=$("$VENV/bin/python" -c 'import platform; print(platform.python_version())' 2>&1) ||
    _env_error "the Python of $VENV does not start ($(tail -1 <<<"$_env_python")). Set PYTHON_MODULE to the one it" \
      "was made with, or make it anew: $anew" || return
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
  [[ ${VIRTUAL_ENV:-$VENV} -ef $VENV ]] ||
    _env_error "$VENV was made as $VIRTUAL_ENV, and does not work elsewhere. Make it anew: $anew"
}

_env_main() {
  local here modules deadline="" _env_python=""
  here=$(CDPATH='' builtin cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || return
  # Each batch has another width: blocks that can grow leave fewer holes in a GPU's memory.
  [[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
  umask 027 # PBS's is 077: your group could not read what a job writes
  PYTHON_MODULE=${PYTHON_MODULE-python/3.12/3.12.9}
  CUDA_MODULE=${CUDA_MODULE-cuda/13.0/13.0.1} # the torch wheel's, python -c "import torch; print(torch.version.cuda)"
  MPI_MODULE=${MPI_MODULE-}
  export PYTHONUNBUFFERED=1 # a line is in the log when it is printed
  export PYTHONUTF8=1       # whatever LANG a profile sets
  # PBS sends SIGTERM to this shell too. With a trap it waits for what it runs, which saves, and returns its status.
  [[ ${PBS_ENVIRONMENT:-} != PBS_BATCH ]] || trap : TERM
  _env_homes
  _env_modules && _env_caches && _env_threads && _env_deadline && _env_config && _env_sweep || return
  VENV=${VENV:-${here%/*}/.venv}
  [[ $VENV == /* ]] || VENV=$PWD/$VENV
  [[ ${NEED_VENV:-yes} == no ]] || _env_venv "$here" || return
  modules="${PYTHON_MODULE:-none}${CUDA_MODULE:+ $CUDA_MODULE}${MPI_MODULE:+ $MPI_MODULE}"
  [[ -z $DEADLINE_OF ]] || deadline="unknown (no answer from qstat)"
  [[ -z $DEADLINE ]] || deadline=$(date -d "@$DEADLINE" '+%F %T')
  echo "env       ${_env_python:+python $_env_python ($VENV), }modules $modules," \
    "cache $CACHE_ROOT, build cache $BUILD_CACHE, $OMP_NUM_THREADS threads${deadline:+, deadline $deadline}"
}

_env_main || return
# What this job is asked for by variables or words. What is not gets values that suit the small new model.
# shellcheck disable=SC2034
ASKED="${MODEL:+--model_name_or_path} ${TRAIN_FILE:+--train_file} ${CONFIG:+--model_name_or_path --train_file} ${ARGS:-} $*"
