#!/usr/bin/env bash
# From an empty machine to a fine-tuned model that answers questions. It needs Python 3.11 or newer and a network:
#   bash quickstart.sh                          about 5 minutes on 2 CPU cores, after the packages are installed
#   JGLUE_DIR=/path/to/JGLUE bash quickstart.sh with real JSQuAD in place of the sample that comes with this
# Run again, it does only what is not done yet. Each step is a lesson of README.md; the commands are the same.
set -uo pipefail
CDPATH='' cd "$(dirname "$0")" || exit 2
bash jobs/setup_venv.sh || exit
source jobs/env.sh || exit
export HF_HUB_OFFLINE=1 # nothing is fetched from here on

if [[ -z ${JGLUE_DIR:-} ]]; then VOCAB=510 STEPS=${STEPS:-1400}; else VOCAB=4000 STEPS=${STEPS:-250}; fi
OUT=output/quickstart${JGLUE_DIR:+_jsquad}
MODEL=$OUT/model TUNED=$OUT/finetuned TRAIN=$OUT/jsquad_train.jsonl VALIDATION=$OUT/jsquad_validation.jsonl
mkdir -p "$OUT" || exit
began=$SECONDS
lesson() { printf '\n== %s  (%d:%02d)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }

lesson "1/6  The data: questions about short Japanese texts"
if [[ ! -s $TRAIN || ! -s $VALIDATION ]]; then
  python jglue/prepare_jglue.py --jglue_dir "${JGLUE_DIR:-jglue/sample}" --output_dir "$OUT" --task jsquad || exit
  if [[ ! -s $TRAIN ]]; then # a JGLUE directory that lacks the training split
    echo "No training split there: the first 3,000 questions of the validation split are trained on,"
    echo "the last 300 asked."
    mv "$VALIDATION" "$OUT/all.jsonl" && head -n 3000 "$OUT/all.jsonl" >"$TRAIN"
    tail -n 300 "$OUT/all.jsonl" >"$VALIDATION"
  elif (($(wc -l <"$VALIDATION") > 300)); then
    head -n 300 "$VALIDATION" >"$OUT/first.jsonl" && mv "$OUT/first.jsonl" "$VALIDATION"
  fi
fi
head -n 1 "$TRAIN"

lesson "2/6  A small new model, which knows nothing yet"
if [[ ! -s $MODEL/config.json ]]; then
  python tiny_model/make_tiny_model.py --model_type llama --text_file "$TRAIN" --output_dir "$MODEL" \
    --vocab_size "$VOCAB" || exit
fi

lesson "3/6  Its answers before"
python generate_text/generate_text.py --model_name_or_path "$MODEL" --prompt_file "$VALIDATION" \
  --output_file "$OUT/before.jsonl" --max_new_tokens 24 --batch_size 50 || exit

lesson "4/6  Fine-tuning on the training questions (the loss is on the answers only)"
QUARTER=$(((STEPS + 3) / 4))
python finetune_full/finetune_full.py --model_name_or_path "$MODEL" --train_file "$TRAIN" \
  --validation_file "$VALIDATION" --output_dir "$TUNED" --max_length 512 --max_steps "$STEPS" \
  --learning_rate 3e-3 --warmup_steps 50 --per_device_train_batch_size 32 --logging_steps 50 \
  --eval_strategy steps --eval_steps "$QUARTER" --save_steps "$QUARTER" --save_total_limit 1 || exit
PICTURE="" # a picture that fails ends nothing
python jobs/draw_loss.py "$TUNED" && PICTURE=$TUNED/loss.png

lesson "5/6  Its answers after"
python generate_text/generate_text.py --model_name_or_path "$TUNED" --prompt_file "$VALIDATION" \
  --output_file "$OUT/after.jsonl" --max_new_tokens 24 --batch_size 50 || exit

lesson "6/6  The score, on questions that were not trained on"
for when in before after; do
  echo "-- $when"
  if [[ $when == before ]]; then scored=$MODEL; else scored=$TUNED; fi
  python jglue/evaluate_jglue.py --task jsquad --prediction_file "$OUT/$when.jsonl" \
    --output_file "$scored/scores.json" || exit
done
python - "$OUT" <<'PY' || exit
import json, sys
def rows(name):
    return [json.loads(line) for line in open(f"{sys.argv[1]}/{name}.jsonl", encoding="utf-8")]
pairs = list(zip(rows("before"), rows("after")))
for before, after in pairs[:: max(1, len(pairs) // 4)][:4]:
    old, new = before["generated_text"][:20], after["generated_text"][:40]
    print(f"\n{before['prompt']}\n  expected {before['completion']} | before {old!r} | after {new!r}")
PY
if [[ -n ${JGLUE_DIR:-} ]]; then
  echo
  echo "A model this small, trained for minutes on real text, learns the form of an answer, seldom"
  echo "the answer itself: it has seen no Japanese but these questions. JSQuAD is meant for models"
  echo "that were trained on much text before: README.md shows how to fine-tune one of those."
fi
lesson "Done: a page about it"
python jobs/report.py "$MODEL" "$TUNED" --output_file "$OUT/report.md" && # nor does a page
  grep -E '^\| (run|trained|time|peak|tokens|eval_loss|jsquad (exact|f1))' "$OUT/report.md"
[[ -z $PICTURE ]] || echo "loss       $PICTURE"
echo "next       python generate_text/generate_text.py --model_name_or_path $TUNED --prompt \\"
printf '%s\n' "             \$'題名：買い物\\n文章：今朝、田中さんは朝市で柿を買った。\\n質問：田中さんは何を買いましたか。\\n答え：'"
echo "           README.md: the lessons one by one, and the same steps with qsub"
