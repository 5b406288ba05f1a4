"""`AdapterMetadata`: all that an adapter's folder says besides its tensors, read strictly.

`Report` is the part that people fill in: what the adapter was trained with, and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.lm.fingerprint import Fingerprint

NAMES = ("base_model_name_or_path", "revision", "vision_encoder", "vision_revision")
LIBRARY = "visual_ground"


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
        _check(self, {"dataset": _is_text, "metrics": _is_metrics, "revision": _is_name, "split": _is_name})
        _check(self, {"pairs": lambda value: value is None or _is_count(value)})


@dataclass(frozen=True)
class Sample:
    """One prompt and what the adapter answered, as text."""

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        _check(self, {"prompt": _is_text, "answer": _is_text})


@dataclass(frozen=True)
class Report:
    """What an adapter's card tells of its making: nothing in it changes what the adapter does.

    Args:
        license: an identifier such as "apache-2.0"; None says nothing.
        datasets: Hub ids of what it was trained on.
        training: the settings that it was trained with, by name.
        evaluations: what was measured.
        samples: some answers.
        picture: a JPEG of the images in the samples, saved as `samples.jpg`.

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
        scalar = lambda value: value is None or isinstance(value, (str, bool)) or _is_number(value)  # noqa: E731
        settings = lambda value: _is_mapping(value) and all(map(scalar, value.values()))  # noqa: E731
        names = lambda value: all(map(_is_text, value))  # noqa: E731
        _check(self, {"license": _is_name, "datasets": names, "training": settings})

    def measured(
        self, dataset: str, results: Mapping[str, Any], pairs: int | None = None, **where: str | None
    ) -> Report:
        """Return a report with one more evaluation, in the place of an earlier one of the same dataset and split.

        Args:
            dataset: its name, or its Hub id.
            results: as from `evaluation.retrieval_recall`: numbers, or mappings of numbers, by name.
            pairs: how many were measured.
            where: `revision` and `split` of the dataset.
        """
        metrics: dict[str, Any] = {}
        for name, value in results.items():
            metrics |= {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        new = Evaluation(dataset, metrics, pairs=pairs, **where)
        same = lambda old: (old.dataset, old.split) == (new.dataset, new.split)  # noqa: E731
        return replace(self, evaluations=(*(old for old in self.evaluations if not same(old)), new))

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
        """Build a report from `to_dict`'s result; unknown keys raise."""
        known = [f.name for f in fields(cls) if f.name != "picture"]
        lists = {name: _list_in(values, name) for name in ("datasets", "evaluations", "samples")}
        _known_keys(values, known, "report")
        return cls(
            license=values.get("license"),
            datasets=tuple(lists["datasets"]),
            training=values.get("training", {}),
            evaluations=tuple(_build(Evaluation, entry) for entry in lists["evaluations"]),
            samples=tuple(_build(Sample, entry) for entry in lists["samples"]),
        )


@dataclass(frozen=True)
class AdapterMetadata:
    """What `adapter_config.json` says.

    Args:
        config: the settings that the adapter is built with.
        provenance: `base_model_name_or_path`, `revision`, `vision_encoder`, `vision_revision`, each a name or None.
        fingerprint: of the LM that it was trained on.
        report: how it was made and what was measured.
    """

    config: GroundingConfig
    provenance: Mapping[str, str | None]
    fingerprint: Fingerprint | None = None
    report: Report = field(default_factory=Report)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; `saving.write_adapter` adds the format version and the shapes."""
        return {
            **{name: self.provenance.get(name) for name in NAMES},
            "config": self.config.to_dict(),
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "library": LIBRARY,
            "report": self.report.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterMetadata:
        """Read and check what an `adapter_config.json` says.

        Raises:
            GroundingFileError: a part is missing, unknown, or of another kind than it must be.
            GroundingValueError: a value outside its range.
        """
        _known_keys(values, [*NAMES, "config", "fingerprint", "library", "report", "format_version", "shapes"], "file")
        if values.get("library") != LIBRARY:
            raise GroundingFileError(f"This adapter says that it is of {values.get('library')!r}, not {LIBRARY!r}.")
        provenance = {name: values.get(name) for name in NAMES}
        if wrong := {name: value for name, value in provenance.items() if not _is_name(value)}:
            raise GroundingFileError(f"These must be provenance or null: {wrong}. Save the adapter again.")
        config, report = values.get("config"), values.get("report", {})
        if not isinstance(config, dict) or not isinstance(report, dict):
            raise GroundingFileError("config and report must be JSON objects. Save the adapter again.")
        fingerprint = values.get("fingerprint")
        return cls(
            config=GroundingConfig.from_dict(config),
            provenance=provenance,
            fingerprint=None if fingerprint is None else _fingerprint(fingerprint),
            report=Report.from_dict(report),
        )


def _fingerprint(values: Any) -> Fingerprint:
    numbers = lambda row: isinstance(row, list) and len(row) <= 4096 and all(map(_is_number, row))  # noqa: E731
    right = (
        isinstance(values, dict)
        and set(values) == {f.name for f in fields(Fingerprint)}
        and _is_count(values["tokens"])
        and isinstance(values["vocabulary"], str)
        and isinstance(values["rows"], list)
        and all(map(numbers, values["rows"]))
        and numbers(values["state"])
    )
    if not right:
        raise GroundingFileError("The adapter's fingerprint of its language model is damaged. Save it again.")
    rows = tuple(tuple(row) for row in values["rows"])
    return Fingerprint(values["tokens"], values["vocabulary"], rows, tuple(values["state"]))


def _known_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise GroundingFileError(f"Unknown keys {unknown} in the adapter's {where}; known are {sorted(known)}.")


def _list_in(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values.get(name, [])
    if not isinstance(found, list):
        raise GroundingFileError(f"{name} must be a list, got {type(found).__name__}. Save the adapter again.")
    return found


def _build(kind: type, entry: Any) -> Any:
    known = [f.name for f in fields(kind)]
    if not isinstance(entry, dict):
        raise GroundingFileError(f"{kind.__name__} must be a JSON object, got {type(entry).__name__}.")
    _known_keys(entry, known, kind.__name__)
    try:
        return kind(**entry)
    except TypeError as error:
        raise GroundingFileError(f"{kind.__name__} is damaged: {error}. Save the adapter again.") from error


def _check(instance: Any, rules: Mapping[str, Any]) -> None:
    for name, holds in rules.items():
        value = getattr(instance, name)
        if not holds(value):
            raise GroundingValueError(f"{type(instance).__name__}.{name} cannot be {value!r}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "" and value.isprintable())


def _is_number(value: Any) -> bool:
    # Whole numbers past a float's range are refused as well.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value))


def _is_metrics(value: Any) -> bool:
    return _is_mapping(value) and all(map(_is_number, value.values())) and all(map(math.isfinite, value.values()))
