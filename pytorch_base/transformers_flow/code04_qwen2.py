"""A whole Qwen2 in plain PyTorch: first one block, then the model as it lies in a checkpoint folder.

Two files make a model: config.json (the sizes) and model.safetensors (name -> tensor). The names say where a tensor
belongs: embeddings, then blocks of attention and MLP, each behind an RMSNorm and added to what came in, then a norm
and the head. Small Qwen2 models have no head of their own in the file: the table of embeddings serves twice
(`tie_word_embeddings`). Report of the model: Yang et al., "Qwen2 Technical Report", 2024.

python code04_qwen2.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

TEXT = "把一个大问题拆成许多小问题，再一个一个地解决"


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Each vector to length sqrt(hidden), times a weight for each place (Zhang & Sennrich, "RMSNorm", 2019)."""
    return weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)


def rotate(states: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions 0, 1, ... for queries or keys [batch, heads, length, head_dim]."""
    length, head_dim = states.shape[2:]
    frequencies = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)  # [length, head_dim]
    left, right = states.chunk(2, dim=-1)
    return states * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()


def attention(states: torch.Tensor, weights: dict, config: dict) -> torch.Tensor:
    """[batch, length, hidden] -> the same shape."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    projected = {}
    for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        flat = F.linear(states, weights[f"self_attn.{name}.weight"], weights[f"self_attn.{name}.bias"])
        projected[name] = flat.unflatten(-1, (count, -1)).transpose(1, 2)  # [batch, count, length, head_dim]
    theta = config["rope_parameters"]["rope_theta"]
    query, key, value = rotate(projected["q_proj"], theta), rotate(projected["k_proj"], theta), projected["v_proj"]
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return F.linear(mixed.transpose(1, 2).flatten(2), weights["self_attn.o_proj.weight"])


def mlp(states: torch.Tensor, weights: dict) -> torch.Tensor:
    """SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020). [batch, length, hidden] -> the same shape."""
    gate, up = F.linear(states, weights["mlp.gate_proj.weight"]), F.linear(states, weights["mlp.up_proj.weight"])
    return F.linear(F.silu(gate) * up, weights["mlp.down_proj.weight"])


def block(states: torch.Tensor, weights: dict, config: dict) -> torch.Tensor:
    """[batch, length, hidden] -> the same shape. `weights` are those of one layer, named as inside of it."""
    eps = config["rms_norm_eps"]
    states = states + attention(rms_norm(states, weights["input_layernorm.weight"], eps), weights, config)
    return states + mlp(rms_norm(states, weights["post_attention_layernorm.weight"], eps), weights)


def qwen2(folder: str, input_ids: torch.Tensor) -> torch.Tensor:
    """A checkpoint's logits: [batch, length] -> [batch, length, vocabulary]."""
    config = json.loads(Path(folder, "config.json").read_text())
    weights = load_file(Path(folder, "model.safetensors"))
    table = weights["model.embed_tokens.weight"]
    states = table[input_ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        states = block(states, own, config)
    states = rms_norm(states, weights["model.norm.weight"], config["rms_norm_eps"])
    return F.linear(states, table if config["tie_word_embeddings"] else weights["lm_head.weight"])


disable_progress_bar()
torch.set_grad_enabled(False)
characters = sorted(set(TEXT))
input_ids = torch.tensor([[characters.index(character) for character in TEXT]])
results = {}
for tied in (True, False):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(characters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # five times the usual: random weights that make a difference
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, tensor in model.named_parameters():
        if "norm" in name or "bias" in name:  # else all ones and zeros, and a mistake there would not be seen
            tensor.normal_(1, 0.2)
    states = torch.randn(2, len(TEXT), 64)
    layer = model.model.layers[1]
    positions = model.model.rotary_emb(states, torch.arange(len(TEXT))[None])
    expected = layer(states, position_embeddings=positions)
    block_gap = (block(states, layer.state_dict(), config.to_dict()) - expected).abs().max().item()

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder, "model.safetensors"))
        logits = qwen2(folder, input_ids)
    expected = model(input_ids).logits
    results[tied] = block_gap, (logits - expected).abs().max().item()
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"tied {tied}: {len(weights)} tensors, {count:,} numbers, lm_head in the file: {'lm_head.weight' in weights}")
    print(f"  likeliest next of {TEXT[-4:]}: {' '.join(characters[i] for i in logits[0, -1].topk(5).indices)}")
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    print(f"  largest difference: block {block_gap:.1e}, logits {results[tied][1]:.1e} of {expected.abs().max():.1f}")
    assert max(results[tied]) < 1e-5 and ("lm_head.weight" in weights) is not tied
block_gap, logits_gap = map(max, zip(*results.values(), strict=True))
print(f"proof: a block differs from the library's by {block_gap:.1e}, a checkpoint's logits by {logits_gap:.1e}")
