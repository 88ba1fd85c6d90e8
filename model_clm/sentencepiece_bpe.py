"""SentencePiece's tokenizer.model -> a fast tokenizer that gives the same ids, which is checked."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor, set_min_log_level
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rows import UserError

PROBES = ["你好，世界！", "hello", " hello", "  two  spaces\n\n\ttab \n", "鑫淼𠮷🙂 ½", "ＥＦＧ１２", "\u3000全角", ""]
PROBES += ["0x1F 3.14159 2024-01-02", "\n\n", " \t \t", "\r\n", "\0", "x\0y", "a▁b", "[[  ]] {{  }}  ---    ###"]
PROBES += [f"a{' ' * count}b{'=' * count}{chr(10) * count}{'哈' * count}" for count in range(1, 70)]
PROBES += ["def f(x):\n    if x:  # why\n        return [x[i] for i in range(len(x))]\n\n\n    return None\n"]
PROBES += ['for (int i = 0; i < n; i++) {\n\t\tprintf("%d\\n", a[i]);\n\t}\n']


def read_sentencepiece(file: Path) -> tuple[ModelProto, SentencePieceProcessor]:
    """The description and the tokenizer itself; raises UserError where a fast one could not do the same."""
    if not file.is_file():
        raise UserError(f"{file.parent}: there is no tokenizer.model in it. Download the whole folder.")
    set_min_log_level(2)  # it warns of the NUL piece
    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        raise UserError(f"{file}: no SentencePiece model. Download it again.") from None
    proto = ModelProto.FromString(processor.serialized_model_proto())
    normalizer, is_bpe = proto.normalizer_spec, proto.trainer_spec.model_type == TrainerSpec.BPE
    if not is_bpe or normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(f"{file}: no BPE that takes texts as they are. Not converted.")
    return proto, processor


def fast_tokenizer(proto: ModelProto, processor: SentencePieceProcessor, marks: dict[int, AddedToken]) -> Tokenizer:
    """A SentencePiece BPE as a fast tokenizer: what merges first is the piece with the better score.

    Pieces that were defined by hand are found before anything merges. They are added tokens here, or with
    `add_dummy_prefix` words of their own: behind an added token the prefix would come once more.
    """
    prefix, names, scores, defined = proto.normalizer_spec.add_dummy_prefix, [], {}, []
    for number, piece in enumerate(proto.pieces):
        name = piece.piece
        if number in marks:
            name = marks[number].content
        elif processor.is_unused(number):  # NUL, which SentencePiece spells in bytes
            name = f"<unused_{number}>"
        elif piece.type == piece.USER_DEFINED:
            defined.append(name)
        elif piece.type == piece.NORMAL:
            scores[name] = (-piece.score, number)
        names.append(name)
    merges = sorted(
        (*score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    vocab, settings = {name: number for number, name in enumerate(names)}, {"fuse_unk": True, "byte_fallback": True}
    settings |= {"unk_token": names[processor.unk_id()], "ignore_merges": prefix and bool(defined)}
    fast = Tokenizer(models.BPE(vocab, [merge[2:] for merge in merges], **settings))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] * prefix
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if prefix and defined:
        longest_first = sorted(defined, key=len, reverse=True)
        fast.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    else:  # normalized: found when spaces are ▁ already, since a piece that holds one is called so
        fast.add_tokens([AddedToken(name, special=False, normalized=True) for name in defined])
    for mark in marks.values():
        (fast.add_special_tokens if mark.special else fast.add_tokens)([mark])
    return fast


def check_tokenizer(fast: Tokenizer, proto: ModelProto, processor: SentencePieceProcessor, marks: dict) -> None:
    """Raises UserError where a probe or a piece of the vocabulary gets other ids than from SentencePiece.

    Texts that hold a mark are left out: SentencePiece takes `<s>` for three characters.
    """
    for number, mark in marks.items():
        if (found := fast.token_to_id(mark.content)) != number:
            raise UserError(f"tokenizer_config.json: {mark.content} would be {found}, not {number}. Not converted.")
    marked = {mark.content for mark in marks.values()}
    marked |= {piece.piece for number, piece in enumerate(proto.pieces) if number in marks}
    texts = PROBES + [piece.piece.replace("▁", " ") for piece in proto.pieces]
    texts = [text for text in texts if not any(mark in text for mark in marked)]
    ours, theirs = fast.encode_batch(texts, add_special_tokens=False), processor.encode(texts)
    for text, one, other in zip(texts, ours, theirs, strict=True):
        if one.ids != other:
            raise UserError(f"tokenizer.model: {text!r} gives {one.ids}, SentencePiece {other}. Not converted.")
