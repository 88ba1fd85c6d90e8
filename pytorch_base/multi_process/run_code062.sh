#!/usr/bin/env bash
# Lesson 6, node 1 of 2. The other node is run_code061.sh: in another terminal, or on another machine. Either may be first.
#
#   bash run_code062.sh
#   MASTER_ADDR=10.0.0.1 bash run_code062.sh     on two machines: the address of the one that runs run_code061.sh
#   MASTER_PORT=29601 bash run_code062.sh        where 29600 is taken; the same on both
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
address=${MASTER_ADDR:-127.0.0.1}
port=${MASTER_PORT:-29600}

# torchrun would wait, too, but couldn't be ended by Ctrl-C while it does
echo "waits for run_code061.sh at $address:$port"
until (: >"/dev/tcp/$address/$port") 2>/dev/null; do sleep 0.5; done

set -x
exec torchrun --nnodes 2 --node_rank 1 --nproc_per_node "${NPROC:-2}" \
    --master_addr "$address" --master_port "$port" code06_nodes.py
