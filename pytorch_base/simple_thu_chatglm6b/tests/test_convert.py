"""A ChatGLM2/3 folder becomes GLM-4's class with the same logits and tokens, or is refused with the reason."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from ranks import losses, train_here
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert_to_glm
import sentencepiece_bpe
from code03_chatglm2 import chatglm2_forward
from conftest import RECIPE, make_conversations, write_rows
from convert_to_glm import convert
from rows import UserError
from template import encode_conversation
from tiny_chatglm import TEXTS, write_checkpoint

TURNS = [{"role": "user", "content": "你好 world"}, {"role": "assistant", "content": "好的  ½"}]


@pytest.fixture(scope="module", params=[True, False], ids=["chatglm3", "chatglm2"])
def converted(request, tmp_path_factory):
    """Whether it is ChatGLM3's form, the folder as downloaded, its weights, the folder as converted."""
    folder = tmp_path_factory.mktemp("convert")
    weights = write_checkpoint(folder / "old", roles=request.param)
    convert(folder / "old", folder / "new")
    return request.param, folder / "old", weights, folder / "new"


def test_logits_are_those_of_the_reference_forward_pass(converted):
    _, _, weights, new = converted
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    input_ids = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(0))
    expected = chatglm2_forward(weights, input_ids)
    with torch.no_grad():
        logits = model(input_ids[None]).logits[0]
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_tokens_are_those_of_sentencepiece_with_chatglms_ids(converted):
    roles, old, _, new = converted
    tokenizer = AutoTokenizer.from_pretrained(new)
    processor = SentencePieceProcessor(model_file=str(old / "tokenizer.model"))
    text = "你好，  世界！\n\n鑫 hello 🙂"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == processor.encode(text)
    assert tokenizer.decode(processor.encode(text)) == text
    size = len(processor)
    assert tokenizer.convert_tokens_to_ids(["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]) == [
        *range(size, size + 5)
    ]
    ids = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    if roles:
        assert tokenizer.convert_tokens_to_ids(["<|system|>", "<|observation|>"]) == [size + 5, size + 8]
        # ChatGLM3's own code encodes "\n" and the text apart, each with a leading space.
        asked = [*processor.encode("\n"), *processor.encode("你好 world")]
        assert ids == [size + 1, size + 3, size + 6, *asked, size + 7, *processor.encode("\n")]
    else:
        assert ids == [size + 1, size + 3, *processor.encode("[Round 1]\n\n问：你好 world\n\n答：")]
    ids = tokenizer.apply_chat_template([*TURNS, TURNS[0]], add_generation_prompt=True, return_dict=False)
    if roles:
        said = [*processor.encode("\n"), *processor.encode("好的  ½")]
        assert ids[2:] == [size + 6, *asked, size + 7, *said, size + 6, *asked, size + 7, *processor.encode("\n")]
    else:
        rounds = "[Round 1]\n\n问：你好 world\n\n答： 好的  ½\n\n[Round 2]\n\n问：你好 world\n\n答："
        assert ids[2:] == processor.encode(rounds)


def test_labels_are_the_replies(converted):
    roles, _, _, new = converted
    tokenizer = AutoTokenizer.from_pretrained(new)
    examples = encode_conversation(TURNS + TURNS, tokenizer)
    learned = [tokenizer.decode([label for label in example["labels"] if label != -100]) for example in examples]
    assert learned == (["好的  ½<|user|> 好的  ½</s>"] if roles else ["好的  ½</s>", "好的  ½</s>"])
    system = [{"role": "system", "content": "天"}]
    if roles:
        encode_conversation(system + TURNS, tokenizer)
    else:
        with pytest.raises(UserError, match="the chat template refuses it: ChatGLM2 knows user and assistant only"):
            encode_conversation(system + TURNS, tokenizer)


def test_what_is_converted_can_be_trained(converted, tmp_path, monkeypatch):
    _, _, _, new = converted
    rows = [row for row in make_conversations(30) if row["messages"][0]["role"] == "user"]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = f"--model_name_or_path {new} --data_path {data} --output_dir {tmp_path / 'out'} --use_lora true"
    flags += " --num_train_epochs 4 --per_device_train_batch_size 4 --learning_rate 1e-2 --logging_steps 1"
    train_here(monkeypatch, *flags.split(), "--save_strategy", "no")
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.model", "config.json"])
def test_what_git_lfs_left_is_named(name, tmp_path):
    old = tmp_path / "old"
    write_checkpoint(old)
    if name.endswith(".bin"):
        (old / "model.safetensors").unlink()
    (old / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match=f"{name}: no .*(git lfs pull|Download it again)"):
        convert(old, tmp_path / "new")


def test_half_precision_in_one_pickled_file(tmp_path):
    weights = write_checkpoint(tmp_path / "old", torch_dtype="float16")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save({name: weight.half() for name, weight in weights.items()}, tmp_path / "old" / "pytorch_model.bin")
    convert(tmp_path / "old", tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.float16
    assert torch.equal(model.lm_head.weight, weights["transformer.output_layer.weight"].half())


def test_pickled_shards_are_read_as_tensors_only(tmp_path):
    weights = write_checkpoint(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:7], names[7:]), start=1):
        torch.save(
            {name: weights[name] for name in part}, tmp_path / "old" / f"pytorch_model-0000{number}-of-00002.bin"
        )
    convert(tmp_path / "old", tmp_path / "new")
    with pytest.raises(UserError, match="stands in pytorch_model-00002-copy.bin and in a file before it"):
        shutil.copy(
            tmp_path / "old" / "pytorch_model-00002-of-00002.bin", tmp_path / "old" / "pytorch_model-00002-copy.bin"
        )
        (tmp_path / "old" / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "old" / "pytorch_model-00001-x.bin")
        convert(tmp_path / "old", tmp_path / "newer")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001.safetensors", "model-00002.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    groups = weights["transformer.encoder.layers.1.self_attention.query_key_value.bias"][64:96]
    assert torch.equal(model.model.layers[1].self_attn.k_proj.bias, groups)


