"""What a run needs of a GPU's memory, and what would make it fit: python train.py ... --estimate true"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from memory import GB, Estimate, Plan, estimate

COMMON_CARDS_GB = (24, 40, 80)  # compared with where there is no GPU


def make_plan(model_args, data_args, args) -> Plan:
    """The run that these flags ask for; where there is no GPU, as it would be on one that has bf16."""
    settings = args.deepspeed
    if isinstance(settings, str):
        settings = json.loads(Path(settings).read_text())
    bf16 = args.bf16 or not torch.cuda.is_available()
    return Plan(
        model_args,
        half=torch.float16 if args.fp16 else torch.bfloat16 if bf16 else torch.float32,
        checkpointing=bool(args.activation_checkpointing),
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        optim=args.optim,
        zero=settings["zero_optimization"] if settings else None,
        world_size=args.world_size,
        packing=data_args.model_max_length if data_args.packing else None,
        seed=args.seed,
        epochs=math.ceil(args.num_train_epochs),
    )


def find_cards() -> dict[str, float]:
    """Free bytes by the name of each visible GPU; of common sizes where there is none."""
    if not torch.cuda.is_available():
        return {f"{size} GB": size * GB for size in COMMON_CARDS_GB}
    numbers = range(torch.cuda.device_count())
    return {f"GPU {i} ({torch.cuda.get_device_name(i)})": torch.cuda.mem_get_info(i)[0] for i in numbers}


def list_remedies(plan: Plan) -> list[tuple[str, dict]]:
    """Flags that may need less memory, those that cost least first, and what they change in the plan."""
    remedies = []
    if not plan.checkpointing:
        remedies.append(("--gradient_checkpointing true", {"checkpointing": True}))
    if plan.batch_size > 1:
        rows = plan.batch_size * plan.accumulation
        flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {rows}"
        remedies.append((flags, {"batch_size": 1, "accumulation": rows}))
    for kind in ("no_offload", "offload"):
        for stage in (2, 3):
            file = Path(__file__).with_name(f"ds_zero{stage}_{kind}.json")
            if plan.world_size > 1 or kind == "offload":
                zero = json.loads(file.read_text())["zero_optimization"]
                remedies.append((f"--deepspeed {file.name}", {"zero": zero}))
    if not plan.model_args.use_lora:
        remedies.append(("--use_lora true", {"model_args": replace(plan.model_args, use_lora=True)}))
    return remedies


def advise(plan: Plan, estimate_of: Callable[[Plan], Estimate], room: float) -> list[tuple[str, Estimate]]:
    """What helps, each by itself; where none makes the run fit, then as many of them together as do, or all.

    Args:
        room: bytes that are free on the fullest card.

    Returns:
        flags, and the estimate with them.
    """
    alone, together, now = [], {}, estimate_of(plan)
    for flags, changed in list_remedies(plan):
        found = estimate_of(replace(plan, **changed))
        if found.needed < now.needed:
            alone.append((flags, found))
    if not alone or min(found.needed for _, found in alone) <= room:
        return alone
    for flags, changed in list_remedies(plan):
        found = estimate_of(replace(plan, **changed))
        if found.needed < now.needed and now.needed > room:
            plan, now = replace(plan, **changed), found
            together[flags.split()[0]] = flags  # a later setting of DeepSpeed's takes the place of an earlier one
    return [*alone, (" ".join(together.values()), now)]


def say_where_it_fits(found: Estimate, cards: dict[str, float]) -> str:
    fits = [name for name, free in cards.items() if found.needed <= free]
    return f"fits {', '.join(fits)}" if fits else f"does not fit {', '.join(cards)}"


def describe_layers(layers: list[int]) -> str:
    """The last layer may keep less, since its MLP runs on supervised tokens only."""
    most, last = max(layers) / GB, layers[-1] / GB
    return f"{len(layers)} layers of {most:.3f} GB" + f" (the last {last:.3f})" * (last < 0.99 * most)


def describe(plan: Plan, found: Estimate, others: dict[str, Estimate]) -> list[str]:
    """The estimate as lines; `others` keep their activations in another way."""

    def line(name: str, size: float, text: str = "") -> str:
        return f"{name:11} {size / GB:8.2f} GB {text}".rstrip()

    states, step = found.states, found.step
    sharing = f"ZeRO-{plan.zero['stage']}" if plan.zero else "DDP" if plan.world_size > 1 else "no sharding"
    trained = "LoRA" if plan.model_args.use_lora else "all weights trained"
    rows, tokens, supervised = step.batch
    lines = [
        f"estimate    one GPU of {plan.world_size}, {str(plan.half)[6:]}, {trained}, {sharing}; GB of 10^9 bytes",
        f"batch       the heaviest: {rows} rows, {tokens:,} tokens are computed, {supervised:,} are supervised",
        line("weights", states["weights"]),
        line("gradients", states["gradients"]),
        line("optimizer", states["optimizer"]),
        *([line("buffers", states["buffers"], f"of {sharing}")] if states["buffers"] else []),
        line("activations", step.kept, f"kept for the backward pass: {describe_layers(step.layers)}"),
        *([line("", step.casts, "of these are autocast's copies of weights")] if step.casts > GB / 100 else []),
        *(
            line("", other.step.kept, f"{way}: {describe_layers(other.step.layers)}; peak {other.peak / GB:.2f} GB")
            for way, other in others.items()
        ),
        line("peak", found.peak, f"{found.moment}, as torch.cuda.max_memory_allocated counts"),
        line("needed", found.needed, "with CUDA's own and the gaps between blocks"),
        *([line("RAM", states["in RAM"], "of each process, offloaded")] if states["in RAM"] else []),
    ]
    return lines


def print_estimate(config, dataset, plan: Plan, path_class) -> None:
    """What --estimate true prints; arguments as of `memory.estimate`.

    Raises:
        UserError: it can't be said of this model.
    """
    cards, known = find_cards(), {}

    def estimate_of(plan: Plan) -> Estimate:
        if repr(plan) not in known:
            known[repr(plan)] = estimate(config, dataset, plan, path_class)
        return known[repr(plan)]

    found = estimate_of(plan)
    switched = "without" if plan.checkpointing else "with"
    others = {f"{switched} --gradient_checkpointing true": replace(plan, checkpointing=not plan.checkpointing)}
    if path_class:
        ways = tuple(way for way in plan.ways if way != "chunk_head")
        others["with the logits of the whole batch"] = replace(plan, ways=ways)
    print(*describe(plan, found, {way: estimate_of(other) for way, other in others.items()}), sep="\n")
    if torch.cuda.is_available():
        print(*(f"free        {free / GB:8.2f} GB on {name}" for name, free in cards.items()), sep="\n")
    else:
        print(f"no GPU      is here: compared with cards of {', '.join(cards)}")
    print(f"            {say_where_it_fits(found, cards)}", flush=True)
    if found.needed > min(cards.values()):
        for flags, better in advise(plan, estimate_of, min(cards.values())):
            ram, where = better.states["in RAM"] / GB, say_where_it_fits(better, cards)
            print(
                f"or          {better.needed / GB:8.2f} GB by {flags}{f', and {ram:.0f} GB RAM' * (ram > 0)}: {where}"
            )
