"""The captions of COCO, and of whatever else is written in its format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats import files


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its captions.

    Args:
        image_id: its id.
        image: its file, relative to the folder.
        captions: its reference captions, at least one.
    """

    image_id: int
    image: str
    captions: tuple[str, ...]


def read_coco_captions(folder: Path, split: str) -> tuple[list[CaptionedImage], Path]:
    """Return the images of a split, such as "val2017", in the order of their file, and the file.

    Raises:
        GroundingFileError: the file is missing or no JSON.
        GroundingValueError: a key that is missing, ids that come twice, a caption of an image that is not listed, or an
            image without captions.
    """
    path = files.find_file(folder, f"captions_{split}.json")
    content = files.read_json(path, dict)
    images = files.placed(files.entry_of(content, "images", list, path.name), f"{path.name}, images")
    annotations = files.placed(files.entry_of(content, "annotations", list, path.name), f"{path.name}, annotations")
    ids = [files.entry_of(image, "id", int, where) for where, image in images]
    files.check_unique(ids, f"{path.name}, images")
    files.check_unique(
        (files.entry_of(one, "id", int, where) for where, one in annotations), f"{path.name}, annotations"
    )
    captions: dict[int, list[str]] = {image_id: [] for image_id in ids}
    for where, annotation in annotations:
        image_id = files.entry_of(annotation, "image_id", int, where)
        if image_id not in captions:
            raise GroundingValueError(f"{where} is about the image {image_id}, which {path.name} does not list.")
        captions[image_id].append(files.entry_of(annotation, "caption", str, where))
    if bare := [image_id for image_id in ids if not captions[image_id]]:
        raise GroundingValueError(f"{path.name} has no captions of {len(bare)} images, such as {bare[:5]}.")
    return [
        CaptionedImage(image_id, f"{split}/{files.entry_of(image, 'file_name', str, where)}", tuple(captions[image_id]))
        for image_id, (where, image) in zip(ids, images, strict=True)
    ], path
