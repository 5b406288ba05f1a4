"""The columns of a dataset: where its images and captions are, and which rows cannot be used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.rows import picture_of, rows_by_number, undecoded
from visual_ground.training.data.prompts import PROMPT, SplitPrompt, is_given, prompt_problem
from visual_ground.training.data.rows import (
    PROBLEM,
    check_not_empty,
    has_images,
    is_missing,
    is_unicode,
    named_by,
)
from visual_ground.training.data.skipped import Skipped
from visual_ground.vision.link_rules import is_address

# How many rows of a stream have their captions checked before training.
NUM_CHECKED = 100


@dataclass(frozen=True)
class Columns:
    """Where a row has its images and captions.

    Args:
        image: the column with an image, or a list of them.
        caption: the column with a caption, or a list of them.
        folder: what relative paths in the image column are relative to.
        forbidden: words that no text may contain, `[RET]` among them.

    Example:
        >>> Columns("jpg", "txt").captions({"jpg": None, "txt": ["a cat", " "]})
        ['a cat']
    """

    image: str = "image"
    caption: str = "caption"
    folder: str | None = None
    forbidden: tuple[str, ...] = field(default=(), repr=False)

    def images(self, row: Mapping[str, Any]) -> list[Any]:
        """Return a row's images as they are: PIL images, arrays, paths, or `{"bytes": ..., "path": ...}`."""
        images = _as_list(picture_of(row[self.image]))
        return [self._resolve(picture_of(image)) for image in images if not is_missing(image)]

    def captions(self, row: Mapping[str, Any]) -> list[str]:
        """Return a row's captions that can be used."""
        return [caption for caption in _as_list(row[self.caption]) if self.problem(caption) is None]

    def texts(self, row: Mapping[str, Any], name: str) -> list[str]:
        """Return the texts of an optional column that can be used."""
        return [text for text in _as_list(row.get(name)) if self.problem(text) is None]

    def problem(self, text: Any) -> str | None:
        """Return why a caption or another text cannot be used; None where it can."""
        if is_missing(text):
            return "is empty"
        if not isinstance(text, str):
            return f"is a {type(text).__name__} and no text"
        if "\ufffd" in text or not is_unicode(text):
            return "has characters that could not be read as UTF-8"
        found = next((word for word in self.forbidden if word in text), None)
        return None if found is None else f"contains {found}, which must not stand in a text"

    def problem_of(self, row: Mapping[str, Any]) -> str | None:
        """Return why a row or its texts cannot be used; None where one text of each kind can."""
        if row.get(PROBLEM):
            return str(row[PROBLEM])
        texts = _as_list(row[self.caption])
        problems = [self.problem(text) for text in texts]
        if None not in problems:
            return f"its caption {problems[0] if problems else 'is empty'}"
        for name in ("request", "question"):
            given = [text for text in _as_list(row.get(name)) if not is_missing(text)]
            if given and not self.texts(row, name):
                return f"its {name} {self.problem(given[0])}"
        problem = None if (prompt := self.prompt(row)) is None else prompt_problem(prompt, self.problem)
        return None if problem is None else f"its prompt {problem}"

    def prompt(self, row: Mapping[str, Any]) -> Any:
        """Return a row's prompt as it is, or None where it has none."""
        # Datasets of generated pictures call their captions so.
        given = self.caption != PROMPT and is_given(row.get(PROMPT))
        return row[PROMPT] if given else None

    def split_prompt(self, row: Mapping[str, Any]) -> SplitPrompt | None:
        """Return a row's prompt, which has no problem, with its images apart; None where it has none."""
        prompt = self.prompt(row)
        return None if prompt is None else SplitPrompt.of(prompt, self._resolve)

    def prompt_images(self, row: Mapping[str, Any]) -> Sequence[Any]:
        """Return the images of a row's prompt."""
        split = self.split_prompt(row)
        return () if split is None else split.images

    def _resolve(self, image: Any) -> Any:
        if self.folder is not None and isinstance(image, (str, os.PathLike)) and not is_address(image):
            return os.path.join(self.folder, image)
        return image


