#!/usr/bin/env bash
# Lesson 8: gradients by hand and by DDP, on NPROC processes of this machine.
#
#   bash run_code08.sh
#   NPROC=4 bash run_code08.sh
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

set -x
exec torchrun --nproc_per_node "${NPROC:-2}" --rdzv_backend c10d --rdzv_endpoint localhost:0 code08_ddp.py
