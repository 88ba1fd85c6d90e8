"""An InternLM folder becomes a Llama with the same logits and tokens, or is refused with the reason."""

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from internlm import LIMIT, random_texts, reference_logits, train_sentencepiece, write_checkpoint, write_weights
from ranks import RECIPE
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Regex, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, InternLM3Config

import convert_to_llama
from convert_to_llama import convert, main
from rows import UserError
from template import encode_conversation

CHATML = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
TURNS = [
    {"role": "system", "content": "天"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "好的  ½"},
    {"role": "user", "content": "def f(x):"},
    {"role": "assistant", "content": " pass"},
]
DYNAMIC = {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
LINEAR = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Code, English and Chinese: this recipe's own."""
    files = [RECIPE / "rows.py", RECIPE / "data.py", *sorted((RECIPE / "data").rglob("*.json*"))]
    return [line for file in files for line in file.read_text("utf-8").splitlines()[:150] if line.strip()]


@pytest.fixture(scope="module")
def models(lines) -> dict[bool, bytes]:
    """SentencePiece models by whether they put a space before a text."""
    return {prefix: train_sentencepiece(lines, prefix) for prefix in (False, True)}


CASES = {
    "rotary-dynamic-bias": ("internlm", {"rotary": {"base": 10000, "type": "dynamic"}, "bias": True}, 1, "bin"),
    "rotary-origin": ("internlm", {"rotary": {"base": 5000, "type": "origin"}}, 2, "bin"),
    "rope_scaling-bias": ("internlm", DYNAMIC | {"bias": True, "rms_norm_eps": 1e-6}, 3, "safetensors"),
    "plain": ("internlm", {}, 1, "safetensors"),
    "internlm2-dynamic": ("internlm2", DYNAMIC, 3, "safetensors"),
    "internlm2-linear-bias": ("internlm2", LINEAR | {"bias": True, "num_key_value_heads": 1}, 2, "bin"),
    "internlm2-plain-tied": ("internlm2", {"rope_scaling": None, "tie_word_embeddings": True}, 1, "safetensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_reference_forward_pass(case, models, tmp_path):
    family, changed, shards, suffix = CASES[case]
    weights = write_checkpoint(tmp_path / "old", models[False], family, shards, suffix, **changed)
    if "tie_word_embeddings" in changed:  # some tools write it all the same
        head = {"output.weight": weights["model.tok_embeddings.weight"].clone()}
        write_weights(tmp_path / "old", weights | head, shards, suffix)
    convert(tmp_path / "old", tmp_path / "new")
    config = json.loads((tmp_path / "old" / "config.json").read_text("utf-8"))
    for length in (20, LIMIT, 50):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
        assert type(model).__name__ == "LlamaForCausalLM"
        input_ids = torch.randint(0, 2400, (length,), generator=torch.Generator().manual_seed(length))
        expected = reference_logits(weights, config, input_ids)
        with torch.no_grad():
            logits = model(input_ids[None]).logits[0]
        assert expected.abs().max() > 1
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    written = sorted(file.name for file in (tmp_path / "new").glob("*.safetensors"))
    if shards == 1:
        assert written == ["model.safetensors"]
        assert not (tmp_path / "new" / "model.safetensors.index.json").exists()
    else:
        assert written == [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
        index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text("utf-8"))
        held = {name: file for file in written for name in load_file(tmp_path / "new" / file)}
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.state_dict().values())


def test_dynamic_rope_would_be_missed(models, tmp_path):
    """The lengths beyond the limit tell apart what the lengths below it can't."""
    weights = write_checkpoint(tmp_path / "old", models[False], **DYNAMIC)
    config = json.loads((tmp_path / "old" / "config.json").read_text("utf-8"))
    input_ids = torch.arange(50)
    plain = reference_logits(weights, config | {"rope_scaling": None}, input_ids)
    assert (plain - reference_logits(weights, config, input_ids)).abs().max() > 1e-2


@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_are_those_of_sentencepiece(prefix, models, lines, tmp_path):
    write_checkpoint(tmp_path / "old", models[prefix], "internlm")
    convert(tmp_path / "old", tmp_path / "new", tokenizer_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
    texts = [processor.id_to_piece(number) for number in range(3, len(processor))] + random_texts(lines, 2000)
    marks = ["<eoh>", "<eoa>", *(f"[UNUSED_TOKEN_{number}]" for number in range(141, 147))]
    if prefix:  # with a space before the text behind each mark, as where a tokenizer splits at added tokens
        texts = [text for text in texts if not any(mark in text for mark in marks)]
    else:  # the first InternLM has no ChatML
        texts = [text for text in texts if not any(mark in text for mark in marks[2:])]
    assert len(texts) > 2000 + 800
    ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    different = [text for text, ours, theirs in zip(texts, ids, processor.encode(texts), strict=True) if ours != theirs]
    assert different == []
    assert [text for text, one in zip(texts, ids, strict=True) if tokenizer.decode(one) != processor.decode(one)] == []
    assert tokenizer("你好")["input_ids"] == [processor.bos_id(), *processor.encode("你好")]
    assert len(tokenizer) == len(processor)


def said(tokenizer, example: dict) -> list[str]:
    """What is learned of a conversation, turn by turn: runs of labels, decoded."""
    runs, last = [], None
    for label in example["labels"]:
        if label != -100:
            runs += [[]] if last in (None, -100) else []
            runs[-1].append(label)
        last = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("no_eoh", [False, True])
def test_internlm_speaks_as_published_and_stops_at_eoa(no_eoh, models, tmp_path):
    write_checkpoint(tmp_path / "old", models[False], "internlm")
    main([str(tmp_path / "old"), str(tmp_path / "new"), *(["--no_eoh"] if no_eoh else [])])
    tokenizer, eoh = AutoTokenizer.from_pretrained(tmp_path / "new"), "" if no_eoh else "<eoh>"
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    asked = f"<s><|System|>:天\n<|User|>:你好{eoh}\n<|Bot|>:好的  ½<eoa>\n<|User|>:def f(x):{eoh}\n<|Bot|>:"
    assert text == f"{asked} pass<eoa>\n"
    assert tokenizer.apply_chat_template(TURNS[:4], tokenize=False, add_generation_prompt=True) == asked
    processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
    eos, eoa = processor.piece_to_id(["</s>", "<eoa>"])
    assert GenerationConfig.from_pretrained(tmp_path / "new").eos_token_id == [eos, eoa]
    assert tokenizer(asked, add_special_tokens=False)["input_ids"] == [1, *processor.encode(asked.removeprefix("<s>"))]
    (example,) = encode_conversation(TURNS, tokenizer)
    assert said(tokenizer, example) == ["好的  ½<eoa>", " pass<eoa>"]
    with pytest.raises(UserError, match="InternLM knows system, user and assistant only"):
        encode_conversation([{"role": "tool", "content": "x"}, *TURNS], tokenizer)


@pytest.mark.parametrize("chat", [False, True])
def test_internlm2_speaks_chatml_on_the_pieces_that_its_base_leaves_unused(chat, models, tmp_path):
    write_checkpoint(tmp_path / "old", models[False])
    processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
    ids = dict(
        zip(CHATML, processor.piece_to_id([f"[UNUSED_TOKEN_{number}]" for number in range(141, 147)]), strict=True)
    )
    if chat:
        added = {
            "content": "",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        decoder = {str(ids[token]): added | {"content": token} for token in CHATML} | {"2": added | {"content": "</s>"}}
        decoder[str(processor.piece_to_id("[UNUSED_TOKEN_139]"))] = added | {"content": "<think>", "special": False}
        settings = {
            "added_tokens_decoder": decoder,
            "chat_template": "{{ bos_token }}{{ messages[0].content }}<|im_end|>",
        }
        (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    convert(tmp_path / "old", tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.convert_tokens_to_ids(CHATML) == list(ids.values())
    assert tokenizer("<|im_start|>")["input_ids"] == [1, ids["<|im_start|>"]]
    assert GenerationConfig.from_pretrained(tmp_path / "new").eos_token_id == [2, ids["<|im_end|>"]]
    if chat:
        assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "<s>天<|im_end|>"
        assert tokenizer.decode(tokenizer("<think>a")["input_ids"], skip_special_tokens=True) == "<think>a"
        return
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in TURNS)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "<s>" + turns
    (example,) = encode_conversation(TURNS, tokenizer)
    assert said(tokenizer, example) == ["好的  ½<|im_end|>", " pass<|im_end|>"]


def test_marks_may_stand_on_other_pieces(models, tmp_path):
    write_checkpoint(tmp_path / "old", models[False])
    processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
    ids = processor.piece_to_id(["[UNUSED_TOKEN_139]", "[UNUSED_TOKEN_140]"])
    names = ["<|im_start|>", "<|im_end|>"]
    decoder = {number: {"content": name, "special": True} for number, name in zip(ids, names, strict=True)}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}), "utf-8")
    convert(tmp_path / "old", tmp_path / "new")
    assert AutoTokenizer.from_pretrained(tmp_path / "new").convert_tokens_to_ids(names) == ids
    assert GenerationConfig.from_pretrained(tmp_path / "new").eos_token_id == [2, ids[1]]


def test_bytes_stay_as_they_were_and_code_is_not_run(models, tmp_path):
    weights = write_checkpoint(tmp_path / "old", models[False], torch_dtype="bfloat16", suffix="bin")
    for name in ("modeling_internlm2.py", "tokenization_internlm2.py"):
        (tmp_path / "old" / name).write_text("raise SystemExit('run')", "utf-8")
    convert(tmp_path / "old", tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, weights["output.weight"])
    config = json.loads((tmp_path / "new" / "config.json").read_text("utf-8"))
    assert "auto_map" not in config and config["rope_theta"] == 10000 and config["eos_token_id"][0] == 2
    mode = (tmp_path / "new" / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "new" / "config.json").stat().st_mode

    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"output.weight": Command()}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: no weights can be read from it"):
        convert(tmp_path / "old", tmp_path / "newer")
    assert not (tmp_path / "run").exists()


def test_internlm3_gets_its_tokenizer_only(models, tmp_path, capsys):
    config = InternLM3Config(vocab_size=2400, hidden_size=64, intermediate_size=96, num_hidden_layers=1, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "tokenizer.model").write_bytes(models[True])
    settings = {
        "tokenizer_class": "InternLM3Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm3.X", None]},
    }
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    before = (tmp_path / "old" / "config.json").read_bytes()
    with pytest.raises(UserError, match="needs no conversion, Transformers has internlm3.*--tokenizer_only"):
        convert(tmp_path / "old", tmp_path / "new")
    main([str(tmp_path / "old"), str(tmp_path / "new"), "--tokenizer_only"])
    files = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == files
    screen = capsys.readouterr().out
    assert (
        f"stay in {tmp_path / 'old'} as they are" in screen and f"cp {tmp_path / 'new'}/* {tmp_path / 'old'}/" in screen
    )
    shutil.copytree(tmp_path / "new", tmp_path / "old", dirs_exist_ok=True)
    assert (tmp_path / "old" / "config.json").read_bytes() == before
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "old")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "old" / "tokenizer.model"))
    assert tokenizer("你好  x\n")["input_ids"] == [1, *processor.encode("你好  x\n")]
    (example,) = encode_conversation(TURNS, tokenizer)
    assert [text.strip() for text in said(tokenizer, example)][0].endswith("好的  ½<|im_end|>")


