"""What is saved with an adapter: its shapes and conventions.

The letters used for dimensions in every docstring of this package:

    b  batch                        d  width of the language model's input embedding
    s  sequence positions           h  width of what the language model's output head reads
    v  rows of the LM's vocabulary  f  width of the vision encoder's features
    k  visual tokens per image      q  width of the retrieval space
    n  images of one call
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from visual_ground.errors import GroundingValueError

FORMAT_VERSION = 1
# Widths past this are a damaged file, not a setting.
MOST = 65536
_KINDS: dict[str, type] = {
    "ret_token": str,
    "sink_token": str,
    "caption_prompt": str,
    "image_prompt": str,
    "units": str,
}
_KINDS |= {"image_first": bool, "mask_spare_columns": bool}


@dataclass(frozen=True)
class GroundingConfig:
    """The settings that an adapter is built with and saved with.

    Args:
        num_visual_tokens: k, input rows per image, 1 to 65536.
        retrieval_dim: q, width of the space in which text and images are compared, 1 to 65536.
        text_layers: hidden states that are mapped into the retrieval space and summed. -1 is what the output head
            reads; other numbers index transformers' `hidden_states` tuple (0 is the input of the first layer).
        ret_token: the text of the retrieval token; the tokenizer must not have it.
        sink_token: text put before every caption in training and before every `embed_text` prompt, so that no caption
            starts its sequence. None takes the tokenizer's BOS, or else its EOS.
        caption_prompt: text between the sink token and a caption in retrieval.
        image_prompt: the same when captioning; "{image}" stands for the image. It matters how it reads: in words that
            make an LM say again what the image's rows say, captioning is learnt many times sooner.
        image_first: put the images that open a sequence before the sink token, as published, and not after it.
        units: "lm" writes rows in units of the LM's own embedding (its mean and spread), standardises what the linear
            layers read, and starts `[RET]` at the mean embedding; "plain" is the published method, with raw linear
            layers.
        mask_spare_columns: set the logits of ids that no token has to -inf, as if the vocabulary were trimmed to the
            tokenizer.

    Raises:
        GroundingValueError: a value outside its range.

    Example:
        >>> GroundingConfig(num_visual_tokens=4).num_visual_tokens
        4
        >>> GroundingConfig.preset("fromage").units
        'plain'
    """

    num_visual_tokens: int = 1
    retrieval_dim: int = 256
    text_layers: tuple[int, ...] = (-1,)
    ret_token: str = "[RET]"
    sink_token: str | None = None
    caption_prompt: str = "Image:"
    image_prompt: str = "Image of {image}:"
    image_first: bool = False
    units: str = "lm"
    mask_spare_columns: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text_layers, (list, tuple)) or not all(type(layer) is int for layer in self.text_layers):
            raise GroundingValueError(f"text_layers must be whole numbers, got {self.text_layers!r}.")
        object.__setattr__(self, "text_layers", tuple(self.text_layers))
        for name in ("num_visual_tokens", "retrieval_dim"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MOST:
                raise GroundingValueError(f"{name} must be a whole number from 1 to {MOST}, got {value!r}.")
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "sink_token" and value is None):
                raise GroundingValueError(f"{name} must be a {kind.__name__}, got {value!r}.")
        if not self.text_layers or len(set(self.text_layers)) != len(self.text_layers):
            raise GroundingValueError(f"text_layers must name at least one layer, each once, got {self.text_layers}.")
        if not self.ret_token or self.ret_token != self.ret_token.strip():
            raise GroundingValueError(f"ret_token must be text without outer spaces, got {self.ret_token!r}.")
        if self.image_prompt.count("{image}") != 1:
            raise GroundingValueError(f'image_prompt must have "{{image}}" in it once, got {self.image_prompt!r}.')
        if self.units not in ("lm", "plain"):
            raise GroundingValueError(f'units must be "lm" or "plain", got {self.units!r}.')

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GroundingConfig:
        """Return named settings: "fromage" is the published method.

        Args:
            name: "fromage".
            changes: fields to set otherwise.

        Raises:
            GroundingValueError: an unknown name.
        """
        if name != "fromage":
            raise GroundingValueError(f'Unknown preset {name!r}; the presets are: "fromage".')
        published = {
            "caption_prompt": "",
            "image_prompt": "{image}",
            "image_first": True,
            "units": "plain",
            "mask_spare_columns": True,
        }
        return cls(**{**published, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "text_layers": list(self.text_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GroundingConfig:
        """Build a config from `to_dict`'s result; unknown keys raise.

        Raises:
            GroundingValueError: a key that no field has, or a value outside its range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise GroundingValueError(f"Unknown config keys {unknown}; known are {sorted(known)}.")
        return cls(**values)

    @classmethod
    def from_pretrained(cls, adapter: str | os.PathLike, **hub_options: Any) -> GroundingConfig:
        """Read the settings of a saved adapter; neither its tensors nor any model is loaded.

        Args:
            adapter: local folder or Hub id.
            hub_options: revision, subfolder, token, cache_dir, local_files_only.

        Raises:
            GroundingFileError: no such adapter, or a damaged one.
            GroundingValueError: another format version, or a value outside its range.
        """
        from visual_ground.sharing import read_record

        return read_record(adapter, **hub_options).config
