#!/bin/bash
# Prepare JGLUE, let a model answer, score the answers. From this directory: qsub -P GROUP job.sh   (or: bash job.sh)
#PBS -N jglue
#PBS -q rt_HG
#PBS -l select=1
#PBS -l walltime=1:00:00
#PBS -j oe
#PBS -k oed
# A job is a copy of this file in the spool of PBS; by hand, $0 tells the directory.
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR"; else CDPATH='' cd "$(dirname "$0")"; fi || exit 2
[[ -f ../jobs/env.sh && -f evaluate_jglue.py ]] ||
  { echo "error: no evaluate_jglue.py and ../jobs/env.sh in $PWD. Submit from this job file's directory" >&2; exit 2; }
source ../jobs/env.sh || exit

# Edit here, or set it at submission: qsub -P GROUP -v TASK=all,MODEL=../finetune_full/output job.sh
JGLUE_DIR=${JGLUE_DIR:-sample} # a checkout of JGLUE, or the sample beside this file
TASK=${TASK:-jsquad}           # jsquad, jcommonsenseqa, jnli, jsts or all
MODEL=${MODEL:-../tiny_model/output/llama}
OUTPUT_DIR=${OUTPUT_DIR:-output} # the data; below it, scores/NAME_OF_THE_MODEL
OUTPUT_FILE=${OUTPUT_FILE:-}     # where set: of one task, only generate into this file (with its ARGS), and score it
read -r -d '' -a WORDS <<<"${ARGS:-}" # split into words; nothing in them is executed or expanded

python prepare_jglue.py --jglue_dir "$JGLUE_DIR" --output_dir "$OUTPUT_DIR" --task "$TASK" || exit
if [[ -n $OUTPUT_FILE ]]; then
  python ../generate_text/generate_text.py --model_name_or_path "$MODEL" --prompt_file "$OUTPUT_DIR/${TASK}_validation.jsonl" \
    --output_file "$OUTPUT_FILE" --max_new_tokens 32 "${WORDS[@]}" "$@" || exit
  python evaluate_jglue.py --task "$TASK" --prediction_file "$OUTPUT_FILE"
  exit
fi
python evaluate_jglue.py --model_name_or_path "$MODEL" --task "$TASK" --data_dir "$OUTPUT_DIR" "${WORDS[@]}" "$@"
