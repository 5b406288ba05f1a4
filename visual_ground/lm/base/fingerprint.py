"""`Fingerprint`: a few numbers that identify a language model, in any dtype and under any name."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

# So few that they can be saved in adapter_config.json and read again at every load.
SAMPLED_ROWS, SAMPLED_TOKENS, SAMPLED_DIMS = 8, 64, 8
# Relative differences below these are a change of dtype, not of the LM: SmolLM2-135M in bfloat16 differs by 0.2 % and
# 1.9 % from itself in float32; 8-bit linear layers differ by 0 % and 5.3 %, and cause the warning
# (benchmarks/results/fingerprints.json).
ROW_TOLERANCE, STATE_TOLERANCE = 0.01, 0.04


def spread(count: int, number: int) -> list[int]:
    """Return `number` positions spread evenly over `count`, or all of them if there are fewer.

    Example:
        >>> spread(100, 4)
        [12, 37, 62, 87]
    """
    number = min(count, number)
    return [(2 * i + 1) * count // (2 * number) for i in range(number)]


@dataclass(frozen=True)
class Fingerprint:
    """What is compared between the LM that an adapter was trained on and the one that it is loaded on.

    Args:
        tokens: how many the tokenizer has.
        vocabulary: hash of some of the tokens with their ids.
        rows: 8 numbers of each of 8 input embeddings.
        state: 16 numbers of what the output head reads after two tokens; all layers contribute to it.
    """

    tokens: int
    vocabulary: str
    rows: tuple[tuple[float, ...], ...]
    state: tuple[float, ...]

    @classmethod
    def of(cls, vocabulary: Mapping[str, int], rows: Tensor, state: Tensor) -> Fingerprint:
        """Take a fingerprint.

        Args:
            vocabulary: the tokens' ids.
            rows: (8, d) embeddings of the ids `spread(count, 8)`, `count` being the smaller of rows and tokens.
            state: (h,) what the output head reads after two tokens.
        """
        tokens = max(vocabulary.values()) + 1
        sampled = set(spread(tokens, SAMPLED_TOKENS))
        pairs = sorted((number, token) for token, number in vocabulary.items() if number in sampled)
        return cls(
            tokens=tokens,
            vocabulary=hashlib.sha256(repr(pairs).encode("utf-8", "backslashreplace")).hexdigest()[:16],
            rows=tuple(_rounded(row[spread(len(row), SAMPLED_DIMS)]) for row in rows),
            state=_rounded(state[spread(len(state), 2 * SAMPLED_DIMS)]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "rows": [list(row) for row in self.rows], "state": list(self.state)}

    def differences(self, other: Fingerprint) -> list[str]:
        """Describe what differs between two LMs; empty for the same LM, whatever its dtype.

        Example:
            >>> one = Fingerprint(2, "a", ((1.0, 0.0),), (3.0, 4.0))
            >>> one.differences(Fingerprint(2, "a", ((1.0, 0.0),), (3.0, 4.5)))
            ['the last hidden state after two tokens differs by 10 %']
        """
        if self.tokens != other.tokens or self.vocabulary != other.vocabulary:
            return [f"the vocabulary is another one ({other.tokens} tokens here, {self.tokens} in training)"]
        differences = []
        rows = relative_difference(sum(self.rows, ()), sum(other.rows, ()))
        state = relative_difference(self.state, other.state)
        if rows > ROW_TOLERANCE:
            differences.append(f"{len(self.rows)} sampled embedding rows differ by {100 * rows:.2g} %")
        if state > STATE_TOLERANCE:
            differences.append(f"the last hidden state after two tokens differs by {100 * state:.2g} %")
        return differences


def _rounded(values: Tensor) -> tuple[float, ...]:
    # Broken weights give numbers that are not finite, which JSON cannot hold; they become 0.
    return tuple(float(f"{value:.5g}") if math.isfinite(value) else 0.0 for value in values.float().tolist())


def relative_difference(one: Sequence[float], two: Sequence[float]) -> float:
    """Return the distance of two vectors as a fraction of the first one's length."""
    if len(one) != len(two):
        return math.inf
    length = math.hypot(*one)
    distance = math.dist(one, two)
    return distance / length if length else math.inf if distance else 0.0


def warn_of_differences(trained: Fingerprint | None, present: Fingerprint | None, name: str | None) -> None:
    """Log a warning, each text once, if an adapter that was trained on the LM of this name is loaded on another."""
    if trained is None or present is None:
        return
    if differences := trained.differences(present):
        _warn_once(
            f"This adapter was trained on another language model than this one ({name or 'one without a name'}). "
            f"Compared were the vocabulary, embedding rows and a hidden state: {'; '.join(differences)}. On a "
            "fine-tune, a merged LoRA or a quantised copy an adapter mostly works as it is: measure it first."
        )


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)
