"""Tensors that are computed once and then kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visual_ground.storage.tensors import write_tensors


def kept(path: Path | None, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a file; if there is none, or a damaged one, compute and write them.

    Args:
        path: the file, whose name says what the tensors depend on; None: nothing is kept.
        compute: returns the tensors.
    """
    if path is not None and path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
    tensors = compute()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
    return tensors
