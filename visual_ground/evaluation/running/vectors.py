"""Vectors in records: as text that holds each number to the bit, in half of the room."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STORED = np.dtype("<f4")


def pack(vector: Tensor) -> str:
    """Return a vector (q,) as base64 of its little-endian float32 numbers."""
    return base64.b64encode(vector.detach().float().cpu().numpy().astype(STORED).tobytes()).decode("ascii")


def unpack(texts: Sequence[str]) -> Tensor:
    """Return packed vectors as (n, q) float32 on the CPU.

    Example:
        >>> unpack([pack(torch.tensor([0.5, -1.0]))]).tolist()
        [[0.5, -1.0]]
    """
    rows = [np.frombuffer(base64.b64decode(text), STORED) for text in texts]
    return torch.from_numpy(np.stack(rows).astype(np.float32)) if rows else torch.empty(0, 0)
