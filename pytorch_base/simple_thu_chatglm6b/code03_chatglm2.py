"""ChatGLM2/3 in plain PyTorch, and the same weights in GLM-4's class: equal logits, so its remote code isn't needed.

    python code03_chatglm2.py

A tiny checkpoint with random weights is written in ChatGLM3's form (names, packing, SentencePiece tokenizer), computed
by the forward pass below, converted by `convert_to_glm.py`, and computed by Transformers. Source of the mathematics:
`modeling_chatglm.py` of ChatGLM2-6B and ChatGLM3-6B (https://github.com/THUDM/ChatGLM3).
"""

import io
import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert_to_glm import convert

CONFIG = {
    **{"model_type": "chatglm", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16},
    **{"num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True},
    **{"add_bias_linear": False, "layernorm_epsilon": 1e-5, "rmsnorm": True, "attention_dropout": 0.0},
    **{"seq_length": 256, "padded_vocab_size": 512, "torch_dtype": "float32", "original_rope": True},
}
TEXTS = [f"{a}{b}，今天天气很好，我们去公园散步。{a} says hello to {b}!" for a in "你我他她它" for b in "天地人和水火"]


def write_checkpoint(folder: Path, roles: bool = True, **changed) -> dict[str, torch.Tensor]:
    """A folder as ChatGLM3-6B's is (without `roles`: ChatGLM2-6B's), with random weights, which are returned."""
    config = CONFIG | changed
    hidden, inner, head = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    heads, groups = config["num_attention_heads"], config["multi_query_group_num"]
    generator = torch.Generator().manual_seed(0)

    def random(*shape, mean=0.0):
        return mean + 0.1 * torch.randn(shape, generator=generator)

    weights = {
        "transformer.embedding.word_embeddings.weight": random(config["padded_vocab_size"], hidden),
        "transformer.rotary_pos_emb.inv_freq": torch.ones(head // 4),
        "transformer.encoder.final_layernorm.weight": random(hidden, mean=1.0),
        "transformer.output_layer.weight": random(config["padded_vocab_size"], hidden),
    }
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": random(hidden, mean=1.0),
            prefix + "self_attention.query_key_value.weight": random((heads + 2 * groups) * head, hidden),
            prefix + "self_attention.query_key_value.bias": random((heads + 2 * groups) * head),
            prefix + "self_attention.dense.weight": random(hidden, heads * head),
            prefix + "post_attention_layernorm.weight": random(hidden, mean=1.0),
            prefix + "mlp.dense_h_to_4h.weight": random(2 * inner, hidden),
            prefix + "mlp.dense_4h_to_h.weight": random(hidden, inner),
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "tokenization_chatglm.py").write_text('["<|user|>", "<|assistant|>"]' if roles else "", "utf-8")
    model, options = io.BytesIO(), {"byte_fallback": True, "remove_extra_whitespaces": False, "minloglevel": 2}
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=400,
        normalization_rule_name="identity", **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return weights


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["layernorm_epsilon"])


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    """Rotates (0, 1), (2, 3) ... of the first half of each head by position times angle; x [tokens, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(len(x)), 10000.0 ** (-torch.arange(0, half, 2) / half))[:, None]
    even, odd = x[..., 0:half:2], x[..., 1:half:2]
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], -1)
    return torch.cat([turned.flatten(-2), x[..., half:]], -1)


def chatglm2_forward(weights: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence [tokens]."""
    heads, groups, head = CONFIG["num_attention_heads"], CONFIG["multi_query_group_num"], CONFIG["kv_channels"]
    x = weights["transformer.embedding.word_embeddings.weight"][input_ids]
    for layer in range(CONFIG["num_layers"]):
        part = {name.split(f"layers.{layer}.")[-1]: w for name, w in weights.items() if f"layers.{layer}." in name}
        packed = rms_norm(x, part["input_layernorm.weight"]) @ part["self_attention.query_key_value.weight"].T
        packed = packed + part["self_attention.query_key_value.bias"]
        q, k, v = packed.view(len(x), -1, head).split([heads, groups, groups], dim=1)
        q, k = rotate_pairs(q), rotate_pairs(k)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))  # a group serves neighbouring heads
        scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v).flatten(1)
        x = x + mixed @ part["self_attention.dense.weight"].T
        both = rms_norm(x, part["post_attention_layernorm.weight"]) @ part["mlp.dense_h_to_4h.weight"].T
        gate, up = both.chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ part["mlp.dense_4h_to_h.weight"].T
    return (
        rms_norm(x, weights["transformer.encoder.final_layernorm.weight"])
        @ weights["transformer.output_layer.weight"].T
    )


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
    assert difference < 1e-5 * expected.abs().max().item()
