"""Pickled lists of texts and arrays of floats, read without running anything that a pickle may ask for.

A pickle is a program: it names functions to call. Here every name is refused but those that arrays are pickled with,
and these are mapped to classes and functions of this module, so that not even numpy's own code is run on the file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.errors import GroundingFileError

FLOATS = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}


class _Kind:
    """Replaces `numpy.dtype`: takes its code, and checks that its bytes are in little-endian order."""

    def __init__(self, code: object, *flags: object) -> None:
        if code not in FLOATS:
            raise pickle.UnpicklingError(f"numbers of kind {code!r}, only {sorted(FLOATS)} are read")
        self.dtype = FLOATS[str(code)]

    def __setstate__(self, state: Sequence[object]) -> None:
        if state[1] != "<":
            raise pickle.UnpicklingError(f"numbers in byte order {state[1]!r}, only '<' is read")


class _Array:
    """Replaces `numpy.ndarray`, whose parts arrive after it was made."""

    def __init__(self, *parts: object) -> None:
        self.tensor: Tensor | None = None

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, kind, by_columns, raw = state
        if not isinstance(kind, _Kind) or not isinstance(raw, bytes) or by_columns:
            raise pickle.UnpicklingError("an array that is not plain rows of floats")
        if min(shape, default=0) < 0 or len(raw) != math.prod(shape) * kind.dtype.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} with {len(raw)} bytes")
        flat = torch.frombuffer(bytearray(raw), dtype=kind.dtype) if raw else torch.empty(0)
        self.tensor = flat.float().view(shape)


def _from_bytes(raw: Any, kind: object, shape: object, order: object) -> _Array:
    """Replace `numpy.core.numeric._frombuffer`, which makes an array at once in pickles of protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, kind, order != "C", bytes(raw) if isinstance(raw, bytearray) else raw))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Replace `codecs.encode`, with which pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_REPLACEMENTS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _from_bytes,
    ("numpy", "ndarray"): object(),  # named in every array, never called
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle._Unpickler):
    """The unpickler written in Python: the one in C allocates as much memory as a file of a few bytes asks for."""

    def find_class(self, module: str, name: str) -> Any:
        key = module.replace("numpy._core", "numpy.core"), name  # numpy 2 renamed its module
        if key not in _REPLACEMENTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an array of floats")
        return _REPLACEMENTS[key]


def read_lists(path: str | os.PathLike[str], names: Sequence[str]) -> list[list[str | Tensor]]:
    """Read a pickled dict's lists of texts and arrays of floats, by these names.

    Returns:
        For each name its list; arrays are float32 tensors. An array in a list's place is the list of its rows.

    Raises:
        GroundingFileError: missing, damaged, without these lists, or asking for anything else; none of it was run.
    """
    try:
        values = _Reader(io.BytesIO(Path(path).read_bytes())).load()
        return [_texts_and_tensors(values[name]) for name in names]
    except Exception as error:  # a damaged pickle raises whatever it runs into
        raise GroundingFileError(f"{path} has no lists {list(names)} of texts and arrays of floats: {error}") from error


def _texts_and_tensors(values: Any) -> list[str | Tensor]:
    if isinstance(values, _Array) and values.tensor is not None:
        return list(values.tensor)
    if not isinstance(values, list):
        raise pickle.UnpicklingError(f"a {type(values).__name__} instead of a list")
    parts = [value.tensor if isinstance(value, _Array) else value for value in values]
    usable = [part for part in parts if isinstance(part, (str, Tensor))]
    if len(usable) < len(parts):
        wrong = {type(part).__name__ for part in parts} - {"str", "Tensor"}
        raise pickle.UnpicklingError(f"a list with {sorted(wrong)} in it")
    return usable
