"""Prefixes on disk, so that a caption runs through the LM once in all epochs, runs and processes.

One folder holds the prefixes of one LM. Every process appends to two files of its own and reads everybody's:

    FOLDER/FINGERPRINT/NAME.prefixes   safetensors records, one after the other
    FOLDER/FINGERPRINT/NAME.jsonl      {"key": K, "start": S, "bytes": B} per record, written after the record

A record counts from the moment that its line is whole, and no file is written by two processes or after its own process
died, so `kill -9` costs one record at most.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save

from visual_ground.model import GroundedModel
from visual_ground.training.losses.cached_retrieval import CaptionKV, Key

logger = logging.getLogger(__name__)


class PrefixFiles:
    """Keeps prefixes in files.

    Args:
        folder: where; an LM has a subfolder of its own, named by its fingerprint.
        model: the grounded model; its LM's weights must not change.
        limit_bytes: how much this process writes at most.
    """

    def __init__(self, folder: str | os.PathLike, model: GroundedModel, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder) / lm_fingerprint(model), limit_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._name, self._written = uuid.uuid4().hex, 0
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._read_to: dict[Path, int] = {}
        self._device = model.frozen_lm.device

    def get(self, key: Key) -> CaptionKV | None:
        """Return what some process has written, or None."""
        name = _digest(key)
        if name not in self._places:
            self._look()
        if name not in self._places:
            return None
        path, start, size = self._places[name]
        with open(path, "rb") as file:
            file.seek(start)
            tensors = {part: tensor.to(self._device) for part, tensor in load(file.read(size)).items()}
        layers = sorted(int(part) for part in tensors if part.isdigit())
        kept = [tensors[str(layer)] for layer in layers]
        return CaptionKV(kept, tensors["head_input"], tensors["log_normaliser"], tensors["label_logits"])

    def put(self, fresh: Mapping[Key, CaptionKV]) -> None:
        """Write these, while there is room; a full disk ends the writing, not the training."""
        for key, prefix in fresh.items():
            if _digest(key) in self._places or self._written + prefix.nbytes > self.limit_bytes:
                continue
            try:
                self._append(_digest(key), prefix)
            except OSError as error:
                logger.warning("No more prefixes are written to %s: %s", self.folder, error)
                self.limit_bytes = 0

    def _append(self, name: str, prefix: CaptionKV) -> None:
        tensors = {str(layer): tensor for layer, tensor in enumerate(prefix.keys_values)}
        tensors |= {part: getattr(prefix, part) for part in ("head_input", "log_normaliser", "label_logits")}
        data = save({part: tensor.contiguous().cpu() for part, tensor in tensors.items()})
        path = self.folder / f"{self._name}.prefixes"
        with open(path, "ab") as file:
            start = file.tell()
            file.write(data)
        with open(path.with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps({"key": name, "start": start, "bytes": len(data)}) + "\n")
        self._places[name] = path, start, len(data)
        self._written += len(data)

    def _look(self) -> None:
        """Learn what others have written since the last look."""
        for index in self.folder.glob("*.jsonl"):
            begin = self._read_to.get(index, 0)
            if index.stem == self._name or index.stat().st_size == begin:
                continue
            data = index.with_suffix(".prefixes")
            size = data.stat().st_size
            with open(index, "rb") as file:
                file.seek(begin)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    entry = json.loads(line)
                    if entry["start"] + entry["bytes"] <= size:
                        self._places.setdefault(entry["key"], (data, entry["start"], entry["bytes"]))
                    begin += len(line)
            self._read_to[index] = begin


def lm_fingerprint(model: GroundedModel) -> str:
    """Return 16 hex digits that stand for a LM: its config, its tensors, and how it is grounded.

    Args:
        model: the grounded model.
    """
    digest = hashlib.sha256(f"{model.lm.config};{model.ret_token_id};".encode())
    digest.update(str(model.config.mask_spare_columns).encode())
    for name, tensor in model.lm.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _digest(key: Key) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]
