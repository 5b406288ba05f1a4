"""Options for transformers' `generate`, with what a grounded model has to add to them; and which ids end an answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.lm.base.peft import base_model_of
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.prompts.processor import GroundingProcessor

MAX_NEW_TOKENS = 64  # If neither the caller nor the LM's own generation config says anything of the length.
# Options of transformers' `generate` that would replace what the prompts are, or lose their images; and why.
REFUSED = {
    "input_ids": "the prompts are the first argument",
    "inputs_embeds": "the prompts are the first argument, and images are embedded by the adapter",
    "attention_mask": "it follows from the prompts",
    "token_healing": "it writes the prompts anew as text, without their images",
}


def complete_options(
    frozen_lm: FrozenLM,
    processor: GroundingProcessor,
    options: Mapping[str, Any],
    prompts: Tensor,
    first: Sequence[LogitsProcessor],
    last: LogitsProcessor,
) -> dict[str, Any]:
    """Return the options of one call of transformers' `generate`.

    Args:
        frozen_lm: the LM.
        processor: of the active adapter.
        options: the caller's.
        prompts: (b, s), the prompts' ids.
        first: logits processors that come before the caller's.
        last: one that comes after the caller's.

    Raises:
        GroundingTypeError: generation_config is not a GenerationConfig.
        GroundingValueError: assisted generation that cannot work, other prompts, or no room for an answer.
    """
    options = dict(options)
    configs = [options.get("generation_config"), _own_config(frozen_lm)]
    if configs[0] is not None and not isinstance(configs[0], GenerationConfig):
        raise GroundingTypeError(
            f"generation_config must be a transformers GenerationConfig, got {type(configs[0]).__name__}."
        )
    sources = [options, *(vars(config) for config in configs if config is not None)]
    _check(sources, len(prompts))
    given = options.pop("logits_processor", None) or ()
    length = _max_new_tokens(sources, prompts.shape[1])
    options.pop("max_length", None)
    if any(source.get("stop_strings") for source in sources):  # transformers needs the tokenizer for these.
        options.setdefault("tokenizer", processor.tokenizer)
    options["logits_processor"] = LogitsProcessorList([*first, *given, last])
    if configs[0] is None:
        return {"pad_token_id": processor.pad_token_id, **options, "max_new_tokens": length}
    options.pop("max_new_tokens", None)
    return {**options, "generation_config": _filled(configs[0], length, processor.pad_token_id)}


def _own_config(frozen_lm: FrozenLM) -> GenerationConfig | None:
    """Return the LM's own generation config."""
    return getattr(base_model_of(frozen_lm.lm), "generation_config", None)


def _filled(config: GenerationConfig, length: int, pad_token_id: int) -> GenerationConfig:
    """Return a copy of the caller's generation config, with the length and the PAD of this call filled in.

    They are put into the config because transformers objects to options passed beside one.
    """
    config = copy.deepcopy(config)
    config.max_new_tokens, config.max_length = length, _length_by_default()
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    return config


def _length_by_default() -> int | None:
    """Return the `max_length` of a config in which it was not set: None, or a number in older transformers."""
    length: int | None = GenerationConfig().max_length
    return length


def _max_new_tokens(sources: Sequence[Mapping[str, Any]], prompt_length: int) -> int:
    """Return the most tokens that an answer may have, from the first source that sets a limit of either kind.

    If none does, but one sets a minimum length, the default is added to it.

    Args:
        sources: the caller's options, the caller's generation config, the LM's own.
        prompt_length: ids of the prompts, which `max_length` counts too.
    """
    for source in sources:
        if (most := source.get("max_new_tokens")) is not None:
            return _length("max_new_tokens", most)
        given = source.get("max_length")
        if given is not None and given != _length_by_default():
            whole = _length("max_length", given)
            if whole <= prompt_length:
                raise GroundingValueError(
                    f"max_length={whole} counts the prompt too, which has {prompt_length} ids, and leaves no room for "
                    "an answer. Pass max_new_tokens, which counts the answer only."
                )
            return whole - prompt_length
    asked = {
        name: next((_length(name, least) for source in sources if (least := source.get(name))), 0)
        for name in ("min_new_tokens", "min_length")
    }
    return MAX_NEW_TOKENS + max(0, asked["min_new_tokens"], asked["min_length"] - prompt_length)


