#!/usr/bin/env bash
# Lesson 14, second part: a rank dies, torchrun starts all of them again. What it reports in between is the death.
#
#   bash run_code14.sh
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Else torchrun's own store serves every attempt, and a rank may find there the address of one that has died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

set -x
exec torchrun --nproc_per_node 2 --max_restarts 1 --rdzv_backend c10d --rdzv_endpoint localhost:0 \
    code14_restart.py
