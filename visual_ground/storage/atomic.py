"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

COMMIT_FOLDER = ".commit"
STAGED_PREFIX = ".staged-"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
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


def write_folder(folder: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write a set of files into a folder, all of them or none.

    They are staged in a subfolder, and the new set is valid from the moment at which that is renamed to `.commit`. Then
    its files are moved over the old ones; `finish_commit` does the rest where that was cut short. So a process or
    machine that stops at any point leaves the old set or the new one, and never a mix. Other files in the folder stay
    as they are. One process may write a folder at a time.

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


def finish_commit(folder: str | os.PathLike[str]) -> None:
    """Move the files of a `.commit` whose writer was cut short to where they belong.

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


def resolve(folder: str | os.PathLike[str], name: str) -> Path:
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
