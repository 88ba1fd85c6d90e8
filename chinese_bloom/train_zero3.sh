#!/usr/bin/env bash
# BLOOM or Falcon SFT with DeepSpeed ZeRO-3, for models that one GPU can't hold: all visible GPUs, or 2 CPU processes.
#
#   bash train_zero3.sh                                     a tiny BLOOM and the sample data of this folder
#   MODEL=bigscience/bloom-560m DATA=my_data bash train_zero3.sh --num_train_epochs 1
#   GPUS=0,1 bash train_zero3.sh                            these GPUs only
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

if [[ -n "${MODEL:-}" ]]; then
    recipe=(--num_train_epochs 3 --learning_rate 2e-5)
else
    recipe=(--num_train_epochs 8 --learning_rate 2e-3 --adam_beta2 0.95) # random weights: it takes longer
fi
[[ -n "${DATA:-}" ]] || recipe+=(--validation_split 0.1)
set -x
exec "${launch[@]}" train.py "${device_args[@]}" \
    --deepspeed ds_zero3_no_offload.json \
    --model_name_or_path "${MODEL:-tiny}" \
    --data_path "${DATA:-data}" \
    --output_dir "${OUTPUT:-output_zero3}" \
    --model_max_length 2048 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 1 \
    "${recipe[@]}" \
    "$@"
