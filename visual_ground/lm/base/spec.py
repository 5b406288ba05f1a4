"""`LMSpec`: a language model's widths, ids and fingerprint, read by running two tokens through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.lm.base.fingerprint import SAMPLED_ROWS, Fingerprint, spread
from visual_ground.lm.base.freezing import FreezeGuard
from visual_ground.lm.base.vocabulary import VirtualVocabulary
from visual_ground.lm.base.weights import check_head, embedding_device, ends_are_tied


@dataclass(frozen=True)
class LMSpec:
    """What grounding needs to know of a language model.

    Args:
        embedding_dim: d, width of its input embedding's output.
        head_dim: h, width of what its output head reads.
        text_dims: widths of the hidden states named by `text_layers`.
        tied: whether input and output embeddings are one: one weight, and no scaling inside the embedding.
        vocabulary: which ids are the LM's and which are virtual.
        fingerprint: identifies the LM; None where its weights are not loaded yet.
    """

    embedding_dim: int
    head_dim: int
    text_dims: tuple[int, ...]
    tied: bool
    vocabulary: VirtualVocabulary
    fingerprint: Fingerprint | None = None


@torch.no_grad()
def read_spec(lm: nn.Module, tokenizer: Any, text_layers: tuple[int, ...]) -> LMSpec:
    """Read a language model's widths, whether its embeddings are tied, ids and fingerprint, by running two tokens.

    Raises:
        GroundingValueError: a text layer that the LM does not have.
    """
    embedding = lm.get_input_embeddings()
    reserved = reserved_ids(lm.config) | frozenset(tokenizer.all_special_ids)
    words, num_rows = tokenizer.get_vocab(), getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]
    count = min(num_rows, max(words.values()) + 1)
    # Two different words, so that attention affects the fingerprint. Special tokens, such as image placeholders, may
    # require further inputs.
    plain = [i for i in range(1, count) if i not in reserved] or [0]
    ids = torch.tensor([[plain[len(plain) // 3], plain[2 * len(plain) // 3]]], device=embedding_device(lm))
    frozen = FreezeGuard(lm)
    try:
        sampled = embedding(torch.tensor([spread(count, SAMPLED_ROWS)], device=ids.device))[0]
        # Only where needed: transformers leaves hooks of its own on an LM that was asked for hidden states.
        embedded, head_input, output, widens = _run_once(lm, ids, any(layer != -1 for layer in text_layers))
    finally:
        frozen.restore()
    states = getattr(output, "hidden_states", None) or ()
    for layer in text_layers:
        if layer != -1 and not -len(states) <= layer < len(states):
            raise GroundingValueError(f"text layer {layer} does not exist: the LM has {len(states)} hidden states.")
    columns = output.logits.shape[-1] - widens
    return LMSpec(
        embedding_dim=embedded.shape[-1],
        head_dim=head_input.shape[-1],
        text_dims=tuple(head_input.shape[-1] if layer == -1 else states[layer].shape[-1] for layer in text_layers),
        tied=ends_are_tied(lm, embedded, ids),
        vocabulary=VirtualVocabulary(num_rows, columns, max(words.values()) + 1, reserved, widens=widens),
        fingerprint=None if head_input.is_meta else Fingerprint.of(words, sampled, head_input.flatten(0, -2)[-1]),
    )


def _run_once(lm: nn.Module, ids: Tensor, hidden_states: bool) -> tuple[Tensor, Tensor, Any, bool]:
    """Run ids (1, s), with one column added to what the output head returns.

    Returns:
        What the embedding returned (1, s, d), what the head read (1, s, h), the LM's output, and whether its logits
        have the column that was added.

    Raises:
        GroundingTypeError: an LM that does not compute logits (1, s, v) from ids alone, with its embedding and head.
    """
    seen: dict[str, Tensor] = {}

    def widen(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        seen.update(head_input=args[0], head_output=logits)
        return nn.functional.pad(logits, (0, 1))

    handles = [
        lm.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.update(embedded=output)),
        lm.get_output_embeddings().register_forward_hook(widen),
    ]
    reason = "its logits are not (1, s, v)"
    try:
        output = lm(input_ids=ids, output_hidden_states=hidden_states)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        output, reason = None, str(error).rstrip(".")
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", None)
    if len(seen) == 3 and isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape:
        check_head(lm.get_output_embeddings(), seen["head_input"], seen["head_output"])
        widens = logits.shape[-1] == seen["head_output"].shape[-1] + 1
        return seen["embedded"], seen["head_input"], output, widens
    raise GroundingTypeError(
        f"{type(lm).__name__} does not compute logits from token ids alone, as a causal language model does; a draft "
        f"head, for example, reads another model's states. The reason: {reason}. Load a complete causal LM."
    )


def reserved_ids(config: Any) -> frozenset[int]:
    """Return the ids with a special meaning in a config or the configs inside it: pad, bos, eos, placeholders ..."""
    ids: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            ids |= reserved_ids(value)
        elif name.endswith(("_token_id", "_token_ids", "_token_index", "_index")):
            values = value if isinstance(value, (list, tuple)) else [value]
            ids |= {i for i in values if type(i) is int}
    return frozenset(ids)
