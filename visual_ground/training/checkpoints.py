"""Checkpoints that are whole or do not count.

A checkpoint is sealed last, by a file that lists all others with their sizes, when these are on the disk. One without a
seal, or that lacks a file of it, was cut short while it was written or removed, and is passed over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.storage.atomic import resolve, sync
from visual_ground.storage.tensors import WEIGHTS_FILE, read_adapter_config, write_json

logger = logging.getLogger(__name__)

SEAL_FILE = "sealed.json"


def seal(folder: str | os.PathLike) -> None:
    """Wait until all files of a checkpoint are on the disk, then say that it is whole."""
    folder = Path(folder)
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    write_json(folder / SEAL_FILE, {"files": _sizes(folder)})
    sync(folder)


def is_whole(folder: str | os.PathLike) -> bool:
    """Return whether a checkpoint was sealed, and still has every file with its size."""
    folder = Path(folder)
    try:
        sealed = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    sizes = _sizes(folder)
    return all(sizes.get(name) == size for name, size in sealed.items())


def whole_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Return the whole checkpoints of a run, in the order in which they were sealed."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_whole(path)]
    return sorted(found, key=lambda path: ((path / SEAL_FILE).stat().st_mtime_ns, _step(path)))


def remove_surplus(output_dir: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """Remove what was cut short, and the oldest checkpoints but `limit`, the newest and the best always excepted."""
    whole = whole_checkpoints(output_dir)
    kept = set(whole if not limit or limit < 0 else whole[-limit:])
    if best is not None:
        kept.add(Path(output_dir) / Path(best).name)
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and path not in kept:
            remove(path)


def remove(folder: str | os.PathLike) -> None:
    """Remove a checkpoint, its seal first, so that no half of it is ever taken for whole."""
    (Path(folder) / SEAL_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def removed_unless_written(folder: Path, writes: bool) -> Iterator[None]:
    """Remove a checkpoint that cannot be written, which also frees the disk, and say that the older ones are whole.

    Raises:
        GroundingFileError: the block raised what writing raises.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if writes:
            remove(folder)
        older = [path.name for path in whole_checkpoints(folder.parent)]
        raise GroundingFileError(
            f"{folder} could not be written: {error}. The checkpoints {older} are whole. Make room, then run the same "
            "command again; it goes on from the last of them."
        ) from error


def choose(resume: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> Path | None:
    """Return the checkpoint to go on from: the one that is named, or the last whole one where `resume` is True.

    Raises:
        GroundingFileError: the one that is named is no whole checkpoint.
    """
    if isinstance(resume, bool) or resume is None:
        whole = whole_checkpoints(output_dir) if resume else []
        return whole[-1] if whole else None
    if not is_whole(resume):
        raise GroundingFileError(
            f"{os.fspath(resume)!r} is no whole checkpoint. resume_from_checkpoint=True takes the last whole one of "
            "the output folder. An adapter without its optimizer is trained further with "
            "GroundedModel.from_pretrained(..., is_trainable=True)."
        )
    return Path(resume)


def check_base(folder: str | os.PathLike, model: GroundedModel) -> None:
    """Raise unless a checkpoint was written for this model's LM, encoder and settings.

    The LM is known by the norms and mean of its embedding's rows, not by its name, for a folder may have moved.

    Raises:
        GroundingValueError: another LM or encoder, or other settings.
    """
    values = read_adapter_config(folder)
    if values["config"] != model.config.to_dict():
        own = model.config.to_dict()
        changed = {name: (value, own.get(name)) for name, value in values["config"].items() if own.get(name) != value}
        raise GroundingValueError(
            f"{folder} was written with other settings, as (checkpoint, now): {changed}. Use those, or another folder."
        )
    own = {name: tensor.cpu() for name, tensor in model.adapter.named_buffers()}
    with safe_open(resolve(folder, WEIGHTS_FILE), framework="pt") as stored:
        found = {name: stored.get_tensor(name) for name in own if name in stored.keys()}
    same_vision = values["vision_encoder"] == model.active.provenance["vision_encoder"]
    if not same_vision or found["feature_mean"].shape != own["feature_mean"].shape:
        raise GroundingValueError(
            f"{folder} was written for another vision encoder: {values['vision_encoder']!r}, this run's is "
            f"{model.active.provenance['vision_encoder']!r}. Use that one, or another output folder."
        )
    for name, room in (("ret_norms", 0.0), ("embedding_mean", 1e-2 * float(own["embedding_std"].mean()))):
        if found[name].shape != own[name].shape or not torch.allclose(found[name], own[name], rtol=1e-3, atol=room):
            raise GroundingValueError(
                f"{folder} was written for another base: {values['base_model_name_or_path']!r}, this run's is "
                f"{model.active.provenance['base_model_name_or_path']!r}. Use that language model, or another folder."
            )


def global_step(folder: str | os.PathLike) -> int:
    """Return after how many steps a checkpoint was written."""
    return int(json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _step(path: Path) -> int:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SEAL_FILE]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
