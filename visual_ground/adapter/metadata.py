"""`AdapterMetadata`: the content of an adapter's `adapter_config.json`, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from visual_ground.adapter.field_checks import check_keys, is_count, is_name_or_none, is_number, is_text
from visual_ground.adapter.report import Report
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError
from visual_ground.lm.base.fingerprint import Fingerprint

PROVENANCE = ("base_model_name_or_path", "revision", "vision_encoder", "vision_revision")
LIBRARY = "visual_ground"
# `storage.tensors.write_adapter` adds the last two.
KEYS = (*PROVENANCE, "config", "fingerprint", "library", "report", "kept", "format_version", "shapes")
# A fingerprint has 8 x 8 and 16 numbers; what has many more is no fingerprint.
MAX_FINGERPRINT_NUMBERS = 4096


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter's folder says besides its tensors.

    Args:
        config: the settings that the adapter is built with.
        provenance: `base_model_name_or_path`, `revision`, `vision_encoder`, `vision_revision`, each a name or None.
        fingerprint: of the LM that it was trained on.
        report: how it was made and what was measured.
        kept: names of parameters that further training leaves as they are.
    """

    config: GroundingConfig
    provenance: Mapping[str, str | None]
    fingerprint: Fingerprint | None = None
    report: Report = field(default_factory=Report)
    kept: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {
            **{name: self.provenance.get(name) for name in PROVENANCE},
            "config": self.config.to_dict(),
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "library": LIBRARY,
            "report": self.report.to_dict(),
            "kept": list(self.kept),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterMetadata:
        """Read and check the content of an `adapter_config.json`.

        Raises:
            GroundingFileError: a part is missing, unknown, or of another kind.
            GroundingValueError: a value outside its range.
        """
        check_keys(values, KEYS, "adapter_config.json")
        if values.get("library") != LIBRARY:
            raise GroundingFileError(
                f"This adapter is of the library {values.get('library')!r}, not of {LIBRARY!r}. Load it with that one."
            )
        provenance = {name: values.get(name) for name in PROVENANCE}
        if wrong := {name: value for name, value in provenance.items() if not is_name_or_none(value)}:
            raise GroundingFileError(f"These must be names or null: {wrong}. Save the adapter again.")
        config, report = values.get("config"), values.get("report", {})
        if not isinstance(config, dict) or not isinstance(report, dict):
            raise GroundingFileError("config and report must be JSON objects. Save the adapter again.")
        kept = values.get("kept", [])  # Adapters from before there was such a list keep nothing.
        if not isinstance(kept, list) or not all(map(is_text, kept)):
            raise GroundingFileError(f"kept must be a list of names, got {kept!r}. Save the adapter again.")
        fingerprint = values.get("fingerprint")
        return cls(
            config=GroundingConfig.from_dict(config),
            provenance=provenance,
            fingerprint=None if fingerprint is None else _read_fingerprint(fingerprint),
            report=Report.from_dict(report),
            kept=tuple(kept),
        )


def _read_fingerprint(values: Any) -> Fingerprint:
    is_valid = (
        isinstance(values, dict)
        and set(values) == {f.name for f in fields(Fingerprint)}
        and is_count(values["tokens"])
        and isinstance(values["vocabulary"], str)
        and isinstance(values["rows"], list)
        and all(map(_is_numbers, values["rows"]))
        and _is_numbers(values["state"])
    )
    if not is_valid:
        raise GroundingFileError("The adapter's fingerprint of its language model is damaged. Save it again.")
    rows = tuple(tuple(row) for row in values["rows"])
    return Fingerprint(values["tokens"], values["vocabulary"], rows, tuple(values["state"]))


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= MAX_FINGERPRINT_NUMBERS and all(map(is_number, values))
