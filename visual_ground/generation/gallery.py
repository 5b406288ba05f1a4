"""Some answers of an adapter for its card: their text, and one small picture of the images in them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw

from visual_ground.adapter.report import Report, Sample
from visual_ground.generation.output import InterleavedOutput, RetrievedImage
from visual_ground.index.remote_images import ImageLink
from visual_ground.vision.images import to_rgb

SIDE, LABEL, COLUMNS, QUALITY = 112, 16, 6, 80


def with_samples(report: Report, prompts: Sequence[str], answers: Sequence[InterleavedOutput]) -> Report:
    """Return a report that shows these answers, with a picture of the images in them.

    Args:
        report: whose samples are replaced.
        prompts: what was asked, as text.
        answers: what was answered, one for each prompt.

    Example:
        >>> report = with_samples(Report(), ["Show me a cat."], [InterleavedOutput(("Here.",))])
        >>> report.samples[0].answer, report.picture
        ('Here.', None)
    """
    samples = tuple(Sample(prompt, str(answer)) for prompt, answer in zip(prompts, answers, strict=True))
    images = [image for answer in answers for image in answer.images]
    shown = [image for image in images if image.image is not None and not isinstance(image.image, ImageLink)]
    return replace(report, samples=samples, picture=_sheet(shown) if shown else None)


def _sheet(shown: Sequence[RetrievedImage]) -> bytes:
    """Draw images in rows, each with its id below, as a JPEG of some kB."""
    columns = min(len(shown), COLUMNS)
    page = Image.new("RGB", (columns * SIDE, -(-len(shown) // columns) * (SIDE + LABEL)), "white")
    draw = ImageDraw.Draw(page)
    for i, one in enumerate(shown):
        x, y = i % columns * SIDE, i // columns * (SIDE + LABEL)
        small = to_rgb(one.image)
        small.thumbnail((SIDE - 8, SIDE - 8))
        page.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
        # Pillow's small built-in font knows Latin letters only.
        label = str(one.id)[-18:].encode("latin-1", "replace").decode("latin-1")
        draw.text((x + 4, y + SIDE), label, "black")
    buffer = io.BytesIO()
    page.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()
