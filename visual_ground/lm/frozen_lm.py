"""`FrozenLM`: a causal language model run with virtual tokens."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.errors import GroundingStateError
from visual_ground.lm.base.freezing import FreezeGuard
from visual_ground.lm.base.peft import base_model_of, tuner_layers
from visual_ground.lm.base.spec import LMSpec
from visual_ground.lm.base.weights import embedding_device
from visual_ground.lm.hook_context import HookContext
from visual_ground.lm.reading import LMReading, log_likelihoods, states_at
from visual_ground.lm.virtual_tokens import VirtualTokens

LAST = (-1,)  # As in `GroundingConfig.text_layers`: what the output head reads.


class FrozenLM:
    """A frozen causal LM with hooks at its two ends.

    Args:
        lm: a causal LM; may be a `PeftModel`.
        spec: its widths and ids, as `read_spec` returns them.
        ret_embeddings: returns `[RET]`'s input (d,) and output embedding (h,), read anew in each forward.
        masks_spare_columns: returns `mask_spare_columns` of `GroundingConfig`, read anew in each forward.
        train_lm_adapter: leave the PEFT adapter in the LM trainable, and nothing else.

    Attributes:
        lm: the transformers model, not a copy of it.
        vocabulary: which ids are the LM's own and which are virtual.
        virtual_tokens: the hooks.
        takes_positions, cache_name: whether its forward takes position_ids, and its argument for keys and values.
        reads_branches: by attention implementation and range of lengths, whether it reads several branches in one pass;
            see `generation.branches.BranchReader`, which finds out.
    """

    def __init__(
        self,
        lm: nn.Module,
        spec: LMSpec,
        ret_embeddings: Callable[[], tuple[Tensor, Tensor]],
        masks_spare_columns: Callable[[], bool],
        train_lm_adapter: bool = False,
    ) -> None:
        self.lm, self.spec, self.vocabulary = lm, spec, spec.vocabulary
        tuned = tuner_layers(lm) if train_lm_adapter else []
        frozen = FreezeGuard(lm)
        for layer in tuned:
            layer.set_adapter(layer.active_adapters)
        parameters = inspect.signature((core := base_model_of(lm)).forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.reads_branches: dict[tuple[str | None, int], bool] = {}
        # transformers 5.24 renamed the argument past_key_values.
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.virtual_tokens = VirtualTokens(core, spec.vocabulary, ret_embeddings, masks_spare_columns)
        self.virtual_tokens.attach(frozen)
        self.virtual_tokens.holder = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy the holder of its hooks, which are copies too."""
        self.__dict__.update(state)
        self.virtual_tokens.holder = weakref.ref(self)

    @property
    def device(self) -> torch.device:
        """Where input ids should be."""
        return embedding_device(self.lm)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the LM computes."""
        return getattr(self.lm, "dtype", torch.float32)

    @property
    def max_length(self) -> int | None:
        """How many ids the LM's context holds; None if its config does not say."""
        limit = getattr(self.lm.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def disabled(self) -> AbstractContextManager[None]:
        """Return a context manager; calls that begin inside it, in any thread, run as if nothing were attached."""
        return self.virtual_tokens.switch.off(self.virtual_tokens.context)

    def bare(self) -> AbstractContextManager[HookContext]:
        """Return a context manager, inside which this thread's calls run without the hooks; other threads keep them."""
        return self.virtual_tokens.bind(enabled=False)

    def release(self) -> nn.Module:
        """Take the hooks off the LM and return it; its own weights are bit for bit what they were."""
        self.virtual_tokens.detach()
        return self.lm

    def bind(self, image_tokens: Tensor | None = None, **settings: Any) -> AbstractContextManager[HookContext]:
        """Return a context manager, inside which any forward of the LM reads these images.

        Args:
            image_tokens: (n * k, d), or None.
            settings: `positions`, `max_logits`, `has_virtual`, as in `HookContext`.

        Raises:
            GroundingStateError: `release` was called, or images come while the adapter is disabled.
        """
        if not self.virtual_tokens.attached:
            raise GroundingStateError("This model was ungrounded; ground the LM again.")
        disabled = self.virtual_tokens.disabled
        if disabled and image_tokens is not None:
            raise GroundingStateError(
                "The adapter is disabled here, so images cannot be read. Leave disable_adapter()."
            )
        return self.virtual_tokens.bind(image_tokens=image_tokens, enabled=not disabled, **settings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run the LM on ids that may be virtual; return its own output, with logits (b, s, columns).

        Args:
            input_ids: (b, s).
            attention_mask: (b, s).
            image_tokens: (n * k, d), the embeddings of the image tokens in the ids, in order.
            options: any other argument of the LM's forward.
        """
        with self.bind(image_tokens):
            return self.run(input_ids, attention_mask, **options)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None, **options: Any) -> Any:
        """Run the LM inside `bind`; left-padded sequences get the positions that they have without padding.

        Args:
            input_ids: (b, s).
            attention_mask: (b, p + s), or anything else that the LM takes for it.
            cache: keys and values of p earlier positions.
            options: for the LM; `position_ids` among them are used as they are.
        """
        if self.virtual_tokens.disabled:
            self.vocabulary.refuse_virtual(input_ids)
        if cache is not None:
            options[self.cache_name] = cache
        if attention_mask is not None and self.takes_positions and "position_ids" not in options:
            if attention_mask.dim() == 2 and not bool(attention_mask[:, 0].all()):
                positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
                options["position_ids"] = positions[:, -input_ids.shape[1] :]
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, **options)

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        image_tokens: Tensor | None = None,
        layers: Sequence[int] = (),
        max_logits: int | None = None,
        has_virtual: bool | None = None,
        **options: Any,
    ) -> LMReading:
        """Run the LM and read it at some positions; the output head runs at these only.

        Args:
            input_ids: (b, s).
            attention_mask: as in `run`.
            positions: (r,) long, positions of the flattened ids.
            image_tokens: (n * k, d).
            layers: the layers whose hidden states to return, as in `GroundingConfig.text_layers`.
            max_logits: as in `HookContext`.
            has_virtual: as in `HookContext`.
            options: for `run`.
        """
        options = {"use_cache": False, "output_hidden_states": any(layer != -1 for layer in layers), **options}
        with self.bind(image_tokens, positions=positions, max_logits=max_logits, has_virtual=has_virtual) as context:
            output = self.run(input_ids, attention_mask, **options)
        assert context.head_input is not None, "the head ran"
        states = states_at(output, context.head_input[0], layers, positions)
        return LMReading(context.head_input[0], states, output.logits[0], output)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        layers: Sequence[int] = LAST,
        image_tokens: Tensor | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """As `read`, with the logits of one position only; return the states, one (r, width) for each layer."""
        return self.read(input_ids, attention_mask, positions, image_tokens, layers, 1, **options).states

    def log_likelihood(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        lengths: Sequence[int],
        image_tokens: Tensor | None = None,
        without_ret: bool = False,
    ) -> Tensor:
        """Return the log-likelihood of each sequence's last ids, summed, in nats, (b,).

        Args:
            input_ids: (b, s), padded on the left.
            attention_mask: (b, s).
            lengths: how many ids of each sequence are scored, at least 1.
            image_tokens: (n * k, d).
            without_ret: given that none of the scored ids is `[RET]`, which then takes no probability from them.
        """
        width = input_ids.shape[1]
        ends = [i * width + j for i, n in enumerate(lengths) for j in range(width - n, width)]
        scored = torch.tensor(ends, device=input_ids.device)
        logits = self.read(input_ids, attention_mask, scored - 1, image_tokens).logits
        if without_ret and logits.shape[-1] > self.vocabulary.ret_token_id:  # Else, the adapter is disabled.
            logits = logits.index_fill(-1, torch.tensor(self.vocabulary.ret_token_id, device=logits.device), -torch.inf)
        return log_likelihoods(logits, input_ids.flatten()[scored], lengths)

    def generate(self, input_ids: Tensor, image_tokens: Tensor | None = None, **options: Any) -> Tensor:
        """Run transformers' own `generate`; return ids (b * num_return_sequences, s).

        Args:
            input_ids: (b, s), padded on the left.
            image_tokens: (n * k, d).
            options: for `generate`.
        """
        with self.bind(image_tokens):
            output = self.lm.generate(input_ids=input_ids, **options)
        return output if isinstance(output, Tensor) else output.sequences

    def head_logits(self, states: Tensor) -> Tensor:
        """Run the output head, with `[RET]`'s column, on states (r, h); return logits (r, columns) in float32."""
        states = states.to(self.dtype)  # In mixed precision, they come in another type than the head's.
        with self.bind():
            logits: Tensor = self.lm.get_output_embeddings()(states.unsqueeze(0))
        return logits[0].float()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return the LM's own input embeddings (..., d) of its own ids (...)."""
        with self.bare():
            embeddings: Tensor = self.lm.get_input_embeddings()(ids.reshape(1, -1).to(self.device))
        return embeddings[0].view(*ids.shape, -1)
