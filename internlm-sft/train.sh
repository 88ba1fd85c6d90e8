#!/usr/bin/env bash
# A persona for InternLM by LoRA without DeepSpeed: in one process, or in NPROC of them (plain data parallelism).
#
#   bash train.sh                                           a tiny base, then the persona of this folder
#   MODEL=internlm/internlm3-8b-instruct DATA=my_persona bash train.sh --num_train_epochs 1
#   GPUS=0,1 NPROC=2 bash train.sh                          two processes on these GPUs
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash train.sh            the same line on each machine
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"
export NPROC=${NPROC:-1}

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

output=${OUTPUT:-output}
if [[ -n "${MODEL:-}" ]]; then
    recipe=(--num_train_epochs 1 --learning_rate 4e-4 --lora_dropout 0.05)
else # random weights know nothing: first all of them learn to answer, as somebody else
    python persona.py cache_data/base --base "${DATA:-data}"
    afresh=()
    [[ "$*" == *"--overwrite_output_dir true"* ]] && afresh=(--overwrite_output_dir true)
    (set -x; "${launch[@]}" train.py "${device_args[@]}" --output_dir "${output%/}_base" \
        --model_name_or_path tiny --data_path cache_data/base --per_device_train_batch_size 8 \
        --num_train_epochs 4 --learning_rate 3e-3 --adam_beta2 0.95 --save_strategy no "${afresh[@]}")
    recipe=(--num_train_epochs 8 --learning_rate 4e-3 --lora_dropout 0.2 --adam_beta2 0.95)
fi
set -x; exec "${launch[@]}" train.py "${device_args[@]}" \
    --model_name_or_path "${MODEL:-${output%/}_base}" \
    --data_path "${DATA:-data}" \
    --output_dir "$output" \
    --per_device_train_batch_size 8 \
    --use_lora true --lora_r 32 --lora_alpha 64 \
    "${recipe[@]}" "$@"
