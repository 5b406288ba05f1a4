"""What is saved: JSON and safetensors, read strictly, and adapter folders of them.

An adapter folder holds `adapter_config.json`, `adapter_model.safetensors`, a README.md, and perhaps `samples.jpg`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.storage.atomic import replacing, resolve, write_folder

# Of adapter and index folders. Version 1 named the adapter's tensors and settings otherwise.
FORMAT_VERSION = 2
# What safetensors calls the dtypes that this package saves.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object that carries this package's format version.

    Raises:
        GroundingFileError: unreadable, or not JSON in UTF-8.
        GroundingValueError: another format version.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        values = json.loads(text, parse_constant=_refuse_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # Half a character could be neither printed nor saved again.
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save it again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise GroundingValueError(
            f"{path} has format version {version!r}; this visual_ground reads version {FORMAT_VERSION}. Install the "
            "visual_ground that wrote it, or make the adapter or index again with this one."
        )
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, whole or not at all."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def write_adapter(
    folder: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    card: str,
    beside: Mapping[str, Callable[[Path], object]] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all.

    Stopping at any point, the power cut included, leaves the old adapter or the new one; see `write_folder`.

    Args:
        folder: where to.
        tensors: the adapter's state dict.
        values: what `adapter_config.json` holds; the format version and every shape are added.
        card: the text of README.md.
        beside: writers of further files, as in `write_folder`.
    """
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    config = {**values, "format_version": FORMAT_VERSION, "shapes": shapes}
    write_folder(
        folder,
        {
            "README.md": lambda path: path.write_bytes(card.encode("utf-8")),
            **(beside or {}),
            WEIGHTS_FILE: lambda path: write_tensors(path, tensors),
            CONFIG_FILE: lambda path: write_json(path, config),
        },
    )


def read_adapter_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Read and check `adapter_config.json`.

    Raises:
        GroundingFileError: no folder, no file, or not JSON.
        GroundingValueError: another format version.
    """
    path = resolve(folder, CONFIG_FILE)
    if not path.is_file():
        raise GroundingFileError(f"{str(folder)!r} is no adapter folder: it has no {CONFIG_FILE}.")
    return read_json(path)


def read_shapes(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of each tensor in a safetensors file; its data stays unread.

    Args:
        path: the file; it is looked up by `resolve`, so a commit that was cut short is seen.

    Raises:
        GroundingFileError: missing or damaged.
    """
    with _opened(path) as stored:
        parts = {name: stored.get_slice(name) for name in stored.keys()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def check_tensors(path: str | os.PathLike, expected: Mapping[str, Tensor]) -> None:
    """Raise unless a safetensors file holds tensors of exactly these names, shapes and dtypes; its data stays unread.

    Args:
        path: the file, as in `read_shapes`.
        expected: may be on the meta device, so that nothing is allocated for what does not fit.

    Raises:
        GroundingFileError: missing or damaged.
        GroundingValueError: names, shapes or dtypes differ; each is listed.
    """
    found = read_shapes(path)
    wanted = {name: (tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in expected.items()}
    wrong = [f"missing: {name}" for name in wanted if name not in found]
    wrong += [f"unexpected: {name}" for name in found if name not in wanted]
    wrong += [
        f"{name}: the file has {_describe(found[name])}, this model needs {_describe(wanted[name])}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if wrong:
        raise GroundingValueError(f"{path} does not fit this model:\n  " + "\n  ".join(wrong))


def read_tensors(path: str | os.PathLike, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a safetensors file strictly, as `check_tensors` says, of finite numbers only.

    Raises:
        GroundingFileError: missing, damaged, or with numbers that are not finite.
        GroundingValueError: names, shapes or dtypes differ; each is listed.
    """
    check_tensors(path, expected)
    with _opened(path) as stored:
        tensors = {name: stored.get_tensor(name) for name in expected}
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise GroundingFileError(f"{path} is damaged: {broken} hold numbers that are not finite. Save it again.")
    return tensors


def load_tensors_into(module: nn.Module, path: str | os.PathLike) -> None:
    """Load safetensors into a module, strictly; nothing is written unless everything fits.

    Args:
        module: whose `state_dict` names, shapes and dtypes the file must have.
        path: the file, as in `read_shapes`.

    Raises:
        GroundingFileError: missing or damaged.
        GroundingValueError: names, shapes or dtypes differ; each is listed.
    """
    tensors = read_tensors(path, module.state_dict())
    with torch.no_grad():
        module.load_state_dict(tensors, strict=True)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    path = resolve(Path(path).parent, Path(path).name)
    if not path.is_file():
        raise GroundingFileError(f"{path} is missing: the folder is half-written. Save it again.")
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save it again.") from error


def _describe(tensor: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = tensor
    return f"{shape}" if dtype == "F32" else f"{shape} of {dtype}"
