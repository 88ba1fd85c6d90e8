"""A mixture of experts: a router sends each token to its best 2 of 8 small MLPs; a loss keeps the experts busy alike.

A model has the parameters of all experts and computes with few: here 2 of 8 (Shazeer et al., 2017; Mixtral, Qwen3-MoE).
Without help the router favours the same ones more and more. The load-balancing loss (Fedus et al., "Switch
Transformers", 2021), experts * sum(share of tokens * mean p), is least where all have the same. p learns it.
All of it is held against Qwen3-MoE's block, loss and gradients.

python code04_mixture_of_experts.py
"""

import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, load_balancing_loss_func

TOKENS, HIDDEN, INNER, EXPERTS, TOP, STEPS = 256, 32, 48, 8, 2, 60


def route(
    tokens: torch.Tensor, router: torch.Tensor, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [tokens, hidden] -> p of all experts, the weights of the TOP best, and which they are."""
    probabilities = F.linear(tokens, router).softmax(-1)
    weights, chosen = probabilities.topk(TOP, dim=-1)
    return probabilities, weights / weights.sum(-1, keepdim=True) if renormalise else weights, chosen


def mix(tokens: torch.Tensor, weights: dict[str, torch.Tensor], renormalise: bool) -> torch.Tensor:
    """Each expert computes its tokens in one go, and adds what comes out to their rows."""
    _, shares, chosen = route(tokens, weights["gate.weight"], renormalise)
    output = torch.zeros_like(tokens)
    for expert in range(EXPERTS):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        gate, up = F.linear(tokens[rows], weights["experts.gate_up_proj"][expert]).chunk(2, dim=-1)
        result = F.linear(F.silu(gate) * up, weights["experts.down_proj"][expert])
        output = output.index_add(0, rows, shares[rows, places, None] * result)
    return output


def balance(probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """EXPERTS * sum of (share of tokens that an expert gets) * (its mean p): TOP where all are alike."""
    share = F.one_hot(chosen, EXPERTS).sum(1).float().mean(0)
    return EXPERTS * (share * probabilities.mean(0)).sum()


def train_router(router: torch.Tensor, tokens: torch.Tensor, weight: float) -> list[int]:
    """Wants the chosen experts to be surer of themselves, as training does; how many tokens each gets in the end."""
    router = router.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([router], lr=0.01)
    for _ in range(STEPS):
        probabilities, shares, chosen = route(tokens, router, renormalise=False)
        optimizer.zero_grad()
        (-shares.sum(-1).log().mean() + weight * balance(probabilities, chosen)).backward()
        optimizer.step()
    return torch.bincount(route(tokens, router, False)[2].flatten(), minlength=EXPERTS).tolist()


torch.manual_seed(0)
gap, largest = 0.0, 0.0
for renormalise in (True, False):
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": TOP, "norm_topk_prob": renormalise}
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, experts_implementation="eager", **sizes)
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = dict(block.named_parameters())
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    slope = torch.randn(TOKENS, HIDDEN)
    probabilities, _, chosen = route(tokens, weights["gate.weight"], renormalise)
    ours, theirs = mix(tokens, weights, renormalise), block(tokens[None])[0]
    losses = [balance(probabilities, chosen)]
    losses.append(load_balancing_loss_func((F.linear(tokens, weights["gate.weight"]),), EXPERTS, TOP))
    wanted = [tokens, *weights.values()]
    pairs = [(ours, theirs), losses]
    pairs += zip(
        *(
            torch.autograd.grad((out * slope).mean() + loss, wanted)
            for out, loss in zip((ours, theirs), losses, strict=True)
        ),
        strict=True,
    )
    gap = max(gap, *((one - two).abs().max().item() for one, two in pairs))
whole, used = (
    sum(w.numel() for w in weights.values()),
    sum(w[0].numel() * TOP for n, w in weights.items() if "exp" in n),
)
used += weights["gate.weight"].numel()
reached = torch.autograd.grad(mix(tokens[:1], weights, renormalise=False).sum(), list(weights.values()))
assert used == sum(gradient.count_nonzero() for gradient in reached)  # none reaches what a token isn't computed with
print("the first token's p:", *[f"{p:.2f}" for p in probabilities[0]], "-> experts", *chosen[0].tolist())
print(f"a token is computed with {used:,} of {whole:,} parameters")

skewed = tokens.detach() + torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))  # all lean to one side
alone, balanced = (train_router(weights["gate.weight"], skewed, weight) for weight in (0.0, 1.0))
print("tokens by expert, trained without the balancing loss:", *alone)
print("tokens by expert, trained with it:                   ", *balanced)
even = TOKENS * TOP / EXPERTS
uniform = balance(torch.full((EXPERTS, EXPERTS), 1 / EXPERTS), torch.arange(EXPERTS * TOP).view(EXPERTS, TOP) % EXPERTS)
assert gap < 1e-5 and abs(uniform.item() - TOP) < 1e-6 and max(alone) > 2 * even > max(balanced) and losses[0] > TOP
print(
    f"proof: output, loss and gradients differ from the library's by {gap:.1e}; {used / whole:.0%} of the parameters a "
    f"token; the busiest expert has {max(alone) / even:.1f} times its share, with the loss {max(balanced) / even:.1f}"
)