def edit_config(**changed):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text("utf-8")) | changed
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}), "utf-8")

    return edit


def edit_weights(change):
    """For a folder of two shards: changes the second."""

    def edit(folder):
        file = folder / "model-00002-of-00002.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return edit


def write(name, text):
    return lambda folder: (folder / name).write_text(text, "utf-8")


def edit_sentencepiece(folder, change):
    proto = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    change(proto)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def forget_chat_pieces(proto):
    for number, piece in enumerate(proto.pieces):
        if piece.piece.startswith("[UNUSED"):
            piece.piece = f"[PIECE_{number}]"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ADDED = {"added_tokens_decoder": {"9999": {"content": "<x>", "special": True}}}
ERRORS = {
    "shard": (lambda f: (f / SECOND).unlink(), f"1 of the 2 files that {INDEX} names are missing, {SECOND}"),
    "index": (
        write(INDEX, '{"weight_map": {"a": "b-1.safetensors"}}'),
        "b-1.safetensors among them. Download them, or",
    ),
    "index broken": (write(INDEX, "{"), f"{INDEX}: no JSON"),
    "no weights": (lambda f: (f / INDEX).unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "missing": (edit_weights(lambda w: w.pop("model.tok_embeddings.weight")), "1 tensors are missing, model.tok_emb"),
    "packed": (
        edit_weights(lambda w: w.pop("model.layers.0.attention.wqkv.weight")),
        "1 tensors are missing, model.layers.0.attention.wqkv.weight",
    ),
    "unknown": (edit_weights(lambda w: w.update(v_head=torch.ones(1))), f"{SECOND}: v_head is unknown to config.json"),
    "shape": (
        edit_weights(lambda w: w.update({"model.layers.0.attention.wqkv.weight": torch.ones(96, 64)})),
        r"layers.0.attention.wqkv.weight is \[96, 64\], config.json asks for \[128, 64\]",
    ),
    "bias": (edit_config(bias=True), "tensors are missing, model.layers.0.attention.wqkv.bias among them"),
    "other shape": (edit_config(vocab_size=2401), r"is \[2400, 64\], config.json asks for \[2401, 64\]"),
    "family": (edit_config(model_type="qwen2"), "model_type is 'qwen2'. Give an InternLM"),
    "llama": (edit_config(model_type="llama"), "needs no conversion, Transformers has llama: MODEL="),
    "rope": (edit_config(rope_scaling={"type": "yarn", "factor": 2.0}), "rope is 'yarn', neither dynamic nor linear"),
    "setting": (edit_config(rms_norm_eps="gone"), "config.json: it lacks rms_norm_eps. Download it again"),
    "config": (lambda f: (f / "config.json").unlink(), "there is no config.json in it. Give the folder"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "there is no tokenizer.model in it. Download"),
    "tokenizer": (write("tokenizer.model", "x" * 2000), "tokenizer.model: no SentencePiece model. Download it again"),
    "spaces": (
        lambda f: edit_sentencepiece(f, lambda p: setattr(p.normalizer_spec, "remove_extra_whitespaces", True)),
        "no BPE that takes texts as they are",
    ),
    "marks": (lambda f: edit_sentencepiece(f, forget_chat_pieces), r"no <\|im_end\|>, nor an unused piece for it"),
    "added": (write("tokenizer_config.json", json.dumps(ADDED)), "<x> would be 2400, not 9999. Not converted"),
    "pointer": (write(SECOND, POINTER), f"{SECOND}: is a Git LFS pointer, not the file itself. Fetch it"),
    "tokenizer pointer": (write("tokenizer.model", POINTER), "tokenizer.model: is a Git LFS pointer"),
    "half a file": (lambda f: os.truncate(f / SECOND, 5000), f"{SECOND}: no weights can be read from it"),
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
    again = load_file(tmp_path / "old" / SECOND) | {"output.weight": weights["output.weight"]}
    again |= {name: weights[name] for name in sorted(weights)[:1]}
    save_file(again, tmp_path / "old" / SECOND)
    with pytest.raises(UserError, match="is unknown to config.json, or stands in an earlier file"):
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
