"""`Report`: the part of an adapter's metadata that people fill in: how it was made, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from visual_ground.adapter.field_checks import (
    check_fields,
    check_keys,
    is_count,
    is_mapping,
    is_metrics,
    is_name_or_none,
    is_setting,
    is_text,
)
from visual_ground.errors import GroundingFileError

Entry = TypeVar("Entry", "Evaluation", "Sample")


@dataclass(frozen=True)
class Evaluation:
    """One measurement.

    Args:
        dataset: its name, or its Hub id.
        metrics: numbers by name, such as `{"text_to_image_r1": 10.7}`.
        revision: of the dataset.
        split: of the dataset.
        pairs: how many image-caption pairs were measured.
    """

    dataset: str
    metrics: Mapping[str, float]
    revision: str | None = None
    split: str | None = None
    pairs: int | None = None

    def __post_init__(self) -> None:
        names = {"revision": is_name_or_none, "split": is_name_or_none}
        count = {"pairs": lambda value: value is None or is_count(value)}
        check_fields(self, {"dataset": is_text, "metrics": is_metrics, **names, **count})


@dataclass(frozen=True)
class Sample:
    """One prompt and what the adapter answered, as text."""

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        check_fields(self, {"prompt": is_text, "answer": is_text})


@dataclass(frozen=True)
class Report:
    """What an adapter's card tells of its making; nothing in it changes what the adapter does.

    Args:
        license: an identifier such as "apache-2.0", or None.
        datasets: Hub ids of what it was trained on.
        training: the settings that it was trained with, by name.
        evaluations: what was measured.
        samples: some answers.
        picture: a JPEG of the images in the samples, saved as `samples.jpg`.

    Raises:
        GroundingValueError: a field of another kind.

    Example:
        >>> report = Report(license="mit").measured("me/pairs", {"text_to_image": {"r1": 10.0}}, split="test")
        >>> report.evaluations[0].metrics
        {'text_to_image_r1': 10.0}
    """

    license: str | None = None
    datasets: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()
    samples: tuple[Sample, ...] = ()
    picture: bytes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "datasets", tuple(self.datasets))
        rules = {"license": is_name_or_none, "datasets": lambda names: all(map(is_text, names))}
        settings = {"training": lambda values: is_mapping(values) and all(map(is_setting, values.values()))}
        check_fields(self, {**rules, **settings})

    def measured(
        self, dataset: str, results: Mapping[str, Any], pairs: int | None = None, **source: str | None
    ) -> Report:
        """Return a report with one more evaluation, which replaces an earlier one of the same dataset and split.

        Args:
            dataset: its name, or its Hub id.
            results: as from `evaluation.retrieval.retrieval_recall`: numbers, or mappings of numbers, by name.
            pairs: how many were measured.
            source: `revision` and `split` of the dataset.
        """
        metrics: dict[str, Any] = {}
        for name, value in results.items():
            metrics |= {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        new = Evaluation(dataset, metrics, pairs=pairs, **source)
        others = [one for one in self.evaluations if (one.dataset, one.split) != (new.dataset, new.split)]
        return replace(self, evaluations=(*others, new))

    def to_dict(self) -> dict[str, Any]:
        """Return all but the picture as JSON-ready values."""
        return {
            "license": self.license,
            "datasets": list(self.datasets),
            "training": dict(self.training),
            "evaluations": [{**vars(one), "metrics": dict(one.metrics)} for one in self.evaluations],
            "samples": [dict(vars(one)) for one in self.samples],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Build a report from `to_dict`'s result; unknown keys and fields of another kind raise."""
        check_keys(values, [f.name for f in fields(cls) if f.name != "picture"], "report")
        lists = {name: values.get(name, []) for name in ("datasets", "evaluations", "samples")}
        if wrong := {name: type(entries).__name__ for name, entries in lists.items() if not isinstance(entries, list)}:
            raise GroundingFileError(f"The report must have lists here, got {wrong}. Save the adapter again.")
        return cls(
            license=values.get("license"),
            datasets=tuple(lists["datasets"]),
            training=values.get("training", {}),
            evaluations=tuple(_build(Evaluation, entry) for entry in lists["evaluations"]),
            samples=tuple(_build(Sample, entry) for entry in lists["samples"]),
        )


def _build(kind: type[Entry], entry: Any) -> Entry:
    if not isinstance(entry, dict):
        raise GroundingFileError(
            f"{kind.__name__} must be a JSON object, got {type(entry).__name__}. Save the adapter again."
        )
    check_keys(entry, [f.name for f in fields(kind)], kind.__name__)
    try:
        return kind(**entry)
    except TypeError as error:
        raise GroundingFileError(f"{kind.__name__} is damaged: {error}. Save the adapter again.") from error
