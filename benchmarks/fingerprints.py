"""How far a fingerprint moves under changes of dtype, rounding and weights (run `make demo` first, for its cache).

    python benchmarks/fingerprints.py

Each line compares SmolLM2-135M-Instruct in float32 with a changed copy, in percent of the length of the vectors that
are compared: sampled embedding rows, and the state that the output head reads after two tokens. Rounding is
symmetric, by row, of all linear layers; embeddings stay as they are, as in common quantised loading. "merged rank 8"
adds to every attention matrix a random matrix of rank 8, of that part of the matrix's own size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from measure import write
from torch import nn

from visual_ground.demo.weights import load_lm
from visual_ground.lm.base.fingerprint import ROW_TOLERANCE, STATE_TOLERANCE, Fingerprint, relative_difference
from visual_ground.lm.base.spec import read_spec


def rounded(bits: int) -> Callable[[nn.Module], None]:
    """Return a change that rounds every linear layer but the head to so many bits."""

    def change(lm: nn.Module) -> None:
        for name, layer in lm.named_modules():
            if isinstance(layer, nn.Linear) and "lm_head" not in name:
                step = layer.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                layer.weight.copy_((layer.weight / step).round() * step)

    return change


def merged(part: float) -> Callable[[nn.Module], None]:
    """Return a change that adds a random matrix of rank 8, of `part` of the size, to every attention matrix."""

    def change(lm: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, layer in lm.named_modules():
            if isinstance(layer, nn.Linear) and "self_attn" in name:
                rows, columns = layer.weight.shape
                low = torch.randn(rows, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
                layer.weight.add_(low * (part * layer.weight.norm() / low.norm()))

    return change


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "bfloat16": lambda lm: lm.to(torch.bfloat16),
    "float16": lambda lm: lm.to(torch.float16),
    "8 bits": rounded(8),
    "4 bits": rounded(4),
    "merged rank 8, 1 %": merged(0.01),
    "merged rank 8, 5 %": merged(0.05),
    "merged rank 8, 20 %": merged(0.2),
}


@torch.no_grad()
def main() -> None:
    """Measure all changes."""
    lm, tokenizer = load_lm(Path("demo/cache"))
    own = _fingerprint(lm.float(), tokenizer)
    found = {}
    for name, change in CHANGES.items():
        other = copy.deepcopy(lm)
        change(other)
        one = _fingerprint(other, tokenizer)
        found[name] = {
            "rows_percent": round(100 * relative_difference(sum(own.rows, ()), sum(one.rows, ())), 3),
            "state_percent": round(100 * relative_difference(own.state, one.state), 3),
            "told": bool(own.differences(one)),
        }
    tolerances = {"rows_percent": 100 * ROW_TOLERANCE, "state_percent": 100 * STATE_TOLERANCE}
    write("fingerprints", {"changes": found, "tolerances": tolerances})


def _fingerprint(lm: nn.Module, tokenizer: object) -> Fingerprint:
    taken = read_spec(lm, tokenizer, (-1,)).fingerprint
    assert taken is not None, "the weights are in memory"
    return taken


if __name__ == "__main__":
    main()
