#!/usr/bin/env bash
# Lesson 5: the collectives under torchrun, on NPROC processes of this machine.
#
#   bash run_code05.sh
#   NPROC=4 bash run_code05.sh
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

set -x
exec torchrun --nproc_per_node "${NPROC:-2}" --rdzv_backend c10d --rdzv_endpoint localhost:0 code05_torchrun.py
