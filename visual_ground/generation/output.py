"""What a grounded model answers: text interleaved with retrieved images."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from visual_ground.errors import GroundingError
from visual_ground.generation import markdown
from visual_ground.index.captions import caption_of
from visual_ground.index.remote_images import ImageLink
from visual_ground.storage.atomic import replacing
from visual_ground.vision.decoding import to_png
from visual_ground.vision.images import ImageLike, to_rgb

MARKDOWN_WIDTH = 512  # Pixels, of images without a path or an address of their own in Markdown.
# The names by which metadata of images say the same thing; the first that is there counts.
_SOURCE = "source", "source_url", "page_url", "url"
_LICENCE = "licence", "license"
_CREDIT = "credit", "attribution", "author", "artist", "creator"


@dataclass(frozen=True)
class RetrievedImage:
    """An image that the model chose to show.

    Args:
        id: its id in the index; None where there was no index to search.
        score: cosine with the vector that was read for the `[RET]`; None likewise.
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

    @property
    def caption(self) -> str | None:
        """What the metadata say that it shows."""
        return caption_of(self.metadata)

    @property
    def source(self) -> str | None:
        """Where the metadata say that it comes from."""
        return self._said(_SOURCE)

    @property
    def licence(self) -> str | None:
        """Under which licence the metadata say that it is."""
        return self._said(_LICENCE)

    @property
    def credit(self) -> str | None:
        """Whom the metadata credit for it."""
        return self._said(_CREDIT)

    def _said(self, names: tuple[str, ...]) -> str | None:
        values = {str(key).lower(): value for key, value in self.metadata.items()}
        return next((str(values[name]) for name in names if values.get(name) not in (None, "")), None)

    @property
    def is_readable(self) -> bool:
        """Whether there is an image here, and not only its address."""
        return self.image is not None and not isinstance(self.image, ImageLink)

    def to_dict(self, address: str | None = None) -> dict[str, Any]:
        """Return what is known of it, fit for JSON; what is not known is left out.

        Args:
            address: where it is found; its `uri` where None.
        """
        known = {
            "id": self.id,
            "score": None if self.score is None else float(self.score),
            "uri": self.uri if address is None else address,
            **{name: getattr(self, name) for name in ("caption", "source", "licence", "credit")},
        }
        return {"type": "image", **{name: value for name, value in known.items() if value is not None}}

    def to_markdown(self, address: str | None = None) -> str:
        """Return it as an image of Markdown with its score, and a line with credit, licence and source below.

        Args:
            address: where it is found, escaped as addresses are; else its `uri`, or the image itself as a data URI.
        """
        if address is not None:
            found = markdown.escaped_address(address)
        else:
            own = data_uri(self.image, MARKDOWN_WIDTH) if self.is_readable and self.uri is None else self.uri
            found = None if own is None else markdown.image_address(own)
        name = self.caption or ("image" if self.id is None else str(self.id))
        score = "" if self.score is None else f"{self.score:.2f}"
        text = f"\\[{markdown.escape(name)}\\]" if found is None else markdown.image(name, found, score)
        page = markdown.web_address(self.source)
        below = [markdown.escape(known) for known in (self.credit, self.licence) if known]
        below += [f"[source]({page})"] if page else [markdown.escape(self.source)] if self.source else []
        return f"{text}  \n*{', '.join(below)}*" if below else text

    def __str__(self) -> str:
        return "[image]" if self.id is None else f"[image {self.id}]"


# What an answer is made of.
Part: TypeAlias = str | RetrievedImage


@dataclass(frozen=True)
class InterleavedOutput:
    """One answer.

    Args:
        parts: strings and `RetrievedImage`s, in order.

    Example:
        >>> print(InterleavedOutput(("A cat.", RetrievedImage("cat", 0.9))))
        A cat. [image cat]
    """

    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[RetrievedImage, ...]:
        """The images alone."""
        return tuple(part for part in self.parts if isinstance(part, RetrievedImage))

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __str__(self) -> str:
        return " ".join(str(part).strip() for part in self.parts if str(part).strip())

    def to_markdown(self, address_of: Callable[[RetrievedImage], str | None] | None = None) -> str:
        """Return Markdown: the text, and each image as a paragraph with its score, credit, licence and source.

        Names and captions are escaped. In what the model wrote, HTML, images, and links to anything but the web are
        turned into plain text.

        Args:
            address_of: returns where an image is found; with None, or where it returns None, its path or address, or
                the image itself as a data URI.

        Example:
            >>> print(InterleavedOutput(("A cat.", RetrievedImage("cat"))).to_markdown())
            A cat.
            <BLANKLINE>
            \\[cat\\]
        """
        blocks = [
            markdown.made_harmless(part).strip("\n")
            if isinstance(part, str)
            else part.to_markdown(address_of(part) if address_of else None)
            for part in self.parts
        ]
        return "\n\n".join(block for block in blocks if block.strip())

    def to_dict(self) -> dict[str, Any]:
        """Return the answer fit for JSON: `text`, and `parts` of the types "text" and "image", in order."""
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part.to_dict() for part in self.parts]
        return {"text": self.text, "parts": parts}

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_messages(self) -> list[dict[str, Any]]:
        """Return the answer as chat messages, which go back into `generate` with the next turn, images included.

        An image that is known by its address only cannot be seen, and is left out.

        Example:
            >>> InterleavedOutput(("A cat.",)).to_messages()
            [{'role': 'assistant', 'content': [{'type': 'text', 'text': 'A cat.'}]}]
        """
        content: list[dict[str, Any]] = []
        for part in self.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            elif part.is_readable:
                content.append({"type": "image", "image": part.image})
        return [{"role": "assistant", "content": content}]

    def _repr_html_(self) -> str:
        return "<div>" + "".join(render_part(part) for part in self.parts) + "</div>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a page that shows the answer, with its images inside the file."""
        page = f'<!doctype html><html><head><meta charset="utf-8"></head><body>{self._repr_html_()}</body></html>\n'
        with replacing(Path(path)) as temporary:
            temporary.write_text(page, encoding="utf-8")


def render_part(part: Part, width: int = 192) -> str:
    """Return HTML for a part: escaped text, or the image at most `width` pixels wide with its id and score below."""
    if isinstance(part, str):
        return f'<span style="white-space:pre-wrap">{html.escape(part)}</span>'
    score = "" if part.score is None else f" ({part.score:.2f})"
    label = html.escape("no index" if part.id is None else f"{part.id}{score}")
    origin = html.escape(", ".join(known for known in (part.credit, part.licence, part.source) if known))
    below = f"<br>{origin}" if origin else ""
    if isinstance(part.image, ImageLink):
        label += f": {_anchor(part.image)}"
    source = None
    if part.is_readable:
        try:
            source = data_uri(part.image, width)
        except GroundingError:  # A file that is gone by now must not take the rest of the answer with it.
            label += ": the picture cannot be opened"
    if source is None:
        return f'<figure style="display:inline-block"><figcaption>[{label}]{below}</figcaption></figure>'
    return (
        f'<figure style="display:inline-block;margin:4px;text-align:center"><img src="{source}" '
        f'alt="{label}"><figcaption style="font-size:12px">{label}{below}</figcaption></figure>'
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
    return "data:image/png;base64," + base64.b64encode(to_png(small)).decode("ascii")
