"""Reading a language model's input and output embeddings, however they are stored: plain, quantised, offloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.errors import GroundingStateError, GroundingTypeError

CHUNK = 512  # Embeddings read at once, so that no second copy of a whole vocabulary is made.
# A head that must be run to be read gives only a sample of its rows, which is enough for their statistics.
SAMPLED_HEAD_ROWS = 4096
DO_NOT_QUANTISE = "Leave it out of the quantisation (llm_int8_skip_modules, modules_to_not_convert)."


def embedding_device(lm: nn.Module) -> torch.device:
    """Return the device that input ids should be on; an offloaded embedding says where it will run."""
    embedding = lm.get_input_embeddings()
    device = getattr(getattr(embedding, "weight", None), "device", torch.device("cpu"))
    if device.type == "meta":
        device = torch.device(getattr(getattr(embedding, "_hf_hook", None), "execution_device", None) or "cpu")
    return device


@contextlib.contextmanager
def weight_of(module: nn.Module) -> Iterator[Tensor | None]:
    """Inside the block, give a module's floating-point weight matrix, loaded if offloaded; None if it has none."""
    with _loaded(module):
        weight: Any = getattr(module, "weight", None)
        is_plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
        yield weight if is_plain and weight.is_floating_point() and weight.dim() == 2 else None


def _loaded(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    context: contextlib.AbstractContextManager[Any] = align_module_device(module)
    return context


def ends_are_tied(lm: nn.Module, embedded: Tensor, ids: Tensor) -> bool:
    """Return whether input and output embeddings are one: one weight, and no scaling inside the embedding.

    Args:
        lm: a causal LM.
        embedded: (1, s, d), its embedding's output for `ids`.
        ids: (1, s).
    """
    # Offloaded weights are loaded one by one, so that a tied weight is at two places in memory.
    offloaded = getattr(getattr(lm.get_output_embeddings(), "weight", None), "is_meta", False)
    with weight_of(lm.get_input_embeddings()) as rows, weight_of(lm.get_output_embeddings()) as columns:
        if rows is None or columns is None or rows.shape != columns.shape:
            return False
        same_weight = rows.data_ptr() == columns.data_ptr() or (offloaded and torch.equal(rows, columns))
        return same_weight and torch.equal(embedded[0, 0].to(rows), rows[ids[0, 0].to(rows.device)])


@torch.no_grad()
def embedding_vectors(lm: nn.Module, count: int) -> Iterator[Tensor]:
    """Yield the embedding module's outputs for ids 0 to count - 1, in chunks (rows, d)."""
    embedding, device = lm.get_input_embeddings(), embedding_device(lm)
    for start in range(0, count, CHUNK):
        yield embedding(torch.arange(start, min(start + CHUNK, count), device=device).unsqueeze(0))[0]


@torch.no_grad()
def head_vectors(lm: nn.Module, count: int, head_dim: int) -> Iterator[Tensor]:
    """Yield the output head's first `count` rows, in chunks (rows, h).

    A head whose weight is quantised, or is no matrix, is run over unit vectors instead, and only some rows are read.

    Raises:
        GroundingTypeError: a head that returns no finite numbers for unit vectors.
    """
    head = lm.get_output_embeddings()
    with weight_of(head) as weight:
        if weight is not None and weight.shape[1] == head_dim:
            yield from torch.split(weight[:count], CHUNK)
            return
    sampled = torch.arange(0, count, max(1, count // SAMPLED_HEAD_ROWS))
    dtype, device = _input_dtype(lm), embedding_device(lm)
    bias = head(torch.zeros(1, 1, head_dim, dtype=dtype, device=device))[0, :, sampled]
    columns = []
    for start in range(0, head_dim, CHUNK):
        unit = torch.zeros(1, min(CHUNK, head_dim - start), head_dim, dtype=dtype, device=device)
        unit[0, :, start : start + CHUNK].fill_diagonal_(1)
        columns.append((head(unit)[0, :, sampled] - bias).float())
    rows = torch.cat(columns).T
    if not bool(torch.isfinite(rows).all()) or not bool(rows.any()):
        raise GroundingTypeError(
            f"The output head, a {type(head).__name__}, cannot be read: for unit vectors it returns numbers that are "
            "not finite, or all zero. " + DO_NOT_QUANTISE
        )
    yield from torch.split(rows, CHUNK)


def check_head(head: nn.Module, head_input: Any, head_output: Any) -> None:
    """Raise GroundingTypeError unless a head's input and output are floating-point numbers.

    A quantised head may read integers with a scale of their own; a logit of `[RET]` computed from them is wrong.
    """
    for verb, value in (("reads", head_input), ("returns", head_output)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = f"{value.dtype} numbers" if isinstance(value, Tensor) else type(value).__name__
            raise GroundingTypeError(
                f"The output head, a {type(head).__name__}, {verb} {kind} where floating-point numbers are needed, so "
                "the column of [RET] cannot be computed beside it. " + DO_NOT_QUANTISE
            )


def _input_dtype(lm: nn.Module) -> torch.dtype:
    dtype = getattr(lm, "dtype", torch.float32)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


class EmbeddingStatistics:
    """Mean (d,), standard deviation (d,) and mean norm of many embeddings, computed chunk by chunk.

    Example:
        >>> statistics = EmbeddingStatistics.of(iter([torch.eye(2)]))
        >>> statistics.mean.tolist(), statistics.mean_norm
        ([0.5, 0.5], 1.0)
    """

    def __init__(self, mean: Tensor, std: Tensor, mean_norm: float) -> None:
        self.mean, self.std, self.mean_norm = mean, std, mean_norm

    @classmethod
    def of(cls, chunks: Iterable[Tensor]) -> EmbeddingStatistics:
        """Compute the statistics of chunks (rows, d)."""
        count, norms = 0, 0.0
        total = squares = torch.zeros(())
        for chunk in chunks:
            wide = chunk.double()  # The variance is a small difference of large sums.
            count += len(wide)
            total, squares = total + wide.sum(0), squares + wide.square().sum(0)
            norms += float(wide.norm(dim=-1).sum())
        mean = total / count
        return cls(mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float(), norms / count)


class LMEnds:
    """A causal LM's input embedding and output head, as they are now."""

    def __init__(self, lm: nn.Module) -> None:
        self.embedding: nn.Module = lm.get_input_embeddings()
        self.head: nn.Module = lm.get_output_embeddings()
        self._sizes = self._read_sizes()

    def _read_sizes(self) -> tuple[object, object]:
        # transformers resizes an embedding in place and replaces the head. Modules without these attributes (of
        # quantisation libraries) cannot be resized in place.
        return getattr(self.embedding, "num_embeddings", None), getattr(self.head, "out_features", None)

    def check(self, lm: nn.Module) -> None:
        """Raise GroundingStateError where these are not the LM's ends any more, or have other sizes."""
        replaced = lm.get_input_embeddings() is not self.embedding or lm.get_output_embeddings() is not self.head
        if replaced or self._read_sizes() != self._sizes:
            raise GroundingStateError(
                f"The input embedding or output head of {type(lm).__name__} was resized or replaced after it was "
                "grounded, as resize_token_embeddings and PEFT do, so images and [RET] have lost their ids. Call "
                "unground(), change the LM, and ground it again."
            )