def _length(name: str, given: Any) -> int:
    """Return a length that was asked for; a GroundingValueError if it is none."""
    try:
        length = int(given)
    except (TypeError, ValueError, OverflowError):  # NaN and infinity are numbers too.
        length = 0
    if isinstance(given, (bool, str)) or length < 1 or length != given:
        raise GroundingValueError(f"{name} must be a whole number of at least 1, got {given!r}.")
    return length


def _check(sources: Sequence[Mapping[str, Any]], batch_size: int) -> None:
    """Raise if other prompts are given, or if another model, or part of this one, is to draft the answer."""
    for name, reason in REFUSED.items():
        if any(source.get(name) is not None and source.get(name) is not False for source in sources):
            raise GroundingValueError(f"generate takes no {name}: {reason}. Leave it out.")
    for name in ("assistant_model", "assistant_early_exit", "use_mtp"):
        if any(source.get(name) for source in sources):
            raise GroundingValueError(
                f"{name} cannot be used: the draft would have to read this model's images and [RET], which only the "
                "grounded language model can. prompt_lookup_num_tokens works, and needs no second model."
            )
    if batch_size > 1 and any(source.get("prompt_lookup_num_tokens") for source in sources):
        raise GroundingValueError(
            f"prompt_lookup_num_tokens takes one prompt at a time, got {batch_size}. Call generate once for each."
        )
    guided = next((scale for source in sources if (scale := source.get("guidance_scale")) is not None), 1)
    if guided != 1 and any(source.get("prompt_lookup_num_tokens") for source in sources):
        raise GroundingValueError(
            f"guidance_scale={guided} reads a second prompt token by token, and prompt_lookup_num_tokens adds several "
            "at once. Leave one of them out."
        )


def end_ids(frozen_lm: FrozenLM, attached: AttachedAdapter, options: Mapping[str, Any] | None = None) -> set[int]:
    """Return the ids with which the LM ends an answer: those of the call, of its generation config, or EOS."""
    ids = option_of(frozen_lm, options or {}, "eos_token_id")
    ids = attached.processor.tokenizer.eos_token_id if ids is None else ids
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    return {ids} if isinstance(ids, int) else set(ids or ())


def ended_by_itself(
    frozen_lm: FrozenLM, attached: AttachedAdapter, options: Mapping[str, Any]
) -> Callable[[Sequence[int]], bool]:
    """Return a function that tells whether an answer's ids (s,) have reached an end id or a stop string.

    Otherwise the answer ran out of tokens.
    """
    ends, stops = end_ids(frozen_lm, attached, options), option_of(frozen_lm, options, "stop_strings") or ()
    stops, processor = (stops,) if isinstance(stops, str) else tuple(stops), attached.processor

    def has_ended(ids: Sequence[int]) -> bool:
        if ends.intersection(ids) or not stops:
            return bool(ends.intersection(ids))
        # transformers ends an answer with the token that completes one of these, so it can stand nowhere else.
        text = processor.tokenizer.decode([i for i in ids if processor.vocabulary.is_token(i)])
        return any(stop in text for stop in stops)

    return has_ended


def option_of(frozen_lm: FrozenLM, options: Mapping[str, Any], name: str) -> Any:
    """Return the value of an option of `generate`: the call's own, else its generation config's, else the LM's."""
    configs = options.get("generation_config"), _own_config(frozen_lm)
    sources = [options, *(vars(config) for config in configs if isinstance(config, GenerationConfig))]
    return next((value for source in sources if (value := source.get(name)) is not None), None)


def silent_ids(frozen_lm: FrozenLM, attached: AttachedAdapter) -> set[int]:
    """Return the ids that end or pad answers; they are not text, even if the tokenizer decodes them as text.

    A tokenizer does so for a PAD that was set after loading, and for ends that only the LM's generation config names.
    An `eos_token_id` that a caller passes may be a word or a full stop, so it stays in the text.
    """
    pad = attached.processor.tokenizer.pad_token_id
    return end_ids(frozen_lm, attached) | (set() if pad is None else {pad})