@pytest.mark.parametrize(("roles", "how"), [(True, {"base": 500000.0}), (False, {"divisor": 50.0})])
def test_long_contexts_have_their_rope(roles, how, tmp_path):
    """As modeling_chatglm.py of ChatGLM3-6B-32K and of ChatGLM2-6B-32K."""
    weights = write_checkpoint(tmp_path / "old", roles=roles, rope_ratio=50)
    convert(tmp_path / "old", tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    input_ids = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids[None]).logits[0]
    torch.testing.assert_close(logits, chatglm2_forward(weights, input_ids, **how), atol=1e-5, rtol=0)
    assert (logits - chatglm2_forward(weights, input_ids)).abs().max() > 0.01


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_that_were_defined_by_hand_are_those_of_sentencepiece(prefix, tmp_path):
    defined = ["<eoh>", "天气", "[X]", "▁x▁"]
    pieces = {"user_defined_symbols": defined, "add_dummy_prefix": prefix, "vocab_size": 360}
    write_checkpoint(tmp_path / "old", pieces=pieces)
    convert(tmp_path / "old", tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
    texts = ["", " ", "<eoh>", "a<eoh>b", "<eoh> 今天<eoh>天气", "今天天气很好", "[X][X]\n x ", "says x hello", "🙂[X]"]
    vocabulary = [
        processor.id_to_piece(number).replace("▁", " ")
        for number in range(3, len(processor))
        if not processor.is_byte(number)
    ]
    texts += vocabulary + [f"{one}{two}" for one in defined for two in vocabulary]
    texts += [f"{two}{one}天" for one in defined for two in vocabulary]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids) == processor.decode(ids), text
    assert processor.piece_to_id("天气") in tokenizer("今天天气很好")["input_ids"]


def test_a_piece_that_nothing_merges_into_is_never_found(tmp_path):
    write_checkpoint(tmp_path / "old")
    model = tmp_path / "old" / "tokenizer.model"
    proto = ModelProto.FromString(model.read_bytes())
    names = [piece.piece for piece in proto.pieces]
    leaf = max(i for i, name in enumerate(names) if len(name) > 1 and sum(name in longer for longer in names) == 1)
    proto.pieces[leaf].piece = "▁天地玄黄"
    model.write_bytes(proto.SerializeToString())
    convert(tmp_path / "old", tmp_path / "new")
    ids = AutoTokenizer.from_pretrained(tmp_path / "new")("天地玄黄", add_special_tokens=False)["input_ids"]
    assert ids == SentencePieceProcessor(model_file=str(model)).encode("天地玄黄") and len(ids) > 1


