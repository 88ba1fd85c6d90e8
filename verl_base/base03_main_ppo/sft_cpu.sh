#!/usr/bin/env bash
# The warm start: verl's SFT trainer on NPROC CPU processes (2). train_cpu.sh goes on from what comes out.
#
#   bash base03_main_ppo/sft_cpu.sh                        the tiny model with random weights, the sample task's examples
#   MODEL=my_model DATA=my_data bash base03_main_ppo/sft_cpu.sh trainer.total_epochs=2
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

output=$(realpath -m "${OUTPUT:-output_main_ppo/sft_$(basename "$data")}")
python -m base03_main_ppo.make_parquet "$data" "$output/data"
if [[ -z "${MODEL:-}" ]]; then
    MODEL=$output/untuned
    python -m base03_main_ppo.untuned "$data/sft.jsonl" "$MODEL"
fi

# without a GPU verl runs on our plug-in; its FSDP engine goes by the name cuda, but works on any device
export VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=cpu_platform VERL_ENGINE_DEVICE=cuda
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=lo
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # the plug-in opens a store of its own, on 127.0.0.1 only
set -x
exec torchrun --nproc_per_node "${NPROC:-2}" --rdzv_backend c10d --rdzv_endpoint localhost:0 \
    -m verl.trainer.sft_trainer --config-dir base03_main_ppo/config --config-name sft \
    model.path="$MODEL" \
    data.train_files="$output/data/sft_train.parquet" \
    data.val_files="$output/data/sft_test.parquet" \
    trainer.default_local_dir="$output" \
    trainer.n_gpus_per_node="${NPROC:-2}" \
    "$@"
