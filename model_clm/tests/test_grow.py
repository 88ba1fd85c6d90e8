"""grow_vocabulary.py: old texts as before, new rows from the mean of their old pieces', Chinese in fewer tokens."""

import json

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from test_tokenizer import make_text
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from grow_vocabulary import add_merges, chinese_words, grow_tokenizer, main, speller
from rows import UserError
from sentencepiece_bpe import fast_tokenizer
from train_tokenizer import MARKS, run_sentencepiece
from train_tokenizer import main as train

ENGLISH = (
    "the quick brown fox jumps over the lazy dog, and the dog sleeps in the sun.\nSo it goes: 1 2 3 (four)!\n" * 20
)
OLD_TEXTS = ["the dog jumps", " over\n\nthe sun 12 (3)", "é ñ ß", "naïve <s> fox"]
CHINESE_TEXT = make_text(3, 300)
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}


def write_llama(folder: str) -> None:
    """A BPE with byte fallback that puts a space before the first word, and a head of its own."""
    proto = run_sentencepiece([ENGLISH + "天地人民"], 420, "bpe", 1.0)
    marks = {number: AddedToken(mark, special=True, normalized=False) for number, mark in enumerate(MARKS)}
    fast = fast_tokenizer(proto, SentencePieceProcessor(model_proto=proto.SerializeToString()), marks)
    model = json.loads(fast.to_str())["model"]
    LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]).save_pretrained(folder)
    config = LlamaConfig(vocab_size=420, num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_qwen(folder: str) -> None:
    """A byte-level BPE with added tokens behind it, rows to spare, tied, in bfloat16."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator([ENGLISH, "天地人民"], 330, new_special_tokens=["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(vocab_size=len(tokenizer) + 7, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)


def write_gpt2(folder: str) -> None:
    tokenizer = GPT2Tokenizer(vocab={}, merges=[]).train_new_from_iterator([ENGLISH], 320)
    tokenizer.save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)


WRITERS = {"llama": write_llama, "qwen": write_qwen, "gpt2": write_gpt2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models, two trained tokenizers, and each model grown by the first of these."""
    folder = tmp_path_factory.mktemp("grow")
    corpus = folder / "corpus.txt"
    corpus.write_text(make_text(0, 3000), encoding="utf-8")
    train([str(corpus), str(folder / "bpe"), "--vocab_size", "450"])
    train([str(corpus), str(folder / "unigram"), "--vocab_size", "420", "--model_type", "unigram"])
    train([str(corpus), str(folder / "byte_level"), "--vocab_size", "400", "--model_type", "byte_level"])
    torch.manual_seed(0)
    for name, write in WRITERS.items():
        write(str(folder / name))
        main([str(folder / name), str(folder / "bpe"), str(folder / f"grown_{name}"), "--pad_to_multiple_of", "16"])
    return folder


def read_both(folder, name: str):
    paths = [folder / name, folder / f"grown_{name}"]
    return [AutoTokenizer.from_pretrained(path) for path in paths], [
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in paths
    ]


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_old_texts_have_their_ids_and_logits(folder, name):
    (old, new), (before, after) = read_both(folder, name)
    assert type(old) is type(new) and before.dtype == after.dtype
    assert {piece: new.get_vocab()[piece] for piece in old.get_vocab()} == old.get_vocab()
    for text in OLD_TEXTS:
        ids = old(text)["input_ids"]
        assert new(text)["input_ids"] == ids
        one, other = (model(torch.tensor([ids]), output_hidden_states=True) for model in (before, after))
        assert torch.equal(one.hidden_states[-1], other.hidden_states[-1])
        # The head's old rows are the same (below); a matrix of another height may be added up in another order.
        torch.testing.assert_close(one.logits[..., : len(old)], other.logits[..., : len(old)])
    assert new.all_special_tokens == old.all_special_tokens


@pytest.mark.parametrize("name", WRITERS)
def test_new_rows_are_the_mean_of_the_old_pieces(folder, name):
    (old, new), (before, after) = read_both(folder, name)
    tied = before.config.tie_word_embeddings
    assert after.config.tie_word_embeddings == tied == (name != "llama")
    assert after.config.vocab_size % 16 == 0 and len(new) <= after.config.vocab_size < len(new) + 16
    added = {number: piece for piece, number in new.get_vocab().items() if number >= len(old)}
    assert sorted(added) == list(range(len(old), len(new))) and len(added) > 50
    for side in ("get_input_embeddings", "get_output_embeddings"):
        one, other = getattr(before, side)().weight, getattr(after, side)().weight
        assert torch.equal(one[: len(old)], other[: len(old)])
        for number, piece in added.items():
            pieces = [token.id for token in old.backend_tokenizer.model.tokenize(piece)]
            assert len(pieces) > 1 and torch.equal(other[number], one[pieces].float().mean(0).to(one.dtype))
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("name", WRITERS)
def test_chinese_takes_fewer_tokens_and_comes_back(folder, name):
    (old, new), _ = read_both(folder, name)
    for text in (CHINESE_TEXT, "天地人民日报", "a天地 the 日月 😀"):
        before, after = (one(text, add_special_tokens=False)["input_ids"] for one in (old, new))
        assert len(after) < len(before)
        assert new.decode(after) == old.decode(before) == text
        assert text != CHINESE_TEXT or len(after) < 0.6 * len(before)
    trained = chinese_words(AutoTokenizer.from_pretrained(folder / "bpe").backend_tokenizer)
    assert {"人民日报", "天", "，"} <= set(trained) and not {"data", "▁", "\n"} & set(trained)
    assert len(new.tokenize("\n人民日报")) < len(old.tokenize("\n人民日报")) - 3


@pytest.mark.parametrize("kind", ["unigram", "byte_level"])
def test_words_of_other_kinds_of_tokenizers(folder, kind):
    """A unigram's words have no halves among the pieces; a byte-level one has pieces that are no text."""
    words = chinese_words(AutoTokenizer.from_pretrained(folder / kind).backend_tokenizer)
    assert "�" not in "".join(words) and max(map(len, words)) > 2
    for name in WRITERS:
        old = AutoTokenizer.from_pretrained(folder / name).backend_tokenizer
        grown, spelt, left_out = grow_tokenizer(old, words, name)
        assert len(left_out) < 0.05 * len(words)
        assert len(grown.encode(CHINESE_TEXT).ids) < 0.8 * len(old.encode(CHINESE_TEXT).ids)
        assert min(spelt) == old.get_vocab_size() and max(spelt) == grown.get_vocab_size() - 1


def test_merges_of_a_word_without_halves():
    settings = {"model": {"vocab": {"天": 0, "地": 1}, "merges": []}, "added_tokens": [{"content": "<s>", "id": 2}]}
    grown, new = add_merges(settings, ["天地玄", "地玄"], lambda text: text)
    assert new == ["玄", "天地", "天地玄", "地玄"] and grown["model"]["vocab"]["天地玄"] == 5
    assert grown["model"]["merges"] == [["天", "地"], ["天地", "玄"], ["地", "玄"]]
    assert settings["model"]["vocab"] == {"天": 0, "地": 1}, "the old settings stay"


def test_what_is_refused(folder, tmp_path):
    bpe, target = str(folder / "bpe"), str(tmp_path / "new")
    with pytest.raises(SystemExit, match="unigram: its tokenizer is a Unigram, which has no merges"):
        main([str(folder / "unigram"), bpe, target])
    with pytest.raises(SystemExit, match="has all the Chinese tokens that there are to add"):
        main([str(folder / "grown_llama"), bpe, target])
    with pytest.raises(SystemExit, match="no tokenizer can be read there"):
        main([str(tmp_path / "nothing"), bpe, target])
    with pytest.raises(SystemExit, match="no model can be read there"):
        main([str(folder / "byte_level"), bpe, target])
    with pytest.raises(SystemExit, match="is not an empty folder"):
        main([str(folder / "llama"), bpe, str(folder)])
    plain = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(UserError, match="neither bytes nor characters"):
        speller(json.loads(plain.to_str()), "my_model")
    plain.model = models.BPE({"a": 0}, [], end_of_word_suffix="</w>")
    with pytest.raises(UserError, match="marks the parts of a word"):
        speller(json.loads(plain.to_str()), "my_model")
    assert not list(tmp_path.iterdir())


def test_too_few_rows(folder, tmp_path):
    """A tokenizer that was grown without its model."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True)))
    tokenizer.add_tokens([f"<{number}>" for number in range(500)])
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **SIZES)).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="its tokenizer has ids up to 500, its embedding 100 rows only"):
        main([str(tmp_path / "model"), str(folder / "bpe"), str(tmp_path / "new")])
