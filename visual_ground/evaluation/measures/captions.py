"""CIDEr-D and BLEU of captions, computed by the published scorers, the package `pycocoevalcap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visual_ground.errors import GroundingStateError, GroundingValueError, needing
from visual_ground.evaluation.measures.ptb import caption_words

# Maps ids to captions, several of each, and returns the words of each caption with spaces between them.
Tokenise = Callable[[Mapping[str, Sequence[str]]], Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class CaptionScores:
    """The scores of a set of captions, as they are published.

    Args:
        cider: of each image, by id; the whole's is their mean. CIDEr-D weighs words by how many images of this set have
            them in their references: scores of different sets do not compare, and those of one image alone are 0.
        bleu: BLEU-1 to BLEU-4 of the whole, from 0 to 1; no mean of images' scores.
    """

    cider: Mapping[str, float]
    bleu: tuple[float, ...]


def caption_scores(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenise: Tokenise | None = None
) -> CaptionScores:
    """Score one caption for each image.

    Args:
        captions: by image id.
        references: by the same ids, one or more of each.
        tokenise: `tokenise_in_python` where None; or `tokenise_with_java`.

    Raises:
        GroundingStateError: `pycocoevalcap` is not installed.
        GroundingValueError: no captions, other ids than the references', or an image without a reference of words.
    """
    tokenise = tokenise_in_python if tokenise is None else tokenise
    _check(captions, references)
    said = tokenise({name: [caption] for name, caption in captions.items()})
    right = tokenise({name: references[name] for name in captions})
    if empty := [name for name in captions if not any(text.strip() for text in right[name])]:
        raise GroundingValueError(f"No reference of these images has words: {empty[:5]}. Leave them out.")
    scorers = _package()
    cider = scorers["cider"]().compute_score(right, said)[1]
    bleu = scorers["bleu"](4).compute_score(right, said, verbose=0)[0]
    by_image = dict(zip(captions, (float(score) for score in cider), strict=True))
    return CaptionScores(by_image, tuple(float(score) for score in bleu))


def tokenise_in_python(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return captions as `caption_words` does: as Stanford's tokenizer, but for what captions hardly ever have."""
    return {name: [caption_words(caption) for caption in several] for name, several in captions.items()}


def tokenise_with_java(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return captions as Stanford's tokenizer does, which the published scores were computed with; it needs Java.

    Raises:
        GroundingStateError: no Java, or `pycocoevalcap` is not installed.
    """
    # A line is a caption there, and an empty one would be lost.
    lines = {name: [{"caption": " ".join(caption.split()) or "."} for caption in of] for name, of in captions.items()}
    try:
        words: dict[str, list[str]] = _package()["ptb"]().tokenize(lines)
    except FileNotFoundError as error:
        raise GroundingStateError(
            'Stanford\'s tokenizer needs Java, and no program "java" was found. Install a Java runtime, or take '
            'tokenizer="python".'
        ) from error
    return words


def _check(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not captions or set(captions) != set(references):
        lacking, extra = sorted(set(captions) - set(references)), sorted(set(references) - set(captions))
        raise GroundingValueError(
            f"Captions and references need the same image ids, and at least one; got {len(captions)} captions, "
            f"{len(lacking)} of them without references {lacking[:5]}, and {len(extra)} references without captions "
            f"{extra[:5]}."
        )


def _package() -> dict[str, Any]:
    with needing('CIDEr and BLEU need pycocoevalcap. Run pip install "visual-ground[captions]".'):
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    return {"bleu": Bleu, "cider": Cider, "ptb": PTBTokenizer}
