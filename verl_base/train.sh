#!/usr/bin/env bash
# GRPO on verl, Ray and FSDP2, on this machine: on all GPUs, or on NPROC CPU processes (2) where there is none.
#
#   bash train.sh                                           the tiny model learns to calculate
#   bash train.sh --algorithm dapo                          or rloo, reinforce_plus_plus
#   DATA=xiehouyu bash train.sh                             the second sample task
#   MODEL=Qwen/Qwen2.5-1.5B-Instruct DATA=my_prompts.jsonl bash train.sh --reward_function my_rewards.py:score
#   GPUS=0,1 bash train.sh                                  on these GPUs
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"
[[ -n "${GPUS:-}" ]] && export CUDA_VISIBLE_DEVICES=$GPUS

data=(--data_path "${DATA:-arithmetic}")
if [[ "${DATA:-arithmetic}" == arithmetic || "${DATA:-}" == xiehouyu ]]; then
    python prepare.py "${DATA:-arithmetic}"
    folder=cache_data/${DATA:-arithmetic}
    data=(--data_path "$folder/train.jsonl" --eval_data_path "$folder/test.jsonl" --max_response_length 32)
fi
recipe=()
if [[ -z "${MODEL:-}" ]]; then # a third of a million parameters bear large steps
    recipe=(--total_training_steps 90 --learning_rate 3e-4 --lr_warmup_steps 15 --lr_scheduler_type cosine
        --train_batch_size 64 --ppo_mini_batch_size 32 --ppo_epochs 2 --clip_ratio_high 0.28 --temperature 1.2
        --test_freq 45)
fi
set -x
exec python train.py \
    --model_name_or_path "${MODEL:-tiny}" \
    "${data[@]}" \
    --output_dir "${OUTPUT:-output}" \
    ${NPROC:+--nproc "$NPROC"} \
    "${recipe[@]}" \
    "$@"
