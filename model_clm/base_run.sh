#!/usr/bin/env bash
# The older script's name: says what it is called now, and hands over.
#
#   DATA=my_prepared bash base_run.sh --config_name llama
set -euo pipefail
# >>> paths: a relative DATA, MODEL or OUTPUT is one of the folder from which the script was called
[[ -e "${DATA:-}" ]] && DATA=$(realpath "$DATA")
[[ -d "${MODEL:-}" ]] && MODEL=$(realpath "$MODEL")
[[ "${OUTPUT:-/}" == /* ]] || OUTPUT=$PWD/$OUTPUT
# <<< paths
cd "$(dirname "$0")"

echo "base_run.sh is now train_zero2.sh, and texts are prepared once: python prepare.py --help" >&2
exec bash train_zero2.sh "$@"
