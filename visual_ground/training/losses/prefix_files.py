"""Captions' keys and values on disk, so that each runs through the LM once in all epochs, runs and processes.

FOLDER/FINGERPRINT/prefixes.bin   a safetensors file for each caption, in an `AppendOnlyStore`; one folder per LM
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save

from visual_ground.model import GroundedModel
from visual_ground.storage.append_only import AppendOnlyStore
from visual_ground.training.losses.cached_caption import CachedCaption, Key

logger = logging.getLogger(__name__)

PREFIXES_FILE = "prefixes.bin"


class PrefixFiles:
    """Keeps captions' keys and values in files.

    Args:
        folder: where; each LM has its own subfolder, named by its fingerprint.
        model: the grounded model; its LM's weights must not change.
        limit_bytes: how much this process writes at most.
    """

    def __init__(self, folder: str | os.PathLike[str], model: GroundedModel, limit_bytes: int) -> None:
        # Not durable: waiting for the disk in every step costs more than running a few captions again.
        self.store = AppendOnlyStore(Path(folder) / lm_fingerprint(model), PREFIXES_FILE, durable=False)
        self.limit_bytes, self._written = limit_bytes, 0
        self._device = model.frozen_lm.device

    def get(self, key: Key) -> CachedCaption | None:
        """Return what any process has written, or None."""
        name = _digest(key)
        if name not in self.store.numbers:
            self.store.refresh()
        number = self.store.numbers.get(name)
        if number is None:
            return None
        tensors = {part: tensor.to(self._device) for part, tensor in load(self.store.read(number)).items()}
        layers = [tensors[str(layer)] for layer in range(sum(part.isdigit() for part in tensors))]
        states = [tensors[f"state{n}"] for n in range(sum(part.startswith("state") for part in tensors))]
        return CachedCaption(layers, states, tensors["head_input"], tensors["log_normaliser"], tensors["label_logits"])

    def put(self, fresh: Mapping[Key, CachedCaption]) -> None:
        """Write these, while there is room; a full disk ends the writing, not the training."""
        for key, caption in fresh.items():
            name = _digest(key)
            if name in self.store.numbers or self._written + caption.nbytes > self.limit_bytes:
                continue
            tensors = {str(layer): tensor for layer, tensor in enumerate(caption.keys_values)}
            tensors |= {f"state{n}": state for n, state in enumerate(caption.states)}
            tensors |= {part: getattr(caption, part) for part in ("head_input", "log_normaliser", "label_logits")}
            data = save({part: tensor.contiguous().cpu() for part, tensor in tensors.items()})
            try:
                self.store.add({name: data})
            except OSError as error:
                logger.warning("No more prefixes are written: %s", error)
                self.limit_bytes = 0
                return
            self._written += len(data)


def lm_fingerprint(model: GroundedModel) -> str:
    """Return 16 hex digits that stand for an LM: its config, its tensors, and how it is grounded."""
    digest = hashlib.sha256(f"{model.lm.config};{model.ret_token_id};".encode())
    # A list of text layers and a prompt decide what is kept where the state is read after a prompt.
    prompt = (model.config.retrieval_prompt, model.config.text_layers) if model.config.retrieval_prompt else ""
    digest.update(f"{model.config.mask_spare_columns}{prompt}".encode())
    for name, tensor in model.lm.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _digest(key: Key) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]
