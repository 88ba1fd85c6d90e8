#!/usr/bin/env bash
# Pre-training with DeepSpeed ZeRO-3, for models that one GPU can't hold: all visible GPUs, or 2 CPU processes.
#
#   bash train_zero3.sh                                     the default corpus, a small Qwen3 from scratch
#   DATA=my_prepared bash train_zero3.sh --config_name llama --hidden_size 512 --num_hidden_layers 8 --num_attention_heads 8
#   MODEL=my_model DATA=my_prepared bash train_zero3.sh     goes on with a checkpoint of the same tokenizer
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

# >>> clm-recipe: one copy of this block stands in every launch script
if [[ -n "${MODEL:-}" ]]; then
    recipe=(--num_train_epochs 1 --learning_rate 1e-4 --lr_scheduler_type cosine --per_device_train_batch_size 4)
elif [[ -n "${DATA:-}" ]]; then # from scratch, in a size that flags say
    recipe=(--num_train_epochs 1 --lr_scheduler_type cosine --per_device_train_batch_size 8
        --learning_rate 1e-3 --embedding_learning_rate 2e-4 --head_learning_rate 2e-4) # the bigram start is to be kept
else # the default: all processes of a machine together have 16 rows a step
    recipe=(--hidden_size 192 --num_hidden_layers 2 --num_attention_heads 6 --intermediate_size 512 --model_max_length 129
        --max_steps 600 --per_device_train_batch_size $(((16 + nproc - 1) / nproc)) --lr_scheduler_type linear
        --learning_rate 3e-3 --embedding_learning_rate 5e-4 --head_learning_rate 5e-4 --warmup_steps 0.1)
fi
if [[ -z "${DATA:-}" ]]; then
    bash default_corpus.sh
    DATA=cache_data/corpus_prepared${MODEL:+_$(basename "$MODEL")}
    recipe+=(--mixture news=0.8,sanguo=0.06,idioms=0.07,words=0.07)
fi
# <<< clm-recipe
set -x
exec "${launch[@]}" train.py "${device_args[@]}" \
    --deepspeed ds_zero3_no_offload.json \
    --model_name_or_path "${MODEL:-scratch}" \
    --data_path "$DATA" \
    --output_dir "${OUTPUT:-output_zero3}" \
    "${recipe[@]}" \
    "$@"
