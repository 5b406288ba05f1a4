"""The questions and annotations of VQAv2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats import files

PEOPLE = 10


@dataclass(frozen=True)
class VQAQuestion:
    """A question about an image.

    Args:
        question_id: its id.
        image: the image's file, relative to the folder.
        question: in words.
        answer_type: "yes/no", "number" or "other".
        answers: what each of ten people answered; none where there are no annotations.
        common_answer: the most common of these.
    """

    question_id: int
    image: str
    question: str
    answer_type: str
    answers: tuple[str, ...]
    common_answer: str


def read_vqa(folder: Path, split: str) -> list[VQAQuestion]:
    """Return the questions of a split, such as "val2014" or "train2014", with their answers.

    Raises:
        GroundingFileError: a file is missing or no JSON.
        GroundingValueError: of another split, or of VQA v1; a key that is missing; ids that differ or come twice.
    """
    questions_file, annotations_file = vqa_files(folder, split)
    questions = _read(questions_file, "questions", split)
    annotations = _read(annotations_file, "annotations", split)
    files.check_same_ids(questions, annotations, "question ids", (questions_file.name, annotations_file.name))
    return [_question(split, *questions[name], *annotations[name]) for name in questions]


def vqa_files(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the paths of a split's questions and annotations."""
    questions = files.find_file(folder, f"v2_OpenEnded_mscoco_{split}_questions.json")
    return questions, files.find_file(folder, f"v2_mscoco_{split}_annotations.json")


def _read(path: Path, key: str, split: str) -> dict[int, tuple[str, Mapping[str, Any]]]:
    content = files.read_json(path, dict)
    listed = files.placed(files.entry_of(content, key, list, path.name), f"{path.name}, {key}")
    said = content.get("data_subtype", split)
    if said != split:
        raise GroundingValueError(f"{path.name} is of the split {said!r}, and {split!r} was expected. Take its file.")
    info = content.get("info")
    release = str(info.get("version", "2")) if isinstance(info, Mapping) else "2"
    if release.startswith("1"):
        raise GroundingValueError(f"{path.name} is of VQA version {release}, and this task is VQAv2. Take its files.")
    ids = [files.entry_of(entry, "question_id", int, where) for where, entry in listed]
    files.check_unique(ids, f"{path.name}, question_id")
    return dict(zip(ids, listed, strict=True))


def _question(
    split: str, asked_at: str, asked: Mapping[str, Any], answered_at: str, answered: Mapping[str, Any]
) -> VQAQuestion:
    image_id = files.entry_of(asked, "image_id", int, asked_at)
    if files.entry_of(answered, "image_id", int, answered_at) != image_id:
        raise GroundingValueError(f"{asked_at} is about image {image_id}, but {answered_at} about another.")
    people = files.placed(files.entry_of(answered, "answers", list, answered_at), f"{answered_at}, answers")
    if len(people) != PEOPLE:
        raise GroundingValueError(f"{answered_at} has {len(people)} answers; VQAv2 has {PEOPLE} for each question.")
    return VQAQuestion(
        asked["question_id"],
        f"{split}/COCO_{split}_{image_id:012d}.jpg",
        files.entry_of(asked, "question", str, asked_at),
        files.entry_of(answered, "answer_type", str, answered_at),
        tuple(files.entry_of(person, "answer", str, where) for where, person in people),
        files.entry_of(answered, "multiple_choice_answer", str, answered_at),
    )
