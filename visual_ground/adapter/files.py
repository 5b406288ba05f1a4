"""Adapter folders, local or on the Hub: written with their card, read strictly, pushed as one commit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.adapter.adapter import IMAGE_SIDE, LM_SIDE, NEWER
from visual_ground.adapter.anchors import ANCHORS_FILE, Anchors
from visual_ground.adapter.metadata import AdapterMetadata
from visual_ground.adapter.model_card import PICTURE_FILE, render_card
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.storage.atomic import resolve
from visual_ground.storage.hub import CARD_FILE, HubOptions, PushOptions, fetch_folder, push_folder
from visual_ground.storage.hub_names import is_hub_name
from visual_ground.storage.readme import is_edited
from visual_ground.storage.tensors import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Header,
    check_shapes,
    read_adapter_config,
    read_shapes,
    read_tensors,
    write_adapter,
)

logger = logging.getLogger(__name__)

# What may be saved beside an adapter: anchors to move it with, and what PEFT has put into its LM.
BESIDE = (ANCHORS_FILE, "lm_adapter/adapter_config.json", "lm_adapter/adapter_model.safetensors")
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, PICTURE_FILE, *BESIDE)
# Twenty times what `generation.gallery` writes: a larger picture was put there by somebody else, and is ignored.
MAX_PICTURE_BYTES = 1 << 22


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """An adapter folder whose files were read and found to belong together; its tensors are still on disk.

    Args:
        name: the local folder or Hub id by which it was opened.
        folder: where it is.
        metadata: the content of its `adapter_config.json`.
        header: shape and dtype of its tensors, by name.
    """

    name: str
    folder: Path
    metadata: AdapterMetadata
    header: Header

    @classmethod
    def open(cls, name: str | os.PathLike[str], options: HubOptions | None = None) -> AdapterFiles:
        """Find an adapter by local folder or Hub id, and read all of it but its tensors.

        Raises:
            GroundingFileError: no such adapter, or a damaged one.
            GroundingValueError: another format version, or a value outside its range.
        """
        is_local = os.path.isdir(name)
        folder = fetch_folder(name, FILES, HubOptions() if options is None else options)
        values = read_adapter_config(folder)
        metadata = AdapterMetadata.from_dict(values)
        if not is_local:
            _refuse_paths(metadata.provenance, name)
        header = read_shapes(folder / WEIGHTS_FILE)
        if values.get("shapes") != {tensor: list(shape) for tensor, (shape, _) in header.items()}:
            raise GroundingFileError(
                f"{CONFIG_FILE} and {WEIGHTS_FILE} in {str(folder)!r} are not of one adapter: the shapes differ. Save "
                "the adapter again."
            )
        picture = resolve(folder, PICTURE_FILE)
        if picture.is_file() and picture.stat().st_size <= MAX_PICTURE_BYTES:
            metadata = replace(metadata, report=replace(metadata.report, picture=picture.read_bytes()))
        return cls(str(name), folder, metadata, header)

    @property
    def config(self) -> GroundingConfig:
        """The settings that the adapter was built with."""
        return self.metadata.config

    @property
    def provenance(self) -> Mapping[str, str | None]:
        """Which LM and encoder it was trained with."""
        return self.metadata.provenance

    def check_fits(self, adapter: nn.Module, lm: str | None = None) -> None:
        """Raise unless the saved tensors are those of this adapter, which may be on the meta device.

        Raises:
            GroundingValueError: names, shapes or dtypes differ; each is listed. If only the LM is another one, the
                text says how to move the adapter to it.
        """
        needed = adapter.state_dict()
        try:
            check_shapes(self.folder / WEIGHTS_FILE, self.header, needed, NEWER)
        except GroundingValueError as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
            wrong = {name for name in {*shapes, *self.header} if shapes.get(name) != self.header.get(name, (None,))[0]}
            if wrong.intersection(IMAGE_SIDE) or not any(name.startswith(LM_SIDE) for name in wrong):
                raise
            raise GroundingValueError(f"{error}\n{self._how_to_move(lm)}") from None

    def _how_to_move(self, lm: str | None) -> str:
        trained_on = self.provenance.get("base_model_name_or_path")
        target = f'"{lm}"' if lm else "lm"
        has_anchors = resolve(self.folder, ANCHORS_FILE).is_file()
        anchors = "" if has_anchors else ", anchors=anchors"
        return (
            f"It was trained on {repr(trained_on) if trained_on else 'another language model'}. Move it to this one: "
            f'visual_ground.transfer("{self.name}", {target}{anchors}). '
            + (
                f"Its folder has the {ANCHORS_FILE} that this needs."
                if has_anchors
                else f"Its folder has no {ANCHORS_FILE}, so make anchors of image-caption pairs of your own with "
                "visual_ground.transferring.collect.collect_anchors."
            )
        )

    def read_tensors(self) -> dict[str, Tensor]:
        """Read all tensors; raise GroundingFileError if they were damaged since, or are not finite."""
        expected = {name: torch.empty(shape, device="meta") for name, (shape, _) in self.header.items()}
        return read_tensors(self.folder / WEIGHTS_FILE, expected)

    @cached_property
    def anchors(self) -> Anchors | None:
        """The anchors with which it can be moved to another LM, if it was saved with any."""
        return Anchors.find(self.folder)


def save_adapter(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: AdapterMetadata,
    repo_id: str | None = None,
    card: str | None = None,
    beside: Mapping[str, Callable[[Path], object]] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all; what people wrote into its card stays.

    Args:
        folder: where to.
        tensors: the adapter's state dict.
        metadata: the content of `adapter_config.json`.
        repo_id: where it is to be published, for the card.
        card: an edited card to start from, in place of the folder's own.
        beside: writers of further files, as in `storage.atomic.write_folder`.
    """
    earlier = _card_in(folder) if card is None else card
    text = render_card(metadata, sum(map(Tensor.numel, tensors.values())), repo_id, earlier)
    writers = dict(beside or {})
    if metadata.report.picture is not None:
        writers[PICTURE_FILE] = partial(_write_bytes, metadata.report.picture)
    write_adapter(folder, tensors, metadata.to_dict(), text, writers)


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def published(metadata: AdapterMetadata) -> AdapterMetadata:
    """Return metadata as it is published: without the names of models that were loaded from local folders."""
    local = {name: value for name, value in metadata.provenance.items() if value and not is_hub_name(value)}
    if local:
        logger.warning("These were loaded from local folders and are published without a name: %s", local)
    return replace(metadata, provenance={**metadata.provenance, **dict.fromkeys(local)})


