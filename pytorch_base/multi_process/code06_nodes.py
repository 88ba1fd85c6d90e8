"""Several nodes: a torchrun on each forms one job, and each rank has a place in its node as well as in the world.

Why: data moves many times as fast within a node as between nodes, so real jobs add up within the nodes first and send
one sum a node over the network. Here by hand, with groups (`new_group`): the result is that of one all-reduce over all.

In two terminals of one machine, in any order:

    bash run_code061.sh
    bash run_code062.sh

On two machines, the same with the address of the first:

    MASTER_ADDR=10.0.0.1 bash run_code061.sh
    MASTER_ADDR=10.0.0.1 bash run_code062.sh
"""

import os
import socket
import sys

import psutil
import torch
import torch.distributed as dist


def own_address(address: str) -> str:
    """The address from which this machine would send to `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        unsent.connect((address, 9))
        return unsent.getsockname()[0]


def find_interface(address: str) -> str:
    """The network interface that leads to `address`.

    Left to itself gloo asks what address the machine's own name has, and in containers, Debian and Ubuntu /etc/hosts
    says 127.0.x.1, where no other machine can reach it.
    `address` may be that very name: then it's the interface of the default route, without one the first that is up.
    """
    own, found = own_address(address), [(name, one) for name, some in psutil.net_if_addrs().items() for one in some]
    names = {one.address: name for name, one in found if one.family == socket.AF_INET}
    if own.startswith("127.") and address != "localhost" and not address.startswith("127."):
        try:
            own = own_address("198.51.100.1")  # nobody has it (RFC 5737): the way there is the default route
        except OSError:
            up = {name for name, one in psutil.net_if_stats().items() if one.isup}
            own = next((one for one, name in names.items() if name in up and not one.startswith("127.")), own)
    return names[own]


def join() -> torch.device:
    """Over the loopback interface if the whole job is on one machine, else over the one that leads to the first."""
    torch.set_num_threads(1)
    on_one_machine = os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost")
    ranks_here = os.environ["WORLD_SIZE" if on_one_machine else "LOCAL_WORLD_SIZE"]
    local_rank = int(os.environ["RANK" if on_one_machine else "LOCAL_RANK"])  # NCCL wants a GPU of its own for each
    cuda = torch.cuda.device_count() >= int(ranks_here)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    interface = find_interface(os.environ["MASTER_ADDR"])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    dist.init_process_group("nccl" if cuda else "gloo")
    return device


def add_up_by_nodes(number: torch.Tensor, node: int, local_rank: int, per_node: int) -> tuple[torch.Tensor, ...]:
    """Within each node, then between the nodes' first ranks, then back into the nodes.

    Returns:
        The sum of the node and the sum of all.
    """
    world = dist.get_world_size()
    firsts = list(range(0, world, per_node))
    groups = [dist.new_group(list(range(first, first + per_node))) for first in firsts]  # all ranks make all groups
    between = dist.new_group(firsts)

    node_sum = number.clone()
    dist.all_reduce(node_sum, group=groups[node])
    total = node_sum.clone()
    if local_rank == 0:
        dist.all_reduce(total, group=between)
    dist.broadcast(total, src=firsts[node], group=groups[node])
    return node_sum, total


def main() -> None:
    if "RANK" not in os.environ:
        sys.exit("error: this lesson needs torchrun: bash run_code061.sh, and in another terminal bash run_code062.sh")
    device = join()
    rank, world = dist.get_rank(), dist.get_world_size()
    node, local_rank = int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"])
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])

    number = torch.tensor(10**rank, device=device)
    node_sum, total = add_up_by_nodes(number, node, local_rank, per_node)
    flat = number.clone()
    dist.all_reduce(flat)
    sums = [tensor.item() for tensor in (number, node_sum, total, flat)]
    rows = [None] * world
    dist.all_gather_object(rows, [rank, node, local_rank, os.getppid(), socket.gethostname(), *sums])
    if local_rank == 0:  # on each node, so that both terminals show it
        print(f"this is node {node} of {world // per_node}")
        print("rank  node  local rank  torchrun's pid  host              number  node's sum    total  all_reduce")
        for rank, node, local_rank, pid, host, *sums in rows:
            print(f"{rank:>4}  {node:>4}  {local_rank:>10}  {pid:>14}  {host[:14]:14} ", end="")
            print(f"{sums[0]:>9}  {sums[1]:>10} {sums[2]:>8}  {sums[3]:>10}")
        _, nodes, _, pids, hosts, _, node_sums, totals, flats = zip(*rows, strict=True)
        assert nodes == tuple(rank // per_node for rank in range(world))
        assert set(totals) == set(flats) == {int("1" * world)} == {sum(set(node_sums))}
        launchers = len(set(zip(hosts, pids, strict=True)))
        by_nodes = f"{node_sums[0]} + {node_sums[-1]} by nodes is {totals[0]} on every rank"
        print(f"proof: {launchers} launchers, {world} ranks, one job: {by_nodes}, as by one all_reduce")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
