"""A Baichuan as it is downloaded, its logits by its published description, and texts to tokenise."""

import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch.nn.functional import silu

SHARD = "model-00002-of-00002.safetensors"
VOCABULARY, LIMIT, HEADS, HEAD = 700, 32, 4, 16
# Of its pieces that were defined by hand, Baichuan2 has such as well: marks, signs, and a few that hold a space.
SYMBOLS = ["<SEP>", "<h2/>", "\n", "```", "...", "。。。", "---", "Ａ", "Ｂ", "ＢＡ", "▁x▁", "<reserved_6>"]
SYMBOLS += ["<reserved_106>", "<reserved_107>"]


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


def write_checkpoint(folder: Path, model: bytes, shards=1, suffix="safetensors", **changed) -> dict:
    """A folder as Baichuan2-7B is downloaded, with random weights, which are returned."""
    config = {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "vocab_size": VOCABULARY}
    config |= {"hidden_size": HEADS * HEAD, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
    config |= {"num_attention_heads": HEADS, "max_position_embeddings": LIMIT, "model_max_length": LIMIT}
    config |= {"hidden_act": "silu", "torch_dtype": "float32", "auto_map": {"x": "y"}} | changed
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for at in ("model.layers.0.", "model.layers.1."):
        shapes |= {at + "self_attn.W_pack": (3 * hidden, hidden), at + "self_attn.o_proj": (hidden, hidden)}
        shapes |= {at + "mlp.gate_proj": (inner, hidden), at + "mlp.up_proj": (inner, hidden)}
        shapes |= {at + "mlp.down_proj": (hidden, inner), at + "input_layernorm": (hidden,)}
        shapes |= {at + "post_attention_layernorm": (hidden,)}
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, config["torch_dtype"])
    weights = {
        f"{name}.weight": (0.1 * torch.randn(shape, generator=generator) + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "tokenizer.model").write_bytes(model)
    write_weights(folder, weights, shards, suffix)
    return weights


def reference_logits(weights: dict, input_ids: torch.Tensor, norm_head: bool) -> torch.Tensor:
    """Logits, (tokens, vocabulary), by the published description of Baichuan2-7B and its original names."""
    length = len(input_ids)
    angles = torch.outer(torch.arange(length), 1 / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)[:, None]

    def norm(x, name):
        return weights[name + ".weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def linear(x, name):
        return x @ weights[name + ".weight"].T

    def rotate(x):  # (tokens, heads, head)
        return x * angles.cos() + torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1) * angles.sin()

    x = weights["model.embed_tokens.weight"][input_ids]
    for at in ("model.layers.0.", "model.layers.1."):
        packed = linear(norm(x, at + "input_layernorm"), at + "self_attn.W_pack")
        q, k, v = packed.view(length, 3, HEADS, HEAD).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(HEAD)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        x = x + linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        x = x + linear(silu(linear(h, at + "mlp.gate_proj")) * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    head = weights["lm_head.weight"]
    if norm_head:
        head = head / head.pow(2).sum(1, keepdim=True).sqrt()
    return norm(x, "model.norm") @ head.T


def random_texts(lines: list[str], count: int) -> list[str]:
    rng = random.Random(0)
    ranges = ((32, 127), (0x4E00, 0x9FA5), (0xFF01, 0xFF5E), (0x1F300, 0x1F6FF), (0x400, 0x450))
    alphabet = [chr(code) for span in ranges for code in range(*span)]
    units = [*SYMBOLS, " x ", " ", "  ", " " * 16, "\t", "\r\n", "\0", "▁", "\u3000", "==", "１２３", "ＡＢ", "e\u0301"]

    def say() -> str:
        kind = rng.random()
        if kind < 0.2:
            return "\n".join(rng.choices(lines, k=2))[:200]
        if kind < 0.4:
            return "".join(rng.choices([" ", "\n", "=", "a", "的"])[0] * rng.randint(1, 40) for _ in range(4))
        return "".join(rng.choice(units if rng.random() < 0.6 else alphabet) for _ in range(rng.randint(1, 40)))

    return [say() for _ in range(count)]


def edit_sentencepiece(folder, change):
    proto = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    change(proto.pieces, proto.normalizer_spec)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def edit_config(**changed):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text("utf-8")) | changed
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}), "utf-8")

    return edit


def edit_weights(change):
    """For a folder of two shards: changes the second."""

    def edit(folder):
        weights = load_file(folder / SHARD)
        change(weights)
        save_file(weights, folder / SHARD)

    return edit
