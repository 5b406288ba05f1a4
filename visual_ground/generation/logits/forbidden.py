"""`ForbiddenColumns`: the last logits processor; it forbids ids again that other processors may have allowed."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from visual_ground.lm.base.vocabulary import VirtualVocabulary


class ForbiddenColumns(LogitsProcessor):
    """Sets the columns of ids that must not be generated to -inf.

    They are -inf in the logits already, but a processor may make something else of that: classifier-free guidance
    subtracts -inf from -inf, which is NaN and wins every argmax; others replace infinite values by finite ones.
    """

    def __init__(self, vocabulary: VirtualVocabulary, mask_spare_columns: bool, num_image_tokens: int) -> None:
        self.vocabulary, self.mask_spare_columns = vocabulary, mask_spare_columns
        self.width = vocabulary.first_image_id + num_image_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (b, >= v), at least as wide as the ids of the prompt need.

        Prompt lookup gives processors dummy scores as wide as the LM's own, and then indexes them by prompt ids.
        """
        scores = torch.nn.functional.pad(scores, (0, max(0, self.width - scores.shape[-1])), value=float("-inf"))
        return self.vocabulary.forbid(scores.clone(), self.mask_spare_columns)
