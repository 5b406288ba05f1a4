"""Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from visual_ground.config import FORMAT_VERSION
from visual_ground.errors import GroundingFileError, GroundingValueError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move what was written there over `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, whole or not at all."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def write_adapter(
    folder: str | os.PathLike, tensors: Mapping[str, Tensor], values: Mapping[str, Any], card: str
) -> None:
    """Write an adapter folder: all files are staged beside it first, then moved in.

    A failure while writing leaves the old folder whole. A machine that stops between the moves can leave new weights
    beside an old config.

    Args:
        folder: where to.
        tensors: the adapter's state dict.
        values: what `adapter_config.json` holds; the format version and every shape are added.
        card: the text of README.md.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        write_tensors(staged / WEIGHTS_FILE, tensors)
        write_json(staged / CONFIG_FILE, {**values, "format_version": FORMAT_VERSION, "shapes": shapes})
        (staged / "README.md").write_text(card, encoding="utf-8")
        for name in ("README.md", WEIGHTS_FILE, CONFIG_FILE):
            os.replace(staged / name, folder / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def read_adapter_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Read and check `adapter_config.json`.

    Raises:
        GroundingFileError: no folder, no file, or not JSON.
        GroundingValueError: another format version.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise GroundingFileError(f"{str(folder)!r} is no adapter folder: it has no {CONFIG_FILE}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save the adapter again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise GroundingValueError(
            f"{path} has format version {version!r}; this visual_ground reads version {FORMAT_VERSION}. "
            "Install the visual_ground that wrote it."
        )
    return values


def load_tensors_into(module: nn.Module, path: str | os.PathLike) -> None:
    """Load safetensors into a module, strictly; nothing is written unless everything fits.

    Raises:
        GroundingFileError: missing or damaged.
        GroundingValueError: names or shapes differ; each is listed.
    """
    path, own = Path(path), module.state_dict()
    if not path.is_file():
        raise GroundingFileError(f"{path} is missing: the adapter folder is half-written. Save the adapter again.")
    try:
        with safe_open(path, framework="pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
            wrong = [f"missing: {name}" for name in own if name not in shapes]
            wrong += [f"unexpected: {name}" for name in shapes if name not in own]
            wrong += [
                f"{name}: the file has {shapes[name]}, this model needs {tuple(tensor.shape)}"
                for name, tensor in own.items()
                if name in shapes and shapes[name] != tuple(tensor.shape)
            ]
            if wrong:
                raise GroundingValueError(f"{path} does not fit this model:\n  " + "\n  ".join(wrong))
            tensors = {name: stored.get_tensor(name) for name in own}
    except SafetensorError as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save the adapter again.") from error
    with torch.no_grad():
        module.load_state_dict(tensors, strict=True)
