#!/bin/bash
# Let a model answer a file of prompts. From this directory: qsub -P GROUP job.sh   (by hand: bash job.sh)
# To chat, take a node for yourself: qsub -I -P GROUP -q rt_HG -l select=1; there, in this directory:
#   source ../jobs/env.sh; python chat.py --model_name_or_path MODEL
#PBS -N generate_text
#PBS -q rt_HG
#PBS -l select=1
#PBS -l walltime=1:00:00
#PBS -j oe
#PBS -k oed
# A job is a copy of this file in the spool of PBS; by hand, $0 tells the directory.
if [[ ${PBS_ENVIRONMENT:-} == PBS_BATCH ]]; then cd "$PBS_O_WORKDIR"; else CDPATH='' cd "$(dirname "$0")"; fi || exit 2
[[ -f ../jobs/env.sh && -f generate_text.py ]] ||
  { echo "error: no generate_text.py and ../jobs/env.sh in $PWD. Submit from this job file's directory" >&2; exit 2; }
source ../jobs/env.sh || exit

# Edit here, or set it at submission: qsub -P GROUP -v MODEL=../finetune_full/output,OUTPUT_FILE=output/2.jsonl job.sh
MODEL=${MODEL:-../tiny_model/output/llama} # a model or an adapter
PROMPT_FILE=${PROMPT_FILE:-../jglue/output/jsquad_validation.jsonl}
OUTPUT_FILE=${OUTPUT_FILE:-output/generated.jsonl}
read -r -d '' -a WORDS <<<"${ARGS:-}" # split into words; nothing in them is executed or expanded

# With -q rt_HF each of the 8 GPUs has a copy of the model and a share of the prompts. A model too large for one GPU:
# ARGS="--device_map auto", which spreads one copy over all of them.
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') || exit
LAUNCH=(python)
if ((GPUS > 1)) && [[ " ${WORDS[*]} $*" != *" --device_map"* ]]; then
  LAUNCH=(python ../jobs/run_ranks.py torchrun --standalone --nproc_per_node "$GPUS")
fi
"${LAUNCH[@]}" generate_text.py --model_name_or_path "$MODEL" --prompt_file "$PROMPT_FILE" --output_file "$OUTPUT_FILE" \
  --max_new_tokens 32 "${WORDS[@]}" "$@"
