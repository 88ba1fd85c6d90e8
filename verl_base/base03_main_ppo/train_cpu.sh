#!/usr/bin/env bash
# verl's own trainer without a GPU, on NPROC processes (2): GRPO, or PPO with a critic (ALGORITHM=ppo).
#
#   bash base03_main_ppo/train_cpu.sh                      from what sft_cpu.sh left, or else the tiny model of train.py
#   ALGORITHM=ppo bash base03_main_ppo/train_cpu.sh trainer.total_training_steps=100
#   MODEL=my_model DATA=my_data bash base03_main_ppo/train_cpu.sh reward.custom_reward_function.path=$PWD/my_rewards.py
#   MODEL=my_model bash base03_main_ppo/train_cpu.sh trainer.val_only=true        only asks the validation questions
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

algorithm=${ALGORITHM:-grpo}
output=$(realpath -m "${OUTPUT:-output_main_ppo/${algorithm}_$(basename "$data")}")
python -m base03_main_ppo.make_parquet "$data" "$output/data"
sft=output_main_ppo/sft_$(basename "$data")
if [[ -z "${MODEL:-}" && -f $sft/latest_checkpointed_iteration.txt ]]; then
    MODEL=$sft/global_step_$(<"$sft/latest_checkpointed_iteration.txt")/huggingface
elif [[ -z "${MODEL:-}" ]]; then
    MODEL=$(python -c "import tiny; print(tiny.tiny_model_folder('$data/train.jsonl', 42))" | tee /dev/stderr | tail -n 1)
fi
set -x
exec python -m base03_main_ppo.run_main_ppo --config-dir base03_main_ppo/config --config-name "$algorithm" device=cpu \
    actor_rollout_ref.model.path="$MODEL" \
    data.train_files="$output/data/train.parquet" \
    data.val_files="$output/data/test.parquet" \
    reward.custom_reward_function.path="$PWD/rewards.py" \
    trainer.default_local_dir="$output" \
    trainer.n_gpus_per_node="${NPROC:-2}" \
    "$@"
