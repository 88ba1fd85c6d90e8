"""What train_tokenizer.py writes: SentencePiece's ids, texts that come back, a token a digit, errors in words."""

import random
import unicodedata

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    BloomConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    NanoChatConfig,
    Qwen2Config,
    Qwen3Config,
)

import train_tokenizer
from rows import UserError
from train_tokenizer import (
    check_passages,
    choose_coverage,
    first_difference,
    main,
    run_sentencepiece,
    sample_corpus,
    train_sentencepiece,
)

WORDS = [
    "天地",
    "玄黄",
    "宇宙洪荒",
    "日月",
    "盈昃",
    "辰宿",
    "列张",
    "寒来暑往",
    "秋收冬藏",
    "data",
    " model",
    "人民日报",
]
MARKS = ["，", "。", "\n", "\n\n", "　　", " ", "  ", "１９９８年", "2024", "3.14", "——", "……", "“好”", "ＡＢＣ", "\t"]
# Nothing of it stands in the corpus: emoji, other planes, marks of SentencePiece's own, what looks like a byte's piece.
HARD = "龘𠮷😀👩\u200d👧 a  b\t\u3000１９９８年１２月，①㎡ﬁ\u00a0\u200b\r\n\n  "
HARD += "<0x0A>▅ </s><s><unk><pad><|endoftext|> é\u0301 ~\0\x7f"
TYPES = ["bpe", "unigram", "byte_level"]


def make_text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + (rng.choice(MARKS) if rng.random() < 0.3 else "") for _ in range(words))


def make_strings(count: int) -> list[str]:
    """Texts of the corpus' characters in any order, each with rare ones, runs of one character and digits amid them."""
    rng, alphabet = random.Random(1), sorted(set(make_text(0, 4000)))
    strings = [HARD, "", " ", "\n", "▁" * 3, "\n \n"]
    for _ in range(count):
        parts = rng.choices(alphabet, k=rng.randint(0, 40)) + [rng.choice(alphabet) * rng.randint(1, 9)]
        parts += rng.choices(WORDS + MARKS, k=rng.randint(0, 20)) + rng.choices(HARD, k=rng.randint(0, 5))
        rng.shuffle(parts)
        strings.append("".join(parts))
    return strings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(2):
        (folder / f"news-{number}.txt").write_text(make_text(number, 4000), encoding="utf-8")
    (folder / "marks.jsonl").write_text('{"text": "书里写着</s>，▁▁也有"}\n[1]\n{"text": "再说"}\n', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """What the script has written, by its kind of model, and what it said."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in TYPES:
        main([str(corpus), str(folder / kind), "--vocab_size", "500", "--model_type", kind])
    return folder


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_are_those_of_sentencepiece(folders, kind):
    tokenizer = AutoTokenizer.from_pretrained(folders / kind)
    processor = SentencePieceProcessor(model_file=str(folders / kind / "sentencepiece.model"))
    assert len(tokenizer) == processor.vocab_size() == 500
    for text in make_strings(600):
        assert encode(tokenizer, text) == processor.encode(text), repr(text)


@pytest.mark.parametrize("kind", TYPES)
def test_texts_come_back_as_they_were(folders, kind):
    tokenizer = AutoTokenizer.from_pretrained(folders / kind)
    for text in make_strings(200):
        # The one character that SentencePiece can't keep is what it writes for a space.
        wanted = text if kind == "byte_level" else text.replace("▁", " ")
        assert tokenizer.decode(encode(tokenizer, text)) == wanted, repr(text)


@pytest.mark.parametrize("kind", TYPES)
def test_digits_line_breaks_and_spaces(folders, kind):
    tokenizer = AutoTokenizer.from_pretrained(folders / kind)
    digits = encode(tokenizer, "2024")
    assert len(digits) == 4 and digits[0] == digits[2]
    decoded = [tokenizer.decode([number]) for number in encode(tokenizer, "１９９８年")]
    assert decoded[:4] == ["１", "９", "９", "８"] and len(decoded) == 5
    assert len(encode(tokenizer, "\n")) == 1 and len(encode(tokenizer, "天地")) == 1
    assert encode(tokenizer, "天地")[0] == encode(tokenizer, "\n天地")[-1], "no space before the first word"
    if kind != "byte_level":
        assert len(encode(tokenizer, "\n\n\n")) == 3
        assert encode(tokenizer, "😀") == [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "😀".encode()]


@pytest.mark.parametrize("kind", TYPES)
def test_special_tokens_in_a_text_are_text_where_asked(folders, kind):
    tokenizer = AutoTokenizer.from_pretrained(folders / kind)
    end = tokenizer.eos_token
    assert end == ("<|endoftext|>" if kind == "byte_level" else "</s>")
    assert tokenizer(f"天地{end}", add_special_tokens=False)["input_ids"][-1] == tokenizer.eos_token_id
    ids = encode(tokenizer, f"天地{end}日月")
    assert not set(ids) & set(tokenizer.all_special_ids) and tokenizer.decode(ids) == f"天地{end}日月"
    assert tokenizer("天地")["input_ids"] == encode(tokenizer, "天地"), "nothing is put around a text"


@pytest.mark.parametrize("config", [Qwen3Config, LlamaConfig, GPT2Config, BloomConfig, GlmConfig, NanoChatConfig])
def test_beside_a_model_it_stays_itself(folders, tmp_path, config):
    """AutoTokenizer looks at the model's class too, whose own tokenizer would add spaces or NFC."""
    for kind in TYPES:
        tokenizer = AutoTokenizer.from_pretrained(folders / kind)
        config().save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        again = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert [encode(again, text) for text in make_strings(20)] == [
            encode(tokenizer, text) for text in make_strings(20)
        ]
        assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_beside_a_qwen2_byte_level_stays_itself(folders, tmp_path):
    """Transformers takes Qwen2Tokenizer there, which is what byte_level is, with NFC; the others would be lost."""
    for kind in ("byte_level", "bpe"):
        tokenizer = AutoTokenizer.from_pretrained(folders / kind)
        Qwen2Config().save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        again = AutoTokenizer.from_pretrained(tmp_path / kind)
        texts = [unicodedata.normalize("NFC", text) for text in make_strings(100)]
        same = all(encode(again, text) == encode(tokenizer, text) for text in texts)
        assert type(again).__name__ == "Qwen2Tokenizer" and same == (kind == "byte_level")


def test_says_what_it_read(corpus, tmp_path, capsys):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(make_text(7, 100), encoding="utf-8")
    main([str(corpus), str(tmp_path / "bpe"), "--vocab_size", "500", "--compare_on", str(held_out)])
    said = capsys.readouterr().out
    assert "left out: 1 records that can't be read, the first" in said and "marks.jsonl:2" in said
    assert "(U+2581), which comes back as a space: 2 in the corpus" in said
    assert "written in the corpus: 0 <s>, 1 </s>, 0 <unk>" in said
    assert "characters per token" in said and "held_out.txt" in said
    assert sorted(file.name for file in (tmp_path / "bpe").iterdir()) == [
        "sentencepiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("kind", TYPES)
def test_too_large_a_vocabulary(corpus, tmp_path, kind):
    """The size that the error names is one that works, and one more doesn't."""
    with pytest.raises(SystemExit, match="--vocab_size 30000: more than this corpus supports") as error:
        main([str(corpus), str(tmp_path / "large"), "--vocab_size", "30000", "--model_type", kind])
    largest = int(str(error.value).split("The largest that works is ")[1].split(";")[0])
    assert not list(tmp_path.iterdir())
    main([str(corpus), str(tmp_path / "largest"), "--vocab_size", str(largest), "--model_type", kind])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "largest")) == largest


