"""Captions of images, scored by CIDEr-D and BLEU against several references, from files in COCO's format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats import files
from visual_ground.evaluation.formats.coco_captions import read_coco_captions
from visual_ground.evaluation.measures.captions import caption_scores, tokenise_in_python, tokenise_with_java
from visual_ground.evaluation.running.images import ImageFeatures
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.prompts import answer_encoded
from visual_ground.evaluation.running.task import Task
from visual_ground.generation.sentences import sentence_ends
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt

TOKENIZERS = {"python": tokenise_in_python, "stanford": tokenise_with_java}


class Captions(Task):
    """CIDEr-D, times 100 as it is published, and BLEU-1 to BLEU-4, in percent.

    The LM writes after the prompt that the adapter was trained with, `config.image_prompt`, greedily; its first
    sentence is the caption. The report's file has the captions in the format of the official results. CIDEr-D weighs
    words by the images that are scored, so that numbers of other sets of images do not compare.

    Args:
        data: folder with `annotations/captions_<split>.json` and the images in `<split>`.
        split: such as "val2017".
        max_new_tokens: the most tokens of a caption.
        tokenizer: "python", or "stanford", which the published numbers were computed with and which needs Java.
    """

    name, primary_metric, unit, dataset = "captions", "cider", "image", "COCO captions"

    def __init__(
        self,
        data: str | os.PathLike[str],
        split: str = "val2017",
        max_new_tokens: int = 30,
        tokenizer: str = "python",
    ) -> None:
        if max_new_tokens < 1:
            raise GroundingValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        self.split: str | None = split
        self.max_new_tokens, self.tokenizer = max_new_tokens, files.choose(tokenizer, tuple(TOKENIZERS), "tokenizer")
        self.settings: Mapping[str, Any] = {"split": split, "max_new_tokens": max_new_tokens, "tokenizer": tokenizer}
        self.folder = Path(data)
        images, path = read_coco_captions(self.folder, split)
        self.images, self.files = {str(one.image_id): one for one in images}, [path]

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Read the images."""
        found = images.read({name: self.folder / one.image for name, one in self.images.items()})
        prompt = EncodedPrompt(tuple(model.processor.caption_prefix(image=True)), ())

        def measure(numbers: Sequence[int]) -> list[Record]:
            features = [found.features[number] for number in numbers]
            texts = answer_encoded(model, [prompt] * len(numbers), features, max_new_tokens=self.max_new_tokens)
            pairs = zip(numbers, texts, strict=True)
            return [{"image": found.names[number], "caption": first_sentence(text)} for number, text in pairs]

        return Plan(found.names, measure, found.missing)

    def score(self, records: Sequence[Record]) -> Scores:
        """Return CIDEr-D of each image and BLEU of all, and the results in the official format."""
        captions = {record["image"]: record["caption"] for record in records}
        references = {name: self.images[name].captions for name in captions}
        scores = caption_scores(captions, references, TOKENIZERS[self.tokenizer])
        results = [{"image_id": int(name), "caption": caption} for name, caption in captions.items()]
        bleu = {f"bleu{n}": 100 * value for n, value in enumerate(scores.bleu, 1)}
        values = {"cider": [[100 * scores.cider[record["image"]]] for record in records]}
        return Scores(values, bleu, {f"captions-{self.split}-results.json": results})


def first_sentence(text: str) -> str:
    """Return the first sentence of a text's first line.

    Example:
        >>> first_sentence("a cat on a mat. It is red.\\nImage of a dog")
        'a cat on a mat.'
    """
    line = text.strip().partition("\n")[0].strip()
    ends = sentence_ends(line)
    return line[: ends[0]].strip() if ends else line
