"""The queries of CIRR, CIRCO and FashionIQ: an image, how the one that is looked for differs, and which that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats import files

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

    @property
    def named(self) -> tuple[str, ...]:
        """All images that it names."""
        return self.reference, *self.right, *self.members


@dataclass(frozen=True)
class ComposedSet:
    """Queries, and the images that they search.

    Args:
        queries: in the order of the file.
        images: their files by name, relative to the folder, in the order of the file.
    """

    queries: list[ComposedQuery]
    images: dict[str, str]


def read_cirr(folder: Path, split: str) -> tuple[ComposedSet, list[Path]]:
    """Return CIRR's queries, of version rc2, and the files they are in; `split` is "val" or "test1".

    Raises:
        GroundingFileError: a file is missing or no JSON.
        GroundingValueError: a key that is missing, ids that come twice, an image that is not in the split.
    """
    captions = files.find_file(folder, f"cap.rc2.{split}.json")
    listed = files.find_file(folder, f"split.rc2.{split}.json")
    images = files.read_json(listed, dict)
    paths = {name: files.entry_of(images, name, str, listed.name).removeprefix("./") for name in images}
    entries = files.placed(files.read_json(captions, list), captions.name)
    queries = [_cirr_query(entry, where, split) for where, entry in entries]
    return _checked(queries, paths, captions), [captions, listed]


def _cirr_query(entry: Mapping[str, Any], where: str, split: str) -> ComposedQuery:
    reference = files.entry_of(entry, "reference", str, where)
    image_set = files.entry_of(entry, "img_set", dict, where)
    members = files.entries_of(image_set, "members", str, f"{where}, img_set")
    if reference not in members:
        raise GroundingValueError(f"{where}: the reference {reference!r} is not among the members {members}.")
    right = () if split in TEST_SPLITS else (files.entry_of(entry, "target_hard", str, where),)
    return ComposedQuery(
        str(files.entry_of(entry, "pairid", int, where)),
        reference,
        files.entry_of(entry, "caption", str, where),
        right,
        tuple(member for member in members if member != reference),
    )


def read_circo(folder: Path, split: str) -> tuple[ComposedSet, list[Path]]:
    """Return CIRCO's queries, which search COCO's unlabelled images, and their files; `split` is "val" or "test"."""
    path = files.find_file(folder, f"annotations/{split}.json")
    listed = files.find_file(folder, "image_info_unlabeled2017.json")
    content = files.entry_of(files.read_json(listed, dict), "images", list, listed.name)
    images = files.placed(content, f"{listed.name}, images")
    ids = [files.entry_of(image, "id", int, where) for where, image in images]
    files.check_unique(ids, f"{listed.name}, images")
    paths = {
        str(image_id): f"COCO2017_unlabeled/unlabeled2017/{files.entry_of(image, 'file_name', str, where)}"
        for image_id, (where, image) in zip(ids, images, strict=True)
    }
    entries = files.placed(files.read_json(path, list), path.name)
    return _checked([_circo_query(entry, where, split) for where, entry in entries], paths, path), [path, listed]


def _circo_query(entry: Mapping[str, Any], where: str, split: str) -> ComposedQuery:
    name, reference = files.entry_of(entry, "id", int, where), files.entry_of(entry, "reference_img_id", int, where)
    right = () if split in TEST_SPLITS else tuple(map(str, files.entries_of(entry, "gt_img_ids", int, where)))
    if not right and split not in TEST_SPLITS:
        raise GroundingValueError(f"{where}: gt_img_ids is empty, so that nothing is right.")
    files.check_unique(right, f"{where}, gt_img_ids")
    return ComposedQuery(str(name), str(reference), files.entry_of(entry, "relative_caption", str, where), right)


def read_fashioniq(folder: Path, category: str, split: str) -> tuple[ComposedSet, list[Path]]:
    """Return FashionIQ's queries of a category and their files; `split` is "val" or "test"."""
    path = files.find_file(folder, f"cap.{category}.{split}.json")
    listed = files.find_file(folder, f"split.{category}.{split}.json")
    names = files.entries_of({"images": files.read_json(listed, list)}, "images", str, listed.name)
    files.check_unique(names, listed.name)
    suffix = next((end for end in ("png", "jpg") if names and (folder / f"images/{names[0]}.{end}").is_file()), "png")
    paths = {name: f"images/{name}.{suffix}" for name in names}
    queries = []
    for number, (where, entry) in enumerate(files.placed(files.read_json(path, list), path.name)):
        captions = [caption.strip(" .,?") for caption in files.entries_of(entry, "captions", str, where)]
        right = () if split in TEST_SPLITS else (files.entry_of(entry, "target", str, where),)
        # The file gives its queries no ids; an image may be asked about several times.
        name = f"{category}-{number}"
        queries.append(
            ComposedQuery(name, files.entry_of(entry, "candidate", str, where), " and ".join(captions), right)
        )
    return _checked(queries, paths, path), [path, listed]


def _checked(queries: list[ComposedQuery], images: dict[str, str], path: Path) -> ComposedSet:
    """Raise where a query is there twice, or an image that a query names is not among those that are searched."""
    files.check_unique((query.name for query in queries), f"{path.name}, ids of queries")
    for query in queries:
        for image in query.named:
            if image not in images:
                raise GroundingValueError(
                    f"{path.name}: the query {query.name} names the image {image!r}, which is not among the "
                    f"{len(images)} images of the split. Take both files of the same split."
                )
    return ComposedSet(queries, images)
