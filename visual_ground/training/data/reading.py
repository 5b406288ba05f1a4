"""What is read of one row: its texts, its image, its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from visual_ground.errors import GroundingValueError
from visual_ground.training.data.columns import Columns
from visual_ground.training.data.prompts import PROMPT
from visual_ground.vision.identity import image_key
from visual_ground.vision.images import image_name, to_rgb


def read_image(image: Any, skipped: list[str], may_skip: bool = True) -> Image.Image | None:
    """Return an image as RGB; one that cannot be read is noted in `skipped`, or raises where it may not be skipped."""
    try:
        return to_rgb(image)
    except GroundingValueError as error:
        if not may_skip:
            raise
        skipped.append(f"{image_name(image)}: {error}")
        return None


def first_image_key(row: Mapping[str, Any], columns: Columns) -> str:
    """Return by what a row's first image is known again; it and those of the row's prompt are opened."""
    image = columns.images(row)[0]
    for one in (*columns.prompt_images(row), image):
        to_rgb(one)
    return image_key(image)


def prompt_of(
    row: Mapping[str, Any], columns: Columns, features: Any, skipped: list[str], may_skip: bool = True
) -> dict[str, Any] | None:
    """Return a row's `prompt` with its `prompt_features` (m, f) or `prompt_images`; nothing where it has no prompt.

    Args:
        row: the row.
        columns: where its images are.
        features: (m, f), of the prompt's images; None reads these.
        skipped: where an image that cannot be read is noted; None is returned then.
        may_skip: False raises there instead.
    """
    split = columns.split_prompt(row)
    if split is None:
        return {}
    if features is not None or not split.images:
        return {"prompt": split.template, "prompt_features": features if split.images else None}
    images = [read_image(image, skipped, may_skip) for image in split.images]
    return None if None in images else {"prompt": split.template, "prompt_images": images}


def without_prompt(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example as if its row had no prompt."""
    return {name: value for name, value in example.items() if not name.startswith(PROMPT)}


def example_of(row: Mapping[str, Any], columns: Columns, choose: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """Return a row's texts, one of each kind."""
    example = {"caption": choose(columns.captions(row) or [""])}
    for name in ("request", "question"):
        if texts := columns.texts(row, name):
            example[name] = choose(texts)
    return example
