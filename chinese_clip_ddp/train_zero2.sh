#!/usr/bin/env bash
# An image and a text encoder with DeepSpeed ZeRO-2: on every visible GPU, or on 2 CPU processes where there is none.
#   bash train_zero2.sh                                     generated scenes and emojis, two small encoders from scratch
#   MODEL=OFA-Sys/chinese-clip-vit-base-patch16 DATA=my_pairs bash train_zero2.sh --num_train_epochs 1
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash train_zero2.sh      the same line on each machine
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"
# >>> launch: one copy of this block stands in every launch script
[[ -n "${GPUS:-}" ]] && export CUDA_VISIBLE_DEVICES=$GPUS
gpu_count=$(python -c 'import torch; print(torch.cuda.device_count())')
device_args=()
if [[ $gpu_count == 0 ]]; then
    device_args=(--use_cpu true)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
nproc=${NPROC:-$([[ $gpu_count == 0 ]] && echo 2 || echo "$gpu_count")}
if [[ ${NNODES:-1} == 1 ]]; then
    launch=(python launch.py --nproc_per_node "$nproc" --rdzv_backend c10d --rdzv_endpoint "localhost:${MASTER_PORT:-0}")
else
    launch=(python launch.py --nproc_per_node "$nproc" --nnodes "$NNODES" --node_rank "$NODE_RANK"
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
# <<< launch
# >>> clip-recipe: one copy of this block stands in every launch script
if [[ -n "${MODEL:-}" || "$*" == *_model_name_or_path* ]]; then # encoders that have learnt already
    recipe=(--num_train_epochs 3 --learning_rate 1e-5 --per_device_train_batch_size 64)
else # from scratch: all processes of a machine together have 128 pairs a step
    recipe=(--num_train_epochs 9 --learning_rate 2e-3 --per_device_train_batch_size $(((128 + nproc - 1) / nproc)))
    recipe+=(--image_augmentation crop)
fi
if [[ -z "${DATA:-}" ]]; then
    python data01_scenes.py
    DATA=cache_data/scenes
    recipe+=(--eval_data_path cache_data/scenes_eval)
fi
# <<< clip-recipe
set -x
exec "${launch[@]}" train.py "${device_args[@]}" \
    --deepspeed ds_zero2_no_offload.json \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    --data_path "$DATA" \
    --output_dir "${OUTPUT:-output_zero2}" \
    "${recipe[@]}" \
    "$@"