def test_what_merges_first_is_told_by_the_scores(tmp_path):
    """Not by the numbers, though SentencePiece's own training gives the pieces both in one order."""
    write_checkpoint(tmp_path / "old")
    model = tmp_path / "old" / "tokenizer.model"
    before, proto = SentencePieceProcessor(model_file=str(model)), ModelProto.FromString(model.read_bytes())
    merged = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    scores = [piece.score for piece in merged]
    random.Random(0).shuffle(scores)
    for piece, score in zip(merged, scores, strict=True):
        piece.score = score
    model.write_bytes(proto.SerializeToString())
    convert(tmp_path / "old", tmp_path / "new")
    tokenizer, after = AutoTokenizer.from_pretrained(tmp_path / "new"), SentencePieceProcessor(model_file=str(model))
    assert tokenizer(TEXTS, add_special_tokens=False)["input_ids"] == after.encode(TEXTS) != before.encode(TEXTS)


WRONG = {  # what is only so joined is a split after 20 characters, which no piece has
    "alone": lambda fast: fast.add_tokens([AddedToken("says", normalized=False)]),
    "joined": lambda fast: setattr(fast, "pre_tokenizer", pre_tokenizers.FixedLength(20)),
}


@pytest.mark.parametrize("where", WRONG)
def test_a_tokenizer_that_would_differ_is_not_written(where, tmp_path, monkeypatch):
    right = convert_to_glm.fast_tokenizer

    def wrong(*given):
        fast = right(*given)
        WRONG[where](fast)
        return fast

    write_checkpoint(tmp_path / "old")
    monkeypatch.setattr(sentencepiece_bpe, "PROBES", [])
    monkeypatch.setattr(convert_to_glm, "fast_tokenizer", wrong)
    with pytest.raises(UserError, match="tokenizer.model: '.*' gives .*, SentencePiece .* Not converted"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_chatglm2s_past_answers_carry_one_token_more(tmp_path):
    """The original's chat leaves the space before a past answer out, which the training has."""
    write_checkpoint(tmp_path / "old", roles=False)
    convert(tmp_path / "old", tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好的"}] * 2
    ids = tokenizer.apply_chat_template(turns + turns[:1], return_dict=False)[2:]
    original = (
        "".join(f"[Round {number}]\n\n问：你好\n\n答：好的\n\n" for number in (1, 2)) + "[Round 3]\n\n问：你好\n\n答："
    )
    assert len(ids) == len(processor.encode(original)) + 2 and processor.decode(ids) == original.replace(
        "答：好", "答： 好"
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"multi_query_attention": False}, "multi_query_attention is False"),
        ({"quantization_bit": 4}, "its weights are packed integers"),
        ({"model_type": "glm"}, r"no ChatGLM2-6B or ChatGLM3-6B. GLM-4 .* needs no conversion"),
    ],
)
def test_what_would_differ_is_refused(changed, reason, tmp_path):
    write_checkpoint(tmp_path / "old", **changed)
    with pytest.raises(UserError, match=reason):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_first_chatglm_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "position_encoding_2d": True}))
    with pytest.raises(UserError, match="another model, with prefix attention"):
        convert(tmp_path, tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("transformer.output_layer.weight"), "1 weights are missing, lm_head.weight"),
        (lambda weights: weights.update({"transformer.prefix": torch.ones(1)}), "transformer.prefix: ChatGLM2 and"),
        (
            lambda weights: weights.update({"transformer.output_layer.weight": torch.ones(3, 64)}),
            r"lm_head.weight has shape \[3, 64\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, reason, tmp_path):
    write_checkpoint(tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "old" / "model.safetensors")
    with pytest.raises(UserError, match=reason):
        convert(tmp_path / "old", tmp_path / "new")


def test_a_folder_that_is_in_use_or_not_whole_is_refused(tmp_path):
    write_checkpoint(tmp_path / "old")
    with pytest.raises(UserError, match="is not an empty folder"):
        convert(tmp_path / "old", tmp_path / "old")
    (tmp_path / "old" / "tokenization_chatglm.py").unlink()
    command = [sys.executable, "convert_to_glm.py", str(tmp_path / "old"), str(tmp_path / "new")]
    run = subprocess.run(command, cwd=RECIPE, capture_output=True, text=True)
    assert run.returncode == 1 and "there is no tokenization_chatglm.py in it" in run.stderr
    assert "Traceback" not in run.stderr
