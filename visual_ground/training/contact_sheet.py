"""A contact sheet of a few validation pairs: image, caption, generated caption, and the images retrieved for it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers.trainer_callback import CallbackHandler

from visual_ground.errors import GroundingError
from visual_ground.evaluation.pairs import image_features
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.storage.atomic import replacing
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.meters import log_image
from visual_ground.training.validation import embed_texts
from visual_ground.vision.images import to_rgb

# Layout, in pixels: a thumbnail's side, the space between columns and rows, a line of text, the column of text.
SIDE, GAP, LINE_HEIGHT, TEXT_WIDTH = 112, 10, 16, 250
# What fits into that column: characters in a line at font size 12, and lines in half a thumbnail's height.
LINE_LENGTH, LINES = 38, 3
NUM_RETRIEVED = 3
# Images that are searched: enough for the search to be hard, few enough to be encoded again at each evaluation.
MAX_CANDIDATES = 512
MAX_NEW_TOKENS = 24  # as long as a caption in training, see `GroundingTrainingArguments.max_caption_length`


@dataclass(frozen=True)
class SheetEntry:
    """What the sheet shows of one pair.

    Args:
        image: the validation image, or None where there are only features of it.
        caption: its caption.
        generated: the caption that the model generates for the image.
        retrieved: the images that it retrieves for the caption, best first.
        correct: which of these is the pair's own image, or None.
    """

    image: Any
    caption: str
    generated: str
    retrieved: tuple[Any, ...]
    correct: int | None


@torch.no_grad()
def sheet_entries(model: GroundedModel, examples: ExampleDataset, count: int) -> list[SheetEntry]:
    """Caption the images of `count` pairs, evenly spaced, and retrieve images for their captions among up to 512."""
    # An image may come several times, with a caption each.
    firsts = list({group: i for i, group in reversed(list(enumerate(examples.groups)))}.values())[::-1]
    pool = [firsts[i] for i in _evenly_spaced(len(firsts), MAX_CANDIDATES)]
    shown = [pool[i] for i in _evenly_spaced(len(pool), count)]
    pairs = {number: examples[number] for number in pool}
    images = model.adapter.embed_images(image_features(model, [pairs[number] for number in pool]))
    captions, _ = embed_texts(model, [pairs[number] for number in shown])
    nearest = (captions @ images.T).topk(min(NUM_RETRIEVED, len(pool))).indices.tolist()
    entries = []
    for number, best in zip(shown, nearest, strict=True):
        retrieved = [pool[i] for i in best]
        generated = generate_caption(model, image_features(model, [pairs[number]]))
        correct = retrieved.index(number) if number in retrieved else None
        candidates = tuple(examples.image(i) for i in retrieved)
        entries.append(SheetEntry(examples.image(number), pairs[number]["caption"], generated, candidates, correct))
    return entries


def generate_caption(model: GroundedModel, features: Tensor) -> str:
    """Return the caption that the model generates greedily for an image given as features (1, f)."""
    vocabulary, processor, device = model.frozen_lm.vocabulary, model.processor, model.active.device
    prompt = EncodedPrompt(tuple(processor.caption_prefix(image=True)), ())
    ids, mask = pad_batch([prompt], vocabulary.first_image_id, processor.pad_token_id, "left")
    sequence = model.frozen_lm.generate(
        ids.to(device),
        model.active.image_tokens(image_features=features),
        attention_mask=mask.to(device),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=processor.pad_token_id,
    )
    # [RET] may have an id that the tokenizer does not know.
    new_ids = [i for i in sequence[0, ids.shape[1] :].tolist() if vocabulary.is_token(i)]
    return str(model.tokenizer.decode(new_ids, skip_special_tokens=True)).strip()


def draw_sheet(entries: Sequence[SheetEntry], title: str) -> Image.Image:
    """Draw the entries, one below the other; a pair's own image among those retrieved has a green frame."""
    width = GAP + SIDE + GAP + TEXT_WIDTH + GAP + NUM_RETRIEVED * (SIDE + GAP)
    sheet = Image.new("RGB", (width, 2 * GAP + LINE_HEIGHT + len(entries) * (SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((GAP, GAP), title, "black", font)
    for position, entry in enumerate(entries):
        top = 2 * GAP + LINE_HEIGHT + position * (SIDE + GAP)
        sheet.paste(_thumbnail(entry.image), (GAP, top))
        texts = (entry.caption, "black", 0), (entry.generated or "(nothing)", "#3465a4", SIDE // 2)
        for text, colour, offset in texts:
            for i, line in enumerate(textwrap.wrap(text, LINE_LENGTH)[:LINES]):
                draw.text((2 * GAP + SIDE, top + offset + i * LINE_HEIGHT), line, colour, font)
        for i, image in enumerate(entry.retrieved):
            left = 3 * GAP + SIDE + TEXT_WIDTH + i * (SIDE + GAP)
            sheet.paste(_thumbnail(image), (left, top))
            if i == entry.correct:
                draw.rectangle((left - 2, top - 2, left + SIDE + 1, top + SIDE + 1), outline="#4e9a06", width=3)
    return sheet


def log_sheet(entries: Sequence[SheetEntry], output_dir: str, name: str, step: int, callbacks: CallbackHandler) -> None:
    """Write a sheet as a PNG file into `<output_dir>/pictures`, completely or not at all, and log it to TensorBoard."""
    title = f"{name}, step {step}: caption, generated caption (blue), images retrieved for the caption"
    sheet = draw_sheet(entries, title)
    with replacing(Path(output_dir) / "pictures" / f"{name}-{step:08d}.png") as temporary:
        sheet.save(temporary, "PNG")
    log_image(callbacks, f"{name}/pairs", np.asarray(sheet), step)


def _thumbnail(image: Any) -> Image.Image:
    square = Image.new("RGB", (SIDE, SIDE), "#eeeeec")
    try:
        small = to_rgb(image)
    except GroundingError:  # There are only features, or the file was removed after they were computed.
        return square
    small.thumbnail((SIDE, SIDE))
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return square


def _evenly_spaced(length: int, count: int) -> list[int]:
    """Return up to `count` numbers below `length`, evenly spaced.

    Example:
        >>> _evenly_spaced(10, 3)
        [0, 3, 6]
    """
    count = min(length, count)
    return [i * length // count for i in range(count)]
