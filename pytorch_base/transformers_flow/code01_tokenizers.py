"""Byte-level BPE from scratch: the merges, the ids and the texts that the `tokenizers` library gives.

BPE starts from single symbols and, again and again, joins the pair that stands side by side most often (Sennrich et
al., "Neural Machine Translation of Rare Words with Subword Units", 2016). On bytes, as in GPT-2 and Qwen, no text is
ever unknown: a Chinese character is three bytes, an emoji four, and joining makes them whole again.

python code01_tokenizers.py
"""

import json
import re
from collections import Counter

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = """清晨的茶园里，采茶的人已经开始忙碌。新采的茶叶要先摊开，再用铁锅慢慢炒干。
炒茶的人说，火候是茶叶的灵魂：火大了茶叶会焦，火小了茶叶会青。
老茶客喝茶先看颜色，再闻香气，最后才慢慢品味。好的茶叶，香气清，颜色绿，味道甘。
茶园的主人说，今年的雨水多，新茶的香气比去年更清。采茶的人听了，慢慢露出笑容。
开始学喝茶的人，总是先学会等：等水开，等茶叶慢慢舒展，等香气慢慢升起来。"""
UNSEEN = ["采茶的人慢慢喝茶。", "𠮷野家的𨋢里，龘字不会读", "喝茶🍵的👨‍👩‍👧一家", "Tea 2024: 新茶\t上市\n"]
PIECE = "[一-鿿]+|[^一-鿿]+"  # nothing is merged across the border between Chinese characters and all else
NUM_MERGES = 100


def printable_bytes() -> dict[int, str]:
    """Byte -> the character that stands for it in a vocabulary: itself where it can be seen, else one from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


BYTES = printable_bytes()
ALPHABET = sorted(BYTES.values())  # ids 0 to 255


def split_pieces(text: str) -> list[list[str]]:
    """Text -> pieces, each a list of symbols, one a byte of its UTF-8."""
    return [[BYTES[byte] for byte in piece.encode()] for piece in re.findall(PIECE, text)]


def join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Each occurrence of the pair, from the left, becomes one symbol."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def train(text: str, num_merges: int) -> list[tuple[str, str]]:
    """Learns the merges, in order. Among pairs that are equally frequent, the one with the smallest ids comes first."""
    ids = {symbol: number for number, symbol in enumerate(ALPHABET)}
    pieces, merges = split_pieces(text), []
    for _ in range(num_merges):
        counts = Counter(pair for symbols in pieces for pair in zip(symbols, symbols[1:], strict=False))
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        ids["".join(best)] = len(ids)
        merges.append(best)
        pieces = [join(symbols, best) for symbols in pieces]
    return merges


def encode(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """Text -> tokens: of all pairs in a piece the one that was learned first is joined, until none is left."""
    ranks, tokens = {pair: rank for rank, pair in enumerate(merges)}, []
    for symbols in split_pieces(text):
        while known := [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in ranks]:
            symbols = join(symbols, min(known, key=ranks.get))
        tokens += symbols
    return tokens


def decode(tokens: list[str]) -> str:
    """Tokens -> text. A part of a character alone shows as a replacement character."""
    byte_of = {symbol: byte for byte, symbol in BYTES.items()}
    return bytes(byte_of[symbol] for symbol in "".join(tokens)).decode(errors="replace")


merges = train(TEXT, NUM_MERGES)
library = Tokenizer(models.BPE())
library.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(PIECE), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
library.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=256 + NUM_MERGES, initial_alphabet=ALPHABET, show_progress=False)
library.train_from_iterator([TEXT], trainer)

library_merges = [tuple(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
print("first merges:", *["+".join(pair) for pair in merges[:6]])
words = [decode(["".join(pair)]) for pair in merges]
print("whole characters and words:", *[repr(word)[1:-1] for word in words if "\ufffd" not in word])
assert merges == library_merges

print("\ntext, its bytes -> tokens (· is a part of a character)")
for text in [*TEXT.splitlines(), *UNSEEN]:
    tokens, expected = encode(text, merges), library.encode(text)
    assert tokens == expected.tokens
    assert decode(tokens) == library.decode(expected.ids) == text
    if text in UNSEEN:
        shown = ["·" if "\ufffd" in decode([token]) else decode([token]) for token in tokens]
        print(f"{text!r}, {len(text.encode())} -> {len(tokens)}: {'|'.join(shown)}")

count = len(TEXT.splitlines()) + len(UNSEEN)
shorter = len(TEXT.encode()) / len(encode(TEXT, merges))
print(f"\nproof: {len(merges)} merges and the tokens of {count} texts equal the library's, ", end="")
print(f"every text comes back; {shorter:.2f} bytes a token")