def forbidden_words(model: GroundedModel) -> tuple[str, ...]:
    """Return what no caption may contain: `[RET]`, and tokens for which the LM has no embedding."""
    added = model.tokenizer.get_added_vocab() if hasattr(model.tokenizer, "get_added_vocab") else {}
    unknown = [token for token, number in added.items() if number >= model.frozen_lm.vocabulary.num_rows]
    return (model.config.ret_token, *sorted(unknown))


def open_rows(rows: Any, columns: Columns) -> Any:
    """Check a dataset's columns; images of a `datasets` dataset are then given as files, not decoded.

    Args:
        rows: mappings by index, or a `datasets` dataset, which may be a stream.
        columns: where the images and captions are; `image_features` may stand for the images.

    Returns:
        The rows, whose images are not decoded.

    Raises:
        GroundingTypeError: neither of these, or a stream with a caption among its first that is no string.
        GroundingValueError: no rows, or columns missing.
    """
    rows = rows_by_number(rows)
    first = check_not_empty(undecoded(rows, [columns.image]))
    required = [columns.caption] if "image_features" in first else [columns.image, columns.caption]
    if missing := [name for name in required if name not in first]:
        raise GroundingValueError(
            f"The dataset has no columns {missing}; its columns are {sorted(first)}. Name them: image_column=, "
            "caption_column= (--image-column, --caption-column)."
        )
    rows = undecoded(rows, [columns.image])
    if is_stream(rows):
        first_rows = enumerate(islice(rows, NUM_CHECKED))
        if not any([_has_caption(row, number, columns) for number, row in first_rows]):
            raise _no_captions(columns)
    return rows


def usable_rows(rows: Any, columns: Columns, skipped: Skipped) -> list[int]:
    """Return the indices of the rows that have an image and a caption.

    Raises:
        GroundingTypeError: a caption that is no string.
        GroundingValueError: all captions are empty, or too many rows cannot be used.
    """
    texts = without_images(rows, columns)
    shown = has_images(rows, columns.image) if texts is not rows else None
    usable, captioned = [], False
    for number, row in enumerate(texts):
        captioned |= _has_caption(row, number, columns)
        has_image = "image_features" in row or (shown[number] if shown else bool(columns.images(row)))
        problem = columns.problem_of(row) or (None if has_image else "it has no image")
        if problem is None:
            usable.append(number)
        else:
            skipped.add(f"row {number}{named_by(row)}: {problem}", check=captioned)
    if not captioned:
        raise _no_captions(columns)
    skipped.check(len(texts))
    return usable


def without_images(rows: Any, columns: Columns) -> Any:
    """Return the rows of a `datasets` dataset without the images, which then are not even read from the disk."""
    if not hasattr(rows, "remove_columns") or columns.image not in (rows.column_names or ()):
        return rows
    return rows.remove_columns([columns.image])


def is_stream(rows: Any) -> bool:
    """Return whether rows can only be read one after the other, as from a `datasets.IterableDataset`."""
    from datasets import IterableDataset

    return isinstance(rows, IterableDataset)


def _has_caption(row: Mapping[str, Any], number: int, columns: Columns) -> bool:
    """Return whether a row has a caption at all; raise GroundingTypeError where it is no string."""
    captions = [caption for caption in _as_list(row[columns.caption]) if not is_missing(caption)]
    for caption in captions:
        if not isinstance(caption, str):
            raise GroundingTypeError(
                f"Row {number} has the caption {caption!r}, a {type(caption).__name__}; a caption must be a "
                f"string, or a list of strings. Choose another column than {columns.caption!r}."
            )
    return bool(captions)


def _no_captions(columns: Columns) -> GroundingValueError:
    return GroundingValueError(f"All captions in the column {columns.caption!r} are empty. Choose another column.")


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
