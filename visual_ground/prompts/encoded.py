"""`EncodedPrompt`: a prompt as token ids, and how several are padded into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from visual_ground.errors import GroundingValueError


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as ids; image j of the prompt is k times the number -1 - j in them.

    Args:
        ids: token ids, and negative marks for image tokens.
        images: the prompt's images, upright RGB, in order.
    """

    ids: tuple[int, ...]
    images: tuple[Image.Image, ...]


def pad_batch(encoded: Sequence[EncodedPrompt], first_image_id: int, pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Stack prompts into ids (b, s) and their attention mask (b, s); image tokens are numbered over the whole batch.

    Args:
        encoded: the prompts.
        first_image_id: id of the batch's first image token.
        pad_id: id to pad with; any real one, as it is masked.
        side: "left", for generation, or "right".
    """
    if not encoded:
        raise GroundingValueError("The batch is empty; give at least one prompt.")
    length = max(len(prompt.ids) for prompt in encoded)
    ids = torch.full((len(encoded), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    next_id = first_image_id
    for i, prompt in enumerate(encoded):
        start = length - len(prompt.ids) if side == "left" else 0
        span = slice(start, start + len(prompt.ids))
        sequence = list(prompt.ids)
        for position, value in enumerate(sequence):
            if value < 0:
                sequence[position], next_id = next_id, next_id + 1
        ids[i, span], mask[i, span] = torch.tensor(sequence), 1
    return ids, mask
