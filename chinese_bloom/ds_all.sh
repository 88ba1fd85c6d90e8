#!/usr/bin/env bash
# BLOOM in several sizes, one after the other, each with the first way of ZeRO that fits the memory; ends with a table.
#
#   bash ds_all.sh                                          all sizes: from the hub, or tiny ones where there is no GPU
#   SIZES="560m 3b" DATA=my_data bash ds_all.sh --num_train_epochs 1   these two; the flags are those of every run
#   MODELS=my_models bash ds_all.sh                         the folders my_models/bloom-560m, my_models/bloom-1b1, ...
#   MODEL_13B=my_13b SIZES=13b bash ds_all.sh               BLOOM has no 13b: any folder of that size
#   GPUS=0,1 OUTPUTS=my_runs bash ds_all.sh                 these GPUs only; the runs are my_runs/560m, my_runs/1b1, ...
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
[[ "${MODELS:-/}" == /* ]] || MODELS=$PWD/$MODELS
[[ "${MODEL_13B:-/}" == /* ]] || MODEL_13B=$PWD/$MODEL_13B
[[ "${OUTPUTS:-/}" == /* ]] || OUTPUTS=$PWD/$OUTPUTS
cd "$(dirname "$0")"
[[ -n "${GPUS:-}" ]] && export CUDA_VISIBLE_DEVICES=$GPUS

set -x
exec python sizes.py "$@"
