"""Speculative sampling changes nothing: every course it can take is counted, and the sum is what the target alone does.

A small model (the draft) guesses the next tokens, drawing x from q. The large one (the target) has its own p for all of
them after a single pass, and takes x with probability min(1, p(x) / q(x)). At the first guess that it refuses it draws
from max(0, p - q), made to sum to 1, instead; if it refuses none, it adds a token of its own (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", 2023). Here p and q are random tables over three words.

python code12_speculative_sampling.py
"""

from collections import Counter
from itertools import product

import torch

WORDS, GUESSES, LENGTH = "天地人", 2, 4


def random_model(seed: int) -> dict[tuple, torch.Tensor]:
    """Beginning of a text -> a distribution of the next word, [words], in float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix: (2 * torch.randn(len(WORDS), dtype=torch.float64, generator=generator)).softmax(-1)
        for length in range(LENGTH + GUESSES)
        for prefix in product(range(len(WORDS)), repeat=length)
    }


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What the target draws from after a refusal: where it wants more than the draft gave."""
    return (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()


def rounds(target: dict, draft: dict, prefix: tuple, after_refusal=residual, guessed: int = 0) -> Counter:
    """All courses of one round: the words that it appends -> probability."""
    p = target[prefix]
    if guessed == GUESSES:  # all were taken, and the target has seen one place further
        return Counter({(word,): p[word].item() for word in range(len(WORDS))})
    q, courses = draft[prefix], Counter()
    taken = torch.minimum(p, q)  # q(x) * min(1, p(x) / q(x))
    for word in range(len(WORDS)):
        courses[(word,)] += ((1 - taken.sum()) * after_refusal(p, q)[word]).item()
        for rest, share in rounds(target, draft, (*prefix, word), after_refusal, guessed + 1).items():
            courses[(word, *rest)] += taken[word].item() * share
    return courses


def texts(target: dict, draft: dict, after_refusal=residual) -> Counter:
    """The first LENGTH words, by as many rounds as it takes -> probability."""
    open_texts, done = Counter({(): 1.0}), Counter()
    while open_texts:
        longer = Counter()
        for prefix, share in open_texts.items():
            for words, chance in rounds(target, draft, prefix, after_refusal).items():
                text = (prefix + words)[:LENGTH]
                (done if len(text) == LENGTH else longer)[text] += share * chance
        open_texts = longer
    return done


target, draft = random_model(0), random_model(1)
alone = {
    words: torch.stack([target[words[:place]][word] for place, word in enumerate(words)]).prod().item()
    for words in product(range(len(WORDS)), repeat=LENGTH)
}
together, naive = texts(target, draft), texts(target, draft, after_refusal=lambda p, q: p)
print("text: by the target alone, with the draft, with p instead of max(0, p - q) after a refusal")
for words in sorted(alone, key=alone.get, reverse=True)[:4]:
    print(f"  {''.join(WORDS[word] for word in words)}: {alone[words]:.4f} {together[words]:.4f} {naive[words]:.4f}")
gap = max(abs(together[words] - alone[words]) for words in alone)
wrong = max(abs(naive[words] - alone[words]) for words in alone)
taken = torch.stack([torch.minimum(target[prefix], draft[prefix]).sum() for prefix in target]).mean().item()
print(f"a guess is taken with probability sum min(p, q), {taken:.0%} on average")
assert gap < 1e-12 and wrong > 0.01 and abs(sum(together.values()) - 1) < 1e-12
print(f"proof: the probabilities of {len(alone)} texts differ from the target's by at most {gap:.1e}, ", end="")
print(f"by {wrong:.2f} if p itself is drawn from after a refusal")
