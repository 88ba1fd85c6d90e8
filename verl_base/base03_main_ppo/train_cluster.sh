#!/usr/bin/env bash
# verl's own trainer on several machines with GPUs: the same line on each, NODE_RANK differs. Machine 0 is Ray's head:
# it waits for the others, submits the job and ends Ray everywhere when that is done. This folder, MODEL and OUTPUT are
# at the same place on all machines (a shared file system).
#
#   export RAY_AUTH_TOKEN=my_secret     the same on all: without it, who reaches the port could run code on them
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash base03_main_ppo/train_cluster.sh
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")/.."
[[ -n "${GPUS:-}" ]] && export CUDA_VISIBLE_DEVICES=$GPUS
head=$MASTER_ADDR:${MASTER_PORT:-6379}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [[ $NODE_RANK != 0 ]]; then
    until (echo > "/dev/tcp/${head/://}") 2> /dev/null; do sleep 2; done
    set -x
    exec ray start --block --address "$head"
fi

# >>> data: DATA is a sample task, or a folder with train.jsonl, test.jsonl and, for sft_cpu.sh, sft.jsonl
data=${DATA:-arithmetic}
if [[ $data == arithmetic || $data == xiehouyu ]]; then
    python prepare.py "$data"
    data=cache_data/$data
fi
# <<< data

algorithm=${ALGORITHM:-grpo}
output=$(realpath -m "${OUTPUT:-output_main_ppo/${algorithm}_$(basename "$data")}")
command=(python -m verl.trainer.main_ppo --config-dir "$PWD/base03_main_ppo/config" --config-name "$algorithm" device=gpu
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-7B-Instruct}"
    data.train_files="$output/data/train.parquet"
    data.val_files="$output/data/test.parquet"
    reward.custom_reward_function.path="$PWD/rewards.py"
    trainer.default_local_dir="$output"
    trainer.n_gpus_per_node="${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count())')}"
    trainer.nnodes="$NNODES"
    "$@")
[[ -n "${DRY_RUN:-}" ]] && exec printf '%s\n' "${command[@]}"
for address in "$head" 127.0.0.1:8265; do
    if (echo > "/dev/tcp/${address/://}") 2> /dev/null; then
        echo "error: $address is in use (by another Ray? ray stop); the head needs MASTER_PORT (6379) and 8265." >&2
        exit 1
    fi
done
python -m base03_main_ppo.make_parquet "$data" "$output/data"
ray start --block --head --node-ip-address "$MASTER_ADDR" --port "${head##*:}" --dashboard-host 127.0.0.1 &
trap "kill $!; wait" EXIT
python -m base03_main_ppo.wait_for_nodes "$head" "$NNODES"
set -x
ray job submit --address http://127.0.0.1:8265 -- "${command[@]}"
