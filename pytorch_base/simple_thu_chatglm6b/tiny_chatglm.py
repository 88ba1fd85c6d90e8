"""A tiny checkpoint in the form in which ChatGLM2-6B and ChatGLM3-6B are downloaded, with random weights."""

import io
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

CONFIG = {
    **{"model_type": "chatglm", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16},
    **{"num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True},
    **{"add_bias_linear": False, "layernorm_epsilon": 1e-5, "rmsnorm": True, "attention_dropout": 0.0},
    **{"seq_length": 256, "padded_vocab_size": 512, "torch_dtype": "float32", "original_rope": True},
}
TEXTS = [f"{a}{b}，今天天气很好，我们去公园散步。{a} says hello to {b}!" for a in "你我他她它" for b in "天地人和水火"]


def write_checkpoint(folder: Path, roles=True, pieces: dict | None = None, **changed) -> dict[str, torch.Tensor]:
    """A folder as ChatGLM3-6B's is (without `roles`: ChatGLM2-6B's), with random weights, which are returned.

    Args:
        pieces: settings of SentencePiece's trainer that ChatGLM's own hasn't.
        changed: settings of the model.
    """
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
    options = {"vocab_size": 400, "byte_fallback": True, "remove_extra_whitespaces": False, "minloglevel": 2}
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe",
        normalization_rule_name="identity", **options | (pieces or {}),
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return weights