def push_saved(folder: str | os.PathLike[str], repo_id: str, options: PushOptions) -> str:
    """Commit a saved adapter to the Hub without loading any model; return the commit's address.

    Args:
        folder: a local adapter folder. Its card is published if it was edited; the Hub keeps earlier versions.
        repo_id: made if it does not exist.
        options: where to, and how.

    Raises:
        GroundingFileError: no adapter, or a damaged one; or the Hub did not take it, and is as it was.
    """
    if not os.path.isdir(folder):
        raise GroundingFileError(f"{str(folder)!r} is no local folder. Only a saved adapter can be pushed.")
    saved = AdapterFiles.open(folder)
    tensors, metadata = saved.read_tensors(), published(saved.metadata)
    _ = saved.anchors  # Damaged ones raise here, and not for those who load what was pushed.
    paths = {name: resolve(folder, name) for name in BESIDE}
    beside = {name: partial(_write_bytes, path.read_bytes()) for name, path in paths.items() if path.is_file()}
    # An edited card is published; else the Hub's own is kept up, with the edits that were made there.
    card = _card_in(folder)
    card = card if card is not None and is_edited(card) else None
    return push_folder(lambda to: save_adapter(to, tensors, metadata, repo_id, card, beside), repo_id, options, FILES)


def _card_in(folder: str | os.PathLike[str]) -> str | None:
    path = resolve(folder, CARD_FILE)
    return path.read_text(encoding="utf-8", errors="replace") if os.path.isfile(path) else None


def _refuse_paths(names: Mapping[str, str | None], adapter: Any) -> None:
    """Raise if an adapter from the Hub would have local files loaded as its models."""
    wrong = {name: value for name, value in names.items() if value and not is_hub_name(value)}
    if wrong:
        raise GroundingFileError(
            f"The adapter {str(adapter)!r} from the Hub names local paths, or names that the Hub cannot have: "
            f"{wrong}. Do not trust it; or download it, and load its folder with the models passed."
        )
