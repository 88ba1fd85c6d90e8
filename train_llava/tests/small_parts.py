"""Vision towers and language models of a few thousand random weights, of the real classes, each in a folder."""

import json
from pathlib import Path

import torch
import transformers as T
from safetensors.torch import save_model

VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 4]}
FOCALNET = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 32,
    "use_conv_embed": True,
    "depths": [1, 2],
    "focal_levels": [2, 2],
    "focal_windows": [3, 3],
}
LEVIT = {
    "image_size": 128,
    "hidden_sizes": [32, 48, 64],
    "num_attention_heads": [2, 3, 4],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "mlp_ratio": [2, 2, 2],
    "attention_ratio": [2, 2, 2],
}
# name: config, image processor, image tokens, the chosen layer
TOWERS = {
    "clip": (T.CLIPVisionConfig(**VIT), T.CLIPImageProcessorPil, 16, -2),
    "chinese_clip": (T.ChineseCLIPVisionConfig(**VIT), T.ChineseCLIPImageProcessorPil, 16, -2),
    "siglip": (T.SiglipVisionConfig(**VIT), T.SiglipImageProcessorPil, 16, -2),
    "vit": (T.ViTConfig(**VIT), T.ViTImageProcessorPil, 16, -2),
    "dinov2": (T.Dinov2Config(**VIT), T.BitImageProcessorPil, 16, -2),
    "swin": (T.SwinConfig(window_size=4, **SWIN), T.ViTImageProcessorPil, 16, -1),
    "focalnet": (T.FocalNetConfig(**FOCALNET), T.BitImageProcessorPil, 64, -1),
    "levit": (T.LevitConfig(**LEVIT), T.LevitImageProcessorPil, 4, -1),
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LANGUAGE_MODELS = {
    "qwen2": (T.Qwen2Config, True),  # and whether its head is its embedding
    "qwen3": (T.Qwen3Config, True),
    "llama": (T.LlamaConfig, False),
    "internlm3": (T.InternLM3Config, False),
}
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def save(model, folder) -> str:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return str(folder)


def save_image_processor(name: str, folder) -> None:
    config, processor, *_ = TOWERS[name]
    size = {"height": config.image_size, "width": config.image_size}
    processor(size=size, crop_size=size).save_pretrained(folder)


def make_tower(name: str, folder) -> str:
    torch.manual_seed(0)
    model = save(T.AutoModel.from_config(TOWERS[name][0]), folder)
    save_image_processor(name, folder)
    return model


def make_tokenizer(chat_template: str | None = CHATML):
    tokenizer = T.Qwen2Tokenizer().train_new_from_iterator(
        ["天地玄黄，宇宙洪荒。你好，请介绍一下你自己。图里有什么？"],
        280,
        new_special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|endoftext|>"
    tokenizer.chat_template = chat_template
    return tokenizer


def make_language_model(name: str, folder, spare_rows: int = 8, dtype=torch.float32, chat_template=CHATML) -> str:
    """A folder of a base model, whose generation stops at <|endoftext|> and whose template ends turns by another."""
    torch.manual_seed(1)
    tokenizer, (config_class, tied) = make_tokenizer(chat_template), LANGUAGE_MODELS[name]
    config = config_class(
        vocab_size=len(tokenizer) + spare_rows,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TEXT,
    )
    model = T.AutoModelForCausalLM.from_config(config).to(dtype)
    config.dtype = dtype
    save(model, folder)
    generation = {"eos_token_id": tokenizer.eos_token_id, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}
    Path(folder, "generation_config.json").write_text(json.dumps(generation))
    tokenizer.save_pretrained(folder)
    return str(folder)
