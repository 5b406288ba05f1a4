"""An adapter moves to another language model: the image side stays as it is, the rest is fitted to the new LM.

The layer image -> retrieval does not depend on the LM, so it is copied and kept frozen, and every index that was built
with the old model is valid for the new one. What meets the LM is fitted from anchors: the text layers and the images'
input rows in closed form, `[RET]`'s row by a convex descent that the LM takes no part in; a few steps of the normal
training may follow.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback

from visual_ground.adapter.adapter import Adapter
from visual_ground.adapter.anchors import Anchors
from visual_ground.adapter.files import AdapterFiles
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.grounding import ground
from visual_ground.lm.weights import embedding_device
from visual_ground.model import GroundedModel
from visual_ground.storage.hub import HubOptions
from visual_ground.storage.tensors import WEIGHTS_FILE, read_tensors
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.trainer import GroundingTrainer
from visual_ground.transfer.fit import fit_image_rows, fit_text_layers

if TYPE_CHECKING:
    from visual_ground.vision.encoder import VisionEncoder

SHARED = (
    "image_retrieval_projection.weight",
    "image_retrieval_projection.bias",
    "feature_mean",
    "feature_std",
    "logit_scale",
)


@dataclass(frozen=True)
class Refinement:
    """A few steps of training after the closed form.

    Args:
        steps: optimizer steps.
        batch_size: anchors in each.
        learning_rate: of the first step; falls to zero along a cosine.
        projector_learning_rate: that of the layer from images to input rows.
        captioning_fraction: the part of each batch that is captioned.
        seed: of the order.
    """

    steps: int = 5
    batch_size: int = 32
    learning_rate: float = 3e-5
    projector_learning_rate: float = 2e-5
    captioning_fraction: float = 0.0625
    seed: int = 0


@dataclass(frozen=True)
class ImageSide:
    """What of an adapter does not depend on its language model.

    Args:
        config: the adapter's settings.
        tensors: those named in `SHARED`.
        vision: the encoder, or the name that the adapter has for it.
        anchors: those published with it, if any.
    """

    config: GroundingConfig
    tensors: Mapping[str, Tensor]
    vision: VisionEncoder | str | None
    anchors: Anchors | None = None

    @classmethod
    def of(cls, model: GroundedModel) -> ImageSide:
        """Take it from a grounded model."""
        state = model.adapter.state_dict()
        tensors = {name: state[name].detach().clone() for name in SHARED}
        return cls(model.config, tensors, model.vision, model.active.anchors)

    @classmethod
    def load(cls, adapter: str | os.PathLike, **hub_options: Any) -> ImageSide:
        """Take it from a saved adapter, without its language model.

        Args:
            adapter: local folder or Hub id.
            hub_options: as in `GroundedModel.from_pretrained`.

        Raises:
            GroundingFileError: no such adapter, or a damaged one.
        """
        saved = AdapterFiles.open(adapter, HubOptions.of(hub_options))
        if missing := [name for name in SHARED if name not in saved.shapes]:
            raise GroundingFileError(f"{str(adapter)!r} is no adapter: it has no tensors {missing}. Fetch it again.")
        wanted = {name: torch.empty(shape, device="meta") for name, shape in saved.shapes.items()}
        tensors = read_tensors(saved.folder / WEIGHTS_FILE, wanted)
        vision = saved.metadata.provenance["vision_encoder"]
        shared = {name: tensors[name] for name in SHARED}
        return cls(saved.metadata.config, shared, vision, saved.anchors)

    def embed(self, features: Tensor) -> Tensor:
        """Map image features (n, f) to unit vectors (n, q), as every model with this image side does."""
        scaled = (features.float().cpu() - self.tensors["feature_mean"].cpu()) / self.tensors["feature_std"].cpu()
        weight, bias = (self.tensors[f"image_retrieval_projection.{part}"].cpu() for part in ("weight", "bias"))
        return F.normalize(F.linear(scaled, weight, bias), dim=-1)


def transfer(
    source: ImageSide,
    lm: str | nn.Module,
    tokenizer: Any = None,
    anchors: Anchors | None = None,
    refinement: Refinement | None = None,
    **changes: Any,
) -> GroundedModel:
    """Ground another LM with an adapter's image side; image indexes of the old model stay valid.

    Args:
        source: the image side.
        lm: as in `ground`.
        tokenizer: as in `ground`.
        anchors: what to fit with; those published with the adapter where None.
        refinement: training after the closed form; none where None, which costs the least and finds as much
            (benchmarks/transfer).
        changes: fields of the config that are to differ, such as `text_layers`; `retrieval_dim` and `scaling` cannot.

    Returns:
        The grounded model, trainable; its image side is frozen.

    Raises:
        GroundingValueError: no anchors, anchors of another encoder, or a change that would make indexes invalid.
        GroundingTypeError, GroundingStateError: as in `ground`.

    Example:
        >>> model = transfer(ImageSide.load("me/adapter"), "google/gemma-3-270m")  # doctest: +SKIP
    """
    anchors = source.anchors if anchors is None else anchors
    width = source.tensors["image_retrieval_projection.weight"].shape[1]
    if anchors is None:
        raise GroundingValueError("This adapter was published without anchors. Pass image-caption pairs of your own.")
    if anchors.features.shape[1] != width:
        raise GroundingValueError(
            f"The anchors have {anchors.features.shape[1]} features per image, the adapter reads {width}. Make them "
            "with the adapter's own vision encoder."
        )
    if fixed := sorted({"retrieval_dim", "scaling"} & set(changes)):
        raise GroundingValueError(f"A transfer cannot change {fixed}: image indexes would not be valid any more.")
    model = ground(lm, source.vision, tokenizer, config=replace(source.config, **changes))
    try:
        if model.vision.feature_dim != width:
            raise GroundingValueError(
                f"The vision encoder gives {model.vision.feature_dim} features, the adapter reads {width}. Pass the "
                "encoder that it was trained with."
            )
        _copy_image_side(model.adapter, source)
        fit_text_layers(model, anchors)
        fit_image_rows(model, anchors)
        if refinement is not None:
            _refine(model, anchors, refinement)
    except BaseException:
        model.unground()
        raise
    model.active.anchors = anchors
    return model


@torch.no_grad()
def _copy_image_side(adapter: Adapter, source: ImageSide) -> None:
    state = adapter.state_dict()
    for name in SHARED:
        state[name].copy_(source.tensors[name])
    adapter.image_retrieval_projection.requires_grad_(False)


def _refine(model: GroundedModel, anchors: Anchors, refinement: Refinement) -> None:
    pairs = zip(anchors.features.float(), anchors.captions, strict=True)
    rows = [{"image_features": feature, "caption": list(captions)} for feature, captions in pairs]
    with tempfile.TemporaryDirectory() as folder:
        args = GroundingTrainingArguments(
            output_dir=folder,
            max_steps=refinement.steps,
            per_device_train_batch_size=min(refinement.batch_size, len(anchors)),
            learning_rate=refinement.learning_rate,
            projector_learning_rate=refinement.projector_learning_rate,
            captioning_fraction=refinement.captioning_fraction,
            seed=refinement.seed,
            concat_captions_prob=0.0,
            lr_scheduler_type="cosine",
            save_strategy="no",
            cache_features=False,
            data_dependent_init=False,
            disable_tqdm=True,
            use_cpu=embedding_device(model.lm).type == "cpu",
        )
        trainer = GroundingTrainer(model, args, rows)
        trainer.remove_callback(PrinterCallback)  # it prints, which a library must not
        trainer.train()
