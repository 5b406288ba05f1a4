"""The demo's contact sheet: the conversations and the requests as one picture; and an overview, for a README."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from visual_ground.demo.conversations import CONVERSATIONS, Exchange, Request
from visual_ground.demo.page import PARTS
from visual_ground.storage.atomic import replacing
from visual_ground.vision.images import to_rgb

# In pixels. The page is drawn on a sheet of this height and then cut to what is on it.
WIDTH, HEIGHT, PICTURE, MARGIN, SMALL = 1000, 9000, 112, 20, 86
INDENT, LETTER = 74, 8.2  # Of what was said, after who said it; and how wide a letter is.
# The overview has conversations on the left and requests on the right, beside each other.
OVERVIEW = ("A request", "A request in other words", "A picture and a wish")
OVERVIEW_WIDTHS = 568, 616
PART_COLOURS = {"seen": "#2f5d50", "unseen": "#5d3f6a"}
RIGHT, WRONG = "#2f8f5b", "#b3402e"


class _Sheet:
    """A page that is filled from top to bottom."""

    def __init__(self, width: int = WIDTH) -> None:
        self.image = Image.new("RGB", (width, HEIGHT), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def heading(self, text: str, colour: str) -> None:
        """Draw the name of a part on a band."""
        self.draw.rounded_rectangle((MARGIN, self.y, self.image.width - MARGIN, self.y + 34), 6, colour)
        self.draw.text((MARGIN + 12, self.y + 5), text, "white", ImageFont.load_default(20))
        self.y += 44

    def title(self, text: str) -> None:
        """Draw a title."""
        self.draw.text((MARGIN, self.y), text, "black", ImageFont.load_default(17))
        self.y += 28

    def turn(self, who: str, parts: Sequence[Any]) -> None:
        """Draw what one side said: lines of text, and pictures beside each other."""
        font, left = ImageFont.load_default(15), MARGIN + INDENT
        self.draw.text((MARGIN, self.y), who, "#3465a4" if who == "you" else "#4e7a1e", font)
        x = left
        for part in parts:
            if isinstance(part, str):
                if x > left and part.strip():
                    self.y, x = self.y + PICTURE + 6, left
                width = int((self.image.width - left - MARGIN) / LETTER)
                for line in chain.from_iterable(textwrap.wrap(own, width) for own in part.strip().splitlines()):
                    self.draw.text((left, self.y), line, "black", font)
                    self.y += 20
            elif part.image is not None:
                self.image.paste(_fitted(part.image, PICTURE), (x, self.y))
                x += PICTURE + 8
        self.y += (PICTURE + 6 if x > left else 0) + 6

    def conversation(self, title: str, exchanges: Sequence[Exchange]) -> None:
        """Draw a conversation."""
        self.title(title)
        for exchange in exchanges:
            self.turn("you", exchange.message)
            self.turn("model", exchange.answer.parts)
        self.y += 8

    def requests(self, requests: Sequence[Request]) -> None:
        """Draw what came for each request, framed green if it is right, with what was asked for below."""
        right = sum(request.is_right for request in requests)
        self.title(f"{len(requests)} requests, {right} of them answered with the right picture (green)")
        columns, font = (self.image.width - 2 * MARGIN) // (SMALL + 10), ImageFont.load_default(10)
        for i, request in enumerate(requests):
            x = MARGIN + i % columns * (SMALL + 10)
            if i and not i % columns:
                self.y += SMALL + 26
            if request.answer.images:
                self.image.paste(_fitted(request.answer.images[0].image, SMALL), (x, self.y))
            frame = (x, self.y, x + SMALL, self.y + SMALL)
            self.draw.rectangle(frame, outline=RIGHT if request.is_right else WRONG, width=2)
            self.draw.text(
                (x, self.y + SMALL + 3), textwrap.shorten(request.wanted, 17, placeholder="\u2026"), "black", font
            )
        self.y += SMALL + 40

    def cut(self) -> Image.Image:
        """Return what is on the page."""
        return self.image.crop((0, 0, self.image.width, min(self.y, HEIGHT)))


def _fitted(picture: Any, side: int) -> Image.Image:
    small = to_rgb(picture)
    small.thumbnail((side, side))
    return small


def write_contact_sheet(
    path: Path, conversations: Mapping[str, Sequence[Exchange]], requests: Sequence[Request]
) -> None:
    """Draw the conversations, part by part, and the requests, as a PNG."""
    sheet = _Sheet()
    for part, (title, _) in PARTS.items():
        sheet.heading(title, PART_COLOURS[part])
        for talk in CONVERSATIONS:
            if talk.part == part:
                sheet.conversation(talk.title, conversations[talk.title])
        if part == "seen" and requests:
            sheet.requests(requests)
    with replacing(path) as temporary:
        sheet.cut().save(temporary, "PNG")


def write_overview(path: Path, conversations: Mapping[str, Sequence[Exchange]], requests: Sequence[Request]) -> None:
    """Draw some conversations, and all requests beside them, as a PNG."""
    left, right = (_Sheet(width) for width in OVERVIEW_WIDTHS)
    for title in OVERVIEW:
        left.conversation(title, conversations[title])
    right.requests(requests)
    page = Image.new("RGB", (sum(OVERVIEW_WIDTHS), max(left.y, right.y)), "white")
    for sheet, x in ((left, 0), (right, left.image.width)):
        page.paste(sheet.cut(), (x, 0))
    with replacing(path) as temporary:
        page.save(temporary, "PNG")
