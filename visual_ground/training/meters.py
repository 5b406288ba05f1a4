"""What a training run logs besides its loss: parts of the loss, accuracies, norms, temperature, speed and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers.trainer_callback import CallbackHandler

from visual_ground.adapter.adapter import Adapter


class Meters:
    """Averages what the training steps between two log lines did.

    Values stay on their device until they are read: asking a GPU for a number makes the CPU wait for all its work.

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
        """Forget what was counted, and start the clock."""
        self._values: dict[str, list[Tensor]] = {}
        self._tokens = self._images = 0
        self._started_at = time.perf_counter()

    def count(self, batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Add one batch, as from `ExampleCollator`, and the scalars that the objective returned for it."""
        for name, value in {**(outputs.get("terms") or {}), **outputs}.items():
            if name not in ("loss", "terms"):
                self._values.setdefault(name, []).append(torch.as_tensor(value).detach())
        self._tokens += sum(len(sequence.ids) for name in ("captioning", "retrieval") for sequence in batch[name])
        self._images += len(batch["groups"])

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """Return the means, the speed of this process and the state of the adapter, and start again.

        Tokens are those that the LM reads, in the captioning and the retrieval pass together. Memory is in MB: the peak
        on a GPU, else what the process holds now.
        """
        means = {name: round(float(torch.stack(values).double().mean()), 4) for name, values in self._values.items()}
        seconds = max(time.perf_counter() - self._started_at, 1e-9)
        ret_in, ret_out = self.adapter.ret_embeddings()
        squares = [parameter.square().sum() for parameter in self.adapter.parameters()]
        means |= {
            "temperature": round(float((-self.adapter.logit_scale).exp()), 4),
            "ret_input_norm": round(float(ret_in.norm()), 4),
            "ret_output_norm": round(float(ret_out.norm()), 4),
            "adapter_norm": round(float(torch.stack(squares).sum().sqrt()), 4),
            "tokens_per_second": round(self._tokens / seconds, 1),
            "images_per_second": round(self._images / seconds, 1),
            "memory_mb": round(memory_mb()),
        }
        self.start()
        return means


def memory_mb() -> float:
    """Return the most memory that was allocated on the GPU, or the memory that this process holds, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6


def set_tensorboard_folder(callbacks: CallbackHandler, folder: str) -> None:
    """Have TensorBoard write into one folder of the run, whether before training or after a restart."""
    for callback in callbacks.callbacks:
        if hasattr(callback, "tb_writer") and callback.logging_dir is None:
            callback.logging_dir = folder


def log_image(callbacks: CallbackHandler, name: str, pixels: np.ndarray, step: int) -> None:
    """Log an image (h, w, 3) to TensorBoard, where it is one of the run's callbacks."""
    for callback in callbacks.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image(name, pixels, step, dataformats="HWC")
