"""Composed retrieval: queries of an image and a text, ranked beside what the text alone and the image alone find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from visual_ground.evaluation.formats.composed import ComposedQuery, ComposedSet
from visual_ground.evaluation.measures.composed import ranking
from visual_ground.evaluation.running.images import ImageFeatures, Images
from visual_ground.evaluation.running.plan import Plan, Record
from visual_ground.evaluation.running.prompts import embed_prompts
from visual_ground.model import GroundedModel

# What a query is made of, and how the metrics of each begin: many methods do not beat the text alone.
WAYS = {"composed": "", "text_only": "text_only_", "image_only": "image_only_"}
# How many images of each ranking are kept: as many as the servers take.
DEPTH = 50
INCOMPLETE = "queries that name an image that is missing"


@dataclass(frozen=True)
class Gallery:
    """The images that one set's queries search, and their unit vectors (n, q)."""

    images: Images
    vectors: Tensor


def composed_plan(
    model: GroundedModel,
    images: ImageFeatures,
    folder: Path,
    sets: Mapping[str, ComposedSet],
    without_reference: bool,
) -> Plan:
    """Return the plan of a task of composed retrieval, with a record for each query.

    Args:
        model: the grounded model.
        images: reads the images.
        folder: what the images' files are relative to.
        sets: queries and their images, by name.
        without_reference: whether a query's own image is taken out of those that it searches.
    """
    galleries: dict[str, Gallery] = {}
    asked: list[tuple[str, ComposedQuery]] = []
    missing: dict[str, list[str]] = {}
    for name, composed in sets.items():
        found = images.read({image: folder / path for image, path in composed.images.items()})
        vectors = model.embed_images(image_features=found.features) if len(found.names) else found.features
        galleries[name] = Gallery(found, vectors)
        complete = [query for query in composed.queries if all(one in found for one in query.named)]
        asked += [(name, query) for query in complete]
        kept = {query.name for query in complete}
        left_out = {**found.missing, INCOMPLETE: [one.name for one in composed.queries if one.name not in kept]}
        for reason, names in left_out.items():
            missing.setdefault(reason, []).extend(names)

    def measure(numbers: Sequence[int]) -> list[Record]:
        return _measure(model, [asked[number] for number in numbers], galleries, without_reference)

    searched = sum(len(gallery.images.names) for gallery in galleries.values())
    return Plan([query.name for _, query in asked], measure, missing, {"images": searched})


def values_by_way(
    records: Sequence[Record], key: str, measure: Callable[[list[str], frozenset[str]], Mapping[str, float]]
) -> dict[str, list[list[float]]]:
    """Return metrics of each query and way, as `Scores.values`; queries of test sets have none.

    Args:
        records: of the plan.
        key: "ranked", or "subset".
        measure: from a ranking and the right names to metrics.
    """
    values: dict[str, list[list[float]]] = {}
    for number, record in enumerate(records):
        for way, prefix in WAYS.items():
            found = measure(record[key][way], frozenset(record["right"])) if record["right"] else {}
            for metric, value in found.items():
                values.setdefault(prefix + metric, [[] for _ in records])[number] = [value]
    return values


def _measure(
    model: GroundedModel,
    asked: Sequence[tuple[str, ComposedQuery]],
    galleries: Mapping[str, Gallery],
    without_reference: bool,
) -> list[Record]:
    features = [galleries[name].images[query.reference] for name, query in asked]
    vectors = {
        "composed": embed_prompts(
            model, [[image, query.text] for image, (_, query) in zip(features, asked, strict=True)]
        ),
        "text_only": embed_prompts(model, [query.text for _, query in asked]),
    }
    records: list[Record] = []
    for row, (name, query) in enumerate(asked):
        gallery = galleries[name]
        own = gallery.vectors[gallery.images.rows[query.reference]]
        of_query = {way: of[row] for way, of in vectors.items()} | {"image_only": own}
        scores = {way: (gallery.vectors @ vector).float().cpu().numpy() for way, vector in of_query.items()}
        right, names = frozenset(query.right), gallery.images.names
        without = frozenset([query.reference]) if without_reference else frozenset()
        record: Record = {"set": name, "query": query.name, "reference": query.reference, "text": query.text}
        record["right"] = list(query.right)
        record["ranked"] = {way: ranking(of, names, right, without)[:DEPTH] for way, of in scores.items()}
        if query.members:
            rows = [gallery.images.rows[member] for member in query.members]
            record["subset"] = {way: ranking(of[rows], query.members, right, frozenset()) for way, of in scores.items()}
        records.append(record)
    return records
