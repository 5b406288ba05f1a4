"""The map from standardised image features back to the encoder's own space, which is the retrieval space then."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EncoderSpace(nn.Module):
    """The map from standardised features back to the encoder's own: a layer that is never trained.

    It has a linear layer's tensors, so that an adapter's files and transfers are the same in either space.

    Args:
        width: of the pooled features.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = width
        self.register_buffer("weight", torch.eye(width))
        self.register_buffer("bias", torch.zeros(width))

    @torch.no_grad()
    def undo(self, mean: Tensor, std: Tensor) -> None:
        """Undo a standardisation with a mean and a standard deviation (width,)."""
        self.weight.copy_(torch.diag(std))
        self.bias.copy_(mean)

    def forward(self, standardized: Tensor) -> Tensor:
        """Return the features (n, width)."""
        return F.linear(standardized, self.weight, self.bias)
