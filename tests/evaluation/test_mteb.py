"""A grounded model as an encoder of the real mteb, on tiny retrieval tasks built in memory."""

import sys

import numpy as np
import pytest
import torch

from tests.tiny import grounded, picture
from visual_ground.errors import GroundingStateError, GroundingTypeError
from visual_ground.evaluation.mteb_encoder import MTEBEncoder

WORDS = [f"w{10 + i} w{20 + 3 * i}" for i in range(5)]


@pytest.fixture(scope="module")
def mteb():
    import warnings

    with warnings.catch_warnings():  # Those of its own imports.
        warnings.simplefilter("ignore")
        return pytest.importorskip("mteb")


def task(mteb, category, queries, corpus):
    """Return a task whose query i is about the corpus' row i."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    numbers = range(len(WORDS))

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Tiny{category.upper()}",
            description="In memory.",
            reference="https://example.org",
            dataset={"path": "in/memory", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["image", "text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
            date=("2020-01-01", "2020-01-02"),
            domains=[],
            task_subtypes=[],
            license="mit",
            annotations_creators="derived",
            dialect=[],
            sample_creation="found",
            bibtex_citation="",
        )

        def load_data(self, num_proc=None, **kwargs):
            split = RetrievalSplitData(
                queries=Dataset.from_dict({"id": [f"q{i}" for i in numbers], **queries}),
                corpus=Dataset.from_dict({"id": [f"d{i}" for i in numbers], **corpus}),
                relevant_docs={f"q{i}": {f"d{i}": 1} for i in numbers},
                top_ranked=None,
            )
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Tiny()


def pictures(start=0):
    return [picture(start + i) for i in range(5)]


TASKS = {
    "t2i": ({"text": WORDS}, {"image": pictures()}),
    "i2t": ({"image": pictures()}, {"text": WORDS}),
    "it2i": ({"text": WORDS, "image": pictures(10)}, {"image": pictures()}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("category", TASKS)
def test_mtebs_retrieval_tasks_run_on_a_grounded_model(mteb, category):
    model = grounded()
    queries, corpus = TASKS[category]
    encoder = MTEBEncoder(model, "me/tiny", "1")
    options = {"cache": None, "show_progress_bar": False, "encode_kwargs": {"batch_size": 2}}
    found = mteb.evaluate(encoder, task(mteb, category, queries, corpus), **options)
    with torch.no_grad():
        asked = {
            "t2i": lambda: model.embed_text(WORDS),
            "i2t": lambda: model.embed_images(pictures()),
            "it2i": lambda: model.embed_text(
                [[image, f" {text}"] for image, text in zip(pictures(10), WORDS, strict=True)]
            ),
        }[category]()
        searched = model.embed_text(WORDS) if category == "i2t" else model.embed_images(pictures())
    expected = float(((asked @ searched.T).argmax(1) == torch.arange(5)).double().mean())
    assert found.task_results[0].scores["test"][0]["hit_rate_at_1"] == pytest.approx(expected, abs=1e-5)
    assert found.model_name == "me/tiny" and found.model_revision == "1"


def test_it_satisfies_the_protocol(mteb):
    from mteb.models.models_protocols import EncoderProtocol

    encoder = MTEBEncoder(grounded())
    assert isinstance(encoder, EncoderProtocol)
    assert encoder.mteb_model_meta.modalities == ["text", "image"] and encoder.mteb_model_meta.embed_dim == 6


def test_rows_of_a_batch_may_lack_text_or_image(mteb):
    model = grounded()
    encoder = MTEBEncoder(model)
    found = encoder.encode([{"text": ["w5", "", "w6"], "image": [None, picture(1), picture(2)]}])
    with torch.no_grad():
        one_by_one = [
            model.embed_text(["w5"]),
            model.embed_images([picture(1)]),
            model.embed_text([[picture(2), " w6"]]),
        ]
    assert found == pytest.approx(torch.cat(one_by_one).numpy(), abs=1e-5)
    assert encoder.similarity(found, found).diagonal().numpy() == pytest.approx(np.ones(3), abs=1e-5)
    assert encoder.similarity_pairwise(found, found).numpy() == pytest.approx(np.ones(3), abs=1e-5)
    assert encoder.encode([]).shape == (0, 6)


def test_what_it_cannot_read_is_refused(mteb):
    encoder = MTEBEncoder(grounded())
    with pytest.raises(GroundingTypeError, match=r"batches have \['audio'\]. Choose a task"):
        encoder.encode([{"audio": [1]}])
    with pytest.raises(GroundingTypeError, match="Row 1 of a batch has neither"):
        encoder.encode([{"text": ["w5", ""], "image": [None, None]}])


def test_without_mteb_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb.models.model_meta", None)
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(GroundingStateError, match=r"visual-ground\[mteb\]"):
        MTEBEncoder(grounded())
