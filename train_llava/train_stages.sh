#!/usr/bin/env bash
# Both stages of LLaVA (https://arxiv.org/abs/2310.03744): the projector alone, then it and the language model.
#   VISION=my_clip TEXT=my_qwen DATA=my_data bash train_stages.sh       builds the LLaVA first, by build_model.py
#   MODEL=my_llava CAPTIONS=my_captions DATA=my_data bash train_stages.sh --train_type use_lora
# CAPTIONS (else DATA) is for stage 1, further flags are for stage 2; ZERO=3 shards the weights too.
set -euo pipefail
[[ -e "${CAPTIONS:-}" ]] && CAPTIONS=$(realpath "$CAPTIONS")
[[ -d "${VISION:-}" ]] && VISION=$(realpath "$VISION")
[[ -d "${TEXT:-}" ]] && TEXT=$(realpath "$TEXT")
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"

output=${OUTPUT:-$PWD/output_stages}
if [[ -z "${DATA:-}" || -z "${MODEL:-}" && (-z "${VISION:-}" || -z "${TEXT:-}") ]]; then
    echo "error: give DATA, and a model: either VISION and TEXT, or MODEL." >&2
    exit 1
fi
if [[ -z "${MODEL:-}" ]]; then
    MODEL=$output/built
    [[ -d "$MODEL" ]] || python build_model.py "$VISION" "$TEXT" "$MODEL"
fi
echo "stage 1 of 2: train.py --train_type projector"
MODEL=$MODEL DATA=${CAPTIONS:-$DATA} OUTPUT=$output/stage1 bash "train_zero${ZERO:-2}.sh" \
    --train_type projector --learning_rate 1e-3 --per_device_train_batch_size 16
echo "stage 2 of 2: train.py --train_type freeze_vision $*"
MODEL=$output/stage1 DATA=$DATA OUTPUT=$output/stage2 exec bash "train_zero${ZERO:-2}.sh" \
    --train_type freeze_vision --learning_rate 2e-5 --projector_learning_rate 2e-5 --gradient_checkpointing true "$@"
