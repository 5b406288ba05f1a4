"""Sealed checkpoint folders: a checkpoint is complete, or it is ignored.

The seal is a file that lists every other file with its size. It is written last, when all others are on the disk. A
checkpoint without a seal, or whose files differ from the list, was interrupted while it was written or removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from visual_ground.errors import GroundingFileError
from visual_ground.storage.atomic import sync
from visual_ground.storage.tensors import write_json

SEAL_FILE = "sealed.json"
# What a checkpoint of the same step is called while another takes its place.
REPLACED = ".replaced-"


def seal(folder: str | os.PathLike[str]) -> None:
    """Wait until all files of a checkpoint are on the disk, then mark it as complete."""
    folder = Path(folder)
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    write_json(folder / SEAL_FILE, {"files": _sizes(folder)})
    sync(folder)


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Return whether a checkpoint was sealed, and still has every listed file with its size."""
    folder = Path(folder)
    try:
        sealed = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    sizes = _sizes(folder)
    return all(sizes.get(name) == size for name, size in sealed.items())


def complete_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints of a run, in the order in which they were sealed."""
    complete = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_complete(path)]
    return sorted(complete, key=lambda path: ((path / SEAL_FILE).stat().st_mtime_ns, _step(path)))


def remove_surplus(output_dir: str | os.PathLike[str], limit: int | None, best: str | None) -> None:
    """Remove incomplete checkpoints, and all but the newest `limit` complete ones.

    Args:
        output_dir: the run's folder.
        limit: how many to keep; None, 0 and negative numbers keep all complete ones.
        best: the folder of the best checkpoint, which is always kept.
    """
    complete = complete_checkpoints(output_dir)
    kept = set(complete if not limit or limit < 0 else complete[-limit:])
    if best is not None:
        kept.add(Path(output_dir) / Path(best).name)
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and path not in kept:
            remove(path)


def remove(folder: str | os.PathLike[str]) -> None:
    """Remove a checkpoint, its seal first, so that a partly removed one is never taken for a complete one."""
    (Path(folder) / SEAL_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Make room for a checkpoint; a complete one that is there, as of an earlier run, is kept until `settle`."""
    aside = folder.with_name(REPLACED + folder.name)
    if not is_complete(folder):
        remove(folder)
    else:
        remove(aside)
        folder.rename(aside)


def settle(folder: Path) -> None:
    """Remove what `set_aside` has kept where the new checkpoint is complete, and else put it back."""
    aside = folder.with_name(REPLACED + folder.name)
    if not aside.is_dir():
        return
    if is_complete(folder):
        remove(aside)
    else:
        remove(folder)
        aside.rename(folder)


@contextlib.contextmanager
def removed_unless_written(folder: Path, writes: bool) -> Iterator[None]:
    """Remove a checkpoint that cannot be written, which also frees the disk, and name the complete ones in the error.

    Raises:
        GroundingFileError: the block raised an OSError or RuntimeError, as writing to a full disk does.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if writes:
            remove(folder)
            settle(folder)
        complete = [path.name for path in complete_checkpoints(folder.parent)]
        raise GroundingFileError(
            f"{folder} could not be written: {error}. The checkpoints {complete} are complete. Free some disk space, "
            "then run the same command again; it resumes from the last of them."
        ) from error


def choose(resume: str | os.PathLike[str] | bool | None, output_dir: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        resume: a checkpoint's folder; or True for the last complete one of the run, where there is one.
        output_dir: the run's folder.

    Raises:
        GroundingFileError: the named folder is not a complete checkpoint.
    """
    if isinstance(resume, bool) or resume is None:
        complete = complete_checkpoints(output_dir) if resume else []
        return complete[-1] if complete else None
    if not is_complete(resume):
        raise GroundingFileError(
            f"{os.fspath(resume)!r} is not a complete checkpoint. resume_from_checkpoint=True takes the last complete "
            "one of the output folder. To train a saved adapter further, without optimizer state, load it with "
            "GroundedModel.from_pretrained(..., is_trainable=True)."
        )
    return Path(resume)


def global_step(folder: str | os.PathLike[str]) -> int:
    """Return the number of optimizer steps after which a checkpoint was written."""
    return int(json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SEAL_FILE]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
