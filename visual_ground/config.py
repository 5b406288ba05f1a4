"""The settings that are saved with an adapter: its shapes and conventions.

The letters used for dimensions in every docstring of this package:

    b  batch                     d  width of the language model's input embedding
    s  sequence positions        h  width of what the language model's output head reads
    v  columns of its logits     f  width of the vision encoder's features
    k  image tokens per image    q  width of the retrieval space
    n  images of one call

Pixels are (n, c, h, w), as in PyTorch: there c, h and w are channels, height and width. In a search, k is how many
entries to find. Other letters, such as m and r, are counts that the docstring explains.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.storage.hub import HubOptions, fetch_folder
from visual_ground.storage.tensors import CONFIG_FILE, read_adapter_config

# A larger width is a damaged file, or one made to exhaust the memory: the widest LMs have 16,384.
MAX_WIDTH = 65536
_CHOICES = {
    "visual_tokens_from": ("pooled", "patches"),
    "scaling": ("embedding", "none"),
    "retrieval_space": ("learned", "encoder"),
}
_TEXTS = ("ret_token", "sink_token", "caption_prompt", "image_prompt", "retrieval_prompt", *_CHOICES)
_SWITCHES = ("image_first", "mask_spare_columns", "train_lm_adapter", "tied_ret")
_KINDS: dict[str, type] = {**dict.fromkeys(_TEXTS, str), **dict.fromkeys(_SWITCHES, bool)}


@dataclass(frozen=True)
class GroundingConfig:
    """The settings that an adapter is built with and saved with.

    Args:
        num_visual_tokens: k, image tokens per image, 1 to 65536.
        visual_tokens_from: "pooled" makes an image's k tokens from its pooled features; "patches" makes each token from
            its own part of the picture, as the mean of that part's patches. The retrieval vector is made from the
            pooled features either way.
        retrieval_dim: q, width of the space in which text and images are compared, 1 to 65536.
        retrieval_space: "learned" fits a layer for images too; "encoder" takes the encoder's own image vectors, scaled
            to unit length, and fits only the text side to them, so that indexes which others have built with the same
            CLIP or SigLIP can be searched. `ground` then sets retrieval_dim to the width of these vectors.
        text_layers: hidden states that are mapped into the retrieval space and summed. -1 is what the output head
            reads; other numbers index transformers' `hidden_states` tuple (0 is the input of the first layer).
        ret_token: the text of the retrieval token; the tokenizer must not have it.
        sink_token: text put before every caption in training and before every `embed_text` prompt. Many LMs attend to
            the first token whatever it is, and this keeps a caption's first word out of that place. None: the
            tokenizer's BOS, or else its EOS.
        caption_prompt: text between the sink token and a caption in retrieval.
        image_prompt: the same in captioning; "{image}" stands for the image. Its wording matters: after two examples in
            words, an LM names what the image tokens mean, where it would else write an essay (docs/recipe.md).
        retrieval_prompt: words put after a text; the state for retrieval is read at the last of them. An LM that is
            about to say what something looks like knows more of it than one that has just ended a sentence. They are
            read on a copy of the cache, so they are no part of an answer, and the LM continues without them. Empty:
            the state is read at `[RET]` itself, as published.
        image_first: put images that open a sequence before the sink token, as published, and not after it.
        scaling: "embedding" gives image tokens the mean and standard deviation of the LM's own embedding, standardises
            the linear layers' inputs, and starts `[RET]` at the mean embedding; "none" is the published method, with
            raw linear layers.
        mask_spare_columns: set the logits of ids that no token has to -inf, as if the vocabulary were trimmed to the
            tokenizer.
        tied_ret: True: `[RET]` has one embedding for input and output if the LM's own are tied, as published. False: it
            has two, and the input embedding can be chosen so that the LM continues as if `[RET]` were not there.
        train_lm_adapter: train what PEFT has put into the LM (LoRA and the like) together with this adapter, and save
            it in the same folder; otherwise it is frozen, like the LM.

    Raises:
        GroundingValueError: a value outside its range.

    Example:
        >>> GroundingConfig(num_visual_tokens=4).num_visual_tokens
        4
        >>> GroundingConfig.preset("fromage").scaling
        'none'
    """

    num_visual_tokens: int = 1
    visual_tokens_from: str = "pooled"
    retrieval_dim: int = 256
    retrieval_space: str = "learned"
    text_layers: tuple[int, ...] = (-1,)
    ret_token: str = "[RET]"
    sink_token: str | None = None
    caption_prompt: str = "Image:"
    image_prompt: str = "Image of cat: a cat. Image of house: a house. Image of {image}:"
    retrieval_prompt: str = "It looks like a"
    image_first: bool = False
    scaling: str = "embedding"
    mask_spare_columns: bool = False
    train_lm_adapter: bool = False
    tied_ret: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_layers", _checked_layers(self.text_layers))
        for name in ("num_visual_tokens", "retrieval_dim"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_WIDTH:
                raise GroundingValueError(f"{name} must be a whole number from 1 to {MAX_WIDTH}, got {value!r}.")
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "sink_token" and value is None):
                raise GroundingValueError(f"{name} must be a {kind.__name__}, got {value!r}.")
        if not self.ret_token or self.ret_token != self.ret_token.strip():
            raise GroundingValueError(f"ret_token must be text without outer spaces, got {self.ret_token!r}.")
        _check_retrieval_prompt(self.retrieval_prompt, self.ret_token)
        if self.image_prompt.count("{image}") != 1:
            raise GroundingValueError(f'image_prompt must have "{{image}}" in it once, got {self.image_prompt!r}.')
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise GroundingValueError(f'{name} must be "{choices[0]}" or "{choices[1]}", got {value!r}.')

    @property
    def num_patch_tokens(self) -> int:
        """Parts of the picture whose features the vision encoder must give besides the pooled ones."""
        return self.num_visual_tokens if self.visual_tokens_from == "patches" else 0

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GroundingConfig:
        """Return named settings: "fromage" is the published method.

        Args:
            name: "fromage".
            changes: fields that are to differ from the preset.

        Raises:
            GroundingValueError: an unknown name.
        """
        if name != "fromage":
            raise GroundingValueError(f'Unknown preset {name!r}; the presets are: "fromage".')
        published = {
            "caption_prompt": "",
            "image_prompt": "{image}",
            "retrieval_prompt": "",
            "image_first": True,
            "scaling": "none",
            "mask_spare_columns": True,
            "tied_ret": True,
        }
        return cls(**{**published, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "text_layers": list(self.text_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GroundingConfig:
        """Build a config from `to_dict`'s result; unknown keys raise.

        Adapters that were saved before `retrieval_prompt` existed do not have it; their states are read at `[RET]`.

        Raises:
            GroundingValueError: a key that no field has, or a value outside its range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise GroundingValueError(f"Unknown config keys {unknown}; known are {sorted(known)}.")
        return cls(**{"retrieval_prompt": "", **values})

    @classmethod
    def from_pretrained(cls, adapter: str | os.PathLike[str], **hub_options: Any) -> GroundingConfig:
        """Read the settings of a saved adapter; neither its tensors nor any model is loaded.

        Args:
            adapter: local folder or Hub id.
            hub_options: revision, subfolder, token, cache_dir, local_files_only.

        Raises:
            GroundingFileError: no such adapter, or a damaged one.
            GroundingValueError: another format version, or a value outside its range.
        """
        folder = fetch_folder(adapter, (CONFIG_FILE,), HubOptions.of(hub_options))
        values = read_adapter_config(folder).get("config")
        if not isinstance(values, dict):
            raise GroundingFileError(f"config in {CONFIG_FILE} must be a JSON object. Save the adapter again.")
        return cls.from_dict(values)


def _checked_layers(layers: Any) -> tuple[int, ...]:
    if not isinstance(layers, (list, tuple)) or not all(type(layer) is int for layer in layers):
        raise GroundingValueError(f"text_layers must be whole numbers, got {layers!r}.")
    if not layers or len(set(layers)) != len(layers):
        raise GroundingValueError(f"text_layers must name at least one layer, each once, got {tuple(layers)}.")
    return tuple(layers)


def _check_retrieval_prompt(prompt: str, ret_token: str) -> None:
    if prompt and not prompt.strip():
        raise GroundingValueError(f"retrieval_prompt must have words, or be empty, got {prompt!r}.")
    if ret_token in prompt:
        raise GroundingValueError(
            f"retrieval_prompt must not hold ret_token {ret_token!r}, got {prompt!r}. The state is read at its last "
            "word instead of at the token; leave the token out."
        )
