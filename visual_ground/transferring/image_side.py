"""`ImageSide`: the part of an adapter that does not depend on its language model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from visual_ground.adapter.adapter import IMAGE_SIDE
from visual_ground.adapter.anchors import Anchors
from visual_ground.adapter.files import AdapterFiles
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError
from visual_ground.model import GroundedModel
from visual_ground.storage.hub import HubOptions
from visual_ground.vision.encoder import VisionEncoder


@dataclass(frozen=True)
class ImageSide:
    """What a transfer takes over of an adapter.

    Args:
        config: the adapter's settings.
        tensors: those named in `adapter.adapter.IMAGE_SIDE`.
        vision: the encoder; None: the one that `provenance` names.
        anchors: those published with the adapter, if any.
        provenance: `vision_encoder` and `vision_revision`, as in `AdapterMetadata.provenance`.
        hub: how to load that encoder: token, cache_dir and local_files_only.
    """

    config: GroundingConfig
    tensors: Mapping[str, Tensor]
    vision: VisionEncoder | None = None
    anchors: Anchors | None = None
    provenance: Mapping[str, str | None] = field(default_factory=dict)
    hub: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: GroundedModel) -> ImageSide:
        """Take it from a grounded model."""
        state = model.adapter.state_dict()
        tensors = {name: state[name].detach().clone() for name in IMAGE_SIDE}
        return cls(model.config, tensors, model.vision, model.active.anchors, model.active.provenance)

    @classmethod
    def load(cls, adapter: str | os.PathLike[str], **hub_options: Any) -> ImageSide:
        """Take it from a saved adapter, without its language model.

        Args:
            adapter: local folder or Hub id.
            hub_options: revision, subfolder, token, cache_dir, local_files_only; see `HubOptions`.

        Raises:
            GroundingFileError: no such adapter, or a damaged one.
        """
        options = HubOptions.of(hub_options)
        files = AdapterFiles.open(adapter, options)
        if missing := [name for name in IMAGE_SIDE if name not in files.header]:
            raise GroundingFileError(f"{files.name!r} is no adapter: it has no tensors {missing}. Fetch it again.")
        tensors = files.read_tensors()
        kept = {name: tensors[name] for name in IMAGE_SIDE}
        return cls(files.config, kept, None, files.anchors, files.provenance, options.for_models())

    def embed(self, features: Tensor) -> Tensor:
        """Map image features (n, f) to unit vectors (n, q), as every model with this image side does."""
        tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        standardized = (features.float().cpu() - tensors["feature_mean"]) / tensors["feature_std"]
        weight, bias = (tensors[f"image_retrieval_projection.{part}"] for part in ("weight", "bias"))
        return F.normalize(F.linear(standardized[:, : weight.shape[1]], weight, bias), dim=-1)
