"""The queries of CIRR, CIRCO and FashionIQ: an image, how the one that is looked for differs, and which that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats.checked import check_unique, entries, find_file, read_json, take, take_all

# CIRR calls its test set test1, and asks its server about both lists.
TEST_SPLITS = ("test", "test1")


@dataclass(frozen=True)
class ComposedQuery:
    """An image, and in words how the one that is looked for differs.

    Args:
        name: the query's id.
        reference: the image's name.
        text: the difference.
        right: the names of the images that are right; none in test sets.
        members: CIRR's small set of similar images, without the reference.
    """

    name: str
    reference: str
    text: str
    right: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComposedSet:
    """Queries, and the images that they search.

    Args:
        queries: in the order of the file.
        images: their files by name, relative to the folder, in the order of the file.
    """

    queries: list[ComposedQuery]
    images: dict[str, str]

    def check(self, where: str) -> None:
        """Raise where a query is there twice, or an image that a query names is not among those that are searched.

        Raises:
            GroundingValueError: names the query and the image.
        """
        check_unique((query.name for query in self.queries), where, "the query ids")
        for query in self.queries:
            for image in (query.reference, *query.right, *query.members):
                if image not in self.images:
                    raise GroundingValueError(
                        f"{where}: the query {query.name} names the image {image!r}, which is not among the "
                        f"{len(self.images)} images of the split. Take both files of the same split."
                    )


def read_cirr(folder: Path, split: str) -> tuple[ComposedSet, list[Path]]:
    """Return CIRR's queries, of version rc2, and the files they are in; `split` is "val" or "test1".

    Raises:
        GroundingFileError: a file is missing or no JSON.
        GroundingValueError: a key that is missing, ids that come twice, an image that is not in the split.
    """
    captions = _find(folder, f"captions/cap.rc2.{split}.json", "cirr", "file of queries")
    listed = _find(folder, f"image_splits/split.rc2.{split}.json", "cirr", "list of images")
    images = read_json(listed)
    if not isinstance(images, Mapping) or not images:
        raise GroundingValueError(f"{listed.name} should map the images' names to files, got {type(images).__name__}.")
    files = {name: take(images, name, str, listed.name).removeprefix("./") for name in images}
    queries = [_cirr_query(entry, where, split) for where, entry in entries(read_json(captions), captions.name)]
    return _checked(queries, files, captions), [captions, listed]


def _cirr_query(entry: Mapping[str, Any], where: str, split: str) -> ComposedQuery:
    reference = take(entry, "reference", str, where)
    image_set = take(entry, "img_set", dict, where)
    members = take_all(image_set, "members", str, f"{where}, img_set")
    if reference not in members:
        raise GroundingValueError(f"{where}: the reference {reference!r} is not among the members {members}.")
    right = () if split in TEST_SPLITS else (take(entry, "target_hard", str, where),)
    return ComposedQuery(
        str(take(entry, "pairid", int, where)),
        reference,
        take(entry, "caption", str, where),
        right,
        tuple(member for member in members if member != reference),
    )


def read_circo(folder: Path, split: str) -> tuple[ComposedSet, list[Path]]:
    """Return CIRCO's queries, which search COCO's unlabelled images, and their files; `split` is "val" or "test".

    Raises:
        GroundingFileError: a file is missing or no JSON.
        GroundingValueError: as in `read_cirr`.
    """
    path = find_file(folder, (f"annotations/{split}.json",), "file of queries")
    name = "annotations/image_info_unlabeled2017.json"
    listed = find_file(folder, (f"COCO2017_unlabeled/{name}", name), "list of images")
    images = entries(take(read_json(listed), "images", list, listed.name), f"{listed.name}, images")
    ids = [take(image, "id", int, where) for where, image in images]
    check_unique(ids, listed.name, "the image ids")
    # The files' numbers alone are not enough: the official names are padded with zeros.
    files = {
        str(image_id): f"COCO2017_unlabeled/unlabeled2017/{take(image, 'file_name', str, where)}"
        for image_id, (where, image) in zip(ids, images, strict=True)
    }
    queries = [_circo_query(entry, where, split) for where, entry in entries(read_json(path), path.name)]
    return _checked(queries, files, path), [path, listed]


def _circo_query(entry: Mapping[str, Any], where: str, split: str) -> ComposedQuery:
    name, reference = take(entry, "id", int, where), take(entry, "reference_img_id", int, where)
    right = () if split in TEST_SPLITS else tuple(map(str, take_all(entry, "gt_img_ids", int, where)))
    if not right and split not in TEST_SPLITS:
        raise GroundingValueError(f"{where}: gt_img_ids is empty, so that nothing is right.")
    check_unique(right, where, "the gt_img_ids")
    return ComposedQuery(str(name), str(reference), take(entry, "relative_caption", str, where), right)


def read_fashioniq(folder: Path, category: str, split: str) -> tuple[ComposedSet, list[Path]]:
    """Return FashionIQ's queries of a category and their files; `split` is "val" or "test".

    Raises:
        GroundingFileError: a file is missing or no JSON.
        GroundingValueError: as in `read_cirr`.
    """
    path = find_file(folder, (f"captions/cap.{category}.{split}.json",), "file of queries")
    listed = find_file(folder, (f"image_splits/split.{category}.{split}.json",), "list of images")
    names = take_all({"images": read_json(listed)}, "images", str, listed.name)
    check_unique(names, listed.name, "the images")
    suffix = next((end for end in ("png", "jpg") if names and (folder / f"images/{names[0]}.{end}").is_file()), "png")
    files = {name: f"images/{name}.{suffix}" for name in names}
    queries = []
    for number, (where, entry) in enumerate(entries(read_json(path), path.name)):
        captions = [caption.strip(" .,?") for caption in take_all(entry, "captions", str, where)]
        right = () if split in TEST_SPLITS else (take(entry, "target", str, where),)
        # The file gives its queries no ids; an image may be asked about several times.
        name = f"{category}-{number}"
        queries.append(ComposedQuery(name, take(entry, "candidate", str, where), " and ".join(captions), right))
    return _checked(queries, files, path), [path, listed]


def _find(folder: Path, name: str, inner: str, what: str) -> Path:
    return find_file(folder, (name, f"{inner}/{name}"), what)


def _checked(queries: list[ComposedQuery], images: dict[str, str], path: Path) -> ComposedSet:
    composed = ComposedSet(queries, images)
    composed.check(path.name)
    return composed
