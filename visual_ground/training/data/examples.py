"""Training examples: rows of a dataset become examples, and those become batches of unpadded token sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.prompts.chat import typed_message
from visual_ground.prompts.encoded import EncodedPrompt
from visual_ground.training.data.columns import Columns, open_rows, without_images
from visual_ground.training.data.prompts import PromptIds
from visual_ground.training.data.reading import example_of, is_readable, prompt_of, read_image, without_prompt
from visual_ground.training.data.rows import select_rows
from visual_ground.training.data.sampler import first, happens, turns
from visual_ground.training.data.sequences import TokenSequence, number_images, with_retrieval_prompt

# Stands for the image when a chat template is rendered; only its place in the ids matters.
_PLACEHOLDER = Image.new("RGB", (1, 1))


class ExampleDataset(Dataset[dict[str, Any]]):
    """The rows of a dataset as examples, with image features if these are known.

    What is sampled depends on the seed and the index alone, not on what was sampled before, so it is the same in any
    process and after any restart. Indices continue past the last row: `len + i` is row i in the second epoch.

    If `sample` is True, an image that cannot be read is noted in the example's `skipped`, and the next row is used
    instead; else it is an error. `Preparing` leaves out such rows before.

    Args:
        rows: mappings with an image (or `image_features`, (f,)) and a caption; either may be a list, of which one is
            sampled each time. Optional: `prompt`, texts and images after which the image is to be found, as
            `embed_text` takes it, read instead of the caption in retrieval; `request`, with which a user asks to be
            shown the image, likewise; `question`, which a user asks about the image when captioning; the latter two go
            through the tokenizer's chat template. `group`: rows of one group are no negatives of each other; by default
            those that share an image.
        features: for each row by number, its images' features (images, f); None reads the image each time.
        groups: for each row, a number.
        sample: False always takes the first image and caption.
        columns: where the images and captions are.
        numbers: for each row, its number in the user's dataset, for messages.
        seed: of what is sampled.
        prompt_features: for each row by number, the features of its prompt's images; None reads these each time.

    Attributes:
        captions: for each row, which of its captions is taken, see `each_caption`; None as `sample` says.

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
        prompt_features: Any = None,
    ) -> None:
        self.columns, self.prompt_features = columns or Columns(), prompt_features
        self.rows = open_rows(rows, self.columns)
        self.features, self.sample, self.seed, self.numbers = features, sample, seed, numbers
        self._texts = self.rows if features is None else without_images(self.rows, self.columns)
        self.groups = range(len(self.rows)) if groups is None else groups
        self.captions: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        skipped: list[str] = []
        for offset in range(len(self)):
            number = (draw + offset) % len(self)
            choose = turns(self.seed, number, draw // len(self)) if self.sample else first
            row = self._texts[number]
            if not is_readable(row, number, skipped, self.sample):
                continue
            example = example_of(row, self.columns, choose)
            if self.captions is not None:
                example["caption"] = self.columns.captions(row)[self.captions[number]]
            example |= {"row": number if self.numbers is None else int(self.numbers[number])}
            example |= {"group": int(self.groups[number]), "draw": draw}
            features = None if self.prompt_features is None else self.prompt_features[number]
            prompt = prompt_of(row, self.columns, features, skipped, self.sample)
            if prompt is None:
                continue
            example |= prompt
            if self.features is not None:
                return {**example, "image_features": choose(list(self.features[number]))}
            if "image_features" in row:
                return {**example, "image_features": torch.as_tensor(row["image_features"]).float()}
            if image := read_image(choose(self.columns.images(row)), skipped, self.sample):
                return {**example, "image": image, "skipped": skipped}
        raise GroundingValueError(f"None of the dataset's images can be read. The first are: {skipped[:3]}")

    def each_caption(self) -> ExampleDataset:
        """Return a dataset with one example for each caption of a row; a row with a prompt, read instead, stays one."""
        owners: list[int] = []
        places: list[int] = []
        for number, row in enumerate(without_images(self.rows, self.columns)):
            count = 1 if self.columns.prompt(row) is not None else max(1, len(self.columns.captions(row)))
            owners += [number] * count
            places += range(count)
        return self if len(owners) == len(self) else self.select(owners, False, places)

    def select(self, indices: Sequence[int], sample: bool, captions: Sequence[int] | None = None) -> ExampleDataset:
        """Return the rows at these indices, of which one may come several times; the rest is as in the class."""
        if captions is None and self.captions is not None:
            captions = [self.captions[i] for i in indices]
        features, prompts = (
            None if given is None else given.select(indices) for given in (self.features, self.prompt_features)
        )
        groups = [self.groups[i] for i in indices]
        numbers = list(indices) if self.numbers is None else [self.numbers[i] for i in indices]
        rows = select_rows(self.rows, indices)
        selected = ExampleDataset(rows, features, groups, sample, self.columns, numbers, self.seed, prompts)
        selected.captions = captions
        return selected

    def image(self, number: int) -> Any:
        """Return a row's first image as it is in the dataset, or None if that has only features."""
        row = self.rows[number]
        return self.columns.images(row)[0] if self.columns.image in row else None


class ExampleCollator:
    """Turns examples into one batch of unpadded sequences; the losses decide how these are laid out for the LM.

    Args:
        model: the grounded model, for its tokenizer, conventions and image preprocessing.
        max_caption_length: ids of a caption with its `[RET]`; longer ones are cut.
        concat_captions_prob: with this probability the captioning sequences 2i and 2i + 1 become one, twice as long;
            which batches do depends on the seed and the index of the batch's first example alone.
        captioning_fraction: the part of each batch that is captioned; all of it is retrieved.
        end_captions: whether a caption's end, as EOS, is to be predicted when captioning.
        seed: of what is sampled.
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
        self.model, self.processor = model, model.processor
        self.max_caption_length, self.concat_captions_prob = max_caption_length, concat_captions_prob
        self.captioning_fraction, self.end_captions = captioning_fraction, end_captions

    def captioning(self, example: Mapping[str, Any], follows_caption: bool = False) -> TokenSequence:
        """Return the image, the prompt before the caption (see `caption_prefix`), and the caption as labels."""
        caption = self._caption(example)
        if self.end_captions and self.processor.tokenizer.eos_token_id is not None:
            caption = [*caption, self.processor.tokenizer.eos_token_id]
        if question := example.get("question"):
            return TokenSequence.of(self._chat([_PLACEHOLDER, question]), caption)
        return TokenSequence.of(self.processor.caption_prefix(image=True, follows_caption=follows_caption), caption)

    def retrieval(self, example: Mapping[str, Any]) -> TokenSequence:
        """Return the caption with `[RET]` as labels, after its prompt; or a request or prompt, answered by `[RET]`."""
        ret = self.model.ret_token_id
        if "prompt" in example:
            return TokenSequence.of(PromptIds.of(self.processor, example["prompt"]).ids, [ret])
        if request := example.get("request"):
            return TokenSequence.of(self._chat([request]), [ret])
        return TokenSequence.of(self.processor.caption_prefix(image=False), [*self._caption(example), ret])

    def _caption(self, example: Mapping[str, Any]) -> list[int]:
        ids = self.processor.encode_caption(example["caption"])
        if example.get("question") and self.processor.tokenizer.chat_template:
            ids = self.processor.encode_text(example["caption"].strip())
        return ids[: self.max_caption_length - 1]

    def _chat(self, parts: Sequence[Any]) -> list[int]:
        # Typed, because a request that reads like a path is words.
        message = typed_message("user", parts)
        has_template = bool(self.processor.tokenizer.chat_template)
        return list(self.processor.encode([message] if has_template else [*message["content"], "\n"]).ids)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return one batch.

        Args:
            examples: b examples.

        Returns:
            `captioning` and `retrieval`, lists of `TokenSequence`; `groups` and `rows`, (b,); and `image_features`
            (b, f) or `pixel_values` (b, c, h, w). The captioning sequences use the first of the images, in order.
            If prompts have images, also `prompt_features` (m, f) or `prompt_pixels` (m, c, h, w).
        """
        captioned = examples[: max(1, round(self.captioning_fraction * len(examples)))]
        joined = len(captioned) > 1 and happens(self.concat_captions_prob, self.seed, examples[0].get("draw", 0))
        sequences = [self.captioning(example, joined and n % 2 == 1) for n, example in enumerate(captioned)]
        if joined:
            pairs = zip(sequences[::2], sequences[1::2], strict=False)
            sequences = [one + two for one, two in pairs] + sequences[len(sequences) - len(sequences) % 2 :]
        batch: dict[str, Any] = {
            "captioning": self.checked(sequences),
            "retrieval": self._read([self.retrieval(example) for example in examples]),
            "groups": torch.tensor([example["group"] for example in examples]),
            "rows": torch.tensor([example["row"] for example in examples]),
        }
        if skipped := [name for example in examples for name in example.get("skipped", ())]:
            batch["skipped"] = skipped
        if "image_features" in examples[0]:
            batch["image_features"] = torch.stack([example["image_features"] for example in examples])
        else:
            batch["pixel_values"] = self.model.vision.preprocess([example["image"] for example in examples])
        return batch | self.prompt_images(examples)

    def prompt_images(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the features (m, f) of the prompts' images, in the order of their marks, or the pixels."""
        features: list[Tensor] = []
        images: list[Any] = []
        for example in examples:
            order = PromptIds.of(self.processor, example["prompt"]).order if "prompt" in example else ()
            features += [example["prompt_features"][i] for i in order if "prompt_images" not in example]
            images += [example["prompt_images"][i] for i in order if "prompt_images" in example]
        if images:
            return {"prompt_pixels": self.model.vision.preprocess(images)}
        return {"prompt_features": torch.stack(features)} if features else {}

    def texts(self, examples: Sequence[Mapping[str, Any]]) -> list[TokenSequence]:
        """Return the `retrieval` part of the captions and requests alone, which reads no images."""
        return self._read([self.retrieval(without_prompt(example)) for example in examples])

    def _read(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Return `checked` sequences, also if the retrieval prompt comes after each."""
        read = [with_retrieval_prompt(self.processor, sequence) for sequence in sequences]
        self.processor.check_ids([EncodedPrompt(sequence.ids, ()) for sequence in read])
        return self.checked(sequences)

    def checked(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Return sequences whose image tokens are numbered, or raise if the LM cannot read their ids."""
        self.processor.check_ids([EncodedPrompt(sequence.ids, ()) for sequence in sequences])
        return number_images(sequences, self.model.frozen_lm.vocabulary.first_image_id)
