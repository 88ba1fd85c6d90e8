"""Two roles in one pool: the actor and its reference live in the same processes, and are called like two groups.

python -m base01_worker_and_ray.code08_colocated_roles
"""

from pathlib import Path

from cluster import local_cluster  # before Ray and verl: they read the environment that it sets

# isort: split
import ray
from verl import DataProto
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.single_controller.ray.base import create_colocated_worker_cls

from base01_worker_and_ray.code08_workers import Policy
from base01_worker_and_ray.tiny_model import make_prompts, save_tiny_model

path = str(Path("output_base01/model").resolve())
save_tiny_model(path)
batch = DataProto.from_dict({"input_ids": make_prompts(4)["input_ids"].clamp(min=1)})  # [rows, length], no padding


def mean_log_ratio(actor: RayWorkerGroup, reference: RayWorkerGroup) -> float:
    """Mean of log p(actor) - log p(reference) over the tokens of the batch."""
    actor_log_probs, reference_log_probs = [role.compute_log_probs(batch).batch for role in (actor, reference)]
    return (actor_log_probs["log_probs"] - reference_log_probs["log_probs"]).mean().item()


with local_cluster(2, "output_base01") as pool:
    roles = {name: RayClassWithInitArgs(ray.remote(Policy), path=path) for name in ("actor", "reference")}
    # Two groups would be four processes, and each of them asks for a GPU of its own; one class of both roles is two.
    group = RayWorkerGroup(pool, create_colocated_worker_cls(roles))
    groups = group.spawn(prefix_set=roles.keys())  # two views of the same processes, each with one role's methods
    actor, reference = groups["actor"], groups["reference"]

    print("pids of the actor:    ", *actor.get_pid())
    print("pids of the reference:", *reference.get_pid())
    assert actor.get_pid() == reference.get_pid() and len(set(actor.get_pid())) == 2

    before = mean_log_ratio(actor, reference)
    for step in range(3):
        losses = actor.learn(batch.batch["input_ids"], learning_rate=0.1)
        print(f"step {step}: loss on rank 0 and 1:", *[f"{loss:.4f}" for loss in losses])
        assert losses[0] == losses[1]
    after = mean_log_ratio(actor, reference)
    assert before == 0 and after > 0
print(f"proof: same pids; log p(actor) - log p(reference) is {before:.4f} before learning and {after:.4f} after it")
