#!/usr/bin/env bash
# Preference training with DeepSpeed ZeRO-2: on every visible GPU, or on 2 CPU processes where there is none.
#
#   bash train_zero2.sh                                     a tiny model: a short SFT on the chosen replies, then DPO
#   MODEL=my_baichuan2 DATA=my_pairs bash train_zero2.sh    DPO by LoRA; --use_lora false trains all weights
#   MODEL=my_sft_adapter DATA=my_pairs bash train_zero2.sh  goes on with an adapter, which is the reference as well
#   GPUS=0,1 bash train_zero2.sh                            these GPUs only
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

output=${OUTPUT:-output_zero2}
if [[ -n "${MODEL:-}" ]]; then
    recipe=(--use_lora true --num_train_epochs 1 --learning_rate 2e-5)
else # random weights prefer nothing: first all of them learn to answer
    afresh=()
    [[ "$*" == *"--overwrite_output_dir true"* ]] && afresh=(--overwrite_output_dir true)
    (set -x; "${launch[@]}" train.py "${device_args[@]}" --deepspeed ds_zero2_no_offload.json --output_dir "${output%/}_sft" \
        --model_name_or_path tiny --data_path "${DATA:-data/train}" --loss_type sft --per_device_train_batch_size 4 \
        --num_train_epochs 4 --learning_rate 2e-3 --adam_beta2 0.95 --save_total_limit 1 "${afresh[@]}")
    recipe=(--num_train_epochs 4 --learning_rate 5e-4 --rpo_alpha 1)
fi
[[ -n "${DATA:-}" ]] || recipe+=(--eval_data_path data/validation)
set -x; exec "${launch[@]}" train.py "${device_args[@]}" \
    --deepspeed ds_zero2_no_offload.json \
    --model_name_or_path "${MODEL:-${output%/}_sft}" \
    --data_path "${DATA:-data/train}" \
    --output_dir "$output" \
    --per_device_train_batch_size 4 \
    "${recipe[@]}" "$@"
