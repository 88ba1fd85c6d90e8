"""Encoded rows -> a batch: ids padded, and all pictures of the batch in the order of their tokens."""

import torch

from batch import collate
from data import IGNORE_INDEX


class LlavaCollator:
    """Examples of `data.load_encoded` -> what the model takes. Runs in the DataLoader's workers, pictures included.

    Args:
        source: gives the pictures of a list of references and ids as a tensor of (pictures, *source.shape):
            `pixels.Pixels`, or a cache of the tower's features.
        image_tokens: tokens of one picture.
        always_image: a batch without any picture gets an example of a blank one, without labels. Needed where the tower
            or the projector is trained: a rank that doesn't call them leaves the others waiting for its gradients
            (DDP and every ZeRO stage), or stops with parameters unused.
    """

    def __init__(self, source, image_token_id: int, image_tokens: int, always_image: bool):
        self.source, self.image_token_id, self.image_tokens = source, image_token_id, image_tokens
        self.always_image = always_image

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """The batch.

        Returns:
            `input_ids`, `attention_mask` and `labels` of `batch.collate`, of shape (examples, longest), and, unless
            there is no picture, `pixel_values` of (pictures, *source.shape). A blank picture is all zeros, which is a
            picture of the mean colour, and stays a finite number in every tower.
        """
        references = [reference for example in examples for reference in example["images"]]
        image_ids = [image_id for example in examples for image_id in example["image_ids"]]
        if references:
            return collate(examples) | {"pixel_values": self.source(references, image_ids)}
        if not self.always_image:
            return collate(examples)
        ids = [self.image_token_id] * self.image_tokens
        blank = {"input_ids": ids, "labels": [IGNORE_INDEX] * self.image_tokens}
        return collate([*examples, blank]) | {"pixel_values": torch.zeros(1, *self.source.shape)}
