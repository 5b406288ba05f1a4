"""From what encoders return to pooled features (n, f), or to patches averaged to k parts of the picture."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.errors import GroundingTypeError, GroundingValueError

# Vision transformers have one class token and a few registers (DINOv2 has 4). More than this many tokens before a
# square are therefore no prefix, and the tokens form no grid.
MAX_PREFIX_TOKENS = 16


def pool(output: Any, use_pooler: bool = True) -> Tensor:
    """Return pooled features (n, f) from whatever an encoder returned.

    Taken in this order: `image_embeds`, `pooler_output`, else the mean of `last_hidden_state`, or of the last of
    `feature_maps`, over its tokens or over height and width.

    Args:
        output: a tensor, a list of one tensor per image, or a transformers output.
        use_pooler: False passes over `pooler_output`.

    Raises:
        GroundingTypeError: nothing in it is features of images.

    Example:
        >>> pool(torch.ones(2, 7, 5)).shape, pool(torch.ones(2, 5, 3, 3)).shape
        (torch.Size([2, 5]), torch.Size([2, 5]))
    """
    names = ["image_embeds", *(["pooler_output"] if use_pooler else []), "last_hidden_state"]
    features = output if isinstance(output, (Tensor, list)) else _first(output, names)
    features = _last_map(output) if features is None else features
    if isinstance(features, (list, tuple)) and features and all(isinstance(part, Tensor) for part in features):
        features = torch.stack([part.reshape(-1, part.shape[-1]).mean(0) for part in features])
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise GroundingTypeError(
            f"A vision encoder must return features (n, f), got {_describe(output)}. Pass a tower that returns a "
            "tensor, image_embeds, pooler_output or last_hidden_state."
        )
    if features.dim() == 4:
        return _channels_first(features).flatten(2).mean(-1)
    if features.dim() not in (2, 3):
        raise GroundingTypeError(
            f"A vision encoder must return features (n, f), (n, tokens, f) or (n, f, height, width), got "
            f"{tuple(features.shape)}. Features of clips of frames or of tiles cannot be read."
        )
    return features.mean(1) if features.dim() == 3 else features


def patches(output: Any, count: int, num_prefix_tokens: int | None = None) -> Tensor:
    """Average an encoder's patches to `count` parts of the picture, in reading order.

    The picture is cut into a x b rectangles, as nearly square as `count` = a * b allows; tokens that form no grid are
    cut into runs of equal length.

    Args:
        output: a tensor, or a transformers output with `last_hidden_state`: (n, tokens, f) or (n, f, height, width).
        count: k.
        num_prefix_tokens: class and register tokens before the patches; None takes those in excess of a square grid.

    Returns:
        (n, k, f).

    Raises:
        GroundingValueError: pooled features only, or fewer patches than k.

    Example:
        >>> patches(torch.arange(5.0).view(1, 5, 1), 2).flatten().tolist()  # a class token; left and right of 2 x 2
        [2.0, 3.0]
    """
    tokens = output if isinstance(output, Tensor) else _first(output, ["last_hidden_state"])
    tokens = _last_map(output) if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.dim() not in (3, 4):
        received = tuple(tokens.shape) if isinstance(tokens, Tensor) else _describe(output)
        raise GroundingValueError(
            f'This encoder gives no patches: visual_tokens_from="patches" needs (n, tokens, f) or (n, f, height, '
            f'width), got {received}. Set visual_tokens_from="pooled".'
        )
    grid = _channels_first(tokens) if tokens.dim() == 4 else _as_grid(tokens, num_prefix_tokens)
    if grid.dim() == 4 and (shape := _nearly_square(count, grid.shape[-2], grid.shape[-1])):
        return F.adaptive_avg_pool2d(grid, shape).flatten(2).transpose(1, 2)
    sequence = grid.flatten(2)
    if sequence.shape[-1] < count:
        raise GroundingValueError(
            f"This encoder has {sequence.shape[-1]} patches, fewer than num_visual_tokens={count}. Ask for fewer."
        )
    return F.adaptive_avg_pool1d(sequence, count).transpose(1, 2)


def _as_grid(tokens: Tensor, num_prefix_tokens: int | None) -> Tensor:
    """Return tokens (n, t, f) as (n, f, side, side), or as (n, f, t) if they form no square."""
    total = tokens.shape[1]
    prefix = total - math.isqrt(total) ** 2 if num_prefix_tokens is None else num_prefix_tokens
    side = math.isqrt(total - prefix)
    if side * side != total - prefix or prefix > MAX_PREFIX_TOKENS:
        return tokens[:, num_prefix_tokens or 0 :].transpose(1, 2)
    return torch.unflatten(tokens[:, prefix:].transpose(1, 2), -1, (side, side))


def _nearly_square(count: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the most nearly square (a, b), a * b = count, that a grid of height x width can be averaged to."""
    pairs = [(a, count // a) for a in range(1, count + 1) if count % a == 0]
    fitting = [(a, b) for a, b in pairs if a <= height and b <= width]
    return min(fitting, key=lambda pair: abs(pair[0] - pair[1]), default=None)


def _channels_first(features: Tensor) -> Tensor:
    """Return (n, f, height, width); (n, height, width, f) is recognised by its two equal sides."""
    _, first, second, last = features.shape
    if first == second != last:
        return features.permute(0, 3, 1, 2)
    if second != last and first < min(second, last):
        raise GroundingTypeError(
            f"A vision encoder must return (n, f, height, width), and in {tuple(features.shape)} the axis of the "
            "features cannot be told, as with tiles or crops. Pool them in a module of your own."
        )
    return features


def _first(output: Any, names: list[str]) -> Any:
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


def _last_map(output: Any) -> Any:
    maps = getattr(output, "feature_maps", None)
    return maps[-1] if isinstance(maps, (list, tuple)) and maps else None


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"{output.dtype} numbers of shape {tuple(output.shape)}"
    names = list(output) if hasattr(output, "keys") else []
    return type(output).__name__ + (f" with {', '.join(map(str, names))}" if names else "")
