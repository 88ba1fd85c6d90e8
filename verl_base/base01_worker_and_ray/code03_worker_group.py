"""verl's single controller: one program calls a method once, and a group of workers runs it, one process a rank.

python -m base01_worker_and_ray.code03_worker_group
"""

from cluster import local_cluster  # before Ray and verl: they read the environment that it sets

# isort: split
import ray
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup

from base01_worker_and_ray.code03_workers import VARIABLES, Member

with local_cluster(2, "output_base01") as pool:  # RayResourcePool: two places, on a GPU each where there are GPUs
    member = RayClassWithInitArgs(ray.remote(Member), team="verl")  # the class and its arguments; nothing is started
    group = RayWorkerGroup(pool, member)  # one Member in each place; the registered methods become the group's own

    replies = group.introduce("hello")
    print(f"one call, {len(replies)} replies: {replies[0]['said']!r} from pid", *[reply["pid"] for reply in replies])
    for name in VARIABLES:
        print(f"  {name:12}", *[f"{reply[name]:>10}" for reply in replies])
    assert [reply["RANK"] for reply in replies] == ["0", "1"]
    assert {reply["WORLD_SIZE"] for reply in replies} == {"2"}
    assert len({(reply["MASTER_ADDR"], reply["MASTER_PORT"]) for reply in replies}) == 1
    assert len({reply["pid"] for reply in replies}) == 2
    assert {reply["LOCAL_RANK"] for reply in replies} == {"0"}  # a worker sees its own GPU only, and that is number 0

    reply = group.introduce_first("hello")
    print(f"rank 0 alone: {reply!r}")
    assert reply == "hello, verl, from rank 0 of 2"

    totals = group.add_up(10.0)
    print(f"the ranks add up 10 and 20 among themselves, and each returns the total: {totals}")
    assert totals == [30.0, 30.0]
print("proof: ranks 0 and 1 of 2 in two processes, one rendezvous, all-reduce gives 30.0 on both")
