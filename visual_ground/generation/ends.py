"""Which ids end an answer, and which ids of one are no text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.lm.frozen_lm import FrozenLM


def end_ids(frozen_lm: FrozenLM, attached: AttachedAdapter, options: Mapping[str, Any] | None = None) -> set[int]:
    """Return the ids with which the LM ends an answer: those of the call, of its generation config, or EOS.

    Args:
        frozen_lm: the LM.
        attached: the active adapter, with the tokenizer.
        options: of the call to `generate`.
    """
    own = getattr(getattr(frozen_lm.lm, "generation_config", None), "eos_token_id", None)
    ids = (options or {}).get("eos_token_id", own)
    ids = attached.processor.tokenizer.eos_token_id if ids is None else ids
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    return {ids} if isinstance(ids, int) else set(ids or ())


def silent_ids(frozen_lm: FrozenLM, attached: AttachedAdapter) -> set[int]:
    """Return the ids that end or pad answers; they are not text, even if the tokenizer decodes them as text.

    A tokenizer does so for a PAD that was set after loading, and for ends that only the LM's generation config names.
    Ends that a call gives are words for it, such as a full stop, and are part of the answer.
    """
    pad = attached.processor.tokenizer.pad_token_id
    return end_ids(frozen_lm, attached) | (set() if pad is None else {pad})
