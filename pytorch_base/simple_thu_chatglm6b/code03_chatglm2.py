"""ChatGLM2/3 in plain PyTorch, and the same weights in GLM-4's class: equal logits, so its remote code isn't needed.

    python code03_chatglm2.py

A tiny checkpoint with random weights is written in ChatGLM3's form (names, packing, SentencePiece tokenizer), computed
by the forward pass below, converted by `convert_to_glm.py`, and computed by Transformers. Source of the mathematics:
`modeling_chatglm.py` of ChatGLM2-6B and ChatGLM3-6B (https://github.com/THUDM/ChatGLM3).
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert_to_glm import convert
from tiny_chatglm import CONFIG, write_checkpoint


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["layernorm_epsilon"])


def rotate_pairs(x: torch.Tensor, base: float, divisor: float) -> torch.Tensor:
    """Rotates pairs (0, 1), (2, 3) ... of half a head by position times angle; x: [tokens, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(len(x)) / divisor, base ** (-torch.arange(0, half, 2) / half))[:, None]
    even, odd = x[..., 0:half:2], x[..., 1:half:2]
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], -1)
    return torch.cat([turned.flatten(-2), x[..., half:]], -1)


def chatglm2_forward(weights: dict, input_ids: torch.Tensor, base=10000.0, divisor=1.0) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence [tokens].

    For long contexts ChatGLM3 multiplies `base` by its `rope_ratio`, ChatGLM2 divides positions by it.
    """
    heads, groups, head = CONFIG["num_attention_heads"], CONFIG["multi_query_group_num"], CONFIG["kv_channels"]
    x = weights["transformer.embedding.word_embeddings.weight"][input_ids]
    for layer in range(CONFIG["num_layers"]):
        part = {name.split(f"layers.{layer}.")[-1]: w for name, w in weights.items() if f"layers.{layer}." in name}
        packed = rms_norm(x, part["input_layernorm.weight"]) @ part["self_attention.query_key_value.weight"].T
        packed = packed + part["self_attention.query_key_value.bias"]
        q, k, v = packed.view(len(x), -1, head).split([heads, groups, groups], dim=1)
        q, k = rotate_pairs(q, base, divisor), rotate_pairs(k, base, divisor)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))  # a group serves neighbouring heads
        scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v).flatten(1)
        x = x + mixed @ part["self_attention.dense.weight"].T
        both = rms_norm(x, part["post_attention_layernorm.weight"]) @ part["mlp.dense_h_to_4h.weight"].T
        gate, up = both.chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ part["mlp.dense_4h_to_h.weight"].T
    x = rms_norm(x, weights["transformer.encoder.final_layernorm.weight"])
    return x @ weights["transformer.output_layer.weight"].T


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        weights = write_checkpoint(Path(scratch, "chatglm3"))
        convert(Path(scratch, "chatglm3"), Path(scratch, "glm"))
        model = AutoModelForCausalLM.from_pretrained(Path(scratch, "glm"), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(Path(scratch, "glm"))
    messages = [{"role": "user", "content": "今天天气怎么样？"}, {"role": "assistant", "content": "很好，去散步。"}]
    input_ids = torch.tensor(tokenizer.apply_chat_template(messages, return_dict=False))
    print(tokenizer.decode(input_ids), f"\n{len(input_ids)} tokens: {input_ids.tolist()}\n")
    for name in ("query_key_value.weight", "dense_h_to_4h.weight"):
        print(f"ChatGLM  {name:24}", *(list(w.shape) for n, w in weights.items() if n.endswith(name) and ".0." in n))
    for name, weight in model.named_parameters():
        if "layers.0." in name and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight")):
            print(f"GLM      {name.rpartition('.0.')[2]:24}", list(weight.shape))
    expected = chatglm2_forward(weights, input_ids)
    with torch.no_grad():
        logits = model(input_ids[None]).logits[0]
    difference = (logits - expected).abs().max().item()
    print(f"\nproof: logits up to {expected.abs().max():.1f} differ by at most {difference:.1e}")
    assert difference < 1e-5
