"""Attention to few positions, with gradients, on a CPU.

There, torch's fused kernel takes two to five times as long as matrix products for a forward and a backward pass over
some tens of positions in bfloat16, and as long in float32 (benchmarks/training/short_attention.py). It saves memory,
which short sequences do not need.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Positions that are attended to, at most: a packed row and the prefix before it.
LONGEST = 160

Context = AbstractContextManager[None]


def short_attention(device: torch.device, length: int) -> Context:
    """Return a context in which attention is computed by matrix products, where gradients are faster so.

    Args:
        device: of the LM.
        length: positions that are attended to.
    """
    is_faster = torch.is_grad_enabled() and device.type == "cpu" and length <= LONGEST
    return sdpa_kernel(SDPBackend.MATH) if is_faster else nullcontext()


def recomputed_alike() -> tuple[Context, Context]:
    """Return the contexts of a checkpointed forward pass and of its repetition, which must keep the same tensors."""
    by_products = not torch.backends.cuda.flash_sdp_enabled()
    return nullcontext(), sdpa_kernel(SDPBackend.MATH) if by_products else nullcontext()
