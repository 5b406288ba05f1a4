"""What a browser shows of an answer: its text, and each picture with what is known of it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from visual_ground.generation import markdown
from visual_ground.generation.output import Part, RetrievedImage
from visual_ground.index.remote_images import ImageLink
from visual_ground.server.pictures import Pictures, ShownIndex

# Wide enough to see what a picture shows, also beside others on a telephone.
STYLE = """
.vg-picture{display:inline-block;margin:.5em .75em .5em 0;vertical-align:top;max-width:min(320px,100%)}
.vg-picture img{width:100%;min-width:224px;max-height:360px;object-fit:contain;background:#fff;border-radius:.6em;
margin:0!important}
.vg-caption{display:block;font-size:.85em;line-height:1.35;padding:.35em .1em 0}
.vg-origin{opacity:.75}
.vg-picture a{opacity:1!important;filter:none!important}
#conversation .example{border:1px solid var(--border-color-primary);border-radius:.6em}
#conversation button[aria-label=Share]{display:none}
"""


@dataclass(frozen=True)
class Album:
    """The pictures of an index that the page can show.

    Args:
        index: the index.
        pictures: reads them for the browser.
        folder: the path under which the app has them.
    """

    index: ShownIndex
    pictures: Pictures
    folder: str

    def address(self, image: RetrievedImage) -> str:
        """Return where the browser finds a picture, relative, so that the page also works under a path of a proxy."""
        assert image.id is not None, "it is from the index"
        return self.pictures.address(image.id, self.folder).lstrip("/")


def bubble(parts: Sequence[Part], album: Album | None) -> str:
    """Return an answer as Markdown with figures of HTML in it; what strangers wrote is escaped."""
    blocks = [markdown.made_harmless(part) if isinstance(part, str) else figure(part, album) for part in parts]
    # Pictures of one `[RET]` stand side by side, as one paragraph.
    joined = ""
    for part, block in zip(parts, blocks, strict=True):
        is_picture = isinstance(part, RetrievedImage)
        joined += f"\n\n{block}" if is_picture and not joined.endswith("</span>") else block
        joined += "\n\n" if not is_picture else ""
    return joined.strip()


def figure(image: RetrievedImage, album: Album | None) -> str:
    """Return HTML for an image, with its caption, score, credit, licence and source below it."""
    if image.id is None:
        return '<span class="vg-picture"><span class="vg-caption">[a picture was meant here]</span></span>'
    name = html.escape(image.caption or str(image.id))
    shown = f'<span class="vg-caption"><b>{name}</b>{_score(image)}{_origin(image)}</span>'
    if isinstance(image.image, ImageLink) and (page := markdown.web_address(image.image.address)):
        shown = _link(page, "open the picture") + shown
    elif image.is_readable and album is not None:
        address = html.escape(album.address(image))
        picture = f'<img src="{address}" alt="{name}">'
        shown = f'<a href="{address}" target="_blank" rel="noreferrer">{picture}</a>{shown}'
    return f'<span class="vg-picture">{shown}</span>'


def _score(image: RetrievedImage) -> str:
    return "" if image.score is None else f' <span title="cosine with the query">{image.score:.2f}</span>'


def _origin(image: RetrievedImage) -> str:
    known = [html.escape(text) for text in (image.credit, image.licence) if text]
    if page := markdown.web_address(image.source):
        known.append(_link(page, "source"))
    return f'<br><span class="vg-origin">{" · ".join(known)}</span>' if known else ""


def _link(address: str, text: str) -> str:
    return f'<a href="{html.escape(address)}" target="_blank" rel="noreferrer">{text}</a>'
