"""`TokenSequence`: one unpadded training sequence, which is what the collator hands over.

Nothing is padded before the losses know how the language model can read it: `speedups.packing` decides the layout.
Until then everything is plain Python numbers, so that asking for one never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from visual_ground.prompts.processor import GroundingProcessor

# What torch's cross entropy ignores by default, and transformers puts where nothing is to be predicted.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class TokenSequence:
    """Token ids with their labels, without padding.

    Args:
        ids: the token ids; an image's tokens are negative numbers, as in `EncodedPrompt`, until `number_images`.
        labels: for each id the same id where it is to be predicted, else -100. Behind a caption, a retrieval prompt
            stands where `[RET]` is to be predicted, so that its first id has another label.

    Example:
        >>> TokenSequence.of([1, 2], [7])
        TokenSequence(ids=(1, 2, 7), labels=(-100, -100, 7))
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    def of(cls, prefix: Sequence[int], predicted: Sequence[int]) -> TokenSequence:
        """Join ids that are only read and ids that are to be predicted."""
        return cls((*prefix, *predicted), (*[IGNORE_INDEX] * len(prefix), *predicted))

    def __add__(self, other: TokenSequence) -> TokenSequence:
        num_images = len({i for i in self.ids if i < 0})
        shifted = tuple(i - num_images if i < 0 else i for i in other.ids)
        return TokenSequence(self.ids + shifted, self.labels + other.labels)

    def after(self, count: int) -> TokenSequence:
        """Return what follows the first `count` ids."""
        return TokenSequence(self.ids[count:], self.labels[count:])

    @property
    def num_labels(self) -> int:
        """How many ids are to be predicted; the first id never is, because nothing stands before it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def number_images(sequences: Sequence[TokenSequence], first_image_id: int) -> list[TokenSequence]:
    """Give image tokens, negative numbers until then, their ids from the first on, in order over all sequences.

    Example:
        >>> sequences = [TokenSequence.of([-1, -1], [7]), TokenSequence.of([-1], [8])]
        >>> [sequence.ids for sequence in number_images(sequences, 100)]
        [(100, 101, 7), (102, 8)]
    """
    image_id = count(first_image_id)
    return [
        TokenSequence(tuple(next(image_id) if i < 0 else i for i in sequence.ids), sequence.labels)
        for sequence in sequences
    ]


def with_retrieval_prompt(processor: GroundingProcessor, sequence: TokenSequence) -> TokenSequence:
    """Return a sequence, whose last id is `[RET]`, that ends where its state is read for retrieval.

    Without a retrieval prompt that is `[RET]`, and the sequence is returned as it is. Else the prompt stands in the
    place of `[RET]`, which stays what is to be predicted there.
    """
    if not processor.config.retrieval_prompt:
        return sequence
    prompt = processor.retrieval_suffix(sequence.ids[:-1])
    labels = (*sequence.labels, *[IGNORE_INDEX] * (len(prompt) - 1))
    return TokenSequence((*sequence.ids[:-1], *prompt), labels)
