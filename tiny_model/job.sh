#!/bin/bash
# Make a small model to try the other lessons on. From this directory: qsub -P GROUP job.sh   (by hand: bash job.sh)
#PBS -N tiny_model
#PBS -q rt_HC
#PBS -l select=1
#PBS -l walltime=0:30:00
#PBS -j oe
#PBS -k oed
# A job is a copy of this file in the spool of PBS; by hand, $0 tells the directory.
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR"; else CDPATH='' cd "$(dirname "$0")"; fi || exit 2
[[ -f ../jobs/env.sh && -f make_tiny_model.py ]] ||
  { echo "error: no make_tiny_model.py and ../jobs/env.sh in $PWD. Submit from this job file's directory" >&2; exit 2; }
source ../jobs/env.sh || exit

# Edit here, or set it at submission: qsub -P GROUP -v MODEL_TYPE=gpt_neox,ARGS="--hidden_size 256" job.sh
MODEL_TYPE=${MODEL_TYPE:-llama} # gpt2, gpt_neox, falcon, mpt, llama or qwen3
[[ -n ${TEXT_FILE:-} ]] || ARGS="--vocab_size 510 ${ARGS:-}" # few tokens, as suits the few words of the sample
TEXT_FILE=${TEXT_FILE:-../jglue/output/jsquad_train.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-output/$MODEL_TYPE}
read -r -d '' -a WORDS <<<"${ARGS:-}" # split into words; nothing in them is executed or expanded

if [[ $TEXT_FILE == ../jglue/output/* && ! -f $TEXT_FILE ]]; then # the sample, when no data was prepared yet
  python ../jglue/prepare_jglue.py --jglue_dir ../jglue/sample --output_dir ../jglue/output --task all || exit
fi
python make_tiny_model.py --model_type "$MODEL_TYPE" --text_file "$TEXT_FILE" --output_dir "$OUTPUT_DIR" \
  "${WORDS[@]}" "$@"
