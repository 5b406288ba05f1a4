"""The rows at a language model's two ends, wherever and however its weights are kept: quantised, offloaded, plain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.errors import GroundingTypeError

CHUNK = 512
# Rows of a head that can only be read by running it are read from a sample: only their statistics are wanted.
SAMPLED_ROWS = 4096
LEAVE_OUT = "Leave it out of the quantisation (llm_int8_skip_modules, modules_to_not_convert)."


def embedding_device(lm: nn.Module) -> torch.device:
    """Return the device that input ids should be on; an offloaded embedding says where it will run."""
    embedding = lm.get_input_embeddings()
    device = getattr(getattr(embedding, "weight", None), "device", torch.device("cpu"))
    if device.type == "meta":
        device = torch.device(getattr(getattr(embedding, "_hf_hook", None), "execution_device", None) or "cpu")
    return device


@contextlib.contextmanager
def weight_of(module: nn.Module) -> Iterator[Tensor | None]:
    """Give a module's plain floating weight inside the block, loaded from where it is offloaded to; else None."""
    with _loaded(module):
        weight: Any = getattr(module, "weight", None)
        usual = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
        yield weight if usual and weight.is_floating_point() and weight.dim() == 2 else None


def _loaded(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def ends_are_tied(lm: nn.Module, embedded: Tensor, ids: Tensor) -> bool:
    """Return whether a row that goes in is the row that comes out: one weight, and no scaling inside the embedding.

    Args:
        lm: a causal LM.
        embedded: (1, s, d), its embedding's output.
        ids: (1, s), of these ids.
    """
    # Offloaded weights are loaded one by one, so one weight has two places in memory then.
    offloaded = getattr(getattr(lm.get_output_embeddings(), "weight", None), "is_meta", False)
    with weight_of(lm.get_input_embeddings()) as rows, weight_of(lm.get_output_embeddings()) as columns:
        if rows is None or columns is None or rows.shape != columns.shape:
            return False
        one = rows.data_ptr() == columns.data_ptr() or (offloaded and torch.equal(rows, columns))
        return one and torch.equal(embedded[0, 0].to(rows), rows[ids[0, 0].to(rows.device)])


@torch.no_grad()
def embedding_vectors(lm: nn.Module, count: int) -> Iterator[Tensor]:
    """Yield the embedding module's outputs for ids 0 to count - 1, in chunks (rows, d)."""
    embedding, device = lm.get_input_embeddings(), embedding_device(lm)
    for start in range(0, count, CHUNK):
        yield embedding(torch.arange(start, min(start + CHUNK, count), device=device).unsqueeze(0))[0]


@torch.no_grad()
def head_vectors(lm: nn.Module, count: int, head_dim: int) -> Iterator[Tensor]:
    """Yield the output head's first `count` rows, in chunks (rows, h).

    A head whose weight is quantised, or is no matrix, is run over unit vectors instead, and gives a sample of its rows.

    Raises:
        GroundingTypeError: a head that gives no finite numbers for them.
    """
    head = lm.get_output_embeddings()
    with weight_of(head) as weight:
        if weight is not None and weight.shape[1] == head_dim:
            yield from weight[:count].split(CHUNK)
            return
    wanted = torch.arange(0, count, max(1, count // SAMPLED_ROWS))
    dtype, device = _reads(lm), embedding_device(lm)
    bias = head(torch.zeros(1, 1, head_dim, dtype=dtype, device=device))[0, :, wanted]
    columns = []
    for start in range(0, head_dim, CHUNK):
        unit = torch.zeros(1, min(CHUNK, head_dim - start), head_dim, dtype=dtype, device=device)
        unit[0, :, start : start + CHUNK].fill_diagonal_(1)
        columns.append((head(unit)[0, :, wanted] - bias).float())
    rows = torch.cat(columns).T
    if not bool(torch.isfinite(rows).all()) or not bool(rows.any()):
        raise GroundingTypeError(
            f"The output head, a {type(head).__name__}, cannot be read: for unit vectors it gives numbers that are not "
            "finite, or all zero. " + LEAVE_OUT
        )
    yield from rows.split(CHUNK)


def check_head(head: nn.Module, head_input: Any, head_output: Any) -> None:
    """Raise GroundingTypeError unless what a head read and gave are plain floating numbers.

    A quantised head may take whole numbers with a scale of their own; a row of ours times these would be wrong.
    """
    for what, value in (("reads", head_input), ("gives", head_output)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = f"{value.dtype} numbers" if isinstance(value, Tensor) else type(value).__name__
            raise GroundingTypeError(
                f"The output head, a {type(head).__name__}, {what} {kind} where floating numbers are needed, so the "
                "column of [RET] cannot be computed beside it. " + LEAVE_OUT
            )


def _reads(lm: nn.Module) -> torch.dtype:
    dtype = getattr(lm, "dtype", torch.float32)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


class EmbeddingStatistics:
    """Mean (d,), per-dimension spread (d,) and mean norm of many rows, gathered in chunks.

    Example:
        >>> statistics = EmbeddingStatistics.of(iter([torch.eye(2)]))
        >>> statistics.mean.tolist(), statistics.mean_norm
        ([0.5, 0.5], 1.0)
    """

    def __init__(self, mean: Tensor, std: Tensor, mean_norm: float) -> None:
        self.mean, self.std, self.mean_norm = mean, std, mean_norm

    @classmethod
    def of(cls, chunks) -> EmbeddingStatistics:
        """Gather the statistics of an iterable of chunks (rows, d)."""
        count, norms = 0, 0.0
        total = squares = torch.zeros(())
        for chunk in chunks:
            wide = chunk.double()
            count += len(wide)
            total, squares = total + wide.sum(0), squares + wide.square().sum(0)
            norms += float(wide.norm(dim=-1).sum())
        mean = total / count
        return cls(mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float(), norms / count)
