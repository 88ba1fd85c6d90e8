#!/usr/bin/env bash
# Every way of --cross_embedding, one after the other; then their curves in one picture and their results in a table.
#
#   bash train_ddp_ti_all.sh                                output_all/<way>, output_all/compare.png
#   MODES="tiled sigmoid" OUTPUT=my_output bash train_ddp_ti_all.sh --num_train_epochs 5
#   MODEL=my_clip DATA=my_pairs MODES="base tiled" bash train_ddp_ti_all.sh
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"

all=${OUTPUT:-$PWD/output_all}
folders=()
for mode in ${MODES:-base gather gather_nn custom local tiled sigmoid}; do
    OUTPUT=$all/$mode bash train_ddp_text_image.sh --num_train_epochs 2 --cross_embedding "$mode" "$@"
    folders+=("$all/$mode")
done
python compare.py "${folders[@]}"
