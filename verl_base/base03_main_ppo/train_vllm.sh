#!/usr/bin/env bash
# verl's own trainer on the GPUs of this machine, completions by vLLM: GRPO, or PPO with a critic (ALGORITHM=ppo).
#
#   bash base03_main_ppo/train_vllm.sh                     Qwen2.5-7B-Instruct and the sample task, on all GPUs
#   GPUS=0,1 MODEL=Qwen/Qwen2.5-1.5B-Instruct DATA=my_data bash base03_main_ppo/train_vllm.sh \
#       reward.custom_reward_function.path=$PWD/my_rewards.py 'trainer.logger=[console,tensorboard]'
#   DRY_RUN=1 NPROC=8 bash base03_main_ppo/train_vllm.sh   prints the command as for 8 GPUs; check_configs.py reads it
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")/.."

# >>> data: DATA is a sample task, or a folder with train.jsonl, test.jsonl and, for sft_cpu.sh, sft.jsonl
data=${DATA:-arithmetic}
if [[ $data == arithmetic || $data == xiehouyu ]]; then
    python prepare.py "$data"
    data=cache_data/$data
fi
# <<< data

[[ -n "${GPUS:-}" ]] && export CUDA_VISIBLE_DEVICES=$GPUS
nproc=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count())')}
algorithm=${ALGORITHM:-grpo}
output=$(realpath -m "${OUTPUT:-output_main_ppo/${algorithm}_$(basename "$data")}")
command=(python -m base03_main_ppo.run_main_ppo --config-dir base03_main_ppo/config --config-name "$algorithm" device=gpu
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-7B-Instruct}"
    data.train_files="$output/data/train.parquet"
    data.val_files="$output/data/test.parquet"
    reward.custom_reward_function.path="$PWD/rewards.py"
    trainer.default_local_dir="$output"
    trainer.n_gpus_per_node="$nproc"
    "$@")
[[ -n "${DRY_RUN:-}" ]] && exec printf '%s\n' "${command[@]}"
python -m base03_main_ppo.make_parquet "$data" "$output/data"
set -x
exec "${command[@]}"
