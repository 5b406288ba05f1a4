"""A few answers for an adapter's card: their text, and one small picture of the images in them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw

from visual_ground.adapter.report import Report, Sample
from visual_ground.errors import GroundingError
from visual_ground.generation.output import InterleavedOutput, RetrievedImage
from visual_ground.vision.images import to_rgb

# In pixels and percent; small, because the picture is published with the adapter.
SIDE, LABEL_HEIGHT, COLUMNS, JPEG_QUALITY = 112, 16, 6, 80
MARGIN, LABEL_LENGTH = 4, 18  # Pixels around an image; characters of an id that fit below it.


def with_samples(report: Report, prompts: Sequence[str], answers: Sequence[InterleavedOutput]) -> Report:
    """Return a report with these prompts and answers as its samples, and a picture of the images in them.

    Example:
        >>> report = with_samples(Report(), ["Show me a cat."], [InterleavedOutput(("Here.",))])
        >>> report.samples[0].answer, report.picture
        ('Here.', None)
    """
    samples = tuple(Sample(prompt, str(answer)) for prompt, answer in zip(prompts, answers, strict=True))
    shown = [(image, small) for answer in answers for image in answer.images if (small := _small(image)) is not None]
    return replace(report, samples=samples, picture=_draw(shown) if shown else None)


def _small(retrieved: RetrievedImage) -> Image.Image | None:
    """Return an image small enough for its place, or None where it is only an address, is gone or is damaged."""
    if not retrieved.is_readable:
        return None
    try:
        small = to_rgb(retrieved.image)
    except GroundingError:
        return None
    small.thumbnail((SIDE - 2 * MARGIN, SIDE - 2 * MARGIN))
    return small


def _draw(shown: Sequence[tuple[RetrievedImage, Image.Image]]) -> bytes:
    """Return a JPEG of images in a grid, each with its id below."""
    columns = min(len(shown), COLUMNS)
    page = Image.new("RGB", (columns * SIDE, -(-len(shown) // columns) * (SIDE + LABEL_HEIGHT)), "white")
    draw = ImageDraw.Draw(page)
    for i, (retrieved, small) in enumerate(shown):
        x, y = i % columns * SIDE, i // columns * (SIDE + LABEL_HEIGHT)
        page.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
        # Pillow's small built-in font has Latin letters only.
        label = str(retrieved.id)[-LABEL_LENGTH:].encode("latin-1", "replace").decode("latin-1")
        draw.text((x + MARGIN, y + SIDE), label, "black")
    buffer = io.BytesIO()
    page.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
