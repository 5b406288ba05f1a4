"""VisDial's official files: the dialogs, and the dense annotations of some of their rounds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats import files

SPLIT = "val"  # The only split that has answers for all, and dense annotations.
DIALOGS_FILE = f"visdial_1.0_{SPLIT}.json"
DENSE_FILE = f"visdial_1.0_{SPLIT}_dense_annotations.json"
IMAGE = "VisualDialog_val2018_{:012d}"


@dataclass(frozen=True)
class Round:
    """One question with its candidates and which of them is the answer."""

    question: str
    options: tuple[str, ...]
    right: int

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.options[self.right]


@dataclass(frozen=True)
class Dialog:
    """Rounds about one image; `dense` has the relevance of each candidate of round `dense_round`, from 0."""

    image_id: int
    rounds: tuple[Round, ...]
    dense_round: int | None = None
    dense: tuple[float, ...] = ()

    @property
    def id(self) -> str:
        """The image's id."""
        return str(self.image_id)


def read_dialogs(data: str | os.PathLike[str]) -> tuple[list[Dialog], list[Path]]:
    """Return the dialogs of the validation split, in the file's order, and the files that were read.

    Raises:
        GroundingFileError: no dialogs there, or another kind of file.
        GroundingValueError: another split, a missing entry, a number that leads nowhere, or ids that do not match.
    """
    path = files.find_file(data, DIALOGS_FILE)
    content = files.read_json(path, dict)
    split = files.entry_of(content, "split", str, path.name)
    if split != SPLIT:
        raise GroundingValueError(f"{path.name} says that it is the split {split!r}; {SPLIT!r} is needed.")
    body = files.entry_of(content, "data", dict, path.name)
    questions, answers = (files.entry_of(body, key, list, f"{path.name}, data") for key in ("questions", "answers"))
    entries = files.entry_of(body, "dialogs", list, f"{path.name}, data")
    dialogs = [_read_dialog(entry, questions, answers, f"{path.name}, dialog {n}") for n, entry in enumerate(entries)]
    files.check_unique([dialog.image_id for dialog in dialogs], f"{path.name}, image_id")
    if not any(Path(data).rglob(DENSE_FILE)):
        return dialogs, [path]
    dense_path = files.find_file(data, DENSE_FILE)
    return _with_dense(dialogs, files.read_json(dense_path, list), dense_path.name), [path, dense_path]


def _read_dialog(entry: Any, questions: Sequence[Any], answers: Sequence[Any], where: str) -> Dialog:
    rounds = []
    for number, turn in enumerate(files.entry_of(entry, "dialog", list, where)):
        place = f"{where}, round {number}"
        question = files.number_in(questions, files.entry_of(turn, "question", int, place), f"{place}: question")
        numbers = files.entry_of(turn, "answer_options", list, place)
        options = tuple(str(files.number_in(answers, one, f"{place}: an answer option")) for one in numbers)
        right = files.entry_of(turn, "gt_index", int, place)
        files.number_in(options, right, f"{place}: gt_index")
        if "answer" in turn and turn["answer"] != numbers[right]:
            raise GroundingValueError(
                f"{place}: the answer is {turn['answer']} and gt_index leads to {numbers[right]}. The file is damaged."
            )
        rounds.append(Round(str(question), options, right))
    if not rounds:
        raise GroundingValueError(f"{where} has no rounds.")
    return Dialog(files.entry_of(entry, "image_id", int, where), tuple(rounds))


def _with_dense(dialogs: Sequence[Dialog], entries: Sequence[Any], name: str) -> list[Dialog]:
    by_image: Mapping[int, int] = {dialog.image_id: number for number, dialog in enumerate(dialogs)}
    found, seen = list(dialogs), []
    for number, entry in enumerate(entries):
        where = f"{name}, entry {number}"
        image_id = files.entry_of(entry, "image_id", int, where)
        if image_id not in by_image:
            raise GroundingValueError(
                f"{where}: image_id {image_id} is in no dialog of {DIALOGS_FILE}. The files are of different versions."
            )
        dialog = dialogs[by_image[image_id]]
        place = files.entry_of(entry, "round_id", int, where) - 1  # It counts from 1.
        options = files.number_in(dialog.rounds, place, f"{where}: round_id - 1").options
        relevance = files.entry_of(entry, "gt_relevance", list, where)
        if len(relevance) != len(options):
            raise GroundingValueError(f"{where}: {len(relevance)} gt_relevance for {len(options)} answer options.")
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in relevance):
            raise GroundingValueError(f"{where}: gt_relevance must be numbers from 0 to 1, got {relevance[:5]} ...")
        seen.append(image_id)
        found[by_image[image_id]] = Dialog(image_id, dialog.rounds, place, tuple(map(float, relevance)))
    files.check_unique(seen, f"{name}, image_id")
    return found
