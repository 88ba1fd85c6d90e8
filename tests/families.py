"""Transformers' causal model types, and how a tiny model of each is built: real classes, random weights.

    python tests/families.py                shows loss, gradient norm and seconds of every family
    python tests/families.py qwen2 mixtral  of these

The loss is taken plainly, a row a call, without padding and without a mask: what a trainer must arrive at, however it
lays rows out.
"""

import argparse
import dataclasses
import math
import random
import re
import time

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

# Settings of all families: a configuration takes those it has.
# fmt: off
SMALL = dict(
    vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128, ffn_dim=128, max_position_embeddings=256, is_decoder=True, initializer_range=0.04,
    init_std=0.04, pad_token_id=0, bos_token_id=1, eos_token_id=2, sep_token_id=2, cls_token_id=1,
    # sliding window
    sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16,
    # mixtures of experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, num_shared_experts=1,
    n_shared_experts=1, moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_intermediate_size=32,
    n_group=1, topk_group=1, first_k_dense_replace=1, num_dense_layers=1, mlp_layer_types=["dense", "sparse"],
    # latent attention; sparse attention: with few heads many scores of its indexer are 0, and padding decides the ties
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    index_topk=8, index_head_dim=16, index_n_heads=16,
    # linear attention, state spaces
    linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    state_size=16, ssm_state_size=16, mamba_d_state=16, mamba_n_heads=8, mamba_num_heads=8, mamba_d_ssm=128,
    mamba_head_dim=16, chunk_size=16, mamba_chunk_size=16,
)

# Settings that several families share.
FULL = dict(layer_types=["full_attention"] * 2)
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
LATENT = dict(num_key_value_heads=4)
INDEXED = LATENT | dict(layer_types=["indexed_attention"] * 2)
BYTES = dict(vocab_size=320, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)

# What a family needs beyond SMALL, so that every kind of layer it has occurs. `factor` replaces the 3 of `build`.
FAMILIES = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": dict(moe_num_experts=4),
    "axk1": LATENT,
    "axk2": INDEXED,
    "bailing_hybrid": LINEAR | LATENT,
    "bamba": dict(attn_layer_indices=[1]),
    "beam": {},
    "bert": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "blt": dict(
        patcher_config=BYTES, encoder_config=BYTES | dict(hidden_size_global=128), local_attention_window_len=8,
        decoder_config=BYTES | dict(hidden_size_global=128), global_config=BYTES | dict(hidden_size=128),
        encoder_hash_byte_group_vocab=64,
    ),
    "codegen": dict(rotary_dim=8),
    "cohere": dict(logit_scale=1.0),
    "cohere2": dict(logit_scale=1.0),
    "cohere2_moe": dict(logit_scale=1.0),
    "cohere_compass_text": dict(
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]),
            full_attention=None,
        )
    ),
    "ctrl": dict(dff=128),
    "cwm": {},
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8), ffn_config=dict(ffn_hidden_size=32, moe_top_k=2)
    ),
    "deepseek_v2": LATENT | dict(n_group=2, topk_method="group_limited_greedy"),
    "deepseek_v3": LATENT | dict(n_group=2),
    "deepseek_v32": INDEXED,
    "deepseek_v4": dict(
        num_hidden_layers=3, mlp_layer_types=["hash_moe", "moe", "moe"], o_groups=2, o_lora_rank=16,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        compress_rates=dict(heavily_compressed_attention=8, compressed_sparse_attention=4), num_key_value_heads=1,
    ),
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "dots3_note_text": LATENT | dict(
        layer_types=["indexed_attention", "sliding_attention"], head_dim=32, per_layer_config={1: dict(q_lora_rank=8)}
    ),
    "ernie4_5": {},
    "ernie4_5_moe": dict(moe_num_shared_experts=1),
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {},
    "falcon_h1": {},
    "falcon_mamba": {},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0], vocab_size_per_layer_input=320,
        hidden_size_per_layer_input=16, laurel_rank=8,
    ),
    "gemma4_text": dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        vocab_size_per_layer_input=320, hidden_size_per_layer_input=16, global_head_dim=32, enable_moe_block=True,
        top_k_experts=2,
    ),
    "gemma4_unified_text": dict(global_head_dim=32),
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": INDEXED,
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8),
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {},
    "gptj": dict(rotary_dim=8),
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": LINEAR,
    "granitemoeshared": {},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": INDEXED,
    "hyperclovax": {},
    "inkling2_text": dict(layer_types=["hybrid_sliding", "hybrid"], rel_extent=64),
    "inkling_text": dict(layer_types=["hybrid_sliding", "hybrid"], rel_extent=64, logits_mup_width_multiplier=1.0),
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "jetmoe": {},
    "kimi_linear": LINEAR | LATENT | dict(linear_head_dim=16, linear_num_heads=4),
    "kolibri1": {},
    "laguna": {},
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "lfm3": dict(num_hidden_layers=3, layer_types=["conv", "sliding_attention", "full_attention"]),
    "llama": {},
    "llama4_text": dict(
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], attention_chunk_size=8,
        interleave_moe_layer_step=2, intermediate_size_mlp=128,
    ),
    "longcat_flash": LATENT | dict(
        num_layers=1, ffn_hidden_size=128, expert_ffn_hidden_size=32, moe_topk=2, zero_expert_num=2
    ),
    "mamba": {},
    "mamba2": dict(num_heads=8, n_groups=1),
    "mellum": {},
    "mimo_v2_flash": dict(head_dim=24),
    "minicpm3": LATENT | dict(dim_model_base=64),
    "minimax": LINEAR | dict(block_size=16),
    "minimax_m2": {},
    "minimax_m3_vl_text": dict(
        layer_types=["full_attention", "minimax_m3_sparse"], dense_intermediate_size=128, rotary_dim=8,
        index_n_heads=2, index_block_size=4, index_topk_blocks=2,
    ),
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": dict(local_attention=8),
    "moshi": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], n_groups=1,
        moe_shared_expert_intermediate_size=32,
    ),
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": LINEAR,
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": FULL,
    "qwen2_moe": FULL | dict(mlp_only_layers=[0]),
    "qwen3": FULL,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_moe": dict(mlp_only_layers=[0]),
    "qwen3_next": LINEAR,
    "qwen4_exp_text": dict(
        factor=6, layer_types=["linear_attention", "indexed_attention"], hc_lowrank=8, ple_layer_ids=[1],
        heads_per_ngram=2, ngram_vocab_size_base=64, indexer_n_heads=16, indexer_kv_heads=1, indexer_head_dim=16,
        indexer_budget=8, indexer_compress_ratio=2,
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "roberta": {},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": FULL | dict(no_rope_layer_interval=2),
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "xlstm": {},
    "youtu": LATENT,
    "zamba": LATENT | dict(
        num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"], attention_head_dim=32
    ),
    "zamba2": LATENT | dict(layers_block_type=["linear_attention", "hybrid"], attention_head_dim=32),
    "zaya": dict(layer_types=["hybrid_sliding", "hybrid"], num_experts_per_tok=1),
}

