#!/usr/bin/env bash
# Both stages of LLaVA (https://arxiv.org/abs/2310.03744): the projector alone, then it and the language model.
#   VISION=my_clip TEXT=my_qwen DATA=my_data bash train_stages.sh       builds the LLaVA first, by build_model.py
#   MODEL=my_llava CAPTIONS=my_captions DATA=my_data bash train_stages.sh --train_type use_lora
# CAPTIONS (else DATA) is for stage 1, further flags are for stage 2, those on reading data for both; STAGE1="--flag value"
# has stage 1's own; ZERO=3 shards the weights too.
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
    mkdir -p "$output"
    if [[ ! -d "$MODEL" ]]; then
        echo "$VISION $TEXT" >"$MODEL.txt"
        python build_model.py "$VISION" "$TEXT" "$MODEL"
    elif [[ "$(cat "$MODEL.txt" 2>&1)" != "$VISION $TEXT" ]]; then
        echo "error: $MODEL was built of other parts ($(cat "$MODEL.txt" 2>&1)); give another OUTPUT, or remove it" >&2
        exit 1
    fi
fi
read -ra stage1 <<<"${STAGE1:-}"
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    case ${!i} in
    --skip_bad_rows | --image_aspect_ratio | --model_max_length | --trust_remote_code | --feature_cache_gb | --dataloader_num_workers)
        stage1+=("${!i}" "${!next}")
        ;;
    esac
done
echo "stage 1 of 2: train.py --train_type projector"
MODEL=$MODEL DATA=${CAPTIONS:-$DATA} OUTPUT=$output/stage1 bash "train_zero${ZERO:-2}.sh" \
    --train_type projector --learning_rate 1e-3 --per_device_train_batch_size 16 "${stage1[@]}" || {
    echo "stage 1 has failed; it takes flags of its own from STAGE1, as in STAGE1='--overwrite_output_dir true'" >&2
    exit 1
}
echo "stage 2 of 2: train.py --train_type freeze_vision $*"
MODEL=$output/stage1 DATA=$DATA OUTPUT=$output/stage2 exec bash "train_zero${ZERO:-2}.sh" \
    --train_type freeze_vision --learning_rate 2e-5 --projector_learning_rate 2e-5 --gradient_checkpointing true "$@"
