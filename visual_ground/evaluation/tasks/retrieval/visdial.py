"""VisDial 1.0: answers ranked in a dialogue about an image, and dialogues and images that find each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visual_ground.evaluation.formats import files
from visual_ground.evaluation.metrics import RANKS, all_ranks, hits, ndcg, ranks_of
from visual_ground.evaluation.running.images import ImageFeatures, Images
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.prompts import embed_encoded, embed_prompts, without_features
from visual_ground.evaluation.running.records import pack, unpack
from visual_ground.evaluation.running.task import Task
from visual_ground.evaluation.tasks.retrieval.visdial_files import IMAGE, SPLIT, Dialog, read_dialogs
from visual_ground.lm.reading import log_likelihoods
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt
from visual_ground.scoring.candidates import CandidateScorer

PARTS = ("all", "answers", "retrieval")
VARIANTS = ("standard", "published")
WAYS = ("dialog_to_image", "image_to_dialog")


class VisDial(Task):
    """VisDial 1.0 val: `ndcg`, `mrr`, `answer_r<k>` in percent and `mean_rank` of the answers; recalls both ways.

    Answers: after the image and the dialogue up to a question, each candidate's log-likelihood is summed over its
    tokens. `ndcg` is that of the rounds with dense annotations, the others are over all rounds. Retrieval:
    `dialog_to_image_r<k>` and `image_to_dialog_r<k>`, with all ten rounds and without the caption.

    The variant "published" repeats three faults of the published scripts, and is for comparison only. Each answer is
    scored by the logits *at* its tokens, instead of those before them, and so by no likelihood; `ndcg` takes the round
    after the annotated one; and `dialog_to_image` is what an image finds among the dialogues.

    Args:
        data: folder with `visdial_1.0_val.json`, `visdial_1.0_val_dense_annotations.json` (without which there is no
            `ndcg`), and images named `VisualDialog_val2018_<id>`, in any folder.
        part: "all", or only "answers" or "retrieval".
        variant: "standard" or "published".
    """

    name, unit, split, primary_metric = "visdial", "dialog", SPLIT, "mrr"

    def __init__(self, data: str | os.PathLike[str], part: str = "all", variant: str = "standard") -> None:
        self._part = files.choose(part, PARTS, "part")
        self._is_published = files.choose(variant, VARIANTS, "variant") == "published"
        self.dataset = "VisDial 1.0 (published protocol)" if self._is_published else "VisDial 1.0"
        self.settings: Mapping[str, Any] = {"part": part, "variant": variant}
        if part == "retrieval":
            self.primary_metric = f"{WAYS[0]}_r1"
        self._dialogs, self.files = read_dialogs(data)
        folder = files.ImageFolder(data)
        self._paths = {dialog.id: folder.path(IMAGE.format(dialog.image_id)) for dialog in self._dialogs}

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Read the images."""
        found = images.read(self._paths)
        dialogs = [dialog for dialog in self._dialogs if dialog.id in found]
        scorer = CandidateScorer(model.frozen_lm, model.active)

        def measure(numbers: Sequence[int]) -> list[Record]:
            batch = [dialogs[number] for number in numbers]
            records: list[Record] = [{} for _ in batch]
            if self._part != "answers":
                for record, vectors in zip(records, self._vectors(model, batch, found), strict=True):
                    record |= vectors
            if self._part != "retrieval":
                for record, dialog in zip(records, batch, strict=True):
                    record |= self._answers(model, scorer, dialog, found[dialog.id])
            return records

        undescribed = [dialog.id for dialog in dialogs if dialog.dense_round is None]
        missing = {**found.missing, "dialogs without dense annotations, not in ndcg": undescribed}
        if self._part == "retrieval":
            missing = dict(found.missing)
        return Plan(
            [dialog.id for dialog in dialogs], measure, missing, {"rounds": sum(len(d.rounds) for d in dialogs)}
        )

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the numbers of both parts, if they were measured."""
        values: dict[str, list[list[float]]] = {}
        if self._part != "retrieval":
            values |= self._answer_values(records)
        if self._part != "answers":
            values |= self._retrieval_values(records)
        return Scores(values)

    # Answers.

    def _answers(self, model: GroundedModel, scorer: CandidateScorer, dialog: Dialog, features: Tensor) -> Record:
        """Return the ranks of all candidates of each round, which of them is right, and the dense annotations."""
        ranks = []
        for number, one in enumerate(dialog.rounds):
            prompt, _ = without_features([features, history(dialog, number)])
            encoded = EncodedPrompt(model.processor.encode(prompt).ids, ())
            options = [f" {text}" for text in one.options]
            way = _published_scores if self._is_published else CandidateScorer.score
            ranks.append(all_ranks(way(scorer, encoded, options, features[None]).tolist()))
        right = [one.right for one in dialog.rounds]
        return {"ranks": ranks, "right": right, "dense_round": dialog.dense_round, "dense": list(dialog.dense)}

    def _answer_values(self, records: Sequence[Record]) -> dict[str, list[list[float]]]:
        values: dict[str, list[list[float]]] = {name: [] for name in ("ndcg", "mrr", "mean_rank")}
        values |= {f"answer_r{k}": [] for k in RANKS}
        flat = [ranks for record in records for ranks in record["ranks"]]
        begin = 0
        for record in records:
            ranks = [ranks[right] for ranks, right in zip(record["ranks"], record["right"], strict=True)]
            values["mrr"].append([100 / rank for rank in ranks])
            values["mean_rank"].append([float(rank) for rank in ranks])
            for k in RANKS:
                values[f"answer_r{k}"].append([hits(rank)[f"r{k}"][0] for rank in ranks])
            values["ndcg"].append([])
            if record["dense_round"] is not None:
                # The published script counts rounds from 0, the file from 1, also beyond the dialog's end.
                place = begin + record["dense_round"] + self._is_published
                gain = ndcg(record["dense"], flat[place]) if place < len(flat) else None
                values["ndcg"][-1] += [] if gain is None else [100 * gain]
            begin += len(ranks)
        return values

    # Retrieval.

    def _vectors(self, model: GroundedModel, dialogs: Sequence[Dialog], images: Images) -> list[Record]:
        texts = [transcript(dialog) for dialog in dialogs]
        pictures = model.embed_images(image_features=torch.stack([images[dialog.id] for dialog in dialogs]))
        vectors = _published_vectors(model, texts) if self._is_published else embed_prompts(model, texts)
        return [{"text": pack(text), "image": pack(image)} for text, image in zip(vectors, pictures, strict=True)]

    def _retrieval_values(self, records: Sequence[Record]) -> dict[str, list[list[float]]]:
        texts, images = (unpack([record[side] for record in records]) for side in ("text", "image"))
        scores = texts @ images.T
        right = torch.eye(len(records), dtype=torch.bool)
        to_image, to_dialog = ranks_of(scores, right).tolist(), ranks_of(scores.T, right).tolist()
        # A row of the published scores is an image; its length, which is not 1 there, changes no order in its row.
        found = {WAYS[0]: to_dialog if self._is_published else to_image, WAYS[1]: to_dialog}
        return {f"{way}_r{k}": [hits(rank)[f"r{k}"] for rank in ranks] for way, ranks in found.items() for k in RANKS}


def history(dialog: Dialog, number: int) -> str:
    """Return the questions and right answers before a round, and its question, up to where an answer begins."""
    lines = [f"Q: {one.question}?\nA: {one.answer}" for one in dialog.rounds[:number]]
    return "\n".join([*lines, f"Q: {dialog.rounds[number].question}?\nA:"])


def transcript(dialog: Dialog) -> str:
    """Return all questions and answers on one line."""
    return " ".join(f"Q: {one.question}? A: {one.answer}." for one in dialog.rounds)


def _published_scores(
    scorer: CandidateScorer, prompt: EncodedPrompt, candidates: Sequence[str], features: Tensor
) -> Tensor:
    """Return for each candidate the log-probabilities of its tokens by the logits at these tokens, summed."""
    processor, texts = scorer.attached.processor, [scorer.attached.processor.continue_text(one) for one in candidates]
    scores = []
    for start in range(0, len(texts), scorer.batch_size):
        part = texts[start : start + scorer.batch_size]
        batch = processor.batch([EncodedPrompt((*prompt.ids, *ids), ()) for ids in part]).to(scorer.frozen_lm.device)
        tokens = scorer.attached.image_tokens(image_features=features.repeat(len(part), 1))
        ids, width = batch["input_ids"], batch["input_ids"].shape[1]
        ends = [row * width + j for row, text in enumerate(part) for j in range(width - len(text), width)]
        read = torch.tensor(ends, device=ids.device)
        logits = scorer.frozen_lm.read(ids, batch["attention_mask"], read, tokens).logits
        scores.append(log_likelihoods(logits, ids.flatten()[read], list(map(len, part))).cpu())
    return torch.cat(scores)


def _published_vectors(model: GroundedModel, texts: Sequence[str]) -> Tensor:
    """Return the vectors after texts that begin with the opening ids only, without the captions' prompt."""
    processor = model.processor
    opened = [(*processor.sink, *processor.encode_text(text)) for text in texts]
    encoded = [EncodedPrompt((*ids, *processor.retrieval_suffix(ids)), ()) for ids in opened]
    return embed_encoded(model, encoded, [])
