"""`VisionEncoder`: any vision model as one frozen module from pixels (n, c, h, w) to features (n, f)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from visual_ground.errors import GroundingError, GroundingTypeError, GroundingValueError
from visual_ground.vision.entry_point import entry_of, has_method, parameter_names
from visual_ground.vision.images import ImageLike, Images, is_single
from visual_ground.vision.pooling import patches, pool
from visual_ground.vision.preprocessing import Preprocessing

# Images that a CPU runs at once: the activations of more leave its caches. Convolutions take half the time of 64 at
# once and less, transformers the same (benchmarks/vision_batches.py).
CPU_IMAGES = 8


class VisionEncoder(nn.Module):
    """A frozen encoder with its preprocessing and the width of its features.

    Features are one vector per image. With `num_patch_tokens` = k, it holds the pooled features and then k parts of
    the picture, `patch_dim` each: f = `pooled_dim` + k * `patch_dim`.

    Args:
        model: a transformers, open_clip or timm model, or any module from pixels (n, c, h, w) to features (n, f).
        image_processor: maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`.
        name: the string it was loaded by, or None.
        feature_dim: f, if it is known; found by running an image if None.
        num_patch_tokens: k parts of the picture besides the pooled features; 0 for none.
        use_pooler: False takes the mean of the tokens, for a model whose `pooler_output` is untrained.

    Raises:
        GroundingTypeError: it reads something else than images, or returns no features of them.
        GroundingValueError: its features have no fixed width, or differ each time.

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
        self._mask_ratio: float | None = None
        try:
            with evaluating(model):
                self._refuse_video_models()
                self.preprocessing = Preprocessing(image_processor, entry_of(model), type(model).__name__)
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
        self.feature_dim = self.pooled_dim + num_patch_tokens * self.patch_dim

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixels (n, c, h, w) to features (n, f); no gradient ever flows here."""
        on_cpu = next(self.model.parameters(), pixel_values).device.type == "cpu"
        runs = pixel_values.split(CPU_IMAGES) if on_cpu and len(pixel_values) else [pixel_values]
        return torch.cat([self._features(pixels) for pixels in runs])

    def _features(self, pixels: Tensor) -> Tensor:
        pooled, parts = self._run(pixels)
        return pooled if parts is None else torch.cat([pooled, parts.flatten(1).to(pooled)], dim=1)

    def preprocess(self, images: Sequence[ImageLike]) -> Tensor:
        """Turn images into pixels (n, c, h, w)."""
        return self.preprocessing(images)

    def encode(self, images: Images, batch_size: int = 32) -> Tensor:
        """Turn images into features, batch by batch.

        Args:
            images: n images in any form that `to_rgb` reads, or one alone; an iterator is read batch by batch too.
            batch_size: images that are decoded and run at once.

        Returns:
            (n, f), on the encoder's device.

        Raises:
            GroundingValueError: no images, batch_size below 1, or an image that cannot be read.
            GroundingTypeError: an entry that is no image in any form.
        """
        if batch_size < 1:
            raise GroundingValueError(f"batch_size must be at least 1, got {batch_size}.")
        several: Any = [images] if is_single(images) else images
        iterator: Iterator[Any] = iter(several)
        batches = iter(lambda: list(islice(iterator, batch_size)), [])
        features = [self(self.preprocess(batch)) for batch in batches]
        if not features:
            raise GroundingValueError("There are no images to embed; give at least one.")
        return torch.cat(features)

    def release(self) -> None:
        """Give the model's config back as it was."""
        if self._mask_ratio is not None:
            entry_of(self.model).config.mask_ratio = self._mask_ratio
            self._mask_ratio = None

    # Running the model.

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return pooled features (n, f) and, if k is not 0, parts of the picture (n, k, patch_dim)."""
        model: Any = self.model
        k = self.num_patch_tokens
        reference = next(model.parameters(), None)
        if reference is not None:
            pixels = pixels.to(reference.device, reference.dtype if pixels.is_floating_point() else None)
        if has_method(model, "encode_image"):
            return pool(model.encode_image(pixels)), self._open_clip_parts(pixels) if k else None
        if has_method(model, "forward_features") and has_method(model, "forward_head"):
            tokens = model.forward_features(pixels)
            # A few timm models return a list, one tensor for each of their branches.
            is_sequence = isinstance(tokens, Tensor) and tokens.dim() == 3
            num_prefix = getattr(model, "num_prefix_tokens", None) if is_sequence else None
            return pool(model.forward_head(tokens, pre_logits=True)), patches(tokens, k, num_prefix) if k else None
        entry = entry_of(model)
        by_name = self.preprocessing.pixels_key in parameter_names(entry)
        output = entry(**self.preprocessing.model_inputs(pixels)) if by_name else entry(pixels)
        return pool(output, self.use_pooler), patches(output, k) if k else None

    def _open_clip_parts(self, pixels: Tensor) -> Tensor:
        visual: Any = self.model.visual
        if not has_method(visual, "forward_intermediates"):
            raise GroundingValueError(
                f"{type(visual).__name__} gives no patches: it has no forward_intermediates. Set visual_tokens_from="
                '"pooled", or install an open_clip that has it.'
            )
        output = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True)
        return patches(output["image_intermediates"][-1], self.num_patch_tokens)

    # Probing it, once.

    def _refuse_video_models(self) -> None:
        """Raise for models of video clips, whose own errors would not say what is wrong."""
        entry = entry_of(self.model)
        frames = getattr(getattr(entry, "config", None), "num_frames", None)
        reads_clips = isinstance(frames, int) and frames > 1
        if reads_clips or (has_method(self.model, "get_video_features") and entry is self.model):
            clips = f"clips of {frames} frames" if frames else "clips of frames"
            raise GroundingTypeError(
                f"{type(self.model).__name__} reads videos: it gives features of {clips}, not of images. Pass an image "
                "encoder."
            )

    @torch.no_grad()
    def _probe(self) -> tuple[int, int]:
        """Return the widths of the pooled features and of the patches; the features must be the same each time."""
        # Noise, because the patches of a grey image look alike: masking some at random would not show.
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        pixels = self.preprocess([Image.fromarray(noise)])
        if not _close(self(pixels), self(pixels)):
            self._disable_random_masking(pixels)
        if not _close(self(pixels), self(pixels)):
            raise GroundingValueError(
                f"{type(self.model).__name__} gives other features for the same image each time, in evaluation mode: "
                "it masks or drops at random. Set its mask ratio or dropout to 0, or wrap it in a module that does."
            )
        pooled, parts = self._run(pixels)
        return pooled.shape[1], 0 if parts is None else parts.shape[2]

    def _disable_random_masking(self, pixels: Tensor) -> None:
        """Let a masked autoencoder, which hides patches at random also in evaluation mode, see whole images."""
        entry = entry_of(self.model)
        config: Any = getattr(entry, "config", None)
        if not getattr(config, "mask_ratio", 0):
            return
        self._mask_ratio, config.mask_ratio = config.mask_ratio, 0.0
        order = getattr(entry(pixels.to(next(entry.parameters()))), "ids_restore", None)
        if order is not None and "noise" in parameter_names(entry):
            # It sorts patches by noise even if it keeps them all; rising noise leaves them in order.
            self.preprocessing.extras["noise"] = torch.arange(order.shape[1], dtype=torch.float32).unsqueeze(0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block a model is in evaluation mode; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _close(one: Tensor, other: Tensor) -> bool:
    # Kernels that add in another order differ by less than a thousandth; random masking by far more.
    absolute = 1e-3 * float(one.abs().nan_to_num(0, 0).max())
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=absolute, equal_nan=True)
