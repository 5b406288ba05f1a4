"""COCO and Flickr30k in Karpathy's splits: captions and images that find each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats import files
from visual_ground.evaluation.metrics import RANKS, hits, ranks_of
from visual_ground.evaluation.running.images import ImageFeatures
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.prompts import embed_prompts
from visual_ground.evaluation.running.records import pack, unpack
from visual_ground.evaluation.running.task import Task
from visual_ground.model import GroundedModel

# The folds in which COCO's 5,000 test images are also reported; Flickr30k's test images are 1,000.
FOLD_SIZES = {"coco": 1000, "flickr30k": 0, "flickr8k": 0}
TITLES = {"coco": "COCO", "flickr30k": "Flickr30k", "flickr8k": "Flickr8k"}
WAYS = ("text_to_image", "image_to_text")
# Queries ranked at once: against 25,000 captions their scores take 100 MB.
QUERIES = 1000


@dataclass(frozen=True)
class CaptionedImage:
    """An image by its file's name, with its captions."""

    name: str
    captions: tuple[str, ...]


class Karpathy(Task):
    """Recall at 1, 5 and 10 in percent, of captions for their image and of images for any of their captions.

    An image may have any number of captions. `text_to_image_r<k>` is the mean over captions, `image_to_text_r<k>` over
    images: a hit is any of an image's captions among the best k. With `fold_size`, `fold_<way>_r<k>` are the same in
    folds of so many images, in the file's order, which gives COCO's "1k" beside its "5k".

    Args:
        data: folder with `dataset_<dataset>.json`, and the images by their file's names, in any folder.
        dataset: "coco", "flickr30k" or "flickr8k".
        split: as in the file: "train", "restval", "val" or "test".
        fold_size: images of a fold; 1,000 for COCO where None, 0 for none.
    """

    name, unit = "karpathy", "image"
    primary_metric = f"{WAYS[0]}_r1"

    def __init__(
        self,
        data: str | os.PathLike[str],
        dataset: str = "coco",
        split: str = "test",
        fold_size: int | None = None,
    ) -> None:
        self._fold_size = FOLD_SIZES[files.choose(dataset, tuple(FOLD_SIZES), "dataset")]
        if fold_size is not None:
            self._fold_size = fold_size
        if self._fold_size < 0:
            raise GroundingValueError(f"fold_size must be at least 0, got {fold_size}.")
        self.dataset, self.split = f"{TITLES[dataset]} (Karpathy)", split
        self.settings: Mapping[str, Any] = {"dataset": dataset, "split": split, "fold_size": self._fold_size}
        path = files.find_file(data, f"dataset_{dataset}.json")
        self.files = [path]
        content = files.read_json(path, dict)
        if (said := files.entry_of(content, "dataset", str, path.name)) != dataset:
            raise GroundingValueError(f"{path.name} says that it is the dataset {said!r}; {dataset!r} is needed.")
        self._images, self._empty = _read_images(files.entry_of(content, "images", list, path.name), split, path.name)
        folder = files.ImageFolder(data)
        self._paths = {image.name: folder.path(image.name) for image in self._images}

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Read the images."""
        found = images.read(self._paths)
        kept = [image for image in self._images if image.name in found and image.captions]

        def measure(numbers: Sequence[int]) -> list[Record]:
            batch = [kept[number] for number in numbers]
            features = torch.stack([found[image.name] for image in batch])
            pictures = model.embed_images(image_features=features)
            texts = iter(embed_prompts(model, [caption for image in batch for caption in image.captions]))
            return [
                {"image": pack(picture), "texts": [pack(next(texts)) for _ in image.captions]}
                for image, picture in zip(batch, pictures, strict=True)
            ]

        bare = [image.name for image in self._images if not image.captions]
        missing = {**found.missing, "captions without words": self._empty, "images without captions": bare}
        captions = sum(len(image.captions) for image in kept)
        return Plan([image.name for image in kept], measure, missing, {"captions": captions})

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the recalls among all images, and in folds."""
        texts = unpack([text for record in records for text in record["texts"]])
        images = unpack([record["image"] for record in records])
        owners = torch.tensor([number for number, record in enumerate(records) for _ in record["texts"]])
        values = _recalls(texts, images, owners)
        size = self._fold_size
        if size and len(records) > size:
            for metric in list(values):
                values[f"fold_{metric}"] = [[] for _ in records]
            for first in range(0, len(records) - size + 1, size):  # Images after the last full fold are in none.
                inside = (owners >= first) & (owners < first + size)
                fold = _recalls(texts[inside], images[first : first + size], owners[inside] - first)
                for metric, units in fold.items():
                    values[f"fold_{metric}"][first : first + size] = units
        return Scores(values)


def _recalls(texts: Tensor, images: Tensor, owners: Tensor) -> dict[str, list[list[float]]]:
    """Return by metric, for each image, the hits of its captions, or its own.

    Args:
        texts: (t, q).
        images: (n, q).
        owners: (t,), the image of each text.
    """
    of_texts: list[list[int]] = [[] for _ in images]
    numbers = torch.arange(len(images))
    for begin in range(0, len(texts), QUERIES):
        part = slice(begin, begin + QUERIES)
        ranks = ranks_of(texts[part] @ images.T, owners[part, None] == numbers).tolist()
        for owner, rank in zip(owners[part].tolist(), ranks, strict=True):
            of_texts[owner].append(rank)
    of_images: list[list[int]] = []
    for begin in range(0, len(images), QUERIES):
        part = slice(begin, begin + QUERIES)
        of_images += [[rank] for rank in ranks_of(images[part] @ texts.T, numbers[part, None] == owners).tolist()]
    return {
        f"{way}_r{k}": [[hit for rank in ranks for hit in hits(rank)[f"r{k}"]] for ranks in units]
        for way, units in zip(WAYS, (of_texts, of_images), strict=True)
        for k in RANKS
    }


def _read_images(entries: Sequence[Any], split: str, name: str) -> tuple[list[CaptionedImage], list[str]]:
    """Return the images of a split, in the file's order, and the names of those that have a caption without words."""
    images, splits, empty = [], set(), []
    for number, entry in enumerate(entries):
        where = f"{name}, image {number}"
        splits.add(files.entry_of(entry, "split", str, where))
        if entry["split"] != split:
            continue
        sentences = files.entry_of(entry, "sentences", list, where)
        raw = [files.entry_of(one, "raw", str, f"{where}, sentence {i}").strip() for i, one in enumerate(sentences)]
        file = files.entry_of(entry, "filename", str, where)
        empty += [file for caption in raw if not caption]
        images.append(CaptionedImage(file, tuple(filter(None, raw))))
    if not images:
        raise GroundingValueError(f"{name} has no images of the split {split!r}; it has {sorted(splits)}.")
    files.check_unique([image.name for image in images], f"{name}, filename")
    return images, empty
