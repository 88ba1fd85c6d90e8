#!/usr/bin/env bash
# Preference training with DeepSpeed; ZERO says which: 2 (the default) or 3. All else is as in train_zero2.sh.
#
#   bash train_ds.sh                                        a tiny model: a short SFT on the chosen replies, then DPO
#   MODEL=my_baichuan2 DATA=my_pairs ZERO=3 bash train_ds.sh
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"

exec bash "train_zero${ZERO:-2}.sh" "$@"
