"""An adapter moves to another language model: the image side stays as it is, the rest is fitted to the new LM.

The layer image -> retrieval does not depend on the LM, so it is copied and kept frozen, and every index that was built
with the old model is valid for the new one. What meets the LM is fitted from anchors: the text layers and the images'
input rows in closed form, `[RET]`'s row by a convex descent that the LM takes no part in; a few steps of the normal
training may follow.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
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
from visual_ground.training import ExampleCollator, GroundingTrainer, GroundingTrainingArguments
from visual_ground.training.fitted_ret import fit_ret
from visual_ground.training.prefixes import Spoken, plain_states
from visual_ground.training.shortcuts import choose_prefixes

if TYPE_CHECKING:
    from visual_ground.vision import VisionEncoder

SHARED = ("image_to_retrieval.weight", "image_to_retrieval.bias", "feature_mean", "feature_std", "logit_scale")
CAPTIONS_AT_ONCE = 128
CAPTION_LENGTH = 64
KEPT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Refinement:
    """A few steps of training after the closed form.

    Args:
        steps: optimizer steps.
        batch_size: anchors in each.
        learning_rate: of the first step; falls to zero along a cosine.
        rows_learning_rate: that of the layer from images to input rows.
        captioning_fraction: the part of each batch that is captioned.
        seed: of the order.
    """

    steps: int = 5
    batch_size: int = 32
    learning_rate: float = 3e-5
    rows_learning_rate: float = 2e-5
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
        refinement: training after the closed form; none where None, which costs the least and finds as much
            (benchmarks/transfer).
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
        if refinement is not None:
            _refine(model, anchors, refinement)
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
def caption_states(model: GroundedModel, texts: Sequence[str], fit: bool = False) -> Tensor:
    """Return what the text layers read after each caption, (n, sum of the layers' widths); equal captions run once.

    Args:
        model: the grounded model.
        texts: n captions.
        fit: first turn `[RET]`'s row to where these captions are likely to be followed by it (`fitted_ret`), where the
            LM can run captions up to `[RET]` and go on from there.
    """
    different = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    places, texts = [different[text] for text in texts], list(different)
    collate = ExampleCollator(model, CAPTION_LENGTH, concat_captions_prob=0.0)
    starts = range(0, len(texts), CAPTIONS_AT_ONCE)
    batches = [collate.texts([{"caption": text} for text in texts[i : i + CAPTIONS_AT_ONCE]]) for i in starts]
    device = embedding_device(model.lm)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    store = choose_prefixes(model, batches[0], KEPT_BYTES, packed=True)
    if store and fit:
        fit_ret(model.adapter, Spoken.joined([store.spoken(batch) for batch in batches]))
    parts = [store.states(batch) if store else plain_states(model, batch) for batch in batches]
    return torch.cat([torch.cat(model.adapter.scale_states(states), dim=-1).cpu() for states in parts])[places]


@torch.no_grad()
def fit_text_layers(model: GroundedModel, source: ImageSide, anchors: Anchors) -> None:
    """Set the text layers by ridge regression from the LM's states at `[RET]` to the anchors' image vectors."""
    states = caption_states(model, anchors.texts, fit=True)
    fitted = fit_states(states, source.embed(anchors.features), anchors.images, anchors.groups)
    layers = model.adapter.text_to_retrieval
    for layer, weight in zip(layers, fitted.weight.split(list(model.facts.text_dims), dim=1), strict=True):
        layer.weight.copy_(weight)
        layer.bias.zero_()
    layers[0].bias.copy_(fitted.bias)


def fit_states(states: Tensor, vectors: Tensor, images: Tensor, groups: Tensor | None = None) -> LinearMap:
    """Return the ridge layer from states (n, i) to the vectors (m, q) of their images.

    Its penalty is the one that ranks the right image best among all, for captions whose images it was not fitted to.

    Args:
        states: what the text layers read.
        vectors: unit vectors of the anchors' images.
        images: (n,), for each state its image.
        groups: (n,), equal where two states are about the same thing; by image where None.
    """
    middle, spread = _spread(states)
    even = (states - middle) / spread

    def score(layer: LinearMap, held: Tensor) -> float:
        """Return minus the mean log rank of the right image among all anchors."""
        scores = F.normalize(layer(even[held]), dim=-1) @ vectors.T
        own = scores.gather(1, images[held][:, None])
        return -float((scores >= own).sum(1).double().log().mean())

    return ridge(even, vectors[images], images if groups is None else groups, score).after(middle, spread)


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
    fitted = ridge((features - middle) / deviation, rows, anchors.groups).after(middle, deviation)
    adapter.image_to_rows.weight.copy_(fitted.weight.repeat(model.config.num_visual_tokens, 1))
    adapter.image_to_rows.bias.copy_(fitted.bias.repeat(model.config.num_visual_tokens))


def _refine(model: GroundedModel, anchors: Anchors, refinement: Refinement) -> None:
    pairs = zip(anchors.features.float(), anchors.captions, strict=True)
    rows = [{"image_features": feature, "caption": list(captions)} for feature, captions in pairs]
    with tempfile.TemporaryDirectory() as folder:
        args = GroundingTrainingArguments(
            output_dir=folder,
            max_steps=refinement.steps,
            per_device_train_batch_size=min(refinement.batch_size, len(anchors)),
            learning_rate=refinement.learning_rate,
            rows_learning_rate=refinement.rows_learning_rate,
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
