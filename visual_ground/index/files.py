"""The folder of an image index: vectors, entries and images, written whole or not at all and read strictly."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingFileError
from visual_ground.index.exact import ExactIndex
from visual_ground.index.remote_images import ImageLink, LinkRules, is_url
from visual_ground.storage.atomic import resolve, write_folder
from visual_ground.storage.hub import CARD_FILE
from visual_ground.storage.readme import render_page
from visual_ground.storage.tensors import FORMAT_VERSION, read_json, write_json
from visual_ground.vision.images import ImageLike, to_rgb

logger = logging.getLogger(__name__)

VECTORS_FILE = "index.safetensors"
ENTRIES_FILE = "index.json"
IMAGES_FOLDER = "images"
FILES = (VECTORS_FILE, ENTRIES_FILE, f"{IMAGES_FOLDER}/*.png", CARD_FILE)
# Names of image files that mean the same on every system: no drives, no backslash, nothing too long.
IMAGE_NAME = re.compile(r"[\w.-]{1,200}(?:/[\w.-]{1,200}){0,7}", re.ASCII)
KEYS = {"format_version", "ids", "images", "metadata"}


@dataclass(frozen=True)
class IndexContents:
    """What an index holds, as `ImageIndex` takes it."""

    engine: ExactIndex
    ids: list[str | int]
    images: list[Any] | None
    metadata: list[dict[str, Any]] | None


def write_index(folder: str | os.PathLike[str], contents: IndexContents, card: str | None = None) -> None:
    """Write vectors, ids, images and metadata; paths and addresses stay as they are, PIL images become files.

    Args:
        folder: where to. Files of other names in it stay as they are.
        contents: what to write.
        card: the text of README.md, if it should have one.

    Raises:
        GroundingValueError: a PIL image that cannot be read.
        GroundingTypeError: an image that is neither a PIL image nor a path or address.
    """
    places, new_images = _place_images(contents.images or [], Path(folder))
    entries = {
        "format_version": FORMAT_VERSION,
        "ids": contents.ids,
        "images": None if contents.images is None else places,
        "metadata": contents.metadata,
    }
    page = {} if card is None else {CARD_FILE: lambda path: path.write_bytes(card.encode("utf-8"))}
    write_folder(
        folder,
        {
            **{name: partial(_write_png, image) for name, image in new_images.items()},
            **page,
            VECTORS_FILE: contents.engine.save,
            ENTRIES_FILE: lambda path: write_json(path, entries),
        },
    )


def read_index(folder: str | os.PathLike[str], rules: LinkRules) -> IndexContents:
    """Read what `write_index` wrote. The folder's own images come back as paths in it.

    Any other path that the rules do not allow comes back as an `ImageLink`, and is not opened.

    Args:
        folder: where from.
        rules: which paths may lead out of the folder.

    Raises:
        GroundingFileError: a file is missing or damaged, or a file of the folder's own is outside of it.
        GroundingValueError: another format version.
    """
    folder = Path(folder)
    for name in (VECTORS_FILE, ENTRIES_FILE):
        if not resolve(folder, name).is_file():
            raise GroundingFileError(f"{str(folder)!r} is no image index: it has no {name}.")
    entries = _read_entries(resolve(folder, ENTRIES_FILE))
    images = entries["images"]
    if images is not None:
        images = [_find_image(place, folder, rules) for place in images]
        if outside := [image.address for image in images if isinstance(image, ImageLink) and not image.is_remote]:
            logger.warning(
                "%d images of the index are outside its folder and are not opened, such as %r. Allow their folder with "
                "LinkRules(folders=...), or on the command line with --images.",
                len(outside),
                outside[0],
            )
    return IndexContents(ExactIndex.load(folder / VECTORS_FILE), entries["ids"], images, entries["metadata"])


def publishable(contents: IndexContents, copy_images: bool) -> IndexContents:
    """Return an index in which no path leads to this machine.

    Args:
        contents: an index.
        copy_images: True copies every image that is a path into the index; False leaves the image out, and keeps its
            id, vector and metadata.
    """
    if contents.images is None:
        return contents
    images: list[Any] = []
    omitted = 0
    for image in contents.images:
        is_path = isinstance(image, (str, os.PathLike)) and not is_url(os.fspath(image))
        # A link to a local path that the index's rules do not let us open.
        is_closed = isinstance(image, ImageLink) and not image.is_remote
        if is_closed or (is_path and not copy_images):
            omitted += 1
            images.append(None)
        else:
            images.append(to_rgb(image) if is_path else image)
    if omitted:
        logger.warning("%d images are local files and are not published; copy_images=True publishes them.", omitted)
    return IndexContents(contents.engine, contents.ids, images, contents.metadata)


def index_card(contents: IndexContents, repo_id: str, page: str | None) -> str:
    """Return the text of an index's README.md; what people wrote into an earlier `page` is kept."""
    opening = (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"An image index of visual_ground: {len(contents.engine):,} vectors of width {contents.engine.dim}, with ids"
        f"{', images or their addresses' if contents.images else ''}{' and metadata' if contents.metadata else ''}. It "
        "fits adapters whose image layer made these vectors, and those moved from them to other language models."
    )
    use = (
        "```python\nfrom visual_ground import ImageIndex\n\n"
        f'index = ImageIndex.from_pretrained("{repo_id}")\n```\n\n'
        "Images that are addresses on the network are fetched only from hosts that you allow: see "
        "`visual_ground.index.remote_images.LinkRules`."
    )
    metadata = {"library_name": "visual_ground", "tags": ["visual_ground", "image-retrieval"]}
    return render_page(metadata, f"{opening}\n\n## Use\n\n{use}", page)


