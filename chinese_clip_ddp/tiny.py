"""The tiny default: a dual encoder of real classes with random weights, built on the spot from the data.

The vision tower is LeViT (https://arxiv.org/abs/2104.01136): four overlapping 3 x 3 convolutions of stride 2, then
attention over 4 x 4 tokens. A ViT of that size, which cuts 64 pixels into patches of 8, needs many times the steps
before it tells a circle from a square; code03_test_imageembedding_p2.ipynb shows both side by side.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    LevitConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
)

from data import CACHE_DIR
from model import DualEncoderConfig, DualEncoderModel
from rows import find_files, identify_files, read_rows

SAMPLE_DATA, SAMPLE_EVAL = "cache_data/scenes", "cache_data/scenes_eval"
SIDE, WIDTH, MAX_LENGTH = 64, 128, 64
SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def character_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A token for each character of `texts`; no spaces, no case, no width."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    characters = sorted({character for text in texts for character in normalizer.normalize_str(text)} - set(" \t\r\n"))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    one_by_one = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), one_by_one])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.Fuse()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names, model_max_length=MAX_LENGTH, **SPECIAL_TOKENS
    )


def sine_positions(tokens: int, width: int) -> torch.Tensor:
    """Positions of a square of tokens x tokens by sines and cosines of x and y, shape (tokens * tokens, width).

    Half of the width tells the row, half the column, at width / 4 frequencies (MAE, https://arxiv.org/abs/2111.06377).
    """
    rows, columns = np.meshgrid(np.arange(tokens), np.arange(tokens), indexing="ij")
    frequencies = 100.0 ** -(np.arange(width // 4) / (width // 4))
    angles = [place.reshape(-1, 1) * frequencies for place in (rows, columns)]
    waves = [wave for angle in angles for wave in (np.sin(angle), np.cos(angle))]
    return torch.tensor(np.concatenate(waves, 1), dtype=torch.float32)


def vision_config(tower: str) -> LevitConfig | ViTConfig:
    """LeViT of one stage, or a ViT (no batch norm, so a batch gives what its parts give)."""
    if tower == "levit":
        # The second width is read by the class and not used: down_ops=[] leaves out what would follow the only stage.
        return LevitConfig(
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
    return ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def build_tiny_model(texts: list[str], folder: str, tower: str = "levit") -> None:
    """Saves a dual encoder with random weights, its tokenizer of the characters of `texts`, and its image processor.

    Args:
        tower: "levit" for training, "vit" for tests of equality.
    """
    tokenizer = character_tokenizer(texts)
    text_config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = DualEncoderConfig(
        vision_config=vision_config(tower).to_dict(),
        text_config=text_config.to_dict(),
        vision_pooling="mean",
        text_pooling="mean",
        projection_dim=WIDTH,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DualEncoderModel(config)
    if tower == "vit":
        with torch.no_grad():  # 0.02 in the class: ten times below the patches, so that places are learnt late
            model.vision_model.embeddings.position_embeddings[0, 1:] = 0.5 * sine_positions(SIDE // 8, WIDTH)
    # model.save_pretrained would write nothing in a process that is not the first of its run.
    model.config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    # White becomes 1 and not 0, so that the padding of the convolutions shows where the border is.
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder)


def tiny_model_folder(data_path: str, language: str = "zh") -> str:
    """Folder of the tiny model for this data, built by the first process that asks for it."""
    files = find_files(data_path)
    encodings, content = identify_files(files)
    identity = json.dumps([content, language, Path(__file__).read_text("utf-8")], default=str)
    folder = CACHE_DIR / f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    CACHE_DIR.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as scratch:
        if not folder.exists():
            texts = [row["text"] for row in read_rows(files, encodings, language) if not row["error"]]
            build_tiny_model(texts, f"{scratch}/complete")
            os.rename(f"{scratch}/complete", folder)
    return str(folder)
