"""The tiny default: a LLaVA of real classes, built on the spot from the data as build_model.py builds a large one.

The vision tower is LeViT (https://arxiv.org/abs/2104.01136): four overlapping 3 x 3 convolutions of stride 2, then
attention over 4 x 4 tokens. A ViT of that size, which cuts 64 pixels into patches, never told a circle from a square.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_model
from transformers import (
    LevitConfig,
    LevitModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from build_model import build_llava
from files import UserError
from images import CACHE_DIR
from pretrain_tower import pretrain_tower, read_scenes
from rows import find_files, identify_files, read_rows
from web_dataset import is_address

SAMPLE_DATA, SAMPLE_EVAL = "cache_data/scenes", "cache_data/scenes_eval"
SIDE, WIDTH = 64, 128
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END, PAD = "<|end|>", "<|pad|>"
# One token says who speaks: the picture's 16 and these are most of what a short question costs.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    f"{{% if message.role == 'assistant' %}}{END}{{% endif %}}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def character_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE with merges that make one token of each character of `texts`, never of two.

    Any other character is spelled in its bytes.
    """
    byte_names = bytes_to_unicode()
    vocabulary = {name: index for index, name in enumerate(byte_names.values())}
    merges = {}  # in the order of their lengths, which is that of their ranks
    for length in (2, 3, 4):
        for character in sorted(set("".join(texts))):
            spelled = [byte_names[byte] for byte in character.encode("utf-8")][:length]
            if len(spelled) == length:
                merges["".join(spelled[:-1]), spelled[-1]] = None
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=list(merges), unk_token=None, eos_token=END, pad_token=PAD)
    tokenizer.add_special_tokens({"extra_special_tokens": list(ROLES)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_tower(tower: str) -> PreTrainedModel:
    """LeViT of one stage, or a ViT (no batch norm, so a batch gives what its parts give); random weights."""
    if tower == "levit":
        # The second width is read by the class and not used: down_ops=[] leaves out what would follow the only stage.
        config = LevitConfig(
            image_size=SIDE,
            hidden_sizes=[WIDTH, WIDTH],
            num_attention_heads=[4],
            depths=[2],
            key_dim=[16],
            mlp_ratio=[2],
            attention_ratio=[2],
            down_ops=[],
            hidden_size=WIDTH,
        )
        return LevitModel(config)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=16,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config)


def image_processor() -> ViTImageProcessorPil:
    """White becomes 1 and not 0, so that the padding of the convolutions shows where the border is."""
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def make_language_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.6 million random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def save(model: PreTrainedModel, folder: str) -> None:
    """model.save_pretrained, which would write nothing in a process that is not the first of its run."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})


def build_tiny_model(texts: list[str], folder: str, tower: str | PreTrainedModel = "levit") -> None:
    """Saves a LLaVA whose language model has random weights and knows the characters of `texts`; 16 tokens a picture.

    Args:
        tower: "levit" or, for tests of equality, "vit", both with random weights; or a tower that has learnt.
    """
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        tower = make_tower(tower) if isinstance(tower, str) else tower
        save(tower, f"{scratch}/vision")
        image_processor().save_pretrained(f"{scratch}/vision")
        tokenizer = character_tokenizer(texts)
        save(make_language_model(tokenizer), f"{scratch}/text")
        tokenizer.save_pretrained(f"{scratch}/text")
        layer = -1 if isinstance(tower, LevitModel) else None
        build_llava(f"{scratch}/vision", f"{scratch}/text", folder, vision_feature_layer=layer)


def train_tower(data_path: str) -> PreTrainedModel | None:
    """The tower that has learnt the scenes of the data's scenes.txt; None where there is no such file."""
    path = Path(data_path, "scenes.txt")
    if not path.is_file():
        print(f"no {path}: the tiny model's vision tower keeps random weights")
        return None
    names, scenes = read_scenes(str(path))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = make_tower("levit")
        pretrain_tower(tower, [str(Path(data_path, "images", name)) for name in names], scenes)
    return tower


def tiny_model_folder(data_path: str) -> str:
    """Folder of the tiny model for this data, built by the first process that asks for it; nothing half-built is left.

    Raises:
        UserError: the data is read from a server.
    """
    if is_address(data_path):
        raise UserError(f"--data_path {data_path}: the tiny model is built from a folder's rows; name a model.")
    files = find_files(data_path)
    encodings, content = identify_files(files)
    code = [Path(__file__).with_name(name).read_text("utf-8") for name in ("tiny.py", "pretrain_tower.py")]
    truth = Path(data_path, "scenes.txt")
    scenes = truth.read_text("utf-8") if truth.is_file() else ""
    identity = json.dumps([content, scenes, code], default=str)
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as scratch:
        if not folder.exists():
            rows = [json.loads(row["messages"]) for row in read_rows(files, encodings) if not row["error"]]
            texts = [message["content"] for messages in rows for message in messages]
            build_tiny_model(texts, f"{scratch}/complete", train_tower(data_path) or "levit")
            os.rename(f"{scratch}/complete", folder)
    return str(folder)
