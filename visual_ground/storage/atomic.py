"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from visual_ground.errors import GroundingError, GroundingFileError

COMMIT_FOLDER = ".commit"
STAGED_PREFIX = ".staged-"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move what was written there over `path` when the block succeeds."""
    path = Path(path)
    with naming_errors(path):
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


@contextmanager
def naming_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what goes wrong in writing `path` (permissions, a full disk, a folder there) into one GroundingFileError."""
    try:
        yield
    except GroundingError:
        raise
    except (OSError, SafetensorError) as error:
        # The name of a temporary file or folder would say nothing to anyone.
        reason = getattr(error, "strerror", None) or str(error)
        parts = Path(path).parts
        staged = next((i for i, part in enumerate(parts) if part.startswith(STAGED_PREFIX)), len(parts))
        raise GroundingFileError(
            f"{str(Path(*parts[:staged]))!r} cannot be written: {reason}. Nothing is half-written. Free "
            "space, or choose another place."
        ) from error


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only one that writes a folder, among all processes and threads of this machine, until the block ends.

    The lock is on the folder itself, so no file is left behind, and the system takes it off when a process dies.

    Raises:
        GroundingFileError: another one is writing it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: it refuses by itself to replace files that another process has open.
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GroundingFileError(
                f"{str(folder)!r} is being written by another process or thread. Save again when it is done, or give "
                "each a folder of its own."
            ) from error
        except OSError:  # Some network disks have no locks.
            pass
        yield
    finally:
        os.close(handle)


def write_folder(folder: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write a set of files into a folder, all of them or none.

    They are staged in a subfolder, and the new set is valid from the moment at which that is renamed to `.commit`. Then
    its files are moved over the old ones; `finish_commit` does the rest where that was cut short. So a process or
    machine that stops at any point leaves the old set or the new one, and never a mix. Other files in the folder stay
    as they are. One process or thread may write a folder at a time; a second one is refused.

    Args:
        folder: where to; made where it is missing.
        writers: for each file's name, which may have folders in it, a function that writes the path it is given.

    Raises:
        GroundingFileError: the folder cannot be written, or another process is writing it; the old set is whole.
    """
    folder = Path(folder)
    with naming_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            finish_commit(folder)
            for left_over in folder.glob(f"{STAGED_PREFIX}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            _stage(folder, writers)
            finish_commit(folder)


def _stage(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files into a subfolder, and rename it to `.commit` when all are on the disk."""
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
