"""JSON and safetensors files that are read strictly, and adapter folders made of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.storage.atomic import replacing, resolve, write_folder

# Of adapter folders. Version 1 had other names for the adapter's tensors and settings.
FORMAT_VERSION = 2
# safetensors' names of the dtypes that this package saves.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], expected_version: int = FORMAT_VERSION) -> dict[str, Any]:
    """Read a JSON object that carries the format version that is expected.

    Raises:
        GroundingFileError: unreadable, or not JSON in UTF-8.
        GroundingValueError: another format version.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        values: Any = json.loads(text, parse_constant=_refuse_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # Half a surrogate pair could be neither printed nor saved again.
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save it again.") from error
    if not isinstance(values, dict):
        raise GroundingFileError(f"{path} must hold a JSON object, got {type(values).__name__}. Save it again.")
    version = values.get("format_version")
    if type(version) is not int or version != expected_version:
        raise GroundingValueError(
            f"{path} has format version {version!r}; this visual_ground reads version {expected_version}. Install the "
            "visual_ground that wrote it, or make the adapter or index again with this one."
        )
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, whole or not at all."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def write_rows(
    path: str | os.PathLike[str], name: str, shape: tuple[int, int], dtype: torch.dtype, chunks: Iterable[Tensor]
) -> None:
    """Write safetensors of one tensor whose rows come in chunks, whole or not at all; it is never in memory whole."""
    size = shape[0] * shape[1] * dtype.itemsize
    entry = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({name: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for chunk in chunks:
            file.write(chunk.detach().to("cpu", dtype).contiguous().numpy().data)


def map_tensor(path: str | os.PathLike[str], name: str) -> Tensor:
    """Return a tensor of a safetensors file, mapped into memory; GroundingFileError if it is missing or damaged."""
    with _opened(path) as stored:
        tensor: Tensor = stored.get_tensor(name)
    return tensor


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    card: str,
    beside: Mapping[str, Callable[[Path], object]] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all.

    A process that stops at any point, be it by a power cut, leaves the old adapter or the new one; see `write_folder`.

    Args:
        folder: where to.
        tensors: the adapter's state dict.
        values: the content of `adapter_config.json`, to which the format version and every shape are added.
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


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check `adapter_config.json`; the errors are those of `read_json`."""
    path = resolve(folder, CONFIG_FILE)
    if not path.is_file():
        raise GroundingFileError(f"{str(folder)!r} is no adapter folder: it has no {CONFIG_FILE}.")
    return read_json(path)


Header = Mapping[str, tuple[tuple[int, ...], str]]


def read_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each tensor in a safetensors file, looked up by `resolve`; its data stays unread.

    Raises:
        GroundingFileError: missing or damaged.
    """
    with _opened(path) as stored:
        return _header(stored)


def check_shapes(
    path: str | os.PathLike[str], header: Header, expected: Mapping[str, Tensor], optional: Collection[str] = ()
) -> None:
    """Raise unless a safetensors file holds tensors of exactly these names, shapes and dtypes.

    Args:
        path: the file, for the error's text; it is not read.
        header: as from `read_shapes`.
        expected: may be on the meta device, so that nothing is allocated for what does not fit.
        optional: names that may be missing.

    Raises:
        GroundingValueError: names, shapes or dtypes differ; each is listed.
    """
    needed = {name: (tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in expected.items()}
    wrong = [f"missing: {name}" for name in needed if name not in header and name not in optional]
    wrong += [f"unexpected: {name}" for name in header if name not in needed]
    wrong += [
        f"{name}: the file has {_describe(header[name])}, this model needs {_describe(needed[name])}"
        for name in needed
        if name in header and header[name] != needed[name]
    ]
    if wrong:
        raise GroundingValueError(f"{path} does not fit this model:\n  " + "\n  ".join(wrong))


def read_tensors(
    path: str | os.PathLike[str], expected: Mapping[str, Tensor], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """Read a safetensors file strictly: finite numbers, and tensors as `check_shapes` expects them.

    Args:
        path: the file.
        expected: tensors of the names, shapes and dtypes that it should hold.
        optional: names that may be missing, and are missing in the result then.

    Raises:
        GroundingFileError: missing, damaged, or with numbers that are not finite.
        GroundingValueError: names, shapes or dtypes differ; each is listed.
    """
    with _opened(path) as stored:
        header = _header(stored)
        check_shapes(path, header, expected, optional)
        tensors = {name: stored.get_tensor(name) for name in expected if name in header}
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise GroundingFileError(f"{path} is damaged: {broken} hold numbers that are not finite. Save it again.")
    return tensors


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    path = resolve(Path(path).parent, Path(path).name)
    if not path.is_file():
        raise GroundingFileError(f"{path} is missing: the folder is half-written. Save it again.")
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save it again.") from error


def _header(stored: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    slices = {name: stored.get_slice(name) for name in stored.keys()}
    return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}


def _describe(tensor: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = tensor
    return f"{shape}" if dtype == "F32" else f"{shape} of {dtype}"
