#!/bin/bash
# Fine-tune all parameters on several nodes. From this directory: qsub -P GROUP job_multinode.sh
# Nodes: -l select=4 behind -P GROUP, or below; first see ../abci_firststep/job_check_nodes.sh. Again: it goes on.
#PBS -N finetune_full
#PBS -q rt_HF
#PBS -l select=2
#PBS -l walltime=1:00:00
#PBS -j oe
#PBS -k oed
# A job is a copy of this file in the spool of PBS; by hand, $0 tells the directory.
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR"; else CDPATH='' cd "$(dirname "$0")"; fi || exit 2
[[ -f ../jobs/env.sh && -f finetune_full.py ]] ||
  { echo "error: no finetune_full.py and ../jobs/env.sh in $PWD. Submit from this job file's directory" >&2; exit 2; }
MPI_MODULE=${MPI_MODULE-hpcx/2.20}
source ../jobs/env.sh || exit
source ../jobs/multinode.sh || exit # how many nodes there are, and LAUNCH, which starts a script on each

# Edit here, or set it at submission: qsub -P GROUP -v MODEL=/my/model,OUTPUT_DIR=output/my job_multinode.sh
[[ $ASKED == *--model_name_or_path* ]] || # for the small new model; such a rate would ruin a trained one
  ARGS="--learning_rate 3e-3 --warmup_steps 50 --per_device_train_batch_size 32 --num_train_epochs 5 ${ARGS:-}"
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
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') || exit
if ((GPUS > 0)); then
  [[ -n ${CONFIG:-} ]] || DEEPSPEED=${DEEPSPEED-../deepspeed_configs/zero3.json} # empty: the whole model on each GPU
elif [[ -n ${DEEPSPEED:-} ]]; then
  echo "error: DEEPSPEED needs a GPU, here is none. Unset it" >&2; exit 2
else
  echo "no GPU     one process per node, plain data parallel over gloo, without DeepSpeed"
fi
[[ -z ${DEEPSPEED:-} ]] || WORDS=(--deepspeed "$DEEPSPEED" "${WORDS[@]}")
((GPUS == 0)) || timeout 120 python ../jobs/warn_job.py "$GPUS" finetune_full.py "${SETTINGS[@]}" "${WORDS[@]}" "$@" &
"${LAUNCH[@]}" finetune_full.py "${SETTINGS[@]}" "${WORDS[@]}" "$@"
status=$? # of the training, whatever becomes of the picture; --since: of this job's losses only
((status != 0)) || python ../jobs/draw_loss.py "$OUTPUT_DIR" --since $(($(date +%s) - SECONDS))
exit "$status"
