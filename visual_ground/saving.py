"""Folders that are written whole or not at all, and adapter folders, which are such.

An adapter folder holds `adapter_config.json`, `adapter_model.safetensors` and a README.md.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
COMMIT_FOLDER = ".commit"
STAGED_PREFIX = ".staged-"


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


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object that carries this package's format version.

    Raises:
        GroundingFileError: unreadable, or not JSON.
        GroundingValueError: another format version.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save it again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise GroundingValueError(
            f"{path} has format version {version!r}; this visual_ground reads version {FORMAT_VERSION}. "
            "Install the visual_ground that wrote it."
        )
    return values


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, whole or not at all."""
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def write_folder(folder: str | os.PathLike, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write a set of files into a folder, all of them or none.

    They are staged in a subfolder, and renaming that to `.commit` is the moment at which the new set counts. Then its
    files are moved over the old ones; `finish_commit` does the rest where that was cut short. So a process or machine
    that stops at any point leaves the old set or the new one, and never a mix. Other files in the folder stay as they
    are. One process may write a folder at a time.

    Args:
        folder: where to; made where it is missing.
        writers: for each file's name, which may have folders in it, a function that writes the path it is given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_commit(folder)
    for left_over in folder.glob(f"{STAGED_PREFIX}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    staged = folder / f"{STAGED_PREFIX}{secrets.token_hex(4)}"
    staged.mkdir()
    try:
        for name, write in writers.items():
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        for path in [*staged.rglob("*"), staged]:
            sync(path)
        os.rename(staged, folder / COMMIT_FOLDER)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    sync(folder)
    finish_commit(folder)


def finish_commit(folder: str | os.PathLike) -> None:
    """Move the files of a `.commit` that counts, but was cut short, to where they belong.

    Raises:
        OSError: the folder cannot be written; `resolve` reads it as it is.
    """
    folder = Path(folder)
    commit = folder / COMMIT_FOLDER
    if not commit.is_dir():
        return
    names = sorted(path.relative_to(commit) for path in commit.rglob("*"))
    subfolders = [name for name in names if (commit / name).is_dir()]
    for name in subfolders:
        (folder / name).mkdir(exist_ok=True)
    for name in names:
        if name not in subfolders:
            with suppress(FileNotFoundError):  # Another reader has moved it.
                os.replace(commit / name, folder / name)
    for name in [*subfolders, Path()]:
        sync(folder / name)
    # Only rmdir, never rmtree: where another process has just put a newer commit here, it fails and removes nothing.
    for name in [*reversed(subfolders), Path()]:
        with suppress(OSError):
            (commit / name).rmdir()


def resolve(folder: str | os.PathLike, name: str) -> Path:
    """Return where a file of the folder's present set is to be read; it need not exist.

    A commit that was cut short is finished first, or read in place where the folder cannot be written.
    """
    folder = Path(folder)
    with suppress(OSError):
        finish_commit(folder)
    waiting = folder / COMMIT_FOLDER / name
    return waiting if waiting.is_file() else folder / name


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    if not path.is_dir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return
    with suppress(OSError):  # Windows and some network disks cannot do so for folders.
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
            WEIGHTS_FILE: lambda path: write_tensors(path, tensors),
            CONFIG_FILE: lambda path: write_json(path, config),
            **(beside or {}),
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


def load_tensors_into(module: nn.Module, path: str | os.PathLike) -> None:
    """Load safetensors into a module, strictly; nothing is written unless everything fits.

    Args:
        module: whose `state_dict` names and shapes the file must have.
        path: the file; it is looked up by `resolve`, so a commit that was cut short is seen.

    Raises:
        GroundingFileError: missing or damaged.
        GroundingValueError: names or shapes differ; each is listed.
    """
    path, own = resolve(Path(path).parent, Path(path).name), module.state_dict()
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