def _place_images(images: Sequence[Any], folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """Return what `index.json` holds for each image, and the images to write, by file name.

    A path stands for itself, and `{"file": NAME}` for a file inside the folder. An index that was loaded from this
    folder holds paths into it: these files stay, and no new image is written over them.
    """
    places = [_place_of(image, folder) for image in images]
    taken = {place["file"] for place in places if isinstance(place, dict)}
    new_images = {}
    for position, image in enumerate(images):
        if image is not None and places[position] is None:
            numbered = (f"{IMAGES_FOLDER}/{number:08d}.png" for number in count(position))
            name = next(name for name in numbered if name not in taken)
            taken.add(name)
            new_images[name] = image
            places[position] = {"file": name}
    return places, new_images


def _place_of(image: Any, folder: Path) -> str | dict[str, str] | None:
    """Return what `index.json` holds for an image; None for a PIL image, which needs a file first."""
    if isinstance(image, ImageLink):
        return image.address
    if not isinstance(image, (str, os.PathLike)):
        return None
    parent, name = Path(image).parent, Path(image).name
    if re.fullmatch(r"\d{8,}\.png", name) and parent.resolve() == (folder / IMAGES_FOLDER).resolve():
        return {"file": f"{IMAGES_FOLDER}/{name}"}
    return os.fspath(image)


def _write_png(image: ImageLike, path: Path) -> None:
    to_rgb(image).save(path, format="PNG")


def _find_image(place: Any, folder: Path, rules: LinkRules) -> str | ImageLink | None:
    """Return the path that `index.json` gives an image, or a link where the rules do not allow to open it."""
    if place is None:
        return None
    if isinstance(place, str):
        return place if not is_url(place) and rules.allow_path(place, folder) else ImageLink(place)
    name = place.get("file") if isinstance(place, dict) and len(place) == 1 else None
    if not isinstance(name, str) or not IMAGE_NAME.fullmatch(name) or ".." in name.split("/"):
        raise _outside(place, folder)
    path = os.fspath(resolve(folder, name))
    # In huggingface_hub's cache, a snapshot's files are symbolic links into the folder blobs beside it.
    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    if not LinkRules(folders=(*blobs,)).allow_path(path, folder):
        raise _outside(place, folder)
    return path


def _outside(place: Any, folder: Path) -> GroundingFileError:
    return GroundingFileError(
        f"{ENTRIES_FILE} in {str(folder)!r} places an image at {place!r}, which is not inside the folder. "
        "Do not use this index, or build it again."
    )


def _read_entries(path: Path) -> dict[str, Any]:
    """Read and check `index.json`."""
    entries = read_json(path)
    # An index without images or metadata has null there; any other value that is no list is damage.
    optional = [[] if entries.get(name) is None else entries[name] for name in ("images", "metadata")]
    lists: list[Any] = [entries.get("ids"), *optional]
    if (
        set(entries) != KEYS
        or not all(isinstance(values, list) for values in lists)
        or not all(isinstance(value, (str, int)) and not isinstance(value, bool) for value in lists[0])
        or not all(isinstance(value, dict) for value in lists[2])
    ):
        raise GroundingFileError(f"{path} is damaged: it does not hold the lists {sorted(KEYS)}. Save the index again.")
    return entries
