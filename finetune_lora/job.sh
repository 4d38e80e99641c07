#!/bin/bash
# Train a LoRA adapter, QLoRA with ARGS="--load_in_4bit true". From here: qsub -P GROUP job.sh   (by hand: bash job.sh)
# Submitted again, it goes on from its last checkpoint. With the 8 GPUs of a node: qsub -P GROUP -q rt_HF job.sh
#PBS -N finetune_lora
#PBS -q rt_HG
#PBS -l select=1
#PBS -l walltime=1:00:00
#PBS -j oe
#PBS -k oed
# A job is a copy of this file in the spool of PBS; by hand, $0 tells the directory.
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR"; else CDPATH='' cd "$(dirname "$0")"; fi || exit 2
[[ -f ../jobs/env.sh && -f finetune_lora.py ]] ||
  { echo "error: no finetune_lora.py and ../jobs/env.sh in $PWD. Submit from this job file's directory" >&2; exit 2; }
source ../jobs/env.sh || exit

# The last layer on a base in 8 bit: ARGS="--lora_target_modules none --modules_to_save lm_head --load_in_8bit true"
# Edit here, or set it at submission: qsub -P GROUP -v MODEL=/my/model,TRAIN_FILE=my.jsonl,OUTPUT_DIR=output/my job.sh
[[ $ASKED == *--model_name_or_path* ]] || # the small new model's head is still random; the rate would ruin a trained one
  ARGS="--modules_to_save lm_head --learning_rate 3e-3 --per_device_train_batch_size 32 --num_train_epochs 4 ${ARGS:-}"
MODEL=${MODEL:-../tiny_model/output/llama}
[[ $ASKED == *--train_file* ]] || VALIDATION_FILE=${VALIDATION_FILE-../jglue/output/jsquad_validation.jsonl}
TRAIN_FILE=${TRAIN_FILE:-../jglue/output/jsquad_train.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-output}
SETTINGS=(--model_name_or_path "$MODEL" --train_file "$TRAIN_FILE" --output_dir "$OUTPUT_DIR"
  --save_steps 200 --save_total_limit 2)
# A file of `name: value` lines, such as a run_args.yaml, in place of the variables above: qsub -v CONFIG=my.yaml
[[ -z ${CONFIG:-} ]] || SETTINGS=("$CONFIG") OUTPUT_DIR=$(sed -n 's/^output_dir: *//p' "$CONFIG" 2>&-)
read -r -d '' -a WORDS <<<"${ARGS:-}" # split into words; nothing in them is executed or expanded
[[ -z ${VALIDATION_FILE:-} ]] || WORDS=(--validation_file "$VALIDATION_FILE" "${WORDS[@]}")
[[ -z ${DEEPSPEED:-} ]] || WORDS=(--deepspeed "$DEEPSPEED" "${WORDS[@]}") # e.g. ../deepspeed_configs/zero2.json

GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') || exit
LAUNCH=(python)
if ((GPUS > 1)) || [[ $GPUS == 1 && -n ${DEEPSPEED:-}${CONFIG:-} ]]; then # a settings file may ask for DeepSpeed
  LAUNCH=(python ../jobs/run_ranks.py torchrun --standalone --nproc_per_node "$GPUS") # it names the rank that failed
fi
((GPUS > 0)) || [[ -z ${DEEPSPEED:-} ]] || { echo "error: DEEPSPEED needs a GPU, here is none. Unset it" >&2; exit 2; }
((GPUS == 0)) || timeout 120 python ../jobs/warn_job.py "$GPUS" finetune_lora.py "${SETTINGS[@]}" "${WORDS[@]}" "$@" &
"${LAUNCH[@]}" finetune_lora.py "${SETTINGS[@]}" "${WORDS[@]}" "$@"
status=$? # of the training, whatever becomes of the picture; --since: of this job's losses only
((status != 0)) || python ../jobs/draw_loss.py "$OUTPUT_DIR" --since $(($(date +%s) - SECONDS))
exit "$status"
