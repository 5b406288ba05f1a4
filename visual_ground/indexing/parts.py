"""The parts of an index's build: each is written when it is done, so that a build goes on after the last of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.index.captions import with_captions
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.files import SPACE, write_index
from visual_ground.index.state import IndexState
from visual_ground.index.table.entries import Entries, Segment, make_entries
from visual_ground.index.table.rows import THUMBNAIL
from visual_ground.index.table.table_file import read_table, repeats, write_table
from visual_ground.index.table.thumbnails import read_thumbnails, thumbnails_of, write_thumbnails
from visual_ground.indexing.decoding import Batch
from visual_ground.indexing.options import BuildOptions, PixelEmbedder
from visual_ground.indexing.sources import SourceImage
from visual_ground.storage.tensors import FORMAT_VERSION, read_json, write_json
from visual_ground.vision.identity import ImageSpace

PARTS_FOLDER, FINISHED_FOLDER = ".building", ".built"


def open_parts(parts: Path, options: BuildOptions, space: ImageSpace) -> list[dict[str, Any]]:
    """Return what is done of a build; start one where nothing is."""
    about = {
        "format_version": FORMAT_VERSION,
        "batch_size": options.batch_size,
        "part_size": options.part_size,
        "thumbnail_size": options.thumbnail_size,
        "half": options.half,
        "shard": list(options.shard or (0, 1)),
        "caption_weight": options.caption_weight,
    }
    _check_team(parts)
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if (parts / "build.json").is_file():
            begun = read_json(parts / "build.json")
            before = ImageSpace.from_dict(begun.pop(SPACE, None), len(space.vectors[0]))
            if begun != about or not before.is_same(space):
                raise GroundingValueError(
                    f"{str(parts)!r} holds an unfinished build of {before} and {begun}, and this one is of {space} and "
                    f"{about}. Continue it with the same adapter and options, or delete that folder."
                )
        write_json(parts / "build.json", {**about, SPACE: space.to_dict()})
    except OSError as error:
        raise GroundingFileError(f"The index cannot be built in {str(parts.parent)!r}: {error}.") from error
    return _done(parts)


def _check_team(parts: Path) -> None:
    """Raise where another number of processes has begun."""
    together = parts.name != PARTS_FOLDER
    root = parts.parent if together else parts
    begun = [one.name for one in root.glob("*-of-*") if not together or one.name[-5:] != parts.name[-5:]]
    begun += ["build.json"] if together and (root / "build.json").is_file() else []
    if begun:
        raise GroundingValueError(
            f"{str(root)!r} holds an unfinished build by another number of processes ({begun[0]}). Continue it with as "
            "many, or delete that folder."
        )


def _done(parts: Path) -> list[dict[str, Any]]:
    numbers = range(len(list(parts.glob("*.done.json"))))
    return [json.loads((parts / f"{number:06d}.done.json").read_text(encoding="utf-8")) for number in numbers]


@torch.no_grad()
def write_part(
    parts: Path, number: int, model: PixelEmbedder, batches: Iterator[Batch], options: BuildOptions, bar: Any
) -> dict[str, Any]:
    """Embed some batches and write them; the part counts from the moment at which its `.done.json` is there."""
    vectors, items, thumbnails = list[Tensor](), list[SourceImage](), list[bytes | None]()
    part: dict[str, Any] = {"consumed": 0, "unreadable": []}
    for batch in batches:
        if batch.items:
            metadata = [item.metadata for item in batch.items]
            of_images = model.embed_images(image_features=_features(model, batch))
            vectors.append(with_captions(model, of_images, metadata, options.caption_weight).float().cpu())
        items += batch.items
        thumbnails += batch.thumbnails
        part["consumed"] += batch.consumed
        part["unreadable"] += batch.unreadable
        bar.update(batch.consumed)
    part["count"] = len(items)
    if items:
        block = torch.cat(vectors)
        entries = make_entries(
            [item.id for item in items if item.id is not None],
            [item.address for item in items],
            [item.metadata for item in items],
            len(items),
            0,
        )
        entries = entries.with_thumbnails(thumbnails)
        write_table(parts / f"{number:06d}.parquet", [segment.table for segment in entries.segments])
        if thumbnails_of(entries):
            write_thumbnails(parts / f"{number:06d}.arrow", entries)
        ExactIndex(block.half() if options.half else block).save(parts / f"{number:06d}.safetensors")
    write_json(parts / f"{number:06d}.done.json", part)
    return part


def _features(model: PixelEmbedder, batch: Batch) -> Tensor:
    """Return finite features (b, f) of a batch of pixels, or of features of the encoder's width."""
    if batch.pixels.dim() == 4:
        features: Tensor = model.vision(batch.pixels)
        return features
    wanted, width = model.vision.feature_dim, batch.pixels.shape[-1]
    if width != wanted or not bool(torch.isfinite(batch.pixels).all()):
        raise GroundingValueError(
            f"The encoder {model.vision.name or type(model.vision.model).__name__} has features of width {wanted}, and "
            f"the source has some of width {width} or not finite. Give features of this encoder, or images."
        )
    return batch.pixels


def finish(folder: Path, builds: Sequence[Path], space: ImageSpace, caption_weight: float) -> list[dict[str, Any]]:
    """Join the parts in the builds' folders, in order, into an index, delete them, and return what they were."""
    done = [(parts / f"{number:06d}", part) for parts in builds for number, part in enumerate(_done(parts))]
    full = [path for path, part in done if part["count"]]
    if not full:
        names = [name for _, part in done for name, _ in part["unreadable"]]
        raise GroundingValueError(f"There is no image that can be read, and so nothing to index; tried {names[:3]}.")
    engine = ExactIndex.of_blocks(ExactIndex.load(path.with_suffix(".safetensors")) for path in full)
    segments = tuple(map(_read_segment, full))
    _check_ids(segments, folder)
    entries = Entries(segments, np.zeros(len(engine), dtype=bool), True, True, _next_id(segments))
    write_index(folder, IndexState(engine, entries, space=space, caption_weight=caption_weight))
    # At once, so that a stop in between leaves no parts of which some are missing.
    shutil.rmtree(folder / FINISHED_FOLDER, ignore_errors=True)
    os.rename(folder / PARTS_FOLDER, folder / FINISHED_FOLDER)
    shutil.rmtree(folder / FINISHED_FOLDER)
    return [part for _, part in done]


def _read_segment(part: Path) -> Segment:
    table, thumbnails = read_table(part.with_suffix(".parquet")), part.with_suffix(".arrow")
    if thumbnails.is_file():
        table = table.append_column(THUMBNAIL, read_thumbnails(thumbnails, table.num_rows))
    return Segment(table)


def _check_ids(segments: Sequence[Segment], folder: Path) -> None:
    for name in ("id", "id_number"):
        column = pa.concat_tables([segment.table.select([name]) for segment in segments])[name]
        if repeats(column):
            counts = column.value_counts()
            twice = [one["values"].as_py() for one in counts if one["values"].is_valid and one["counts"].as_py() > 1]
            raise GroundingValueError(
                f"ids must be distinct, and {twice[:5]} come twice. Give each image of the source its own, delete "
                f"{str(folder / PARTS_FOLDER)!r}, and build again."
            )


def _next_id(segments: tuple[Segment, ...]) -> int:
    numbers = [pa.compute.max(segment.table["id_number"]).as_py() for segment in segments]
    return max((number + 1 for number in numbers if number is not None), default=0)
