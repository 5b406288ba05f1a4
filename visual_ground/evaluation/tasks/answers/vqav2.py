"""VQAv2: questions about photos, answered freely or out of common answers, after none or several answered ones."""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats import files
from visual_ground.evaluation.formats.vqa import VQAQuestion, read_vqa, vqa_files
from visual_ground.evaluation.measures.vqa import vqa_accuracy
from visual_ground.evaluation.running.images import ImageFeatures, Images
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.prompts import answer_prompts
from visual_ground.evaluation.running.questions import Question, QuestionPrompt, likeliest
from visual_ground.evaluation.running.task import Task
from visual_ground.model import GroundedModel

PROMPT = "Image of {image}.\nQuestion: {question}\nAnswer:"
KINDS = {"yes/no": "yes_no", "number": "number", "other": "other"}
AT_ONCE = 32  # questions that the LM reads at once
MAX_NEW_TOKENS = 10


class VQAv2(Task):
    """The official accuracy, in percent, of all questions and of each answer type.

    The report's file has the answers in the format of the official results.

    Args:
        data: folder with `v2_OpenEnded_mscoco_<split>_questions.json`, `v2_mscoco_<split>_annotations.json` and the
            images in `<split>`; where shots or choices are asked for, also those of train2014.
        split: "val2014" or "train2014".
        shots: how many answered questions of train2014 come before each, drawn at random for each question.
        choices: 0 lets the LM write the answer, and its first line counts, without a full stop at its end; else the
            likeliest of so many most common answers of train2014 counts.
        prompt: how a question is put, see `QuestionPrompt`.
        images: measure only so many images, drawn at random, with all their questions; None: all.
        seed: of what is drawn.
    """

    name, primary_metric, unit = "vqav2", "accuracy", "image"

    def __init__(
        self,
        data: str | os.PathLike[str],
        split: str = "val2014",
        shots: int = 0,
        choices: int = 0,
        prompt: str = PROMPT,
        images: int | None = None,
        seed: int = 0,
    ) -> None:
        if shots < 0 or choices < 0 or choices == 1 or (images is not None and images < 1):
            raise GroundingValueError(
                f"shots must be at least 0, choices 0 or at least 2, and images at least 1 or None; got {shots}, "
                f"{choices} and {images}."
            )
        self.split: str | None = files.choose(split, ("val2014", "train2014"), "split")
        self.shots, self.seed, self.prompt, self.folder = shots, seed, QuestionPrompt(prompt), Path(data)
        self.settings: Mapping[str, Any] = {"split": split, "shots": shots, "choices": choices, "prompt": prompt}
        self.settings = {**self.settings, "images": images, "seed": seed}
        self.dataset = f"VQAv2 ({shots} shots)" if images is None else f"VQAv2 ({shots} shots, {images} images)"
        self.questions = read_vqa(self.folder, split)
        self.train = read_vqa(self.folder, "train2014") if shots or choices else []
        splits = [split, "train2014"] if self.train else [split]
        self.files = [path for one in dict.fromkeys(splits) for path in vqa_files(self.folder, one)]
        common = Counter(question.common_answer for question in self.train)
        self.choices = [answer for answer, _ in common.most_common(choices)] if choices else []
        self._shown = {question.image for question in self.train}
        self._by_image = _sampled(self.questions, images, seed)

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Read the images, those of the shots too."""
        shots = {question.question_id: self._shots(question) for of in self._by_image.values() for question in of}
        shown = {shot.image for of_one in shots.values() for shot in of_one}
        found = images.read({name: self.folder / name for name in [*self._by_image, *sorted(shown)]})
        whole = {
            name: [one for one in of if all(shot.image in found for shot in shots[one.question_id])]
            for name, of in self._by_image.items()
            if name in found
        }
        units = [name for name, of in whole.items() if of]
        asked = {question.question_id for of in whole.values() for question in of}
        lost = [str(number) for number in shots if number not in asked]
        missing = {**found.missing, "questions that lack an image, theirs or a shot's": lost}

        def measure(numbers: Sequence[int]) -> list[Record]:
            questions = [question for number in numbers for question in whole[units[number]]]
            answers: dict[int, str] = {}
            # Questions of a length share a batch, so that little of it is padding.
            questions.sort(key=lambda one: (len(one.question), one.question_id))
            for start in range(0, len(questions), AT_ONCE):
                part = questions[start : start + AT_ONCE]
                prompts = [self._prompt(one, shots[one.question_id], found) for one in part]
                ids = [one.question_id for one in part]
                answers |= dict(zip(ids, self._answers(model, prompts), strict=True))
            return [
                {"answers": [[one.question_id, answers[one.question_id]] for one in whole[units[number]]]}
                for number in numbers
            ]

        return Plan(units, measure, missing, {"questions": len(asked)})

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the accuracies, and the results in the official format."""
        known = {question.question_id: question for question in self.questions}
        values: dict[str, list[list[float]]] = {
            name: [[] for _ in records] for name in ("accuracy", *(f"accuracy_{kind}" for kind in KINDS.values()))
        }
        results = []
        for unit, record in enumerate(records):
            for number, answer in record["answers"]:
                question = known[number]
                value = 100 * vqa_accuracy(answer, question.answers)
                values["accuracy"][unit].append(value)
                if question.answer_type in KINDS:
                    values[f"accuracy_{KINDS[question.answer_type]}"][unit].append(value)
                results.append({"question_id": number, "answer": answer})
        return Scores(values, files={f"vqav2-{self.split}-results.json": results})

    def _shots(self, question: VQAQuestion) -> list[VQAQuestion]:
        """Return the answered questions before one: about other images, and the same in any order of questions."""
        draw = random.Random(f"{self.seed} {question.question_id}")
        chosen: list[VQAQuestion] = []
        others = len(self._shown) - (question.image in self._shown)
        if others < self.shots:
            raise GroundingValueError(f"train2014 has {others} other images, too few for {self.shots} shots.")
        while len(chosen) < self.shots:
            shot = draw.choice(self.train)
            if shot.image != question.image and all(shot.image != one.image for one in chosen):
                chosen.append(shot)
        return chosen

    def _prompt(self, question: VQAQuestion, shots: Sequence[VQAQuestion], found: Images) -> list[Any]:
        answered = [Question(shot.question, found[shot.image], shot.common_answer) for shot in shots]
        return self.prompt.parts(Question(question.question, found[question.image]), answered)

    def _answers(self, model: GroundedModel, prompts: Sequence[list[Any]]) -> list[str]:
        if self.choices:
            return [self.choices[number] for number in likeliest(model, prompts, self.choices, self.prompt.gap)]
        texts = answer_prompts(model, prompts, max_new_tokens=MAX_NEW_TOKENS)
        return [text.strip().partition("\n")[0].strip().removesuffix(".") for text in texts]


def _sampled(questions: Sequence[VQAQuestion], images: int | None, seed: int) -> dict[str, list[VQAQuestion]]:
    """Return the questions by image, of all images or of some drawn at random, in the order of the file."""
    by_image: dict[str, list[VQAQuestion]] = defaultdict(list)
    for question in questions:
        by_image[question.image].append(question)
    if images is None or images >= len(by_image):
        return dict(by_image)
    kept = set(random.Random(seed).sample(sorted(by_image), images))
    return {name: of for name, of in by_image.items() if name in kept}
