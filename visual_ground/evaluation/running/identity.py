"""What makes two evaluations the same one, so that the records of one may continue the other."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from visual_ground.lm.base.peft import trained_parameters
from visual_ground.model import GroundedModel
from visual_ground.vision.identity import encoder_fingerprint

PACKAGES = ("visual-ground", "torch", "transformers", "numpy")


def adapter_fingerprint(model: GroundedModel) -> str:
    """Return 16 hex digits that stand for the active adapter: its settings and tensors, and those of the LM's PEFT."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    tensors = dict(model.adapter.state_dict())
    if model.config.train_lm_adapter:
        tensors |= {f"lm.{number}": tensor for number, tensor in enumerate(trained_parameters(model.lm))}
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().float().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def describe_model(model: GroundedModel) -> dict[str, Any]:
    """Return what a report says of a model: names, dtype and fingerprints."""
    provenance, fingerprint = model.active.provenance, model.active.spec.fingerprint
    lm = "" if fingerprint is None else json.dumps(fingerprint.to_dict(), sort_keys=True)
    return {
        "lm": provenance.get("base_model_name_or_path"),
        "vision": provenance.get("vision_encoder"),
        "dtype": str(model.frozen_lm.dtype).removeprefix("torch."),
        "adapter_fingerprint": adapter_fingerprint(model),
        "lm_fingerprint": hashlib.sha256(lm.encode()).hexdigest()[:16],
        "vision_fingerprint": encoder_fingerprint(model.vision),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hashes_of(files: Iterable[Path]) -> dict[str, str]:
    """Return, by name, the first 16 hex digits of each file's SHA-256."""
    found = {}
    for path in files:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        found[path.name] = digest.hexdigest()[:16]
    return found


def digest_of(values: Mapping[str, Any]) -> str:
    """Return 16 hex digits that stand for JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
