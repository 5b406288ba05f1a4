"""easy-VQA: questions about the one coloured shape of a picture, out of the pip package `easy_vqa`."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingValueError, needing
from visual_ground.evaluation.formats import files
from visual_ground.evaluation.running.images import ImageFeatures
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.questions import Question, QuestionPrompt, likeliest
from visual_ground.evaluation.running.task import Task
from visual_ground.model import GroundedModel

# The question comes first, so that an image's tokens are read by an LM that knows what is asked of them.
PROMPT = "Question: {question}\nImage of {image}.\nAnswer:"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = {"colour": frozenset(COLOURS), "shape": frozenset(SHAPES), "yes_no": frozenset(("yes", "no"))}
AT_ONCE = 64  # questions that the LM reads at once


class EasyVQA(Task):
    """The likeliest of easy-VQA's 13 answers to each question, in percent right, of all and of each kind.

    `question_only` is right where the most common answer to the same question in the training set is: what can be
    reached without the picture.

    Args:
        split: "test" or "train".
        prompt: how a question is put, see `QuestionPrompt`.
        images: measure only so many pictures, drawn at random, with all their questions; None: all.
        seed: of the draw.
    """

    name, primary_metric, unit = "easy-vqa", "accuracy", "image"

    def __init__(self, split: str = "test", prompt: str = PROMPT, images: int | None = None, seed: int = 0) -> None:
        if images is not None and images < 1:
            raise GroundingValueError(f"images must be at least 1 or None, got {images}.")
        self.split: str | None = files.choose(split, ("test", "train"), "split")
        self.prompt = QuestionPrompt(prompt)
        self.settings: Mapping[str, Any] = {"split": split, "prompt": prompt, "images": images, "seed": seed}
        self.dataset = "easy-VQA" if images is None else f"easy-VQA ({images} images)"
        self.answers = tuple(_package().get_answers())
        self._images: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, image in self.read(split):
            self._images[image].append((question, answer))
        if images is not None and images < len(self._images):
            kept = random.Random(seed).sample(sorted(self._images), images)
            self._images = {image: self._images[image] for image in sorted(kept)}
        self.files = [Path(_package().__file__).parent / "data" / split / "questions.json"]

    def read(self, split: str) -> list[tuple[str, str, int]]:
        """Return the questions of a split, each with its answer and its image's number."""
        package = _package()
        read = package.get_train_questions if split == "train" else package.get_test_questions
        questions = list(zip(*read(), strict=True))
        if strange := sorted({answer for _, answer, _ in questions} - set(self.answers)):
            raise GroundingValueError(f"easy_vqa has answers that are not in its answers.txt: {strange[:5]}.")
        return questions

    def image_paths(self, split: str) -> dict[int, str]:
        """Return the pictures' paths by number."""
        package = _package()
        paths: dict[int, str] = package.get_train_image_paths() if split == "train" else package.get_test_image_paths()
        return paths

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Read the pictures."""
        paths = self.image_paths(str(self.split))
        found = images.read({str(number): paths.get(number, "") for number in sorted(self._images)})
        common = self._common_answers()

        def measure(numbers: Sequence[int]) -> list[Record]:
            asked = [(i, *one) for i in numbers for one in self._images[int(found.names[i])]]
            records: list[Record] = [{"said": [], "right": [], "common": []} for _ in numbers]
            place = {number: row for row, number in enumerate(numbers)}
            # Questions of a length share a batch, so that little of it is padding.
            asked.sort(key=lambda one: len(one[1]))
            for start in range(0, len(asked), AT_ONCE):
                batch = asked[start : start + AT_ONCE]
                prompts = [self.prompt.parts(Question(text, found.features[i])) for i, text, _ in batch]
                chosen = likeliest(model, prompts, self.answers, self.prompt.gap)
                for (i, text, right), number in zip(batch, chosen, strict=True):
                    record = records[place[i]]
                    record["said"].append(self.answers[number])
                    record["right"].append(right)
                    record["common"].append(common.get(text, ""))
            return records

        asked = sum(len(self._images[int(name)]) for name in found.names)
        return Plan(found.names, measure, found.missing, {"questions": asked})

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the accuracies, in percent."""
        values: dict[str, list[list[float]]] = {
            "accuracy": [_hits(record, record["said"]) for record in records],
            "question_only": [_hits(record, record["common"]) for record in records],
        }
        for kind, answers in KINDS.items():
            values[f"accuracy_{kind}"] = [_hits(record, record["said"], answers) for record in records]
        return Scores(values)

    def _common_answers(self) -> dict[str, str]:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for question, answer, _ in self.read("train"):
            counts[question][answer] += 1
        return {question: count.most_common(1)[0][0] for question, count in counts.items()}


def _hits(record: Record, said: Sequence[str], answers: frozenset[str] | None = None) -> list[float]:
    pairs = zip(said, record["right"], strict=True)
    return [100.0 * (one == right) for one, right in pairs if answers is None or right in answers]


def _package() -> Any:
    with needing('easy-VQA comes out of the package easy_vqa. Run pip install "visual-ground[demo]".'):
        import easy_vqa
    return easy_vqa
