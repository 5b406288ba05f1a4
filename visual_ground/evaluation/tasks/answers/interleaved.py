"""Answers with pictures: which pictures a model's answers show and in what order, as RAG-IGBench scores them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.evaluation.formats import files
from visual_ground.evaluation.running.images import ImageFeatures, Images
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.task import Task
from visual_ground.index.image_index import ImageIndex
from visual_ground.model import GroundedModel

PICTURE = re.compile(r"!\[.*?\]\(IMG#(\d+)\)")
FILES = ("data.jsonl", "data.json")
# How much the number of pictures to choose from counts in the Kendall score, as in RAG-IGBench.
DIFFICULTY = 0.5


@dataclass(frozen=True)
class Query:
    """A question with its documents, its pictures by number from 1, and those that the reference shows, in order."""

    id: str
    text: str
    documents: tuple[str, ...]
    images: tuple[Path, ...]
    reference: tuple[int, ...]


class Interleaved(Task):
    """`edit` and `kendall` in percent, of the pictures in an answer against those in the reference answer.

    The model answers each question, after its documents, and may show the pictures of these documents only: they are
    the index that it retrieves from. `edit` is 1 - edit distance / the longer list's length. `kendall` is the share of
    pairs in the answer that both are in the reference and in its order, weighted by how many pictures there were to
    choose from. Where neither shows a picture both are 100. The texts are not scored; the answers are written beside
    the report, for the official script.

    Args:
        data: RAG-IGBench's folder: `data.jsonl` or `data.json`, and images as `images/<id>/<document>/IMG#<n>.jpg`, or
            with another ending.
        max_new_tokens: of an answer.
        max_images: the most pictures of an answer; None for any number.
        ret_bias: as in `GroundedModel.generate`.
        documents: False asks the question alone.
    """

    name, unit, dataset, split, primary_metric = "interleaved", "query", "RAG-IGBench", None, "edit"

    def __init__(
        self,
        data: str | os.PathLike[str],
        max_new_tokens: int = 256,
        max_images: int | None = None,
        ret_bias: float = 0.0,
        documents: bool = True,
    ) -> None:
        if max_new_tokens < 1:
            raise GroundingValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        self._options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "max_images": max_images,
            "ret_bias": ret_bias,
        }
        self._with_documents = documents
        self.settings: Mapping[str, Any] = {**self._options, "documents": documents}
        path, entries = _read_entries(data)
        self.files = [path]
        self._queries = [_read_query(entry, f"{path.name}, entry {n}", path) for n, entry in enumerate(entries)]
        files.check_unique([query.id for query in self._queries], f"{path.name}, id")

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Read the pictures of all queries."""
        found = images.read({str(path): path for query in self._queries for path in query.images})
        queries = [one for one in self._queries if all(str(one.images[n - 1]) in found for n in one.reference)]
        kept = {query.id for query in queries}
        without = [query.id for query in self._queries if query.id not in kept]

        def measure(numbers: Sequence[int]) -> list[Record]:
            return [self._measure(model, queries[number], found) for number in numbers]

        missing = {**found.missing, "queries without a picture of their reference": without}
        return Plan([query.id for query in queries], measure, missing, {"images": len(found.names)})

    def score(self, records: Sequence[Record]) -> Scores:
        """Return both scores, and the answers."""
        edits, kendalls = [], []
        for record in records:
            edits.append([100 * edit_score(record["shown"], record["reference"])])
            order = kendall_score(record["shown"], record["reference"])
            kendalls.append([100 * weighted(order, record["images"], len(record["reference"]))])
        answers = [{"id": record["id"], "model_answer": json.dumps({"answer": record["answer"]})} for record in records]
        return Scores({"edit": edits, "kendall": kendalls}, files={"answers.json": answers})

    def _measure(self, model: GroundedModel, query: Query, images: Images) -> Record:
        there = [number for number, path in enumerate(query.images, 1) if str(path) in images]
        answer, shown = "", []
        index = _index_of(model, query, there, images)
        for part in model.generate([self._prompt(model, query)], index, do_sample=False, **self._options)[0].parts:
            if isinstance(part, str):
                answer += part
            elif part.id is not None:
                shown.append(int(part.id))
                answer += f"![](IMG#{part.id})"
        reference = list(query.reference)
        return {"id": query.id, "shown": shown, "reference": reference, "images": len(query.images), "answer": answer}

    def _prompt(self, model: GroundedModel, query: Query) -> Any:
        """Return the documents and the question; the last documents are left out where the LM cannot hold all."""
        room = (model.frozen_lm.max_length or 1 << 30) - self._options["max_new_tokens"]
        documents = list(query.documents) if self._with_documents else []
        while True:
            text = "\n\n".join([*documents, query.text])
            chat = [{"role": "user", "content": text}]
            prompt = chat if model.tokenizer.chat_template else [{"type": "text", "text": text}]
            if not documents or len(model.processor.encode(prompt).ids) <= room:
                return prompt
            documents.pop()


