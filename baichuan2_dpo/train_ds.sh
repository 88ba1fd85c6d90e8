#!/usr/bin/env bash
# Preference training with DeepSpeed; ZERO says which: 2 (the default) or 3. All else is as in train_zero2.sh.
#
#   bash train_ds.sh                                        a tiny model: a short SFT on the chosen replies, then DPO
#   MODEL=my_baichuan2 DATA=my_pairs ZERO=3 bash train_ds.sh
set -euo pipefail
exec bash "$(dirname "$0")/train_zero${ZERO:-2}.sh" "$@"
