"""Teaches the tiny default's vision tower to see, by CLIP (https://arxiv.org/abs/2103.00020) on generated scenes.

A language model learns from a picture only what its tower tells apart. Among random captions a tower gets by with
colour and place; here a batch is made of families, scenes that differ in one attribute alone, so that each of the five
has to be told from its like. What the large towers have learnt already (CLIP, SigLIP) needs none of this.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange
from transformers import BertConfig, BertModel, PreTrainedModel

from images import load_image, read_image_bytes
from scenes import NAMES, TEMPLATES, Scene, describe, draw_family

WEIGHTS = dict(zip(NAMES, (2, 4, 2, 2, 2), strict=True))  # how often a family differs in which: form is learnt last
STEPS, BATCH, LEARNING_RATE, WARMUP_STEPS = 1300, 64, 2e-3, 30
SHIFT = 2  # pixels
CHARACTERS = sorted({character for template in TEMPLATES for character in template})


def read_scenes(path: str) -> tuple[list[str], list[Scene]]:
    """The pictures' names and the scenes of a file of lines `name<TAB>colour form size count place`."""
    with open(path, encoding="utf-8") as file:
        names, scenes = zip(*(line.rstrip("\n").split("\t") for line in file), strict=True)
    return list(names), [tuple(scene.split()) for scene in scenes]


class DualEncoder(nn.Module):
    """The tower beside a small text encoder by characters, both by the mean of their tokens."""

    def __init__(self, tower: PreTrainedModel, characters: list[str], width: int = 128):
        super().__init__()
        self.vocabulary = {character: index for index, character in enumerate(characters, start=1)}
        config = BertConfig(
            vocab_size=len(characters) + 1,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.tower, self.text_model = tower, BertModel(config, add_pooling_layer=False)
        self.vision_projection = nn.Linear(tower.config.hidden_size, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = self.tower(pixel_values=pixel_values).last_hidden_state
        return F.normalize(self.vision_projection(tokens.mean(1)), dim=-1)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        ids = [torch.tensor([self.vocabulary[character] for character in text]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = (ids > 0).long()
        tokens = self.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.text_projection(mean), dim=-1)

    def forward(self, pixel_values: torch.Tensor, texts: list[str], scenes: list[Scene]) -> torch.Tensor:
        """The loss; the same scene twice in a batch is no negative of itself."""
        logits = self.logit_scale.exp() * self.embed_images(pixel_values) @ self.embed_texts(texts).T
        number = {scene: index for index, scene in enumerate(scenes)}
        numbers = torch.tensor([number[scene] for scene in scenes])
        same = (numbers[:, None] == numbers[None]).fill_diagonal_(False)
        logits, targets = logits.masked_fill(same, -math.inf), torch.arange(len(scenes))
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def shift(pictures: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Pictures (n, height, width, 3), each moved by up to SHIFT pixels; what comes in repeats the border."""
    count, height, width, _ = pictures.shape
    moves = torch.tensor([(rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)) for _ in range(count)])
    rows = (moves[:, :1] + torch.arange(height)).clamp(0, height - 1)
    columns = (moves[:, 1:] + torch.arange(width)).clamp(0, width - 1)
    return pictures[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]


def draw_batch(scenes: list[Scene], rng: random.Random) -> list[Scene]:
    """BATCH scenes of `scenes` in families that differ in one attribute."""
    batch = []
    while len(batch) < BATCH:
        batch += draw_family(scenes, WEIGHTS, rng)[1]
    return batch[:BATCH]


def pretrain_tower(
    tower: PreTrainedModel, pictures: list[str], scenes: list[Scene], steps: int = STEPS, seed: int = 0
) -> DualEncoder:
    """Trains `tower` in place; about 105 CPU seconds with all STEPS.

    Args:
        pictures: paths; 64 x 64 pixels each.
        scenes: what each shows. Others are never drawn into a batch, neither as pictures nor as captions.

    Returns:
        The tower with the text encoder beside it, both in eval mode.
    """
    torch.manual_seed(seed)
    rng, showing = random.Random(seed), {}
    pixels = torch.from_numpy(np.stack([np.asarray(load_image(read_image_bytes(path))) for path in pictures]))
    for index, scene in enumerate(scenes):
        showing.setdefault(scene, []).append(index)
    known, model = (
        list(showing),
        DualEncoder(tower, sorted({*CHARACTERS, *"".join("".join(scene) for scene in scenes)})),
    )
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP_STEPS) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    model.train()
    bar = trange(steps, desc="vision tower", unit="step", mininterval=5)
    for _ in bar:
        batch = draw_batch(known, rng)
        chosen = shift(pixels[[rng.choice(showing[scene]) for scene in batch]], rng)
        chosen = chosen.permute(0, 3, 1, 2) / 127.5 - 1  # channels last in memory: a fifth faster
        loss = model(chosen, [describe(scene, rng.choice(TEMPLATES)) for scene in batch], batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model.eval()
