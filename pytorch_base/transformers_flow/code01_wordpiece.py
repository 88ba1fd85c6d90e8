"""WordPiece from scratch, BERT's tokenizer: words first, then the longest piece that fits, again and again.

A text is cleaned, and cut at white space, at signs and on both sides of each Chinese character, so WordPiece has to do
with words of letters and digits only. It takes the longest piece of the vocabulary that a word begins with, and goes on
with the rest, whose pieces are marked by ## (Schuster and Nakajima, 2012; Devlin et al., "BERT", 2018). If the rest
begins with no piece, the whole word is unknown: nothing falls back to bytes. Held against the `tokenizers` library.

python code01_wordpiece.py
"""

import unicodedata

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

WORDS = ["train", "un", "re", "token", "model", "in", "2019", "20", "训", "练", "模", "型", "分", "词", "与", "，", "a"]
ENDS = ["ing", "ed", "er", "s", "ize", "ization", "iz"]
TEXTS = ["Training a TOKENIZER in 2019!", "remodelers untokenized", "Café résumé", "预训练modelé：20182020", "训𠮷练"]
UNKNOWN, LONGEST = "[UNK]", 20


def is_chinese(character: str) -> bool:
    spans = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF)]
    return any(first <= ord(character) <= last for first, last in [*spans, (0x2F800, 0x2FA1F)])


def is_punctuation(character: str) -> bool:
    """Unicode's, and all signs of ASCII."""
    return unicodedata.category(character)[0] == "P" or (character.isascii() and not character.isalnum())


def split_words(text: str) -> list[str]:
    """Lower case without accents; then words, Chinese characters and signs by themselves."""
    text = "".join(f" {character} " if is_chinese(character) else character for character in text)
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn").lower()
    return "".join(f" {character} " if is_punctuation(character) else character for character in text).split()


def cut(word: str, vocabulary: set[str]) -> list[str]:
    """Pieces of a word, longest first from the left."""
    pieces, begin = [], 0
    while begin < len(word) <= LONGEST:
        marks = "##" if begin else ""
        fits = [end for end in range(begin + 1, len(word) + 1) if marks + word[begin:end] in vocabulary]
        if not fits:
            return [UNKNOWN]
        pieces.append(marks + word[begin : max(fits)])
        begin = max(fits)
    return pieces or [UNKNOWN]


def encode(text: str, vocabulary: set[str]) -> list[str]:
    return [piece for word in split_words(text) for piece in cut(word, vocabulary)]


vocabulary = [UNKNOWN, *WORDS, *(f"##{end}" for end in [*ENDS, *WORDS[:5], *"deilmnort0128"])]
ids = {piece: number for number, piece in enumerate(vocabulary)}
library = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST))
library.normalizer = normalizers.BertNormalizer(lowercase=True)
library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
print(len(vocabulary), "pieces:", *vocabulary)
vocabulary = set(vocabulary)

pieces, words, unknown = 0, 0, 0
for text in [*TEXTS, "train" * 4, "train" * 5]:
    ours = encode(text, vocabulary)
    print(" ".join(split_words(text)), "->", *ours)
    assert ours == library.encode(text).tokens
    pieces, words, unknown = pieces + len(ours), words + len(split_words(text)), unknown + ours.count(UNKNOWN)
spaces = normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=False)  # around Chinese only
characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]  # all but halves of UTF-16's pairs
chinese = {character for character in characters if is_chinese(character)}
apart = chinese ^ {character for character in characters if spaces.normalize_str(character) == f" {character} "}
assert apart <= set(map(chr, range(0x2B820, 0x2B920)))  # Chinese for BERT, not for the library
assert cut("tokenization", vocabulary) != [UNKNOWN] == cut("tokenizatiön", vocabulary) == cut("train" * 5, vocabulary)
print(
    f"proof: {pieces} pieces of {words} words equal the library's, {unknown} of them {UNKNOWN}; {len(chinese):,} "
    f"characters are Chinese, all but {len(apart)} for the library, too"
)
