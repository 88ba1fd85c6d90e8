"""A small InternLM or InternLM2 folder as downloaded, with random weights, and what it must compute."""

import io
import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch.nn.functional import silu, softmax

LIMIT = 32  # max_position_embeddings
SYMBOLS = ["<eoh>", "<eoa>", "<TOKENS_UNUSED_5>", "Ａ", "Ｂ", "ＢＡ", "▁x▁"]
SYMBOLS += [f"[UNUSED_TOKEN_{number}]" for number in range(139, 147)]

NAMES = {
    "internlm": {
        **{"embedding": "model.embed_tokens", "output": "lm_head"},
        **{"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
        **{"attention": [f"self_attn.{letter}_proj" for letter in "qkvo"]},
        **{"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
    },
    "internlm2": {
        **{"embedding": "model.tok_embeddings", "output": "output", "norm1": "attention_norm", "norm2": "ffn_norm"},
        **{"attention": ["attention.wqkv", "attention.wo"]},
        **{"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
    },
}


def train_sentencepiece(lines: list[str], prefix: bool) -> bytes:
    """A small model as InternLM's are, one piece NUL, which no trainer of today would make."""
    model, options = io.BytesIO(), {"byte_fallback": True, "remove_extra_whitespaces": False, "minloglevel": 2}
    options |= {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": prefix, "character_coverage": 0.98}
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=2400,
        normalization_rule_name="identity", split_by_whitespace=False, max_sentencepiece_length=8, **options,
    )  # fmt: skip
    proto = ModelProto.FromString(model.getvalue())
    pieces = [piece.piece for piece in proto.pieces]
    part_of_no_other = [i for i, piece in enumerate(pieces) if sum(piece in longer for longer in pieces) == 1]
    proto.pieces[part_of_no_other[-1]].piece = "\0"
    return proto.SerializeToString()


def random_texts(lines: list[str], count: int) -> list[str]:
    rng = random.Random(0)
    ranges = ((32, 127), (0x4E00, 0x9FA5), (0xFF01, 0xFF5E), (0x1F300, 0x1F6FF), (0x400, 0x450))
    alphabet = [chr(code) for span in ranges for code in range(*span)]
    units = [
        *SYMBOLS,
        " x ",
        " ",
        "  ",
        " " * 16,
        "\t",
        "\n",
        "\r\n",
        "\0",
        "▁",
        "\u3000",
        "==",
        "１２３",
        "ＡＢ",
        "👨‍👩‍👧",
        "e\u0301",
        "你好",
    ]

    def say() -> str:
        kind = rng.random()
        if kind < 0.2:
            return "\n".join(rng.choices(lines, k=2))[:200]
        if kind < 0.4:
            return "".join(rng.choices([" ", "\n", "=", "a", "的"])[0] * rng.randint(1, 40) for _ in range(4))
        return "".join(rng.choice(units if rng.random() < 0.6 else alphabet) for _ in range(rng.randint(1, 40)))

    return [say() for _ in range(count)]


def write_checkpoint(folder: Path, model: bytes, family="internlm2", shards=1, suffix="safetensors", **changed) -> dict:
    """A folder as InternLM (MHA) or InternLM2 (two groups) is downloaded, with random weights, which are returned."""
    config = {"model_type": family, "vocab_size": 2400, "hidden_size": 64, "intermediate_size": 96, "bias": False}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": LIMIT, "rms_norm_eps": 1e-5}
    config |= {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "auto_map": {"x": "y"}}
    config |= ({"num_key_value_heads": 2} if family == "internlm2" else {}) | changed
    vocab, hidden, inner, named = config["vocab_size"], 64, 96, NAMES[family]
    packed = (4 + 2 * config.get("num_key_value_heads", 4)) * 16
    shapes = {named["embedding"]: (vocab, hidden), "model.norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes[named["output"]] = (vocab, hidden)
    for at in ("model.layers.0.", "model.layers.1."):
        shapes |= {at + name: (packed if name == "attention.wqkv" else hidden, hidden) for name in named["attention"]}
        shapes |= {at + named["gate"]: (inner, hidden), at + named["up"]: (inner, hidden)}
        shapes |= {at + named["down"]: (hidden, inner), at + named["norm1"]: (hidden,), at + named["norm2"]: (hidden,)}
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, config["torch_dtype"])
    weights = {}
    for name, shape in shapes.items():
        weight = 0.1 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        weights[f"{name}.weight"] = weight.to(dtype)
        if config["bias"] and name.split(".", 3)[-1] in named["attention"]:
            weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator).to(dtype)
    if family == "internlm":
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "tokenizer.model").write_bytes(model)
    write_weights(folder, weights, shards, suffix)
    return weights


def write_weights(folder: Path, weights: dict, shards: int, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    names, weight_map = sorted(weights), {}
    for number in range(shards):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: weights[name] for name in names[number::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), "utf-8")


def reference_logits(weights: dict, config: dict, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits, (tokens, vocabulary), by the published description of both models and their original names."""
    named, heads, groups = NAMES[config["model_type"]], 4, config.get("num_key_value_heads", 4)
    length, head = len(input_ids), 16
    rotary, scaling = config.get("rotary", {}), config.get("rope_scaling") or {}
    base = rotary.get("base", config.get("rope_theta", 10000))
    kind, factor = scaling.get("type", rotary.get("type")), scaling.get("factor", 1.0)
    positions = torch.arange(length).float() / (factor if kind == "linear" else 1)
    if kind == "dynamic" and length > LIMIT:
        base = base * (factor * length / LIMIT - (factor - 1)) ** (head / (head - 2))
    angles = torch.outer(positions, 1 / base ** (torch.arange(0, head, 2) / head)).repeat(1, 2)[:, None]

    def norm(x, name):
        return weights[name + ".weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])

    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0)

    def rotate(x):  # (tokens, heads, head)
        return x * angles.cos() + torch.cat([-x[..., head // 2 :], x[..., : head // 2]], -1) * angles.sin()

    x = weights[named["embedding"] + ".weight"][input_ids]
    for at in ("model.layers.0.", "model.layers.1."):
        h = norm(x, at + named["norm1"])
        if config["model_type"] == "internlm2":
            packed = linear(h, at + "attention.wqkv").view(length, groups, heads // groups + 2, head)
            q, k, v = packed[:, :, :-2].reshape(length, heads, head), packed[:, :, -2], packed[:, :, -1]
        else:
            q, k, v = (linear(h, f"{at}self_attn.{letter}_proj").view(length, heads, head) for letter in "qkv")
        q, k = rotate(q), rotate(k).repeat_interleave(heads // groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        h = torch.einsum("hqk,khd->qhd", softmax(scores, -1), v.repeat_interleave(heads // groups, 1)).flatten(1)
        x = x + linear(h, at + named["attention"][-1])
        h = norm(x, at + named["norm2"])
        x = x + linear(silu(linear(h, at + named["gate"])) * linear(h, at + named["up"]), at + named["down"])
    return linear(norm(x, "model.norm"), named["embedding" if config["tie_word_embeddings"] else "output"])
