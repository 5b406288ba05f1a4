"""A contact sheet of a few validation pairs: the image, its caption, the caption said, and the images found."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from visual_ground.errors import GroundingError
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.storage.atomic import replacing
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.validation import image_features, text_vectors
from visual_ground.vision.images import to_rgb

SIDE, GAP, LINE, TEXT = 112, 10, 16, 250
FOUND = 3
CANDIDATES = 512
WORDS = 24


@dataclass(frozen=True)
class SheetRow:
    """What the sheet shows of one pair.

    Args:
        image: the validation image.
        caption: its caption.
        said: what the model says of the image.
        found: the images that it finds for the caption, best first.
        right: which of these is the pair's own, or None.
    """

    image: Any
    caption: str
    said: str
    found: tuple[Any, ...]
    right: int | None


@torch.no_grad()
def sheet_rows(model: GroundedModel, examples: ExampleDataset, count: int) -> list[SheetRow]:
    """Say a caption for each of `count` pairs, and find images for their captions among up to 512.

    Args:
        model: the grounded model.
        examples: the pairs.
        count: pairs shown, evenly spread over the dataset.
    """
    pool = _spread(len(examples), CANDIDATES)
    shown = [pool[i] for i in _spread(len(pool), count)]
    rows = {number: examples[number] for number in pool}
    images = model.adapter.embed_images(image_features(model, [rows[number] for number in pool]))
    vectors, _ = text_vectors(model, [rows[number]["caption"] for number in shown])
    order = (vectors @ images.T).topk(min(FOUND, len(pool))).indices.tolist()
    sheet = []
    for number, best in zip(shown, order, strict=True):
        numbers = [pool[i] for i in best]
        said = describe(model, image_features(model, [rows[number]]))
        right = numbers.index(number) if number in numbers else None
        found = tuple(examples.image(i) for i in numbers)
        sheet.append(SheetRow(examples.image(number), rows[number]["caption"], said, found, right))
    return sheet


def describe(model: GroundedModel, features: Tensor) -> str:
    """Return the caption that the model says, greedily, for an image given as features (1, f)."""
    vocabulary, device = model.frozen_lm.vocabulary, model.adapter.logit_scale.device
    prompt = EncodedPrompt(tuple(model.processor.caption_prefix(image=True)), ())
    ids, mask = pad_batch([prompt], vocabulary.first_image_id, model.processor.pad_token_id, "left")
    whole = model.frozen_lm.generate(
        ids.to(device),
        model.active.image_tokens(image_features=features),
        attention_mask=mask.to(device),
        max_new_tokens=WORDS,
        do_sample=False,
        pad_token_id=model.processor.pad_token_id,
    )
    new = [i for i in whole[0, ids.shape[1] :].tolist() if i < vocabulary.num_tokens]
    return model.tokenizer.decode(new, skip_special_tokens=True).strip()


def draw_sheet(rows: Sequence[SheetRow], title: str) -> Image.Image:
    """Draw the rows, one below the other; the pair's own image among those found has a green frame."""
    width = GAP + SIDE + GAP + TEXT + GAP + FOUND * (SIDE + GAP)
    page = Image.new("RGB", (width, 2 * GAP + LINE + len(rows) * (SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    draw.text((GAP, GAP), title, "black", font)
    for place, row in enumerate(rows):
        top = 2 * GAP + LINE + place * (SIDE + GAP)
        page.paste(_small(row.image), (GAP, top))
        for text, colour, below in ((row.caption, "black", 0), (row.said or "(nothing)", "#3465a4", SIDE // 2)):
            for i, line in enumerate(textwrap.wrap(text, 38)[:3]):
                draw.text((2 * GAP + SIDE, top + below + i * LINE), line, colour, font)
        for i, image in enumerate(row.found):
            left = 3 * GAP + SIDE + TEXT + i * (SIDE + GAP)
            page.paste(_small(image), (left, top))
            if i == row.right:
                draw.rectangle((left - 2, top - 2, left + SIDE + 1, top + SIDE + 1), outline="#4e9a06", width=3)
    return page


def save_sheet(page: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, whole or not at all."""
    with replacing(path) as temporary:
        page.save(temporary, "PNG")


def _small(image: Any) -> Image.Image:
    square = Image.new("RGB", (SIDE, SIDE), "#eeeeec")
    try:
        small = to_rgb(image)
    except GroundingError:  # Only features are there, or the file is gone since they were computed.
        return square
    small.thumbnail((SIDE, SIDE))
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return square


def _spread(length: int, count: int) -> list[int]:
    """Return up to `count` numbers below `length`, evenly spread.

    Example:
        >>> _spread(10, 3)
        [0, 3, 6]
    """
    count = min(length, count)
    return [i * length // count for i in range(count)]
