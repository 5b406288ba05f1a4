"""What a grounded model answers: text interleaved with retrieved images."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingError
from visual_ground.index.remote_images import ImageLink
from visual_ground.storage.atomic import replacing
from visual_ground.vision.images import ImageLike, to_rgb


@dataclass(frozen=True)
class RetrievedImage:
    """An image that the model chose to show.

    Args:
        id: its id in the index; None where there was no index to search.
        score: cosine with the model's `[RET]` state; None likewise.
        image: a PIL image, a path, or an `ImageLink` that was not opened; None where the index has no images.
        metadata: the index's metadata of it.
    """

    id: str | int | None = None
    score: float | None = None
    image: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uri(self) -> str | None:
        """The path or address of the image, where it is kept as one."""
        if isinstance(self.image, ImageLink):
            return self.image.address
        return os.fspath(self.image) if isinstance(self.image, (str, os.PathLike)) else None

    def __str__(self) -> str:
        return "[image]" if self.id is None else f"[image {self.id}]"


@dataclass(frozen=True)
class InterleavedOutput:
    """One answer.

    Args:
        parts: strings and `RetrievedImage`s, in order.

    Example:
        >>> print(InterleavedOutput(("A cat.", RetrievedImage("cat", 0.9))))
        A cat. [image cat]
    """

    parts: tuple[str | RetrievedImage, ...]

    @property
    def text(self) -> str:
        """The text alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[RetrievedImage, ...]:
        """The images alone."""
        return tuple(part for part in self.parts if isinstance(part, RetrievedImage))

    def __iter__(self) -> Iterator[str | RetrievedImage]:
        return iter(self.parts)

    def __str__(self) -> str:
        return " ".join(str(part).strip() for part in self.parts if str(part).strip())

    def _repr_html_(self) -> str:
        return "<div>" + "".join(render_part(part) for part in self.parts) + "</div>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a page that shows the answer, with its images inside the file."""
        page = f'<!doctype html><html><head><meta charset="utf-8"></head><body>{self._repr_html_()}</body></html>\n'
        with replacing(Path(path)) as temporary:
            temporary.write_text(page, encoding="utf-8")


def render_part(part: str | RetrievedImage, width: int = 192) -> str:
    """Return HTML for a part: escaped text, or the image at most `width` pixels wide with its id and score below."""
    if isinstance(part, str):
        return f'<span style="white-space:pre-wrap">{html.escape(part)}</span>'
    score = "" if part.score is None else f" ({part.score:.2f})"
    label = html.escape("no index" if part.id is None else f"{part.id}{score}")
    if isinstance(part.image, ImageLink):
        label += f": {_anchor(part.image)}"
    source = None
    if part.image is not None and not isinstance(part.image, ImageLink):
        try:
            source = data_uri(part.image, width)
        except GroundingError:  # A file that is gone or damaged by now must not take the rest of the answer with it.
            label += ": the picture cannot be opened"
    if source is None:
        return f'<figure style="display:inline-block"><figcaption>[{label}]</figcaption></figure>'
    return (
        f'<figure style="display:inline-block;margin:4px;text-align:center"><img src="{source}" '
        f'alt="{label}"><figcaption style="font-size:12px">{label}</figcaption></figure>'
    )


def _anchor(link: ImageLink) -> str:
    """Return HTML for an image that was not opened; a browser goes there only when it is clicked."""
    text = html.escape(link.address)
    is_page = link.address.startswith(("http://", "https://"))
    return f'<a href="{text}" rel="noreferrer">{text}</a>' if is_page else text


def data_uri(image: ImageLike, width: int) -> str:
    """Return an image, at most `width` pixels wide, as a PNG data URI."""
    small = to_rgb(image)
    small.thumbnail((width, width))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
