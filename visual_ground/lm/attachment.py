"""Which hooks are on an LM, and whether a grounded model still holds them."""

from __future__ import annotations

from torch import nn

from visual_ground.lm.base.peft import base_model_of
from visual_ground.lm.virtual_tokens import VirtualTokens


def virtual_tokens_of(lm: nn.Module) -> VirtualTokens | None:
    """Return the hooks that are on an LM; None where it is not grounded."""
    hooks = base_model_of(lm)._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, VirtualTokens)), None)


def detach_orphans(lm: nn.Module) -> bool:
    """Take off hooks that no grounded model holds; return whether the LM still has hooks.

    Two kinds of hooks belong to no grounded model: those of a copied LM, which are copies too, and those of an LM whose
    grounded model is gone.
    """
    tokens = virtual_tokens_of(lm)
    if tokens is not None and not _is_held(tokens):
        tokens.detach()
        tokens = None
    return tokens is not None


def _is_held(tokens: VirtualTokens) -> bool:
    """Return whether the holder of these hooks still lives, and they are not a copy of its hooks."""
    return tokens.holder is not None and getattr(tokens.holder(), "virtual_tokens", None) is tokens
