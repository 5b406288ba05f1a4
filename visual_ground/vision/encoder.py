"""Vision encoders: whatever is given becomes one frozen module from pixels (n, c, h, w) to features (n, f)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from visual_ground.errors import GroundingError, GroundingTypeError, GroundingValueError
from visual_ground.vision.images import to_rgb
from visual_ground.vision.pooling import patches, pool

# Where a processor keeps an image's own shape, images are made squares of at least this side first.
SQUARE_SIDE = 512


class VisionEncoder(nn.Module):
    """A frozen encoder with its preprocessing and the width of its features.

    Features are one row per image. With `num_patch_tokens` = k, a row holds the pooled features and then k parts of
    the picture, `patch_dim` each: f = `pooled_dim` + k * `patch_dim`.

    Args:
        model: a transformers, open_clip or timm model, or any module from pixels (n, c, h, w) to features (n, f).
        image_processor: maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`.
        name: the string it was loaded by, or None.
        feature_dim: f, where it is known; found by running an image where None.
        num_patch_tokens: k parts of the picture that are wanted besides the pooled features; 0 for none.
        use_pooler: False takes the mean of the tokens where `pooler_output` is not to be trusted.

    Raises:
        GroundingTypeError: it reads or returns something else than images' features.
        GroundingValueError: no features of a fixed width can be got from it, or other ones each time.

    Example:
        >>> tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> pixels = lambda images, return_tensors: {"pixel_values": torch.zeros(len(images), 3, 2, 2)}
        >>> VisionEncoder(tower, pixels).feature_dim
        5
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor: Any,
        name: str | None = None,
        feature_dim: int | None = None,
        num_patch_tokens: int = 0,
        use_pooler: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.image_processor, self.name = model, image_processor, name
        self.num_patch_tokens, self.use_pooler = num_patch_tokens, use_pooler
        self.square_side: int | None = None
        self.pixels_key = "pixel_values"
        self._extras: dict[str, Tensor] = {}
        self._mask_ratio: float | None = None
        was_training = model.training
        model.eval()
        try:
            self._refuse_other_senses()
            self._learn_preprocessing()
            self.pooled_dim, self.patch_dim = self._probe() if feature_dim is None else (feature_dim, 0)
        except GroundingError:
            self.release()
            raise
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            self.release()
            raise GroundingValueError(
                f"{type(model).__name__} gave no features for an image ({type(error).__name__}: {error}). A "
                "vision encoder maps pixels (n, c, h, w) to features (n, f); give an image_processor that fits it."
            ) from error
        finally:
            model.train(was_training)
        self.feature_dim = self.pooled_dim + num_patch_tokens * self.patch_dim

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixels (n, c, h, w) to features (n, f); no gradient ever flows here."""
        pooled, parts = self._read(pixel_values)
        return pooled if parts is None else torch.cat([pooled, parts.flatten(1).to(pooled)], dim=1)

    def preprocess(self, images: Sequence[Any]) -> Tensor:
        """Turn PIL images or paths into pixels (n, c, h, w)."""
        return self._process([to_rgb(image) for image in images])[self.pixels_key]

    def release(self) -> None:
        """Give the model's config back as it was."""
        if self._mask_ratio is not None:
            entry_of(self.model).config.mask_ratio = self._mask_ratio
            self._mask_ratio = None

    # Asking the model.

    def _read(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return pooled features (n, f), and, where they are wanted, parts (n, k, patch_dim)."""
        model, k = self.model, self.num_patch_tokens
        reference = next(model.parameters(), None)
        if reference is not None:
            pixels = pixels.to(reference.device, reference.dtype if pixels.is_floating_point() else None)
        if _has(model, "encode_image"):
            return pool(model.encode_image(pixels)), self._open_clip_parts(pixels) if k else None
        if _has(model, "forward_features") and _has(model, "forward_head"):
            tokens = model.forward_features(pixels)
            flat = isinstance(tokens, Tensor) and tokens.dim() == 3  # Some give a list, one for each of their branches.
            prefix = getattr(model, "num_prefix_tokens", None) if flat else None
            return pool(model.forward_head(tokens, pre_logits=True)), patches(tokens, k, prefix) if k else None
        entry = entry_of(model)
        if self.pixels_key not in _parameters(entry):
            output = entry(pixels)
        else:
            extras = {
                name: value.to(pixels.device).expand(len(pixels), *value.shape[1:])
                for name, value in self._extras.items()
            }
            output = entry(**{self.pixels_key: pixels, **extras})
        return pool(output, self.use_pooler), patches(output, k) if k else None

    def _open_clip_parts(self, pixels: Tensor) -> Tensor:
        visual: Any = self.model.visual
        if not _has(visual, "forward_intermediates"):
            raise GroundingValueError(
                f"{type(visual).__name__} gives no patches: it has no forward_intermediates. Set visual_tokens_from="
                '"pooled", or install an open_clip that has it.'
            )
        found = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True)
        return patches(found["image_intermediates"][-1], self.num_patch_tokens)

    # Finding out, once.

    def _refuse_other_senses(self) -> None:
        """Raise for models of clips, text or sound, whose own errors would not say so."""
        entry, kind = entry_of(self.model), type(self.model).__name__
        frames = getattr(getattr(entry, "config", None), "num_frames", None)
        if (isinstance(frames, int) and frames > 1) or (_has(self.model, "get_video_features") and entry is self.model):
            clips = f"clips of {frames} frames" if frames else "clips of frames"
            raise GroundingTypeError(
                f"{kind} reads videos: it gives features of {clips}, not of images. Pass an image encoder."
            )

    def _learn_preprocessing(self) -> None:
        """Learn which of the processor's tensors the model takes, and whether it keeps images' own shapes."""
        wide, tall = (self._process([_grey(*size)]) for size in ((96, 64), (48, 80)))
        entry = entry_of(self.model)
        takes = _parameters(entry)
        main = getattr(entry, "main_input_name", "pixel_values")
        if "pixel_values" not in wide and main in wide:
            self.pixels_key = main
        elif "pixel_values" not in wide:
            raise GroundingTypeError(
                f"{type(self.image_processor).__name__} gives {sorted(wide)}, and {type(self.model).__name__} reads "
                f'{main!r}. Pass an image_processor that maps a list of PIL images to {{"pixel_values": (n, c, h, w)}}.'
            )
        elif main != "pixel_values" and hasattr(entry, "main_input_name") and "pixel_values" not in takes:
            raise GroundingTypeError(
                f"{type(self.model).__name__} reads {main!r}, not pixels: it is no image encoder. Pass a model that "
                "maps pixel_values (n, c, h, w) to features, or the vision tower of this one."
            )
        used = {self.pixels_key, *(name for name in takes if isinstance(wide.get(name), Tensor))}
        if any(wide[name].shape != tall[name].shape or _differ(name, self, wide, tall) for name in used):
            self.square_side = SQUARE_SIDE
            pixels = self._process([_grey(64, 64)])[self.pixels_key]
            self.square_side = max(SQUARE_SIDE, pixels.shape[-1]) if pixels.dim() == 4 else SQUARE_SIDE
        processed = self._process([_grey(64, 64)])
        pixels = processed[self.pixels_key]
        if len(pixels) != 1 or pixels.dim() > 4:
            raise GroundingTypeError(
                f"{type(self.image_processor).__name__} makes {tuple(pixels.shape)} of one image: frames, tiles or "
                "loose patches, where (1, c, h, w) is needed. Pass an image_processor= that makes one entry per image."
            )
        self._extras = {name: processed[name] for name in used - {self.pixels_key}}

    def _process(self, images: list[Image.Image]) -> Any:
        if self.square_side is not None:
            side = self.square_side
            images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
        return self.image_processor(images, return_tensors="pt")

    @torch.no_grad()
    def _probe(self) -> tuple[int, int]:
        """Return the widths of the pooled features and of the patches, of an image that is read twice."""
        # Of noise: the parts of a grey image look alike, so that hiding some would not show.
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        pixels = self._process([Image.fromarray(noise)])[self.pixels_key]
        if not _same(self(pixels), self(pixels)):
            self._mask_nothing(pixels)
        if not _same(self(pixels), self(pixels)):
            raise GroundingValueError(
                f"{type(self.model).__name__} gives other features for the same image each time, in evaluation mode: "
                "it masks or drops at random. Set its mask ratio or dropout to 0, or wrap it in a module that does."
            )
        pooled, parts = self._read(pixels)
        return pooled.shape[1], 0 if parts is None else parts.shape[2]

    def _mask_nothing(self, pixels: Tensor) -> None:
        """Let an encoder that hides patches at random, as it was trained, see whole images in order."""
        entry = entry_of(self.model)
        config: Any = getattr(entry, "config", None)
        if not getattr(config, "mask_ratio", 0):
            return
        self._mask_ratio, config.mask_ratio = config.mask_ratio, 0.0
        order = getattr(entry(pixels.to(next(entry.parameters()))), "ids_restore", None)
        if order is not None and "noise" in _parameters(entry):
            self._extras["noise"] = torch.arange(order.shape[1], dtype=torch.float32).unsqueeze(0)


def entry_of(model: nn.Module) -> Any:
    """Return what is called with pixels: image features where a whole model offers them, else the tower's forward."""
    if _has(model, "get_image_features"):
        return _ImageFeatures(model)
    base = getattr(model, "base_model", model)
    choices = [base if isinstance(base, nn.Module) else model, model]
    if _has(model, "get_encoder"):
        choices.append(model.get_encoder(modality="image"))
    seeing = [choice for choice in choices if "pixel_values" in _parameters(choice)]
    return next((choice for choice in seeing if "input_ids" not in _parameters(choice)), (seeing or choices)[0])


class _ImageFeatures:
    """A whole text-and-image model, called for its image features only."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.forward = model, model.config, model.get_image_features
        self.main_input_name = "pixel_values"

    def __call__(self, **inputs: Tensor) -> Any:
        return self.model.get_image_features(**inputs)

    def parameters(self) -> Any:
        return self.model.parameters()


def _has(model: Any, method: str) -> bool:
    return callable(getattr(model, method, None))


def _parameters(entry: Any) -> set[str]:
    return set(inspect.signature(entry.forward).parameters)


def _grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def _same(one: Tensor, other: Tensor) -> bool:
    room = 1e-3 * float(one.abs().nan_to_num(0, 0).max())
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=room, equal_nan=True)


def _differ(name: str, vision: VisionEncoder, wide: Any, tall: Any) -> bool:
    """Return whether a tensor that goes with the pixels depends on the image's shape."""
    return name != vision.pixels_key and not torch.equal(wide[name], tall[name])


class TransformProcessor:
    """A per-image transform, as open_clip and timm have them, with the interface of a transformers image processor."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        """Return `{"pixel_values": (n, c, h, w)}`."""
        return {"pixel_values": torch.stack([self.transform(image) for image in images])}