# Those that Chinese users know best, or that stand for a mechanism of their own.
KNOWN = (
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "internlm3", "glm",
    "glm4", "glm4_moe", "glm_moe_dsa", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "minicpm3",
    "ernie4_5", "ernie4_5_moe", "hunyuan_v1_dense", "hunyuan_v1_moe", "seed_oss", "minimax", "minimax_m2",
    "kimi_linear", "bailing_hybrid", "llama", "llama4_text", "gpt2", "gpt_neox", "bloom", "falcon", "opt",
    "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3", "phimoe", "olmo2", "granite", "smollm3", "gpt_oss",
    "cohere2", "lfm2", "mamba2", "nemotron", "jetmoe", "rwkv",
)
# fmt: on

UNABLE = {
    "cpmant": "every token sees those after it; its padded batches are not their rows and are refused",
    "xlnet": "with attn_type 'uni' a padded batch fails, with 'bi' it sees the future; its configuration has no length",
}


UNABLE_ZH = {
    "cpmant": "每个 token 都能看到后面的 token；补齐的批次与原来的行不同，会被拒绝",
    "xlnet": "attn_type 为 'uni' 时补齐的批次会出错，为 'bi' 时能看到后文；配置里没有长度",
}


def make_config(model_type: str) -> PreTrainedConfig:
    """SMALL under the class's names for it, the family's own settings as they stand; no dropout, no jitter."""
    config_class = CONFIG_MAPPING[model_type]
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    settings = {name: 0.0 for name, value in defaults.items() if value and re.search("drop|jitter", name)}
    for name, value in SMALL.items():
        name = name if name in defaults else config_class.attribute_map.get(name)
        if name in defaults:
            settings[name] = value
    own = {name: value for name, value in FAMILIES[model_type].items() if name != "factor"}
    return config_class(**settings | own)


def build(model_type: str) -> nn.Module:
    """A tiny model of the real class in fp32, with weights large enough that its logits depend on every part.

    As they are initialised the logits are flat and differences hide, so matrices are multiplied by 3. What starts as
    zero is drawn anew: a gate at zero keeps all that lies behind it, even attention, from counting.

    Raises:
        AssertionError: 2 million parameters or more.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(model_type)).float().eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size < 2_000_000, f"{model_type}: {size} parameters are not tiny"
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
            elif parameter.ndim >= 2:
                parameter.mul_(FAMILIES[model_type].get("factor", 3))
    return model


def make_rows() -> list[dict]:
    """12 rows of 20 to 47 tokens, longer than the sliding window of 8; the first third is no target."""
    rng, rows = random.Random(0), []
    for _ in range(12):
        ids = [rng.randint(10, 319) for _ in range(rng.randint(20, 47))]
        prompt = len(ids) // 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "length": len(ids)})
    return rows


def plain_loss_and_gradients(model: nn.Module, rows: list[dict]) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Mean over all targets of the rows, and its gradients; None for a parameter that the loss does not reach."""
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits
        labels = torch.tensor(row["labels"][1:])
        loss = F.cross_entropy(logits[0, :-1].float(), labels, ignore_index=-100, reduction="sum") / targets
        loss.backward()
        total += loss.item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return total, gradients


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    transformers.logging.set_verbosity_error()
    rows = make_rows()
    print(f"{'family':20}{'parameters':>11}{'loss':>9}{'norm':>10}{'no gradient':>13}{'seconds':>9}")
    for family in parser.parse_args().families:
        start = time.perf_counter()
        model = build(family)
        loss, gradients = plain_loss_and_gradients(model, rows)
        seconds = time.perf_counter() - start
        reached = [gradient for gradient in gradients.values() if gradient is not None]
        norm = math.hypot(*(gradient.norm().item() for gradient in reached))
        print(f"{family:20}{model.num_parameters():11}{loss:9.3f}{norm:10.3f}", end="")
        print(f"{len(gradients) - len(reached):13}{seconds:9.2f}", flush=True)


if __name__ == "__main__":
    main()
