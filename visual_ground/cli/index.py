"""`visual-ground index`: embed images so that they can be found."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visual_ground.cli.arguments import add_model_arguments, load_model
from visual_ground.errors import GroundingError, GroundingFileError, GroundingValueError

if TYPE_CHECKING:
    from visual_ground.cli.arguments import Commands

BATCH_SIZE = 32


def add_parser(commands: Commands) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("index", help="embed images so that they can be found")
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", required=True, help="folder for the index")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Embed image files, and those in folders, into an index; files that cannot be read are left out by name."""
    import torch

    from visual_ground import ImageIndex
    from visual_ground.index.trust import trust

    files = list(dict.fromkeys(_find(options.images)))
    if not files:
        raise GroundingValueError(f"There are no image files in {options.images}.")
    model = load_model(options)
    readable: list[str] = []
    vectors: list[torch.Tensor] = []
    for start in range(0, len(files), BATCH_SIZE):
        names, images = _read(files[start : start + BATCH_SIZE])
        if images:
            vectors.append(model.embed_images(images, batch_size=BATCH_SIZE).cpu())
            readable += names
    if not readable:
        raise GroundingValueError(f"None of {len(files)} files is an image that can be read, such as {files[0]!r}.")
    # Absolute, so that the pictures are found from wherever the index is used on this machine.
    index = ImageIndex(torch.cat(vectors), readable, [os.path.abspath(name) for name in readable])
    index.save_pretrained(options.output)
    trust(options.output, [name if os.path.isdir(name) else os.path.dirname(name) or "." for name in options.images])
    omitted = f", {len(files) - len(readable)} left out" if len(files) > len(readable) else ""
    print(f"{len(readable)} images in the index {options.output}{omitted}")


def _find(names: Sequence[str]) -> Iterator[str]:
    """Return the files that are given, and the image files in folders that are given, hidden ones left out."""
    from visual_ground.prompts.types import IMAGE_SUFFIXES

    suffixes = IMAGE_SUFFIXES | {".avif", ".jfif"}
    for name in names:
        if not os.path.exists(name):
            raise GroundingFileError(f"There is no file or folder {name!r}.")
        if not os.path.isdir(name):
            yield name
            continue
        for path in sorted(Path(name).rglob("*")):
            # macOS puts a hidden ._a.png, which is no image, beside a.png on foreign disks.
            hidden = any(part.startswith(".") for part in path.relative_to(name).parts)
            if path.suffix.lower() in suffixes and not hidden and path.is_file():
                yield str(path)


def _read(names: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Open image files; return the names of those that can be read, and their images."""
    from visual_ground.vision.images import to_rgb

    readable, images = [], []
    for name in names:
        try:
            images.append(to_rgb(name))
            readable.append(name)
        except GroundingError as error:
            print(f"visual-ground: left out: {error}", file=sys.stderr)
    return readable, images
