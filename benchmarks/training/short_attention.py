"""Attention to few positions on a CPU: torch's fused kernel against matrix products, forward and backward.

    python benchmarks/training/short_attention.py

Shapes are SmolLM2-135M's: 9 heads of 64; captions of a batch of 64, alone and in packed rows, behind a prefix of 18
positions, and image tokens behind it. `training/speedups/attention.py` acts on the result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import write

# Rows, positions that ask, positions before them.
SHAPES = ((64, 11, 18), (5, 105, 18), (128, 1, 18), (8, 128, 18), (2, 512, 0))
HEADS, WIDTH, SECONDS = 9, 64, 0.5


def milliseconds(work: Callable[[], object]) -> float:
    """Return the least time of one run of the work, after two that do not count."""
    work(), work()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return round(1e3 * best, 2)


def measured(dtype: torch.dtype, rows: int, count: int, before: int) -> dict[str, float]:
    """Return the milliseconds of a forward and a backward pass by each way."""
    asked = torch.randn(rows, HEADS, count, WIDTH).to(dtype).requires_grad_()
    keys, values = (torch.randn(rows, HEADS, before + count, WIDTH).to(dtype).requires_grad_() for _ in range(2))
    mask = torch.zeros(rows, 1, count, before + count, dtype=dtype)
    gradient = torch.randn(rows, HEADS, count, WIDTH).to(dtype)

    def both() -> object:
        output = scaled_dot_product_attention(asked, keys, values, attn_mask=mask)
        return torch.autograd.grad(output, (asked, keys, values), gradient)

    found = {}
    for name, kernel in (("fused", SDPBackend.FLASH_ATTENTION), ("products", SDPBackend.MATH)):
        with sdpa_kernel(kernel):
            found[name] = milliseconds(both)
    return found


def main() -> None:
    """Measure, write."""
    result: dict[str, object] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            result[f"{str(dtype).removeprefix('torch.')} {shape}"] = measured(dtype, *shape)
    write("short_attention", {"milliseconds": result})


if __name__ == "__main__":
    main()
