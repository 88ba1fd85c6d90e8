"""Elastic restart: rank 1 dies, torchrun starts all ranks again, and they go on from the last checkpoint.

Why: on many machines something always fails. What makes a restart harmless is a checkpoint that is atomic (written
beside, then renamed) and complete (weights, momentum, random numbers, step): the final weights are bit for bit those of
a run in which nothing happened. Always on the CPU, since two kinds of devices would be compared otherwise.

    bash run_code14.sh
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

CHECKPOINT = Path(__file__).parent / "output" / "code14.pt"
STEPS, EVERY, DEATH = 10, 2, 7  # a checkpoint after every 2nd step; rank 1 dies in step 7 of the first attempt


def save(state: dict) -> None:
    """Whoever looks finds the old checkpoint or the new one, never half of one."""
    beside = CHECKPOINT.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, CHECKPOINT)


def train(state: dict, disturbed: bool) -> dict:
    """From the state's step to the last, with noise in the inputs, so that the random numbers count, too."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator()
    generator.set_state(state["generators"][rank])
    weights, velocity = state["weights"].clone(), state["velocity"].clone()
    for step in range(state["step"], STEPS):
        if disturbed and step == DEATH and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            print(f"rank 1: dies in step {step}", flush=True)
            os._exit(13)
        inputs = torch.randn(16, 4, generator=generator)
        gradient = 2 * inputs.T @ (inputs @ weights - inputs.sin().sum(1)) / (len(inputs) * world)
        dist.all_reduce(gradient)
        velocity = 0.9 * velocity + gradient
        weights = weights - 0.05 * velocity
        generators = [None] * world
        dist.all_gather_object(generators, generator.get_state())
        state = {"step": step + 1, "weights": weights, "velocity": velocity, "generators": generators}
        if disturbed and rank == 0 and (step + 1) % EVERY == 0:
            save(state)
    return state


def main() -> None:
    if "RANK" not in os.environ:
        sys.exit("error: this lesson needs torchrun to start it: bash run_code14.sh")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    dist.init_process_group("gloo")
    attempt, rank, world = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank(), dist.get_world_size()
    if attempt == 0 and rank == 0:
        CHECKPOINT.parent.mkdir(exist_ok=True)
        CHECKPOINT.unlink(missing_ok=True)  # an earlier run's
    dist.barrier()
    generators = [torch.Generator().manual_seed(number).get_state() for number in range(world)]
    start = {"step": 0, "weights": torch.zeros(4), "velocity": torch.zeros(4), "generators": generators}
    state = torch.load(CHECKPOINT) if CHECKPOINT.exists() else start
    if rank == 0:
        print(f"attempt {attempt}: {world} ranks begin with step {state['step']}", flush=True)
    begun = state["step"]
    final = train(state, disturbed=True)
    undisturbed = train(start, disturbed=False)
    same = [torch.equal(final[name], undisturbed[name]) for name in ("weights", "velocity")]
    assert all(same) and attempt == 1 and begun == DEATH // EVERY * EVERY
    if rank == 0:
        print(f"  with the restart    {final['weights'].tolist()}")
        print(f"  without a failure   {undisturbed['weights'].tolist()}")
        print(f"proof: {attempt} restart, from step {begun} of {STEPS}; weights and momentum are equal bit for bit")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
