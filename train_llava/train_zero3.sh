#!/usr/bin/env bash
# A LLaVA with DeepSpeed ZeRO-3, for models that one GPU can't hold: all visible GPUs, or 2 CPU processes.
#   bash train_zero3.sh                                     generated scenes, a tiny model: tower, projector, all
#   MODEL=my_llava DATA=my_data bash train_zero3.sh         LoRA; --train_type freeze_vision, projector or none
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
output=${OUTPUT:-output_zero3}
flags=("${device_args[@]}" --deepspeed ds_zero3_no_offload.json)
# >>> llava-recipe: one copy of this block stands in every launch script
first=() of_both=true
for flag in "$@"; do # the tiny model's first stage trains the projector alone: adapters and the tower's rate aren't for it
    case $flag in
    --lora_* | --target_modules | --use_lora | --train_type | --vision_learning_rate) of_both=false ;;
    --*) of_both=true ;;
    esac
    [[ $of_both == false ]] || first+=("$flag")
done
if [[ -z "${MODEL:-}" && " ${first[*]} " == *" --output_dir"* ]]; then
    echo "error: --output_dir: this is two runs, and a look at the result; name their folder by OUTPUT=... instead" >&2
    exit 1
fi
if [[ -z "${DATA:-}" ]]; then
    python data01_scenes.py
    DATA=cache_data/scenes flags+=(--eval_data_path cache_data/scenes_eval)
fi
flags+=(--data_path "$DATA")
set -x
if [[ -z "${MODEL:-}" ]]; then # the tiny one: its tower learns to see while it is built, then the projector, then all
    flags+=(--per_device_train_batch_size $(((16 + nproc - 1) / nproc)) --learning_rate 2e-3 --adam_beta2 0.98)
    stages=(--model_name_or_path tiny --output_dir "$output/stage1" --max_steps 60 --eval_strategy no --eval_on_start false)
    "${launch[@]}" train.py "${flags[@]}" "${stages[@]}" "${first[@]}" --train_type projector
    stages=(--model_name_or_path "$output/stage1" --output_dir "$output" --train_type freeze_vision --num_train_epochs 3)
    "${launch[@]}" train.py "${flags[@]}" "${stages[@]}" "$@"
    [[ "$DATA" != cache_data/scenes ]] || python evaluate_scenes.py "$output" --output "$output/scenes_results.json"
    exit
fi
flags+=(--model_name_or_path "$MODEL" --train_type use_lora --num_train_epochs 1 --learning_rate 2e-4)
exec "${launch[@]}" train.py "${flags[@]}" --output_dir "$output" --per_device_train_batch_size 4 "$@"
# <<< llava-recipe
