"""The unigram tokenizer from scratch: EM learns how likely each piece is, Viterbi finds the likeliest pieces of a text.

A text is cut into pieces that are drawn independently, so p(cut) is the product of p(piece), and p(text) the sum over
all cuts. EM (Kudo, "Subword Regularization", 2018) counts how often each piece is expected in the cuts of the texts,
and takes each one's share of all counts as the new p, which makes the expected log p as large as it can be; pieces that
hardly occur are dropped. T5 and XLM-R tokenize like this. Viterbi's cut is held against the `tokenizers` library's.

python code01_unigram.py
"""

import math
from collections import Counter

from tokenizers import Tokenizer, models

TEXTS = """江边的小城每天早上都有集市，卖菜的人天没亮就来了
卖鱼的人把小船停在江边，船上的鱼还是活的
小城的人喜欢早上买菜，中午做饭，晚上在江边散步
集市上的豆腐是早上新做的，又白又嫩，不到中午就卖完了
晚上的江边很安静，小船都回来了，只有灯光还亮着
卖豆腐的人说，好豆腐要用好水，小城的水是江里来的
天没亮，做豆腐的人就已经开始忙了，等集市开了才能休息""".splitlines()
UNSEEN = ["早上的集市卖豆腐", "江边的人喜欢散步", "小船上的灯光亮着", "卖鲈鱼的人把小猫🐟停在江边"]
NUM_PIECES, LONGEST, RAREST = 85, 4, 1e-9
# 船 stands in a piece only. Three pieces cost 15 here, the likely 江边的 and an unknown 2 + 5 + 10.
FEW = {"江边的": -2.0, "江": -5.0, "边": -5.0, "的船": -5.0}


def log_sum(values: list[float]) -> float:
    """log of the sum of exp(value), without leaving the range of floats."""
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def expect(texts: list[str], scores: dict[str, float]) -> tuple[dict[str, float], float]:
    """E-step, by forward-backward: piece -> log p gives piece -> its expected count in the texts, and their log p."""
    counts, total = dict.fromkeys(scores, 0.0), 0.0
    for text in texts:
        length = len(text)
        spans = [(i, j) for i in range(length) for j in range(i + 1, min(i + LONGEST, length) + 1)]
        spans = [(i, j, scores[text[i:j]]) for i, j in spans if text[i:j] in scores]
        forward, backward = [0.0] * (length + 1), [0.0] * (length + 1)  # log p of all that is before and after a place
        for place in range(1, length + 1):
            forward[place] = log_sum([forward[i] + score for i, j, score in spans if j == place])
        for place in reversed(range(length)):
            backward[place] = log_sum([backward[j] + score for i, j, score in spans if i == place])
        for i, j, score in spans:
            counts[text[i:j]] += math.exp(forward[i] + score + backward[j] - forward[length])
        total += forward[length]
    return counts, total


def normalise(counts: dict[str, float]) -> dict[str, float]:
    """M-step: counts -> log p. Single characters stay, however rare, or some texts could not be cut at all."""
    counts = {piece: max(count, RAREST) for piece, count in counts.items() if count > RAREST or len(piece) == 1}
    total = sum(counts.values())
    return {piece: math.log(count / total) for piece, count in counts.items()}


def viterbi(text: str, scores: dict[str, float]) -> list[str]:
    """The likeliest cut. A character that is no piece costs 10 more than the rarest piece; neighbours of them join."""
    unknown = min(scores.values()) - 10
    best = [(0.0, 0)] + [(-math.inf, 0)] * len(text)  # by place: log p of the best cut, its last piece's begin
    for j in range(1, len(text) + 1):
        for i in range(max(0, j - LONGEST), j):
            score = scores.get(text[i:j], unknown if j - i == 1 else -math.inf)
            best[j] = max(best[j], (best[i][0] + score, i))
    pieces, end = [], len(text)
    while end:
        piece, end = text[best[end][1] : end], best[end][1]
        if pieces and piece not in scores and pieces[0] not in scores:
            pieces[0] = piece + pieces[0]
        else:
            pieces.insert(0, piece)
    return pieces


def cut(texts: list[str], scores: dict[str, float]) -> list[list[str]]:
    """Viterbi's pieces of each text, which have to be the library's."""
    library = Tokenizer(models.Unigram([("<unk>", 0.0), *scores.items()], unk_id=0))
    cuts = [viterbi(text, scores) for text in texts]
    for text, pieces in zip(texts, cuts, strict=True):
        print("|".join(pieces))
        assert pieces == library.encode(text).tokens
    return cuts


substrings = Counter()
for text in TEXTS:
    substrings.update(text[i:j] for j in range(1, len(text) + 1) for i in range(max(0, j - LONGEST), j))
scores = normalise({piece: count for piece, count in substrings.items() if len(piece) == 1 or count > 1})
climbs, apart = [], 0.0
while True:
    likelihoods = []
    for _ in range(3):
        counts, likelihood = expect(TEXTS, scores)
        likelihoods.append(likelihood)
        scores = normalise(counts)
        # where p is best one more of any piece is worth the same: count / p, the number of pieces in all texts
        worth = [count / math.exp(scores[piece]) for piece, count in counts.items() if count > RAREST]
        apart = max(apart, abs(max(worth) / min(worth) - 1), abs(sum(map(math.exp, scores.values())) - 1))
    climbs += [after - before for before, after in zip(likelihoods, likelihoods[1:], strict=False)]
    print(f"{len(scores)} pieces, log-likelihood by EM step:", *[f"{value:8.2f}" for value in likelihoods])
    if len(scores) <= NUM_PIECES:
        break
    longer = sorted((piece for piece in scores if len(piece) > 1), key=scores.get, reverse=True)
    kept = [piece for piece in scores if len(piece) == 1]
    kept += longer[: max(NUM_PIECES, int(0.8 * len(scores))) - len(kept)]
    scores = normalise({piece: math.exp(scores[piece]) for piece in kept})
assert min(climbs) > 0 and apart < 1e-9

print("likeliest pieces:", *sorted(scores, key=scores.get, reverse=True)[:20])
cuts = cut(TEXTS + UNSEEN, scores) + cut(["江边的船"], FEW)
length = sum(map(len, TEXTS)) / sum(map(len, cuts[: len(TEXTS)]))
print(
    f"proof: each of {len(climbs)} EM steps raised the likelihood, by {max(climbs):.2f} to {min(climbs):.4f}, "
    f"p are shares of the counts within {apart:.0e}; {len(cuts)} cuts equal the library's; {length:.2f} a piece"
)
