#!/usr/bin/env bash
# Text classification with DeepSpeed ZeRO-3 (the weights are sharded too): on every visible GPU, or on 2 CPU processes.
#
#   bash train_zero3.sh                                   the small default on product reviews
#   MODEL=hfl/chinese-roberta-wwm-ext DATA=my.csv OUTPUT=output_my bash train_zero3.sh --text_column 评论
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash train_zero3.sh      the same line on each machine
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
# >>> classifier-recipe: one copy of this block stands in every launch script
if [[ -n "${MODEL:-}" ]]; then
    recipe=(--num_train_epochs 3 --learning_rate 3e-5 --per_device_train_batch_size 32)
elif [[ ${DATA:-reviews} == words ]]; then
    recipe=(--num_train_epochs 3 --learning_rate 2e-3 --per_device_train_batch_size $((512 / nproc)) --class_weights balanced)
else # random weights, few rows: all processes of a machine together have 96 rows a step; much against overfitting
    recipe=(--num_train_epochs 3 --learning_rate 2e-3 --per_device_train_batch_size $((96 / nproc)) --adam_beta2 0.98
        --weight_decay 0.1)
fi
# <<< classifier-recipe
set -x
exec "${launch[@]}" train.py "${device_args[@]}" \
    --deepspeed ds_zero3_no_offload.json \
    --model_name_or_path "${MODEL:-tiny}" \
    --data_path "${DATA:-reviews}" \
    --output_dir "${OUTPUT:-output_zero3}" \
    --load_best_model_at_end true \
    "${recipe[@]}" \
    "$@"
