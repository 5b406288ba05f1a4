"""`EncodedPrompt`: a prompt as ids, and how several are padded into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from visual_ground.errors import GroundingValueError


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as ids; image j of the prompt stands in `ids` as the k numbers -1 - j.

    Args:
        ids: token ids, and negative marks for images.
        images: the prompt's images, upright RGB, in order.
    """

    ids: tuple[int, ...]
    images: tuple[Image.Image, ...]


def pad_batch(encoded: Sequence[EncodedPrompt], first_image_id: int, pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Stack prompts into ids (b, s) and their attention mask (b, s); images get ids in order over the whole batch.

    Args:
        encoded: the prompts.
        first_image_id: id of the first image row.
        pad_id: id to pad with; masked, so any real id does.
        side: "left", for generation, or "right".

    Raises:
        GroundingValueError: no prompts.
    """
    if not encoded:
        raise GroundingValueError("The batch is empty; give at least one prompt.")
    length = max(len(prompt.ids) for prompt in encoded)
    ids = torch.full((len(encoded), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    next_id = first_image_id
    for row, prompt in enumerate(encoded):
        start = length - len(prompt.ids) if side == "left" else 0
        place = slice(start, start + len(prompt.ids))
        values = list(prompt.ids)
        for i, value in enumerate(values):
            if value < 0:
                values[i], next_id = next_id, next_id + 1
        ids[row, place], mask[row, place] = torch.tensor(values), 1
    return ids, mask
