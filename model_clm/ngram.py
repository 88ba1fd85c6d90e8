"""What counting alone can do: a token n-gram model in numpy, beside a trained network, and both mixed.

    python ngram.py output_zero2 my_prepared                 bits per byte of the validation texts, by source
    python ngram.py output_zero2 my_prepared --stride 64     each token of the network with 64 tokens or more before it

A small network has no room for the corpus' own phrases, which a table of n-grams knows by heart, so the two together
know more than either. Interpolated Kneser-Ney: Chen and Goodman, "An Empirical Study of Smoothing Techniques for
Language Modeling" (1998).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from data import IGNORE_INDEX, read_manifest, read_tokens
from infer import load_trained_model
from rows import UserError
from windows import ValidationRows, collate_windows, validation_rows

WEIGHTS = np.arange(0.05, 1, 0.05)  # of the network


def join_ngrams(tokens: np.ndarray, order: int, bits: int) -> np.ndarray:
    """Each run of `order` tokens as one number, its first token in the highest bits: shape (tokens - order + 1,)."""
    joined = np.zeros(len(tokens) - order + 1, np.int64)
    for place in range(order):
        joined = joined << bits | tokens[place : place + len(joined)]
    return joined


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of sorted keys, 0 for what is not among them."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


class KneserNey:
    """Interpolated Kneser-Ney over tokens, one discount an order. Memory: some 40 bytes for each different n-gram."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int = 4):
        """tokens: the text to count, shape (tokens,). The order is lower where 63 bits hold no more tokens."""
        self.bits = max(1, (vocab_size - 1).bit_length())
        self.vocab_size, self.order, self.tables = vocab_size, min(order, 63 // self.bits), {}
        tokens = tokens.astype(np.int64)
        longer = None
        for size in range(self.order, 0, -1):
            if longer is None:
                grams, counts = np.unique(join_ngrams(tokens, size, self.bits), return_counts=True)
            else:  # below the highest order, what counts is before how many different tokens it stands
                grams, counts = np.unique(longer & ((1 << self.bits * size) - 1), return_counts=True)
            contexts, place = np.unique(grams >> self.bits, return_inverse=True)
            once, twice = (counts == 1).sum(), (counts == 2).sum()
            self.tables[size] = {
                "grams": (grams, counts),
                "sums": (contexts, np.bincount(place, counts)),
                "kinds": (contexts, np.bincount(place)),
                "discount": once / max(once + 2 * twice, 1),
            }
            longer = grams

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Of each token but the first, after those before it: shape (tokens - 1,)."""
        padded = np.concatenate([np.repeat(tokens[:1], self.order - 1), tokens]).astype(np.int64)
        found = np.full(len(tokens) - 1, 1 / self.vocab_size)
        for size in range(1, self.order + 1):
            table = self.tables[size]
            grams = join_ngrams(padded, size, self.bits)[-len(found) :]
            sums = look_up(*table["sums"], grams >> self.bits)
            kinds = look_up(*table["kinds"], grams >> self.bits)
            counts = look_up(*table["grams"], grams)
            backed = np.maximum(counts - table["discount"], 0) + table["discount"] * kinds * found
            found = np.where(sums > 0, backed / np.maximum(sums, 1), found)
        return found


def read_all(folder: str, sources: list[str]) -> np.ndarray:
    """The streams of some sources, one after the other."""
    return np.concatenate([piece for source in sources for piece in read_tokens(folder, source)])


@torch.no_grad()
def network_probabilities(model, rows: ValidationRows, batch_size: int = 16) -> np.ndarray:
    """Of each target of the rows, in order; an EOS is none."""
    found = []
    for first in range(0, len(rows), batch_size):
        examples = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        batch = {name: values.to(model.device) for name, values in collate_windows(examples, False).items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        targets = batch["labels"][:, 1:]
        asked = targets != IGNORE_INDEX
        losses = torch.nn.functional.cross_entropy(logits[:, :-1][asked].float(), targets[asked], reduction="none")
        found.append(losses.neg().exp().double().cpu().numpy())
    return np.concatenate(found)


def choose_weight(network: np.ndarray, ngrams: np.ndarray) -> float:
    """The network's share that costs the fewest bits on the first tenth of a text."""
    tenth = slice(0, max(1, len(network) // 10))
    return min(WEIGHTS, key=lambda w: -np.log2(w * network[tenth] + (1 - w) * ngrams[tenth]).sum())


def compare(model, prepared: str, length: int, stride: int | None = None, order: int = 4) -> dict[str, dict]:
    """By source: bits per byte of the n-grams, of the network and of both, and the network's share in the latter."""
    manifest = read_manifest(f"{prepared}/train")
    tokens = read_all(f"{prepared}/train", list(manifest["sources"]))
    counted = KneserNey(tokens, manifest["vocab_size"], order)
    table = {}
    for source, rows in validation_rows(f"{prepared}/validation", length, stride).items():
        stream = read_all(f"{prepared}/validation", [source])
        ngrams = counted.probabilities(stream)[stream[1:] != manifest["eos_token_id"]]
        network = network_probabilities(model, rows)
        weight = choose_weight(network, ngrams)
        ways = {"ngrams": ngrams, "network": network, "mixed": weight * network + (1 - weight) * ngrams}
        table[source] = {name: float(-np.log2(p).sum() / rows.bytes) for name, p in ways.items()} | {"weight": weight}
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("prepared", help="the folder that prepare.py has written")
    parser.add_argument("--stride", type=int, help="new tokens of a row, the rest is context; all are new by default")
    parser.add_argument("--order", type=int, default=4, help="tokens of the longest n-grams")
    args = parser.parse_args(argv)
    try:
        model, _ = load_trained_model(args.model)
        length = getattr(model.config, "max_position_embeddings", 1024)
        if args.stride is not None and not 0 < args.stride < length:
            raise UserError(f"--stride {args.stride}: from 1 to {length - 1}, a row's tokens but one.")
        if not Path(args.prepared, "train").is_dir():
            raise UserError(f"{args.prepared}: is no prepared folder; python prepare.py --help says how to make one.")
        for source, found in compare(model, args.prepared, length, args.stride, args.order).items():
            bits = ", ".join(f"{name} {found[name]:.4f}" for name in ("ngrams", "network", "mixed"))
            print(f"{source}: bits per byte: {bits} (the network's share {found['weight']:.2f})")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