def _index_of(model: GroundedModel, query: Query, there: Sequence[int], images: Images) -> ImageIndex | None:
    """Return the pictures that a query may show, with their numbers as ids."""
    if not there:
        return None
    rows = [images.rows[str(query.images[number - 1])] for number in there]
    vectors: Tensor = model.embed_images(image_features=images.features[rows])
    return ImageIndex(vectors, ids=list(there))


def edit_score(shown: Sequence[int], reference: Sequence[int]) -> float:
    """Return 1 - edit distance / the longer list's length, from 0 to 1; 1 where both are empty.

    Example:
        >>> edit_score([1, 2, 3], [1, 3]), edit_score([], [4])
        (0.6666666666666667, 0.0)
    """
    row = list(range(len(reference) + 1))
    for i, one in enumerate(shown, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(reference, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    longest = max(len(shown), len(reference))
    return 1 - row[-1] / longest if longest else 1.0


def kendall_score(shown: Sequence[int], reference: Sequence[int]) -> float:
    """Return the share of the shown pairs that the reference has in this order, from 0 to 1.

    With one picture on either side there are no pairs: then it is the share of right pictures among the longer list.

    Example:
        >>> kendall_score([1, 2, 9], [1, 2, 3]), kendall_score([2, 1], [1, 2]), kendall_score([2], [1, 2])
        (0.3333333333333333, 0.0, 0.5)
    """
    if not shown or not reference:
        return float(not shown and not reference)
    place = {picture: number for number, picture in enumerate(reference)}
    right = [place[picture] for picture in shown if picture in place]
    if len(reference) == 1 or len(shown) == 1:
        return len(right) / max(len(shown), len(reference))
    pairs = sum(one < other for i, one in enumerate(right) for other in right[i + 1 :])
    return pairs / (len(shown) * (len(shown) - 1) / 2)


def weighted(kendall: float, candidates: int, reference: int) -> float:
    """Return a Kendall score weighted by the share of pictures that were not to be chosen; 1 stays 1 without any.

    Example:
        >>> weighted(0.5, 4, 2), weighted(1.0, 0, 0)
        (0.4166666666666667, 1.0)
    """
    if not candidates:
        return kendall
    return kendall * (1 + DIFFICULTY * (candidates - reference) / candidates) / (1 + DIFFICULTY)


def _read_entries(data: str | os.PathLike[str]) -> tuple[Path, list[Any]]:
    """Return the file and its entries: a list, or one JSON object a line."""
    name = next((name for name in FILES if any(Path(data).rglob(name))), FILES[0])
    path = files.find_file(data, name)
    if name == "data.json":
        return path, files.read_json(path, list)
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise GroundingFileError(f"{str(path)!r}, line {number}, is no JSON: {error}. Fetch it again.") from error
    return path, entries


def _read_query(entry: Any, where: str, path: Path) -> Query:
    id_, text, answer = (str(files.entry_of(entry, key, object, where)) for key in ("id", "query", "gt_answer"))
    documents, listed = (files.entry_of(entry, key, list, where) for key in ("documents", "images"))
    if len(documents) != len(listed):
        raise GroundingValueError(f"{where} has {len(documents)} documents and {len(listed)} lists of images.")
    images = [one for number, names in enumerate(listed, 1) for one in _paths(path.parent, id_, number, names)]
    reference = tuple(map(int, PICTURE.findall(answer)))
    if wrong := [number for number in reference if not 1 <= number <= len(images)]:
        raise GroundingValueError(f"{where}: gt_answer shows IMG#{wrong[0]}, and there are {len(images)} images.")
    return Query(id_, text, tuple(map(str, documents)), tuple(images), reference)


def _paths(folder: Path, id_: str, document: int, names: Sequence[Any]) -> list[Path]:
    """Return the paths of a document's images; the official names end with "IMG#<n>", mostly without an ending."""
    own = folder / "images" / id_ / str(document)
    found = []
    for name in names:
        leaf = str(name).rsplit("/", 1)[-1]
        there = sorted(own.glob(f"{leaf}.*")) if leaf.startswith("IMG#") else []
        found.append(there[0] if there else own / leaf)
    return found
