"""An adapter moves to another language model: the image side stays as it is, the rest is fitted to the new LM.

The layer image -> retrieval does not depend on the LM, so it is copied and kept frozen, and every index that was built
with the old model is valid for the new one. What meets the LM is fitted from anchors: the text layers and the images'
input rows in closed form, then everything but the copied layer for a few steps of the normal training.
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

from visual_ground.adapter import Adapter
from visual_ground.anchors import Anchors
from visual_ground.closed_form import LinearMap, ridge
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.hub import HubOptions
from visual_ground.language import embedding_device
from visual_ground.model import GroundedModel, ground
from visual_ground.saving import WEIGHTS_FILE, read_tensors
from visual_ground.sharing import SavedAdapter
from visual_ground.training import GroundingTrainer, GroundingTrainingArguments

if TYPE_CHECKING:
    from visual_ground.vision import VisionEncoder

SHARED = ("image_to_retrieval.weight", "image_to_retrieval.bias", "feature_mean", "feature_std", "logit_scale")
CAPTIONS_AT_ONCE = 32


@dataclass(frozen=True)
class Refinement:
    """The few steps of training after the closed form.

    Args:
        steps: optimizer steps; 0 leaves the closed form as it is.
        batch_size: anchors in each.
        learning_rate: of the first step; falls to zero along a cosine.
        captioning_fraction: the part of each batch that is captioned.
        seed: of the order.
    """

    steps: int = 10
    batch_size: int = 128
    learning_rate: float = 3e-4
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
        return cls(model.config, tensors, model.vision, model.anchors)

    @classmethod
    def load(cls, adapter: str | os.PathLike, **hub_options: Any) -> ImageSide:
        """Take it from a saved adapter, without its language model.

        Args:
            adapter: local folder or Hub id.
            hub_options: as in `GroundedModel.from_pretrained`.

        Raises:
            GroundingFileError: no such adapter, or a damaged one.
        """
        saved = SavedAdapter.find(adapter, HubOptions.of(hub_options))
        if missing := [name for name in SHARED if name not in saved.shapes]:
            raise GroundingFileError(f"{str(adapter)!r} is no adapter: it has no tensors {missing}. Fetch it again.")
        wanted = {name: torch.empty(shape, device="meta") for name, shape in saved.shapes.items()}
        tensors = read_tensors(saved.folder / WEIGHTS_FILE, wanted)
        vision = saved.record.names["vision_encoder"]
        shared = {name: tensors[name] for name in SHARED}
        return cls(saved.record.config, shared, vision, Anchors.find(saved.folder))

    def embed(self, features: Tensor) -> Tensor:
        """Map image features (n, f) to unit vectors (n, q), as every model with this image side does."""
        scaled = (features.float().cpu() - self.tensors["feature_mean"].cpu()) / self.tensors["feature_std"].cpu()
        weight, bias = (self.tensors[f"image_to_retrieval.{part}"].cpu() for part in ("weight", "bias"))
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
        refinement: the training after the closed form.
        changes: fields of the config that are to differ, such as `text_layers`; `retrieval_dim` and `units` cannot.

    Returns:
        The grounded model, trainable; its image side is frozen.

    Raises:
        GroundingValueError: no anchors, anchors of another encoder, or a change that would make indexes invalid.
        GroundingTypeError, GroundingStateError: as in `ground`.

    Example:
        >>> model = transfer(ImageSide.load("me/adapter"), "google/gemma-3-270m")  # doctest: +SKIP
    """
    anchors = source.anchors if anchors is None else anchors
    width = source.tensors["image_to_retrieval.weight"].shape[1]
    if anchors is None:
        raise GroundingValueError("This adapter was published without anchors. Pass image-caption pairs of your own.")
    if anchors.features.shape[1] != width:
        raise GroundingValueError(
            f"The anchors have {anchors.features.shape[1]} features per image, the adapter reads {width}. Make them "
            "with the adapter's own vision encoder."
        )
    if fixed := sorted({"retrieval_dim", "units"} & set(changes)):
        raise GroundingValueError(f"A transfer cannot change {fixed}: image indexes would not be valid any more.")
    model = ground(lm, source.vision, tokenizer, config=replace(source.config, **changes))
    try:
        if model.vision.feature_dim != width:
            raise GroundingValueError(
                f"The vision encoder gives {model.vision.feature_dim} features, the adapter reads {width}. Pass the "
                "encoder that it was trained with."
            )
        _copy_image_side(model.adapter, source)
        fit_text_layers(model, source, anchors)
        fit_image_rows(model, anchors)
        _refine(model, anchors, refinement or Refinement())
    except BaseException:
        model.unground()
        raise
    model.anchors = anchors
    return model


