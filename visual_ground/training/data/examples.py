"""Training examples: rows of a dataset become labelled ids, and those become padded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.training.data.columns import Columns, open_rows, without_images
from visual_ground.training.data.sampler import first, happens, picker
from visual_ground.vision.images import image_name, to_rgb

IGNORED = -100
_BLANK = Image.new("RGB", (1, 1))


@dataclass(frozen=True)
class LabelledIds:
    """One sequence; `ids` has image marks as in `EncodedPrompt`, `labels` is -100 where nothing is to be predicted."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    def of(cls, lead: Sequence[int], tail: Sequence[int]) -> LabelledIds:
        """Join an unlabelled lead and a labelled tail."""
        return cls((*lead, *tail), (*[IGNORED] * len(lead), *tail))

    def __add__(self, other: LabelledIds) -> LabelledIds:
        shift = sum(1 for i in set(self.ids) if i < 0)
        moved = tuple(i - shift if i < 0 else i for i in other.ids)
        return LabelledIds(self.ids + moved, self.labels + other.labels)


class ExampleDataset(Dataset):
    """The rows of a dataset, with their image features where these are known.

    What is taken at random depends on the seed and the number asked for alone, and not on what was taken before, so it
    is the same in any process and after any restart. Numbers go on past the last row: `len + i` is row i in the second
    epoch.

    An image that cannot be read is put down in the example's `skipped`, and the next row comes instead.

    Args:
        rows: mappings with an image (or `image_features`, (f,)) and a caption; either may be a list, of which one is
            taken at random each time. Optional: `request`, what a user says to be shown the image, read instead of the
            caption in retrieval; `question`, what a user asks about the image when captioning; both go through the
            tokenizer's chat template. `group`: rows of one group are no negatives of each other; by default those that
            share an image.
        features: for each row by number, its images' features (images, f); None reads the image each time.
        groups: for each row, a number.
        sample: False always takes the first image and caption.
        columns: where the images and captions are.
        numbers: for each row, its number in the user's dataset, for messages.
        seed: of what is taken at random.

    Raises:
        GroundingValueError: no rows, or columns missing.
    """

    def __init__(
        self,
        rows: Any,
        features: Any = None,
        groups: Sequence[int] | None = None,
        sample: bool = True,
        columns: Columns | None = None,
        numbers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        self.columns = columns or Columns()
        self.rows = open_rows(rows, self.columns)
        self.features, self.sample, self.seed, self.numbers = features, sample, seed, numbers
        self._texts = self.rows if features is None else without_images(self.rows, self.columns)
        self.groups = range(len(self.rows)) if groups is None else groups

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        skipped: list[str] = []
        for further in range(len(self)):
            number = (draw + further) % len(self)
            take = picker(self.seed, draw) if self.sample else first
            row = self._texts[number]
            example = example_of(row, self.columns, take)
            example |= {"row": number if self.numbers is None else int(self.numbers[number])}
            example |= {"group": int(self.groups[number]), "draw": draw}
            if self.features is not None:
                return {**example, "image_features": take(list(self.features[number]))}
            if "image_features" in row:
                return {**example, "image_features": torch.as_tensor(row["image_features"]).float()}
            if readable := read_image(take(self.columns.images(row)), skipped, self.sample):
                return {**example, "image": readable, "skipped": skipped}
        raise GroundingValueError(f"None of the dataset's images can be read. The first are: {skipped[:3]}")

    def image(self, number: int) -> Any:
        """Return a row's first image as it is, or None where the dataset has only features."""
        row = self.rows[number]
        return self.columns.images(row)[0] if self.columns.image in row else None


def read_image(image: Any, skipped: list[str], skips: bool = True) -> Image.Image | None:
    """Return an image as RGB; one that cannot be read is put down in `skipped`, or raises where not `skips`."""
    try:
        return to_rgb(image)
    except GroundingValueError as error:
        if not skips:
            raise
        skipped.append(f"{image_name(image)}: {error}")
        return None


def example_of(row: Mapping[str, Any], columns: Columns, take: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """Return a row's texts, one of each kind."""
    example = {"caption": take(columns.captions(row) or [""])}
    for name in ("request", "question"):
        if texts := row.get(name):
            example[name] = take([texts] if isinstance(texts, str) else texts)
    return example


class ExampleCollator:
    """Turns examples into one batch.

    Args:
        model: the grounded model, for its tokenizer, conventions and image preprocessing.
        max_caption_length: ids of a caption with its `[RET]`; longer ones are cut.
        concat_captions_prob: with this probability the captioning rows 2i and 2i + 1 become one, twice as long; which
            batches do depends on the seed and the number of the batch's first example alone.
        captioning_fraction: the part of each batch that is captioned; all of it is retrieved.
        end_captions: whether a caption's end, as EOS, is to be predicted when captioning.
        seed: of what is done at random.
    """

    def __init__(
        self,
        model: GroundedModel,
        max_caption_length: int = 24,
        concat_captions_prob: float = 0.5,
        captioning_fraction: float = 1.0,
        end_captions: bool = True,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        self.model, self.encoder = model, model.processor
        self.max_caption_length, self.concat_captions_prob = max_caption_length, concat_captions_prob
        self.captioning_fraction, self.end_captions = captioning_fraction, end_captions

    def captioning(self, example: Mapping[str, Any]) -> LabelledIds:
        """Return the image, what leads to a caption, and the caption as labels."""
        caption = self._caption(example)
        if self.end_captions and self.encoder.tokenizer.eos_token_id is not None:
            caption = [*caption, self.encoder.tokenizer.eos_token_id]
        if question := example.get("question"):
            return LabelledIds.of(self._chat([_BLANK, question]), caption)
        return LabelledIds.of(self.encoder.caption_prefix(image=True), caption)

    def retrieval(self, example: Mapping[str, Any]) -> LabelledIds:
        """Return what leads to a caption, and the caption with `[RET]` as labels; or a request, answered by `[RET]`."""
        ret = self.model.ret_token_id
        if request := example.get("request"):
            return LabelledIds.of(self._chat([request]), [ret])
        return LabelledIds.of(self.encoder.caption_prefix(image=False), [*self._caption(example), ret])

    def _caption(self, example: Mapping[str, Any]) -> list[int]:
        ids = self.encoder.encode_caption(example["caption"])
        if example.get("question") and self.encoder.tokenizer.chat_template:
            ids = self.encoder.encode_text(example["caption"].strip())
        return ids[: self.max_caption_length - 1]

    def _chat(self, parts: Sequence[Any]) -> list[int]:
        if not self.encoder.tokenizer.chat_template:
            return list(self.encoder.encode([*parts, "\n"]).ids)
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        return list(self.encoder.encode([{"role": "user", "content": content}]).ids)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `captioning` and `retrieval`, each input_ids, attention_mask and labels (rows, s), and the images.

        Images are `image_features` (b, f) or `pixel_values` (b, c, h, w), one per example; the captioning rows use the
        first of them in order.
        """
        captioned = examples[: max(1, round(self.captioning_fraction * len(examples)))]
        rows = [self.captioning(example) for example in captioned]
        if len(rows) > 1 and happens(self.concat_captions_prob, self.seed, examples[0].get("draw", 0)):
            rows = [a + b for a, b in zip(rows[::2], rows[1::2], strict=False)] + rows[len(rows) - len(rows) % 2 :]
        batch = {
            "captioning": self._pad(rows),
            "retrieval": self.texts(examples),
            "groups": torch.tensor([example["group"] for example in examples]),
            "rows": torch.tensor([example["row"] for example in examples]),
        }
        if skipped := [name for example in examples for name in example.get("skipped", ())]:
            batch["skipped"] = skipped
        if "image_features" in examples[0]:
            batch["image_features"] = torch.stack([example["image_features"] for example in examples])
        else:
            batch["pixel_values"] = self.model.vision.preprocess([example["image"] for example in examples])
        return batch

    def texts(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the `retrieval` part alone, which reads no images."""
        return self._pad([self.retrieval(example) for example in examples])

    def _pad(self, rows: Sequence[LabelledIds]) -> dict[str, Tensor]:
        encoded = [EncodedPrompt(row.ids, ()) for row in rows]
        self.model.processor.check_ids(encoded)
        first, pad = self.model.frozen_lm.vocabulary.first_image_id, self.model.processor.pad_token_id
        ids, mask = pad_batch(encoded, first, pad, "right")
        labels = torch.full_like(ids, IGNORED)
        for label_row, row in zip(labels, rows, strict=True):
            label_row[: len(row.labels)] = torch.tensor(row.labels)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
