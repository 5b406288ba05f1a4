"""What a run says of itself while it runs: losses, accuracies, norms, temperature, speed and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers.trainer_callback import CallbackHandler

from visual_ground.adapter.adapter import Adapter


class Meters:
    """Gathers, between two log lines, what training steps did; `read` gives the means and starts anew.

    Args:
        adapter: the adapter that is trained.

    Example:
        >>> meters = Meters(adapter)  # doctest: +SKIP
        >>> meters.count(batch, {"captioning": loss})  # doctest: +SKIP
        >>> meters.read()["captioning"]  # doctest: +SKIP
        3.1
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.start()

    def start(self) -> None:
        """Begin to count and to time."""
        self._parts: dict[str, list[float]] = {}
        self._tokens = self._images = 0
        self._since = time.perf_counter()

    def count(self, batch: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
        """Add one step's batch and the parts of its loss."""
        for name, value in parts.items():
            if name != "loss":
                self._parts.setdefault(name, []).append(float(value))
        self._tokens += sum(len(sequence.ids) for name in ("captioning", "retrieval") for sequence in batch[name])
        self._images += len(batch["groups"])

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """Return the means, the speed of this process, and the adapter's state; start anew.

        Tokens are those that the LM read in both passes. Memory is the peak on a GPU, or what the process holds.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        ret_in, ret_out = self.adapter.ret_embeddings()
        squares = [parameter.square().sum() for parameter in self.adapter.parameters()]
        found = {name: round(sum(values) / len(values), 4) for name, values in self._parts.items()}
        found |= {
            "temperature": round(float((-self.adapter.logit_scale).exp()), 4),
            "ret_input_norm": round(float(ret_in.norm()), 4),
            "ret_output_norm": round(float(ret_out.norm()), 4),
            "adapter_norm": round(float(torch.stack(squares).sum().sqrt()), 4),
            "tokens_per_second": round(self._tokens / seconds, 1),
            "images_per_second": round(self._images / seconds, 1),
            "memory_mb": round(memory_mb()),
        }
        self.start()
        return found


def memory_mb() -> float:
    """Return the most memory that was allocated on the GPU, or the memory that this process holds, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return psutil.Process().memory_info().rss / 1e6


def log_into(callbacks: CallbackHandler, folder: str) -> None:
    """Have TensorBoard write into a folder of the run's own, also before training and after a restart."""
    for callback in callbacks.callbacks:
        if hasattr(callback, "tb_writer") and callback.logging_dir is None:
            callback.logging_dir = folder


def show_picture(callbacks: CallbackHandler, name: str, pixels: Any, step: int) -> None:
    """Show a picture (h, w, 3) in TensorBoard, where it is one of the run's callbacks."""
    for callback in callbacks.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image(name, pixels, step, dataformats="HWC")
