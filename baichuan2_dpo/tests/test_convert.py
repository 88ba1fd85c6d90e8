"""A Baichuan2 folder becomes a Llama with the same logits and tokens, or is refused with the reason."""

import errno
import io
import json
import os
import random
import shutil
import weakref
from collections import namedtuple

import pytest
import torch
from baichuan import (
    LIMIT,
    SHARD,
    SYMBOLS,
    VOCABULARY,
    edit_config,
    edit_sentencepiece,
    edit_weights,
    random_texts,
    reference_logits,
    write_checkpoint,
    write_weights,
)
from ranks import RECIPE
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Regex, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import convert_to_llama
from convert_to_llama import convert, main
from rows import UserError
from template import encode_conversation, encode_prompt, stop_tokens

WORDS = ["天地", "玄黄", "宇宙", "洪荒", "你好", "世界", "学习", "语言", "模型", "的", "了", "在", "好的", "，", "。"]
TURNS = [
    {"role": "system", "content": "天地"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "好的  ½"},
    {"role": "user", "content": "def f(x):"},
    {"role": "assistant", "content": " pass\n```"},
]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Chinese words in any order, and this recipe's code."""
    rng = random.Random(0)
    code = (RECIPE / "rows.py").read_text("utf-8").splitlines()
    return ["".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(200)] + [line for line in code if line]


@pytest.fixture(scope="module")
def models(lines) -> dict[bool, bytes]:
    """SentencePiece models by whether they put a space before a text; a piece is NUL, as in Baichuan2's."""
    models = {}
    for prefix in (False, True):
        file, options = io.BytesIO(), {"byte_fallback": True, "remove_extra_whitespaces": False, "minloglevel": 2}
        options |= {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": prefix, "character_coverage": 0.98}
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, model_type="bpe", vocab_size=VOCABULARY,
            normalization_rule_name="identity", split_by_whitespace=False, max_sentencepiece_length=8, **options,
        )  # fmt: skip
        proto = ModelProto.FromString(file.getvalue())
        pieces = [piece.piece for piece in proto.pieces]
        part_of_no_other = [i for i, piece in enumerate(pieces) if sum(piece in longer for longer in pieces) == 1]
        proto.pieces[part_of_no_other[-1]].piece = "\0"
        models[prefix] = proto.SerializeToString()
    return models