@pytest.mark.parametrize("kind", TYPES)
def test_too_small_a_vocabulary(corpus, tmp_path, kind):
    with pytest.raises(SystemExit, match="--vocab_size 100: .*") as error:
        main([str(corpus), str(tmp_path / "small"), "--vocab_size", "100", "--model_type", kind])
    assert [int(word) for word in str(error.value).replace(".", " ").split() if word.isdecimal()][-1] >= 257


def test_a_folder_that_holds_something_and_an_empty_corpus(corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds no text"):
        main([str(tmp_path / "empty.txt"), str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="is not an empty folder"):
        main([str(corpus), str(tmp_path)])


def test_a_sample_is_bounded_and_of_all_parts():
    documents = ["天" * 3500, "地" * 200, "玄" * 40_000, "黄" * 40_000]
    sample = sample_corpus(iter(documents), 20_000, ["地地"])
    assert 15_000 < sample.size <= 20_000 and sample.length == 83_700 and sample.documents == 4
    assert sample.characters == set("天地玄黄") and sample.special["地地"] == 100
    assert {"玄", "黄"} <= set("".join(sample.passages))
    whole = sample_corpus(iter(documents), 100_000, [])
    assert "".join(whole.passages) == "".join(documents) and max(map(len, whole.passages)) == 1000


def test_coverage_leaves_half_the_vocabulary_to_words():
    passages = ["".join(chr(0x4E00 + number) * (1000 - number) for number in range(1000))]
    shares = [choose_coverage(passages, size) for size in (100, 1900, 4000)]
    assert shares[0] == 0.98 and shares[1] == pytest.approx(1 - sum(range(1, 51)) / 500500) and shares[2] == 0.9995


def test_a_difference_is_shown(monkeypatch):
    text = make_text(0, 2000)
    proto = train_sentencepiece([text], 450, "bpe", None)
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    other = run_sentencepiece([text], 460, "bpe", 0.99)
    marks = {
        number: AddedToken(mark, special=True, normalized=False) for number, mark in enumerate(train_tokenizer.MARKS)
    }
    fast = train_tokenizer.fast_tokenizer(other, SentencePieceProcessor(model_proto=other.SerializeToString()), marks)
    with pytest.raises(UserError, match="the fast tokenizer differs from SentencePiece at '"):
        check_passages(fast, [text], processor)
    fast.normalizer = None
    with pytest.raises(UserError, match="comes back as"):
        check_passages(fast, ["a b", "▁▁"], None)
    assert first_difference([1, 2, 3], [1, 2]) == 2 and first_difference("ab", "cb") == 0


def test_without_the_other_vocabularies(folders, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "find_spec", lambda name: None)
    fast = AutoTokenizer.from_pretrained(folders / "bpe").backend_tokenizer
    head, line = train_tokenizer.compare(fast, "mine", {"my_text": ["2024", "2025"]})
    assert head.split() == ["characters", "per", "token", "mine"] and line.split() == ["my_text", "1.000"]
