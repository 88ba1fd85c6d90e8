#!/usr/bin/env bash
# Lesson 6, node 0 of 2. The other node is run_code062.sh: in another terminal, or on another machine. Either may be first.
#
#   bash run_code061.sh
#   MASTER_ADDR=10.0.0.1 bash run_code061.sh     on two machines: the address of the one that runs run_code061.sh
#   MASTER_PORT=29601 bash run_code061.sh        where 29600 is taken; the same on both
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# While it waits for the other node, torchrun is deaf to Ctrl-C: this shell hears it, and ends torchrun by SIGTERM.
trap 'kill "$launcher"; wait "$launcher"' INT TERM
set -x
torchrun --nnodes 2 --node_rank 0 --nproc_per_node "${NPROC:-2}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29600}" code06_nodes.py &
launcher=$!
wait "$launcher"