CASES = {  # what is changed, files, their kind, whether the head is a NormHead
    "baichuan2": ({}, 1, "bin", True),
    "baichuan2-shards": ({}, 3, "bin", True),
    "baichuan2-safetensors": ({}, 2, "safetensors", True),
    "baichuan": ({"vocab_size": 64000, "architectures": ["BaiChuanForCausalLM"]}, 1, "bin", False),
    "baichuan-by-vocabulary": ({"vocab_size": 64000}, 1, "safetensors", False),
    "baichuan-by-class": ({"architectures": ["BaiChuanForCausalLM"]}, 1, "safetensors", False),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_reference_forward_pass(case, models, tmp_path):
    changed, shards, suffix, norm_head = CASES[case]
    weights = write_checkpoint(tmp_path / "old", models[False], shards, suffix, **changed)
    convert(tmp_path / "old", tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert type(model).__name__ == "LlamaForCausalLM"
    for length in (20, LIMIT, 50):
        input_ids = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
        expected = reference_logits(weights, input_ids, norm_head)
        with torch.no_grad():
            logits = model(input_ids[None]).logits[0]
        assert expected.abs().max() > 1
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert (expected - reference_logits(weights, input_ids, not norm_head)).abs().max() > 0.1
    written = sorted(file.name for file in (tmp_path / "new").glob("*.safetensors"))
    if shards == 1:
        assert written == ["model.safetensors"]
        assert not (tmp_path / "new" / INDEX).exists()
    else:
        assert written == [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
        index = json.loads((tmp_path / "new" / INDEX).read_text("utf-8"))
        held = {name: file for file in written for name in load_file(tmp_path / "new" / file)}
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.state_dict().values())


def test_rows_of_a_bfloat16_head_get_their_length_in_fp32(models, tmp_path):
    weights = write_checkpoint(tmp_path / "old", models[False], suffix="bin", torch_dtype="bfloat16")
    for name in ("modeling_baichuan.py", "tokenization_baichuan.py"):
        (tmp_path / "old" / name).write_text("raise SystemExit('run')", "utf-8")
    convert(tmp_path / "old", tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    head, old = model.lm_head.weight, weights["lm_head.weight"]
    exact = old.double() / old.double().norm(dim=1, keepdim=True)
    assert model.dtype == torch.bfloat16 and torch.equal(head, exact.bfloat16())
    off = torch.stack([head, torch.nn.functional.normalize(old)]).double().norm(dim=2).sub(1).abs() > 2e-3
    assert off[0].sum() == 0 and off[1].double().mean() > 0.1
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "new" / "config.json").read_text("utf-8"))
    assert "auto_map" not in config and config["rope_theta"] == 10000 and config["max_position_embeddings"] == LIMIT
    assert config["dtype"] == "bfloat16" and config["eos_token_id"][0] == 2 and config["pad_token_id"] == 0
    mode = (tmp_path / "new" / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "new" / "config.json").stat().st_mode


def test_a_head_that_was_saved_after_it_had_answered_stays(models, tmp_path):
    """The remote code scales the weight itself when it first generates."""
    weights = write_checkpoint(tmp_path / "old", models[False], suffix="bin")
    head = weights["lm_head.weight"]
    head /= head.norm(dim=1, keepdim=True)
    write_weights(tmp_path / "old", weights, 1, "bin")
    convert(tmp_path / "old", tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(written, head, atol=1e-7, rtol=0)


def test_one_file_is_held_at_a_time(models, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "old", models[False], 3)
    read, held, counts = convert_to_llama.read_shard, [], []

    def count(file):
        counts.append(sum(tensor() is not None for tensor in held))
        shard = read(file)
        held.extend(weakref.ref(tensor) for tensor in shard.values())
        return shard

    monkeypatch.setattr(convert_to_llama, "read_shard", count)
    convert(tmp_path / "old", tmp_path / "new")
    assert counts == [0, 0, 0] and len(held) == 18


def test_code_is_not_run(models, tmp_path):
    write_checkpoint(tmp_path / "old", models[False], suffix="bin")

    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"lm_head.weight": Command()}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: no weights can be read from it"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_are_those_of_sentencepiece(prefix, models, lines, tmp_path):
    write_checkpoint(tmp_path / "old", models[prefix])
    convert(tmp_path / "old", tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
    texts = [processor.id_to_piece(number) for number in range(3, len(processor))] + random_texts(lines, 1000)
    if prefix:  # with a space before the text behind each mark, as where each message is encoded by itself
        texts = [text for text in texts if "<reserved_10" not in text]
    assert len(texts) > 1200
    ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    different = [text for text, ours, theirs in zip(texts, ids, processor.encode(texts), strict=True) if ours != theirs]
    assert different == []
    assert [text for text, one in zip(texts, ids, strict=True) if tokenizer.decode(one) != processor.decode(one)] == []
    assert tokenizer("你好")["input_ids"] == processor.encode("你好")
    assert len(tokenizer) == len(processor)


def test_it_keeps_its_tokens_and_sets_no_bos(models, tmp_path):
    write_checkpoint(tmp_path / "old", models[False])
    main([str(tmp_path / "old"), str(tmp_path / "new")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    user = tokenizer.convert_tokens_to_ids("<reserved_106>")
    generation = GenerationConfig.from_pretrained(tmp_path / "new")
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == ([2, user], 0, 1)
    assert stop_tokens(tokenizer) == {"</s>", "<reserved_106>"}
    spoken = tokenizer("<reserved_106>a```<reserved_107></s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(spoken, skip_special_tokens=True) == "a```"


def said(tokenizer, example: dict) -> list[str]:
    """What is learned of a conversation, turn by turn: runs of labels, decoded."""
    runs, last = [], None
    for label in example["labels"]:
        if label != -100:
            runs += [[]] if last in (None, -100) else []
            runs[-1].append(label)
        last = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("prefix", [False, True])
def test_each_answer_is_learned_with_its_end(prefix, models, tmp_path):
    write_checkpoint(tmp_path / "old", models[prefix])
    convert(tmp_path / "old", tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    asked = "<reserved_106>你好<reserved_107>好的  ½</s><reserved_106>def f(x):<reserved_107>"
    for system in ([], TURNS[:1]):
        for count in (2, 4):
            turns = system + TURNS[1 : 1 + count]
            text = (("天地" if system else "") + asked + " pass\n```</s>").split("</s>")[: count // 2]
            text = "".join(part + "</s>" for part in text)
            assert tokenizer.apply_chat_template(turns, tokenize=False) == text
            (example,) = encode_conversation(turns, tokenizer)
            answers = ["好的  ½</s>", " pass\n```</s>"][: count // 2]
            assert said(tokenizer, example) == answers
            prompt = encode_prompt(turns[:-1], tokenizer)
            assert example["input_ids"][: len(prompt)] == prompt
            assert tokenizer.decode(example["input_ids"][len(prompt) :]) == answers[-1]
            processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
            named = {"user": ["<reserved_106>"], "assistant": ["<reserved_107>"], "system": []}
            official = []  # each message is encoded by itself; the </s> of older answers is this recipe's
            for turn in turns:
                official += processor.piece_to_id(named[turn["role"]]) + processor.encode(turn["content"])
                official += [2] * (turn["role"] == "assistant")
            assert example["input_ids"] == official
    with pytest.raises(UserError, match="Baichuan2 knows system, user and assistant only"):
        encode_conversation([*TURNS[:2], {"role": "tool", "content": "x"}, *TURNS[2:]], tokenizer)


def place_marks(pieces, _):
    """195 and 196 as in the first Baichuan, where <reserved_106> is another piece."""
    names = [piece.piece for piece in pieces]
    for number, name in ((195, "<reserved_106>"), (196, "<reserved_107>")):
        byte = type(pieces[0]).FromString(pieces[number].SerializeToString())
        pieces[number].CopyFrom(pieces[names.index(name)])
        pieces[names.index(name)].CopyFrom(byte)
        pieces[number].piece = f"<reserved_{number - 93}>"
    pieces[names.index("<reserved_6>")].piece = "<reserved_106>"


def test_marks_are_known_by_their_ids_before_their_names(models, tmp_path):
    write_checkpoint(tmp_path / "old", models[False])
    edit_sentencepiece(tmp_path / "old", place_marks)
    template = {"chat_template": "{{ messages[0].content }}"}
    for name, settings in (("new", {}), ("own", template)):
        (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
        convert(tmp_path / "old", tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert GenerationConfig.from_pretrained(tmp_path / "new").eos_token_id == [2, 195]
    prompt = tokenizer.apply_chat_template(TURNS[1:2], add_generation_prompt=True, tokenize=False)
    assert prompt == "<reserved_102>你好<reserved_103>"
    ids = tokenizer(prompt)["input_ids"]
    assert ids[0] == 195 and ids[-1] == 196
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert own.apply_chat_template(TURNS, tokenize=False) == "天地"


def test_a_token_that_was_added_stays_where_it_was(models, tmp_path):
    write_checkpoint(tmp_path / "old", models[False], vocab_size=VOCABULARY + 1)
    added = {"2": {"content": "</s>", "special": True}, str(VOCABULARY): {"content": "<tool>", "special": False}}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), "utf-8")
    convert(tmp_path / "old", tmp_path / "new")
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("<tool>")["input_ids"] == [VOCABULARY]


def write(name, text):
    return lambda folder: (folder / name).write_text(text, "utf-8")


def forget_marks(pieces, _):
    for number, piece in enumerate(pieces):
        if piece.piece.startswith("<reserved"):
            piece.piece = f"[PIECE_{number}]"


def half_a_pickle(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX).unlink()
    torch.save({"x": torch.ones(5000)}, folder / "pytorch_model.bin")
    os.truncate(folder / "pytorch_model.bin", 5000)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
ADDED = {"added_tokens_decoder": {"9999": {"content": "<x>", "special": True}}}
W_PACK = "model.layers.0.self_attn.W_pack.weight"
ERRORS = {
    "shard": (lambda f: (f / SHARD).unlink(), f"1 of the 2 files that {INDEX} names are missing, {SHARD} among them"),
    "index": (
        write(INDEX, '{"weight_map": {"a": "b-1.safetensors"}}'),
        "b-1.safetensors among them. Download them, or",
    ),
    "index broken": (write(INDEX, "{"), f"{INDEX}: no JSON"),
    "no weights": (lambda f: (f / INDEX).unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "missing": (edit_weights(lambda w: w.pop(W_PACK)), f"1 tensors are missing, {W_PACK} among them"),
    "unknown": (edit_weights(lambda w: w.update(v_head=torch.ones(1))), f"{SHARD}: v_head is unknown to config.json"),
    "shape": (
        edit_weights(lambda w: w.update({W_PACK: torch.ones(64, 64)})),
        rf"{W_PACK} is \[64, 64\], config.json asks for \[192, 64\]",
    ),
    "vocabulary": (edit_config(vocab_size=701), r"is \[700, 64\], config.json asks for \[701, 64\]"),
    "family": (edit_config(model_type="qwen2"), "model_type is 'qwen2'. Give a Baichuan2-7B, Base or Chat"),
    "llama": (edit_config(model_type="llama"), "needs no conversion, it is a Llama: MODEL="),
    "13b": (
        edit_config(max_position_embeddings="gone"),
        "is a Baichuan of 13B, which has ALiBi .* Give a Baichuan2-7B",
    ),
    "13b by its size": (edit_config(hidden_size=5120), "is a Baichuan of 13B, which has ALiBi"),
    "quantised": (edit_config(quantization_config={}), "its weights are quantised. Give the release without -4bits"),
    "setting": (edit_config(rms_norm_eps="gone"), "config.json: it lacks rms_norm_eps. Download it again"),
    "config": (lambda f: (f / "config.json").unlink(), "there is no config.json in it. Give the folder"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "there is no tokenizer.model in it. Download"),
    "tokenizer": (write("tokenizer.model", "x" * 2000), "tokenizer.model: no SentencePiece model. Download it again"),
    "spaces": (
        lambda f: edit_sentencepiece(f, lambda _, normal: setattr(normal, "remove_extra_whitespaces", True)),
        "no BPE that takes texts as they are",
    ),
    "marks": (lambda f: edit_sentencepiece(f, forget_marks), "has no <reserved_106> and <reserved_107>. Is it Baich"),
    "added": (write("tokenizer_config.json", json.dumps(ADDED)), "<x> would be 700, not 9999. Not converted"),
    "pointer": (write(SHARD, POINTER), f"{SHARD}: is a Git LFS pointer, not the file itself. Fetch it"),
    "tokenizer pointer": (write("tokenizer.model", POINTER), "tokenizer.model: is a Git LFS pointer"),
    "half a file": (lambda f: os.truncate(f / SHARD, 5000), f"{SHARD}: no weights can be read from it"),
    "half a pickle": (half_a_pickle, "pytorch_model.bin: no weights can be read from it"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_one_line_and_leaves_nothing(case, models, tmp_path):
    spoil, reason = ERRORS[case]
    write_checkpoint(tmp_path / "old", models[False], shards=2)
    spoil(tmp_path / "old")
    with pytest.raises(UserError, match=reason) as caught:
        convert(tmp_path / "old", tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_a_tensor_that_stands_in_two_files_is_refused(models, tmp_path):
    weights = write_checkpoint(tmp_path / "old", models[False], shards=2)
    again = load_file(tmp_path / "old" / SHARD) | {name: weights[name] for name in sorted(weights)[:1]}
    save_file(again, tmp_path / "old" / SHARD)
    with pytest.raises(UserError, match="lm_head.weight is unknown to config.json, or stands in an earlier file"):
        convert(tmp_path / "old", tmp_path / "new")


def test_a_tokenizer_that_would_differ_is_not_written(models, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "old", models[False])
    build = convert_to_llama.fast_tokenizer

    def spoil(*given):
        fast = build(*given)
        fast.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" {30}"), ""), fast.normalizer])
        return fast

    monkeypatch.setattr(convert_to_llama, "fast_tokenizer", spoil)
    with pytest.raises(UserError, match="tokenizer.model: 'a {30}b=.* gives .*, SentencePiece .* Not converted"):
        convert(tmp_path / "old", tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_and_a_full_folder(models, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "old", models[False], shards=2)
    with pytest.raises(UserError, match="is not an empty folder. Name another one"):
        convert(tmp_path / "old", tmp_path / "old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    command = [str(tmp_path / "old"), str(tmp_path / "new")]
    with monkeypatch.context() as patch:
        patch.setattr(convert_to_llama, "save_file", full)
        with pytest.raises(SystemExit, match=f"^error: {tmp_path}/new: No space left on device. Free some space"):
            main(command)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
        with pytest.raises(SystemExit, match=r"^error: .* GB are needed, 0.0 GB are free"):
            main(command)
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    (tmp_path / ".new.unfinished").mkdir()
    (tmp_path / ".new.unfinished" / "left").write_text("by a conversion that was killed")
    (tmp_path / "new").mkdir()
    main(command)
    assert not (tmp_path / "new" / "left").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "old"]
    screen = capsys.readouterr().out
    assert f"{tmp_path / 'new'}: written, " in screen and f"MODEL={tmp_path / 'new'} DATA=my_data bash" in screen
