"""Turns a ChatGLM2-6B or ChatGLM3-6B folder into one of GLM-4's class, which Transformers has: no remote code needed.

    python convert_to_glm.py my_chatglm3-6b my_chatglm3-glm
    MODEL=my_chatglm3-glm DATA=my_data bash train_zero2.sh

The two compute the same: both rotate the first half of each head in neighbouring pairs, and pack gate and up into one
matrix. Only the names differ, and ChatGLM packs query, key and value. `code03_chatglm2.py` proves it.
ChatGLM-6B, the first one, is another model (`code04_prefix_lm.py`) and is refused.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from rows import UserError
from sentencepiece_bpe import check_tokenizer, fast_tokenizer, read_sentencepiece

# Ids from the end of the vocabulary on, in this order (ChatGLM2 has the first five only). sop and eop get GLM-4's
# names: as they were, they would be found inside of words.
CONTROL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
CHATGLM3_TEMPLATE = """[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>
 {{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
# An answer begins with a space, as its tokens do in ChatGLM2's own training; its chat leaves it out of the history.
CHATGLM2_TEMPLATE = """[gMASK]<sop>{% for message in messages %}{% if message.role == "user" %}\
[Round {{ loop.index0 // 2 + 1 }}]

问：{{ message.content }}

答：{% elif message.role == "assistant" %} {{ message.content }}{{ "" if loop.last else "\\n\\n" }}{% else %}\
{{ raise_exception("ChatGLM2 knows user and assistant only") }}{% endif %}{% endfor %}"""

# Settings under which GLM-4's class computes the same, and where else the two would part.
EXPECTED = {
    "multi_query_attention": (True, "query, key and value would be packed head by head"),
    "rmsnorm": (True, "GLM-4's class has no LayerNorm"),
    "apply_residual_connection_post_layernorm": (False, "GLM-4's class adds to what came into the norm"),
    "post_layer_norm": (True, "GLM-4's class ends with a norm"),
    "add_bias_linear": (False, "GLM-4's class has no biases but those of query, key and value"),
    "tie_word_embeddings": (False, "ChatGLM2 and ChatGLM3 have an output layer of their own"),
    "quantization_bit": (0, "its weights are packed integers; convert the release in half precision"),
    "pre_seq_len": (None, "it has a trained prefix, which GLM-4's class doesn't read"),
}
NEEDED = {"padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "kv_channels"}
NEEDED |= {"layernorm_epsilon", "add_qkv_bias", "attention_dropout", "seq_length"}


def has_roles(folder: Path) -> bool:
    """Whether it is ChatGLM3; raises UserError where the file that tells it from ChatGLM2 is missing."""
    if not (folder / "tokenization_chatglm.py").is_file():
        raise UserError(
            f"{folder}: there is no tokenization_chatglm.py in it. Download the whole folder; no code of it is run."
        )
    return "<|assistant|>" in (folder / "tokenization_chatglm.py").read_text("utf-8")


def read_rope(ratio: float, roles: bool) -> dict:
    """Rope parameters: for long contexts ChatGLM3 multiplies the base by `rope_ratio`, ChatGLM2 divides positions."""
    rope = {"rope_type": "default", "rope_theta": 10000.0 * ratio if roles else 10000.0, "partial_rotary_factor": 0.5}
    return rope if roles or ratio == 1 else rope | {"rope_type": "linear", "factor": float(ratio)}


def read_config(folder: Path) -> GlmConfig:
    """GLM-4's settings for a ChatGLM2/3 folder.

    Raises:
        UserError: it is no such folder, or a setting that GLM-4's class can't have.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: there is no config.json in it. Give the folder of the downloaded model.")
    try:
        old = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{folder}/config.json: no JSON ({error}). Download it again.") from None
    if old.get("model_type") != "chatglm" or "multi_query_group_num" not in old:
        raise UserError(
            f"{folder}: no ChatGLM2-6B or ChatGLM3-6B. GLM-4 (the -hf releases) needs no conversion; ChatGLM-6B is "
            "another model, with prefix attention and two positions a token, and can't be converted."
        )
    if missing := NEEDED - old.keys():
        raise UserError(f"{folder}/config.json: it lacks {', '.join(sorted(missing))}. Download it again.")
    for name, (expected, otherwise) in EXPECTED.items():
        if (value := old.get(name, expected)) != expected:
            raise UserError(f"{folder}/config.json: {name} is {value}, not {expected}: {otherwise}. Not converted.")
    return GlmConfig(
        vocab_size=old["padded_vocab_size"],
        hidden_size=old["hidden_size"],
        intermediate_size=old["ffn_hidden_size"],
        num_hidden_layers=old["num_layers"],
        num_attention_heads=old["num_attention_heads"],
        num_key_value_heads=old["multi_query_group_num"],
        head_dim=old["kv_channels"],
        rms_norm_eps=old["layernorm_epsilon"],
        attention_bias=old["add_qkv_bias"],
        attention_dropout=old["attention_dropout"],
        max_position_embeddings=old["seq_length"],
        tie_word_embeddings=False,
        rope_parameters=read_rope(old.get("rope_ratio", 1), has_roles(folder)),
        bos_token_id=None,
        eos_token_id=None,  # known with the tokenizer
        pad_token_id=None,
        dtype=old.get("torch_dtype", "float16"),
    )


def rename(name: str, tensor: torch.Tensor, config: GlmConfig) -> dict[str, torch.Tensor]:
    """What one tensor of ChatGLM2/3 is called in GLM-4's class.

    Query, key and value, [(heads + 2 groups) * head_dim, ...], become three.

    Raises:
        UserError: a name that ChatGLM2/3 doesn't have.
    """
    outer = {
        "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "transformer.encoder.final_layernorm.weight": "model.norm.weight",
        "transformer.output_layer.weight": "lm_head.weight",
    }
    inner = {
        "self_attention.dense.weight": "self_attn.o_proj.weight",
        "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
        "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    }
    if name == "transformer.rotary_pos_emb.inv_freq":  # computed, not learned
        return {}
    if name in outer:
        return {outer[name]: tensor}
    layer, _, part = name.removeprefix("transformer.encoder.layers.").partition(".")
    if part in inner:
        return {f"model.layers.{layer}.{inner[part]}": tensor}
    module, _, kind = part.rpartition(".")
    if module != "self_attention.query_key_value":
        raise UserError(f"{name}: ChatGLM2 and ChatGLM3 have no such weight.")
    groups = config.num_key_value_heads * config.head_dim
    parts = tensor.split([config.num_attention_heads * config.head_dim, groups, groups])
    return {
        f"model.layers.{layer}.self_attn.{letter}_proj.{kind}": part.contiguous()
        for letter, part in zip("qkv", parts, strict=True)
    }


def read_shards(folder: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The files of weights with their names; pickled ones are read as tensors only, never as code.

    Raises:
        UserError: there is none, or one that can't be read.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder}: there is neither a .safetensors nor a pytorch_model*.bin file in it.")
    for file in files:
        is_safe = file.suffix == ".safetensors"
        try:
            yield file.name, load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{file}: no weights can be read from it ({str(error).splitlines()[0]}). It may be broken, or what git "
                "clone left in its place: git lfs pull, or download it again."
            ) from None


def convert_weights(source: Path, target: Path, config: GlmConfig) -> None:
    """Writes the weights file by file.

    Raises:
        UserError: a weight is missing, stands in two files, or isn't what the configuration says.
    """
    with torch.device("meta"):
        missing = {name: tensor.shape for name, tensor in GlmForCausalLM(config).state_dict().items()}
    weight_map, files, total = {}, [], 0
    for number, (file, shard) in enumerate(read_shards(source), start=1):
        files.append(file)
        new = {}
        for name, tensor in shard.items():
            new |= rename(name, tensor, config)
        for name, tensor in new.items():
            if name in weight_map:
                raise UserError(f"{source}: {name} stands in {file} and in a file before it. Remove what is left over.")
            if missing.pop(name, None) != tensor.shape:
                raise UserError(f"{source}: {name} has shape {list(tensor.shape)}, which config.json doesn't allow.")
            weight_map[name] = f"model-{number:05d}.safetensors"
            total += tensor.nbytes
        save_file(new, target / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    if missing:
        raise UserError(
            f"{source}: {len(missing)} weights are missing, {next(iter(missing))} among them. Read were "
            f"{', '.join(files)}: is the download whole?"
        )
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def check_joined(fast: Tokenizer, proto: ModelProto, processor: SentencePieceProcessor, marked: set[str]) -> None:
    """Raises UserError where pieces of the vocabulary that stand side by side get other ids than from SentencePiece.

    A piece is the first of a text, without its space, then one of eight, and a user-defined one beside another.
    """
    pieces = [piece for piece in proto.pieces if piece.type not in (piece.CONTROL, piece.UNKNOWN, piece.BYTE)]
    defined = [piece.piece.replace("▁", " ") for piece in pieces if piece.type == piece.USER_DEFINED]
    texts = [piece.piece.replace("▁", " ") for piece in pieces]
    random.Random(0).shuffle(texts)
    joined = [text.removeprefix(" ") for text in texts]
    joined += ["".join(texts[start : start + 8]) for start in range(0, len(texts), 8)]
    joined += [text for one, two in zip(defined, texts, strict=False) for text in (one + two, two + one, one + one)]
    joined = [text for text in joined if not any(mark in text for mark in marked)]
    ours, theirs = fast.encode_batch(joined, add_special_tokens=False), processor.encode(joined)
    for text, one, other in zip(joined, ours, theirs, strict=True):
        if one.ids != other:
            raise UserError(f"tokenizer.model: {text!r} gives {one.ids}, SentencePiece {other}. Not converted.")


def convert_tokenizer(source: Path, roles: bool) -> PreTrainedTokenizerFast:
    """The tokenizer with its control tokens and chat template, checked against SentencePiece's own ids.

    Raises:
        UserError: a file is missing, or the two tokenise a probe or a piece of the vocabulary differently.
    """
    try:
        proto, processor = read_sentencepiece(source / "tokenizer.model")
    except UserError as error:
        raise UserError(f"{error} GLM-4's -hf release needs no conversion.") from None
    marks = {
        number: AddedToken(piece.piece, normalized=False, special=True)
        for number, piece in enumerate(proto.pieces)
        if piece.type in (piece.CONTROL, piece.UNKNOWN)
    }
    fast = fast_tokenizer(proto, processor, marks)
    check_tokenizer(fast, proto, processor, marks)
    check_joined(fast, proto, processor, {mark.content for mark in marks.values()})
    added = CONTROL_TOKENS + (ROLE_TOKENS if roles else [])
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=processor.id_to_piece(processor.unk_id()),
        eos_token=processor.id_to_piece(processor.eos_id()),
        pad_token=processor.id_to_piece(processor.unk_id()),
        chat_template=CHATGLM3_TEMPLATE if roles else CHATGLM2_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def convert(source: Path, target: Path) -> None:
    """Writes `target`; raises UserError where something can't be converted exactly, and for a target that is there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not an empty folder. Name another one, or remove it first.")
    config = read_config(source)
    tokenizer = convert_tokenizer(source, has_roles(source))
    ends = [token for token in ("</s>", "<|user|>", "<|observation|>") if token in tokenizer.get_vocab()]
    config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    config.pad_token_id = tokenizer.pad_token_id
    config.architectures = ["GlmForCausalLM"]
    target.mkdir(parents=True, exist_ok=True)
    convert_weights(source, target, config)
    tokenizer.save_pretrained(target)
    config.save_pretrained(target)  # last: a folder without it is no model yet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of ChatGLM2-6B or ChatGLM3-6B, as downloaded")
    parser.add_argument("target", type=Path, help="folder to write, new or empty")
    options = parser.parse_args()
    try:
        convert(options.source, options.target)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{options.target}: written; train it with MODEL={options.target} bash train_zero2.sh")
