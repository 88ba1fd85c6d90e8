"""Waits until a Ray cluster has so many machines.

python -m base03_main_ppo.wait_for_nodes 10.0.0.1:6379 2
"""

import sys
import time

import ray

address, wanted = sys.argv[1], int(sys.argv[2])
ray.init(address, logging_level="error", log_to_driver=False)
while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
    print(f"{alive} of {wanted} machines are there", flush=True)
    time.sleep(5)
