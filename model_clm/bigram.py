"""A start that is a bigram model: table and head are fitted to the corpus' bigrams before the first step.

With the outputs of all blocks at zero a transformer passes each token's embedding through its last norm to its head: it
sees one token and predicts the next. Such a model is fitted to the corpus' table of bigrams in seconds, where gradient
steps on text need many minutes to get as far; then the blocks grow from zero and add what the context knows. The
weights are plain weights of the same class. Counts and targets: interpolated Kneser-Ney smoothing (Chen and Goodman,
"An Empirical Study of Smoothing Techniques for Language Modeling", 1998).
"""

import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from data import read_manifest, read_tokens

TOKENS_COUNTED = 1 << 25  # of each source: more make a better table than a head of some hundred dimensions can hold
DISCOUNT = 0.75
FIT_STEPS, CONTEXTS_PER_STEP = 400, 256
TABLE_LEARNING_RATE, HEAD_LEARNING_RATE = 0.02, 0.005
TABLE_SCALE = 0.15  # root mean square of the table's numbers at first; the blocks add to rows of this size

# What each class calls the matrices by which a block adds to its stream, and what else stands between table and norm.
ENTER_AT_ZERO = {
    **dict.fromkeys(("qwen3", "llama", "qwen2", "glm"), ("self_attn.o_proj.", "mlp.down_proj.")),
    "nanochat": ("self_attn.o_proj.", "mlp.fc2."),
    "gpt2": ("attn.c_proj.", "mlp.c_proj.", "wpe."),
    "bloom": ("self_attention.dense.", "mlp.dense_4h_to_h."),
}


@dataclass
class Bigrams:
    """The bigrams of a source: `keys` sorted, first token x vocabulary + second; `counts` alike."""

    keys: np.ndarray
    counts: np.ndarray
    vocab_size: int

    def __post_init__(self):
        first, second = np.divmod(self.keys, self.vocab_size)
        self.rows = np.searchsorted(first, np.arange(self.vocab_size + 1))  # where each first token's bigrams begin
        self.second = second
        self.totals = np.bincount(first, self.counts, self.vocab_size)
        continuations = np.bincount(second, minlength=self.vocab_size) + 0.02  # what follows nothing is still possible
        self.continuation = (continuations / continuations.sum()).astype(np.float32)

    def smoothed(self, tokens: np.ndarray) -> np.ndarray:
        """Discounted counts plus the share of the unseen, for some first tokens: shape (tokens, vocabulary).

        Each row sums to the times that its token was seen.
        """
        starts, sizes = self.rows[tokens], self.rows[tokens + 1] - self.rows[tokens]
        kinds = DISCOUNT * sizes.astype(np.float32)
        table = kinds[:, None] * self.continuation
        row = np.repeat(np.arange(len(tokens)), sizes)
        place = np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
        table[row, self.second[place]] += self.counts[place] - np.float32(DISCOUNT)
        return table


def count_bigrams(folder, source: str, vocab_size: int, most: int = TOKENS_COUNTED) -> Bigrams:
    """The bigrams among the first `most` tokens of a source, in memory that does not grow with the source."""
    keys, counts, seen, last = np.zeros(0, np.int64), np.zeros(0, np.int64), 0, np.zeros(0, np.int64)
    for tokens in read_tokens(folder, source):
        tokens = np.concatenate([last, tokens[: most - seen]]).astype(np.int64)
        found, times = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        keys, place = np.unique(np.concatenate([keys, found]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, times]), len(keys)).astype(np.int64)
        seen, last = seen + len(tokens) - len(last), tokens[-1:]
        if seen >= most:
            break
    return Bigrams(keys, counts.astype(np.float32), vocab_size)


def mix_bigrams(folder, mixture: dict[str, float] | None, vocab_size: int) -> list[tuple[float, Bigrams]]:
    """The bigrams of each source, and what one of its tokens weighs in the mixture (without one: all the same)."""
    sources = read_manifest(folder)["sources"]
    mixture = mixture or {name: source["tokens"] for name, source in sources.items()}
    found = {name: count_bigrams(folder, name, vocab_size) for name, weight in mixture.items() if weight > 0}
    weights = {name: mixture[name] / bigrams.counts.sum() for name, bigrams in found.items()}
    return [(weights[name] / max(weights.values()), bigrams) for name, bigrams in found.items()]


def draw_contexts(totals: np.ndarray, seed: int):
    """Yields, for ever, some tokens and how often each was drawn, by their share of the text."""
    rng, ends = np.random.default_rng(seed), np.cumsum(totals / totals.sum())
    while True:  # evenly spaced from a random point: each token as often as it should be, to within one
        points = (rng.random() + np.arange(CONTEXTS_PER_STEP)) / CONTEXTS_PER_STEP
        yield np.unique(np.searchsorted(ends[:-1], points), return_counts=True)


