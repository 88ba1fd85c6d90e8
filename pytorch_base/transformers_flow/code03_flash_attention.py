"""FlashAttention by hand: softmax tile by tile, so that the scores [length, length] never exist as a whole.

A row of attention needs the largest of its scores and the sum of exp(score) before it can be mixed. The online softmax
(Milakov and Gimelshein, 2018) keeps both for what it has seen, and shrinks what it has mixed when a larger score comes.
So keys and values are taken a tile at a time (Dao et al., "FlashAttention", 2022), which on a GPU stays in its fast
memory. Kept for the backward pass is log(sum of exp) of each row: the weights of a tile are computed again from it.

python code03_flash_attention.py
"""

import torch
from torch.nn import functional as F

HEADS, LENGTH, HEAD_DIM, TILE = 4, 200, 32, 48  # the last tile has 8 places


class Meter:
    """The largest tensor of scores, and how many tiles were computed."""

    largest, tiles = 0, 0


def list_tiles() -> list[tuple[slice, slice]]:
    """Queries and keys of each tile in which some query hears some key; those wholly in the future are left out."""
    starts = range(0, LENGTH, TILE)
    return [(slice(q, q + TILE), slice(k, k + TILE)) for q in starts for k in starts if k <= q]


def score(query: torch.Tensor, key: torch.Tensor, queries: slice, keys: slice) -> torch.Tensor:
    """[heads, tile, tile], -inf where the key comes after the query."""
    scores = query[:, queries] @ key[:, keys].transpose(1, 2) / HEAD_DIM**0.5
    place = torch.arange(LENGTH)
    Meter.largest, Meter.tiles = max(Meter.largest, scores.nbytes), Meter.tiles + 1
    return scores.masked_fill(place[keys] > place[queries, None], -torch.inf)


class FlashAttention(torch.autograd.Function):
    """Causal attention of query, key and value, each [heads, length, head_dim]."""

    @staticmethod
    def forward(ctx, query, key, value):
        output, total = torch.zeros_like(query), torch.zeros_like(query[..., :1])
        peak = torch.full_like(total, -torch.inf)
        for queries, keys in list_tiles():
            scores = score(query, key, queries, keys)
            new_peak = torch.maximum(peak[:, queries], scores.amax(-1, keepdim=True))
            shrink, weights = (peak[:, queries] - new_peak).exp(), (scores - new_peak).exp()
            total[:, queries] = total[:, queries] * shrink + weights.sum(-1, keepdim=True)
            output[:, queries] = output[:, queries] * shrink + weights @ value[:, keys]
            peak[:, queries] = new_peak
        output = output / total
        ctx.save_for_backward(query, key, value, output, peak + total.log())
        return output

    @staticmethod
    def backward(ctx, slope):
        query, key, value, output, log_total = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        shared = (slope * output).sum(-1, keepdim=True)  # what softmax takes off each score's slope
        for queries, keys in list_tiles():
            weights = (score(query, key, queries, keys) - log_total[:, queries]).exp()
            slopes = slope[:, queries] @ value[:, keys].transpose(1, 2)
            slopes = weights * (slopes - shared[:, queries]) / HEAD_DIM**0.5
            gradients[0][:, queries] += slopes @ key[:, keys]
            gradients[1][:, keys] += slopes.transpose(1, 2) @ query[:, queries]
            gradients[2][:, keys] += weights.transpose(1, 2) @ slope[:, queries]
        return tuple(gradients)


def count_saved(function, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The output, and the bytes that autograd keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return function(*tensors), sum(kept.values())


def attend_at_once(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(1, 2) / HEAD_DIM**0.5
    return scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1) @ value


torch.manual_seed(0)
tensors = [torch.randn(HEADS, LENGTH, HEAD_DIM) for _ in range(3)]
tensors = [tensor.requires_grad_() for tensor in tensors]
slope = torch.randn(HEADS, LENGTH, HEAD_DIM)
results, kept = {}, {}
ways = {"tiles": FlashAttention.apply, "at once": attend_at_once}
ways["library"] = lambda *given: F.scaled_dot_product_attention(*(t[None] for t in given), is_causal=True)[0]
for way, function in ways.items():
    output, kept[way] = count_saved(function, tensors)
    results[way] = [output, *torch.autograd.grad(output, tensors, slope)]
    print(f"{way:8} keeps {kept[way]:>9,} bytes for the backward pass")

whole, across = HEADS * LENGTH**2 * 4, -(-LENGTH // TILE)  # bytes; tiles in a row
print(
    f"scores: {whole:,} bytes as a whole, {Meter.largest:,} in a tile; {Meter.tiles // 2} of {across**2} tiles a pass"
)
pairs = [zip(results["tiles"], result, strict=True) for result in results.values()]
gaps = [max((one - two).abs().max().item() for one, two in pair) for pair in pairs]
parts = 4 * HEADS * LENGTH * HEAD_DIM * 4 + HEADS * LENGTH * 4  # query, key, value, output; one number a row
assert max(gaps) < 1e-5 and Meter.largest == HEADS * TILE**2 * 4
assert kept["tiles"] == kept["library"] == parts < whole < kept["at once"]
assert Meter.tiles == 2 * across * (across + 1) // 2
print(
    f"proof: output and gradients differ from the library's by {gaps[2]:.1e}; {Meter.tiles // 2} of {across**2} tiles, "
    f"each 1/{whole / Meter.largest:.0f} of the scores; {kept['at once'] / kept['tiles']:.1f} times fewer bytes kept"
)