@torch.no_grad()
def _copy_image_side(adapter: Adapter, source: ImageSide) -> None:
    state = adapter.state_dict()
    for name in SHARED:
        state[name].copy_(source.tensors[name])
    adapter.image_to_retrieval.requires_grad_(False)


@torch.no_grad()
def caption_states(model: GroundedModel, texts: tuple[str, ...]) -> Tensor:
    """Return what the text layers read after each caption, (n, sum of the layers' widths); captions run by length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for start in range(0, len(order), CAPTIONS_AT_ONCE):
        some = [texts[i] for i in order[start : start + CAPTIONS_AT_ONCE]]
        parts.append(torch.cat(model.adapter.scale_states(model.text_states(some)), dim=-1).cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


@torch.no_grad()
def fit_text_layers(model: GroundedModel, source: ImageSide, anchors: Anchors) -> None:
    """Set the text layers by ridge regression from the LM's states at `[RET]` to the anchors' image vectors."""
    fitted = fit_states(caption_states(model, anchors.texts), source.embed(anchors.features), anchors.images)
    layers = model.adapter.text_to_retrieval
    for layer, weight in zip(layers, fitted.weight.split(list(model.facts.text_dims), dim=1), strict=True):
        layer.weight.copy_(weight)
        layer.bias.zero_()
    layers[0].bias.copy_(fitted.bias)


def fit_states(states: Tensor, vectors: Tensor, images: Tensor) -> LinearMap:
    """Return the ridge layer from states (n, i) to the vectors (m, q) of their images.

    Its penalty is the one that ranks the right image best among all, for captions whose images it was not fitted to.

    Args:
        states: what the text layers read.
        vectors: unit vectors of the anchors' images.
        images: (n,), for each state its image.
    """
    middle, spread = _spread(states)
    even = (states - middle) / spread

    def score(layer: LinearMap, held: Tensor) -> float:
        """Return minus the mean log rank of the right image among all anchors."""
        scores = F.normalize(layer(even[held]), dim=-1) @ vectors.T
        own = scores.gather(1, images[held][:, None])
        return -float((scores >= own).sum(1).double().log().mean())

    return ridge(even, vectors[images], images, score).after(middle, spread)


def _spread(columns: Tensor) -> tuple[Tensor, Tensor]:
    return columns.mean(0), columns.std(0, correction=0) + 1e-6


@torch.no_grad()
def fit_image_rows(model: GroundedModel, anchors: Anchors) -> None:
    """Set the image rows by ridge regression from image features to the mean embedding of their captions' tokens."""
    adapter = model.adapter
    device = embedding_device(model.lm)
    embedding = model.lm.get_input_embeddings()
    targets = []
    with model.disable_adapter():
        for text in anchors.texts:
            words = text.strip().rstrip(".") or text.strip()
            ids = torch.tensor([model.encoder.encode_text(f" {words}")], device=device)
            targets.append(embedding(ids)[0].float().mean(0))
    spread = adapter.embedding_std.clamp_min(1e-6)
    rows = (torch.stack(targets).to(spread) - adapter.embedding_mean) / spread
    features = adapter.standardise(anchors.features.to(rows.device))[anchors.images.to(rows.device)]
    middle, deviation = _spread(features)
    fitted = ridge((features - middle) / deviation, rows, anchors.images).after(middle, deviation)
    adapter.image_to_rows.weight.copy_(fitted.weight.repeat(model.config.num_visual_tokens, 1))
    adapter.image_to_rows.bias.copy_(fitted.bias.repeat(model.config.num_visual_tokens))


def _refine(model: GroundedModel, anchors: Anchors, refinement: Refinement) -> None:
    if not refinement.steps:
        return
    pairs = zip(anchors.features.float(), anchors.captions, strict=True)
    rows = [{"image_features": feature, "caption": list(captions)} for feature, captions in pairs]
    with tempfile.TemporaryDirectory() as folder:
        args = GroundingTrainingArguments(
            output_dir=folder,
            max_steps=refinement.steps,
            per_device_train_batch_size=min(refinement.batch_size, len(anchors)),
            learning_rate=refinement.learning_rate,
            captioning_fraction=refinement.captioning_fraction,
            seed=refinement.seed,
            concat_captions_prob=0.0,
            lr_scheduler_type="cosine",
            save_strategy="no",
            cache_features=False,
            fit_start=False,
            disable_tqdm=True,
            use_cpu=embedding_device(model.lm).type == "cpu",
        )
        trainer = GroundingTrainer(model, args, rows)
        trainer.remove_callback(PrinterCallback)  # it prints, which a library must not
        trainer.train()