def enter_at_zero(model: nn.Module) -> nn.ModuleList:
    """Makes each block add nothing to its input; returns the list of the blocks."""
    names = ENTER_AT_ZERO[model.config.model_type]
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            nn.init.zeros_(parameter)
    [blocks] = (module for module in model.base_model.children() if isinstance(module, nn.ModuleList))
    return blocks


def factorize(
    bigrams: list[tuple[float, Bigrams]], totals: np.ndarray, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Table and head in closed form, from which the fit has less far to go; both (vocabulary, width), fp32.

    `bigrams` are those of `mix_bigrams`, `totals` how often each token was seen in them, weighed alike.

    All but one of the dimensions factorize log(1 + p(second | first) / p(second)), frequent tokens weighing more. The
    last one is the same for all tokens and carries each token's own frequency; it also fills each row up to one length,
    since the norm before the head takes its length away. Source of the method: Levy and Goldberg, "Neural Word
    Embedding as Implicit Matrix Factorization" (2014).
    """
    size = len(totals)
    keys, place = np.unique(np.concatenate([table.keys for _, table in bigrams]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([weight * (table.counts - DISCOUNT) for weight, table in bigrams]))
    first, second = np.divmod(keys, size)
    before, after = totals + 1e-3, np.bincount(second, counts, size) + 1e-3
    before_share, after_share = before / before.sum(), after / after.sum()
    ratios = np.log1p(counts / before[first] / after_share[second])
    weighted = ratios * (before_share[first] * after_share[second]) ** 0.25
    places, values = torch.from_numpy(np.stack([first, second])), torch.from_numpy(weighted).float()
    matrix = torch.sparse_coo_tensor(places, values, (size, size), is_coalesced=True, check_invariants=False)
    left, singular, right = torch.svd_lowrank(matrix, q=min(width - 1, size), niter=2)
    before_share, after_share = torch.from_numpy(before_share).float(), torch.from_numpy(after_share).float()
    table = left * singular.sqrt() / before_share[:, None] ** 0.25
    head = right * singular.sqrt() / after_share[:, None] ** 0.25
    lengths = table.square().sum(1)
    longest = lengths[torch.from_numpy(totals > 1)].quantile(0.98)
    table *= (longest / lengths.clamp_min(1e-9)).sqrt().clamp_max(1)[:, None]
    filler = (1.3 * longest - table.square().sum(1)).clamp_min(0.05 * longest).sqrt()
    frequency = after_share.log()
    frequency = (frequency - frequency.mean()) / (filler * before_share).sum()
    unused = table.new_zeros(size, width - 1 - table.shape[1])
    table = torch.cat([table, filler[:, None], unused], 1)
    head = torch.cat([head, frequency[:, None], unused], 1) * (1.3 * longest / width).sqrt()
    rotation = torch.linalg.qr(torch.randn(width, width))[0]  # no dimension is a special one
    return table @ rotation * TABLE_SCALE / table.square().mean().sqrt(), head @ rotation


def start_as_bigram_model(model: nn.Module, folder, mixture: dict[str, float] | None, seed: int) -> float:
    """Fits table and head to the bigrams of a prepared folder; the model then predicts by the last token alone.

    Args:
        model: of a class of `ENTER_AT_ZERO`, its head not tied to its table.
        mixture: the weight of each source in the training; None where each counts by its size.

    Returns:
        The seconds that it took.
    """
    start = time.perf_counter()
    blocks = enter_at_zero(model)
    bigrams = mix_bigrams(folder, mixture, model.config.vocab_size)
    totals = sum(weight * table.totals for weight, table in bigrams)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for weight, values in zip((table, head), factorize(bigrams, totals, table.shape[1]), strict=True):
            weight.copy_(values)
    trained = {table: TABLE_LEARNING_RATE, head: HEAD_LEARNING_RATE}
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in trained.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / FIT_STEPS)
    )
    own_blocks = list(blocks)
    del blocks[:]  # they add nothing: the model's own forward computes the same without them
    for tokens, times in islice(draw_contexts(totals, seed), FIT_STEPS):
        targets = sum(weight * table.smoothed(tokens) for weight, table in bigrams) / totals[tokens, None]
        ids = torch.from_numpy(tokens)[:, None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, 0]
        with torch.no_grad():  # the gradient of the cross-entropy with soft targets
            gradient = torch.softmax(logits, 1) - torch.from_numpy(targets.astype(np.float32)).to(logits.device)
            gradient *= torch.from_numpy(times / times.sum()).to(gradient)[:, None]
        gradient = torch.autograd.grad(logits, list(trained), gradient)
        for parameter, value in zip(trained, gradient, strict=True):
            parameter.grad = value
        optimizer.step()
        schedule.step()
    model.zero_grad()
    blocks.extend(own_blocks)
    return time.perf_counter() - start
