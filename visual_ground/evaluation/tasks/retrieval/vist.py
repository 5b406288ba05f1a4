"""VIST, Visual Storytelling: a story's last picture, found by its captions and its earlier pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visual_ground.evaluation.formats import files
from visual_ground.evaluation.metrics import hits, ranks_of
from visual_ground.evaluation.running.images import ImageFeatures, Images
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.prompts import embed_encoded, embed_prompts
from visual_ground.evaluation.running.task import Task
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt

LENGTH = 5  # captions of a story
# What is read before the last picture is asked for: how many of the last captions, and how many pictures between them.
CONTEXTS = {"captions_1": (1, 0), "captions_5": (5, 0), "captions_5_images_4": (5, 4)}
MASKED = "masked"
# The score that the published script gives to a story's earlier pictures.
PUBLISHED_MASK = -10_000.0
VARIANTS = ("standard", "published")


@dataclass(frozen=True)
class Story:
    """One story: its captions, and the ids of its pictures, both in order."""

    id: str
    captions: tuple[str, ...]
    images: tuple[str, ...]


class Vist(Task):
    """Contextual image retrieval on VIST, recall at 1, 5 and 10 in percent.

    Each story is asked in three contexts: its last caption; all five captions; these with the four earlier pictures
    between them. Each is ranked twice: among all pictures, and, with `_masked` in the metric's name, among those that
    are not the story's earlier ones, so that what the context says is told apart from what masking gives.

    A story is left out where its last picture is missing; where only an earlier one is, it counts in the contexts
    without pictures. The variant "published" follows the published script: stories with any picture missing are left
    out, every caption is tokenised with a BOS of its own, and captions stand in the file's order.

    Args:
        data: folder with `<split>.story-in-sequence.json`, and images named by their Flickr ids, in any folder.
        split: "train", "val" or "test".
        variant: "standard" or "published".
    """

    name, unit = "vist", "story"
    primary_metric = "captions_5_images_4_r1"

    def __init__(self, data: str | os.PathLike[str], split: str = "val", variant: str = "standard") -> None:
        self.split: str | None = files.choose(split, ("train", "val", "test"), "split")
        self.is_published = files.choose(variant, VARIANTS, "variant") == "published"
        self.dataset = "VIST (published protocol)" if self.is_published else "VIST"
        self.settings: Mapping[str, Any] = {"split": split, "variant": variant}
        path = files.find_file(data, f"{split}.story-in-sequence.json")
        self.files = [path]
        content = files.read_json(path, dict)
        listed = files.entry_of(content, "images", list, path.name)
        ids = [files.entry_of(entry, "id", str, f"{path.name}, image {i}") for i, entry in enumerate(listed)]
        self._twice = sorted({id_ for id_, count in Counter(ids).items() if count > 1})
        annotations = files.entry_of(content, "annotations", list, path.name)
        self._stories, self._refused = _read_stories(annotations, path.name, sort=not self.is_published)
        folder = files.ImageFolder(data)
        self._paths = {name: folder.path(name) for name in ids}

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Embed all pictures."""
        found = images.read(self._paths)
        needed = slice(None) if self.is_published else slice(LENGTH - 1, None)
        stories = [story for story in self._stories if all(name in found for name in story.images[needed])]
        kept = {story.id for story in stories}
        pictures = model.embed_images(image_features=found.features) if stories else found.features
        missing = {
            **found.missing,
            **self._refused,
            "further entries of an image": self._twice,
            "stories without a picture that is needed": [one.id for one in self._stories if one.id not in kept],
            "stories that lack an earlier picture, not in captions_5_images_4": [
                story.id for story in stories if not all(name in found for name in story.images)
            ],
        }

        def measure(numbers: Sequence[int]) -> list[Record]:
            return self._measure(model, [stories[number] for number in numbers], found, pictures)

        return Plan([story.id for story in stories], measure, missing, {"images": len(found.names)})

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the recalls of each context, masked and not."""
        values: dict[str, list[list[float]]] = {}
        for record in records:
            for context in CONTEXTS:
                for name in (context, f"{context}_{MASKED}"):
                    for metric, hit in hits(record[name]).items():
                        values.setdefault(f"{name}_{metric}", []).append(hit)
        return Scores(values)

    def _measure(
        self, model: GroundedModel, stories: Sequence[Story], images: Images, pictures: Tensor
    ) -> list[Record]:
        records: list[Record] = [{} for _ in stories]
        for context, (captions, shown) in CONTEXTS.items():
            asked = [i for i, one in enumerate(stories) if all(name in images for name in one.images[:shown])]
            for record in records:
                record |= {context: None, f"{context}_{MASKED}": None}
            if not asked:
                continue
            vectors = self._vectors(model, [stories[i] for i in asked], images, captions, shown)
            scores = vectors @ pictures.T
            right, earlier = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
            for row, i in enumerate(asked):
                right[row, images.rows[stories[i].images[-1]]] = True
                earlier[row, [images.rows[name] for name in stories[i].images[:-1] if name in images]] = True
            for row, rank, masked in zip(asked, *self._ranks(scores, right, earlier), strict=True):
                records[row] |= {context: rank, f"{context}_{MASKED}": masked}
        return records

    def _ranks(self, scores: Tensor, right: Tensor, earlier: Tensor) -> tuple[list[int], list[int]]:
        """Return the ranks of the right pictures among all, and without the earlier ones."""
        if self.is_published:
            masked = ranks_of(scores.masked_fill(earlier, PUBLISHED_MASK), right)
        else:
            masked = ranks_of(scores, right, earlier & ~right)  # A picture may come twice in a story.
        return ranks_of(scores, right).tolist(), masked.tolist()

    def _vectors(
        self, model: GroundedModel, stories: Sequence[Story], images: Images, captions: int, shown: int
    ) -> Tensor:
        if self.is_published:
            return _published_vectors(model, stories, images, captions, shown)
        if not shown:
            return embed_prompts(model, [" ".join(story.captions[-captions:]) for story in stories])
        return embed_prompts(model, [_interleaved(story, images) for story in stories])


def _interleaved(story: Story, images: Images) -> list[Any]:
    """Return captions and pictures in turn, the last caption without its picture."""
    prompt: list[Any] = []
    for number, caption in enumerate(story.captions):
        prompt += [f" {caption}" if number else caption]
        prompt += [images[story.images[number]]] if number < LENGTH - 1 else []
    return prompt


def _published_vectors(
    model: GroundedModel, stories: Sequence[Story], images: Images, captions: int, shown: int
) -> Tensor:
    """Return the vectors of stories whose captions are each tokenised with the ids that open a text."""
    processor, marks = model.processor, model.config.num_visual_tokens
    encoded = []
    for story in stories:
        ids: list[int] = []
        for number, caption in enumerate(story.captions[-captions:]):
            ids += [*processor.sink, *processor.encode_text(caption)]
            ids += [-1 - number] * (marks if number < shown else 0)
        encoded.append(EncodedPrompt((*ids, *processor.retrieval_suffix(ids)), ()))
    features = [images[name] for story in stories for name in story.images[:shown]]
    return embed_encoded(model, encoded, features)


def _read_stories(annotations: Sequence[Any], name: str, sort: bool) -> tuple[list[Story], dict[str, list[str]]]:
    """Return the stories of five captions, in the file's order, and the ids of the others by reason."""
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for number, wrapped in enumerate(annotations):
        where = f"{name}, annotation {number}"
        entry = wrapped[0] if isinstance(wrapped, list) and len(wrapped) == 1 else wrapped
        order = files.entry_of(entry, "worker_arranged_photo_order", int, where)
        story = found.setdefault(files.entry_of(entry, "story_id", str, where), {})
        files.check_unique([*story, order], f"{where}, worker_arranged_photo_order of its story")
        caption, image = (files.entry_of(entry, key, str, where) for key in ("text", "photo_flickr_id"))
        story[order] = caption.strip(), image
    stories: list[Story] = []
    refused: dict[str, list[str]] = {"stories without five captions": [], "stories with an empty caption": []}
    for id_, places in found.items():
        captions, images = zip(*(places[order] for order in (sorted(places) if sort else places)), strict=True)
        if len(captions) != LENGTH:
            refused["stories without five captions"].append(id_)
        elif not all(captions):
            refused["stories with an empty caption"].append(id_)
        else:
            stories.append(Story(id_, captions, images))
    return stories, refused
