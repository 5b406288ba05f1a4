"""What is published of an index: nothing that leads to this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visual_ground.index.card import index_card, read_page
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.engines.saved import SAVED_ENGINES
from visual_ground.index.files import FILES, write_index
from visual_ground.index.remote_images import ImageLink, is_url
from visual_ground.index.state import IndexState
from visual_ground.index.table.entries import make_entries
from visual_ground.storage.hub import PushOptions, push_folder
from visual_ground.vision.images import to_rgb

logger = logging.getLogger(__name__)


def publishable(contents: IndexState, images: Sequence[Any], copy_images: bool) -> IndexState:
    """Return an index in which no path leads to this machine.

    Args:
        contents: an index.
        images: its images, in order, as `ImageIndex.images` gives them.
        copy_images: True copies every image that is a path into the index; False leaves the image out, and keeps its
            id, vector and metadata.
    """
    space = None if contents.space is None else contents.space.published()
    if not contents.entries.has_images:
        return replace(contents, space=space)
    published: list[Any] = []
    omitted = 0
    for image in images:
        is_path = isinstance(image, (str, os.PathLike)) and not is_url(os.fspath(image))
        # A link to a local path that the index's rules do not let us open.
        is_closed = isinstance(image, ImageLink) and not image.is_remote
        if is_closed or (is_path and not copy_images):
            omitted += 1
            published.append(None)
        else:
            published.append(to_rgb(image) if is_path else image)
    if omitted:
        logger.warning("%d images are local files and are not published; copy_images=True publishes them.", omitted)
    entries, own = contents.entries, contents.entries.positions()
    metadata = [entries.metadata(p) for p in own] if entries.has_metadata else None
    made = make_entries([entries.id(p) for p in own], published, metadata, len(own), 0)
    engine = contents.engine
    whole = engine.whole() if isinstance(engine, SAVED_ENGINES) else ExactIndex(contents.exact.vectors)
    return IndexState(whole, made, space=space, caption_weight=contents.caption_weight)


def push_index(contents: IndexState, repo_id: str, options: PushOptions) -> str:
    """Commit an index that `publishable` returned to a dataset repository, and return the commit's address."""

    def save(folder: Path) -> None:
        write_index(folder, contents, index_card(contents, repo_id, read_page(folder)))

    return push_folder(save, repo_id, options, FILES, kind="dataset")
