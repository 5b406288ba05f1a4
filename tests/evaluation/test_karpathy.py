"""COCO and Flickr30k in Karpathy's splits, with any number of captions, and in folds."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.nearness import write_images
from tests.tiny import grounded
from visual_ground import evaluate
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.evaluation.metrics import RANKS, ranks_of
from visual_ground.evaluation.tasks.retrieval.karpathy import Karpathy

CAPTIONS = [["w10 w11", "w12"], ["w13 w14 w15"], ["w16", "w17 w5", "w18"], ["w19"], ["w20 w6", "w21"], ["w22"]]
NAMES = [f"COCO_val2014_{i:012d}.png" for i in range(len(CAPTIONS))]


def content(dataset="coco"):
    images = []
    for i, (name, captions) in enumerate(zip(NAMES, CAPTIONS, strict=True)):
        sentences = [
            {"tokens": text.split(), "raw": f"{text} ", "imgid": i, "sentid": 10 * i + j}
            for j, text in enumerate(captions)
        ]
        entry = {"filename": name, "imgid": i, "split": "test", "sentids": [10 * i], "sentences": sentences}
        images.append({**entry, "filepath": "val2014", "cocoid": i} if dataset == "coco" else entry)
    images.append({**images[0], "split": "val", "filename": "other.png"})
    return {"images": images, "dataset": dataset}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "val2014", NAMES)
    for dataset in ("coco", "flickr30k"):
        write(tmp_path, content(dataset))
    return tmp_path


def write(folder, values):
    (folder / f"dataset_{values['dataset']}.json").write_text(json.dumps(values))


def expected(model, folder, chosen):
    """Return the recalls of some images, pair by pair."""
    images = {i: model.embed_images([str(folder / "val2014" / NAMES[i])])[0] for i in chosen}
    texts = {(i, text): model.embed_text([text])[0] for i in chosen for text in CAPTIONS[i]}
    found = {f"{way}_r{k}": [] for way in ("text_to_image", "image_to_text") for k in RANKS}
    for (i, _), vector in texts.items():
        better = sum(float(vector @ images[j]) >= float(vector @ images[i]) for j in chosen if j != i)
        for k in RANKS:
            found[f"text_to_image_r{k}"].append(100.0 * (better < k))
    for i in chosen:
        best = max(float(images[i] @ vector) for (j, _), vector in texts.items() if j == i)
        better = sum(float(images[i] @ vector) >= best for (j, _), vector in texts.items() if j != i)
        for k in RANKS:
            found[f"image_to_text_r{k}"].append(100.0 * (better < k))
    return found


def means(lists):
    return {name: sum(values) / len(values) for name, values in lists.items()}


@pytest.mark.parametrize("dataset", ["coco", "flickr30k"])
def test_recalls_are_those_of_every_pair_alone(folder, dataset):
    model = grounded()
    report = evaluate(model, "karpathy", data=folder, dataset=dataset, batch_size=4, progress=False)
    assert report.metrics == pytest.approx(means(expected(model, folder, range(6))), abs=1e-6)
    assert report.counts == {"units": 6, "captions": 10} and report.split == "test" and not report.missing


def test_folds_are_measured_apart(folder):
    model = grounded()
    metrics = evaluate(model, "karpathy", data=folder, fold_size=4, progress=False).metrics
    fold = means(expected(model, folder, range(4)))  # The two images after it fill no second fold.
    assert metrics == pytest.approx(
        {**means(expected(model, folder, range(6))), **{f"fold_{name}": value for name, value in fold.items()}}
    )
    metrics = evaluate(model, "karpathy", data=folder, fold_size=3, progress=False).metrics
    one, two = (expected(model, folder, chosen) for chosen in (range(3), range(3, 6)))
    for name, values in one.items():
        assert metrics[f"fold_{name}"] == pytest.approx(sum(values + two[name]) / len(values + two[name]))


def test_what_is_missing_is_counted(folder):
    values = content()
    values["images"][2]["sentences"][1]["raw"] = " "
    values["images"][3]["sentences"] = []
    write(folder, values)
    (folder / "val2014" / NAMES[5]).unlink()
    report = evaluate(grounded(), "karpathy", data=folder, progress=False)
    assert report.missing == {
        "images that are not there": [NAMES[5]],
        "captions without words": [NAMES[2]],
        "images without captions": [NAMES[3]],
    }
    assert report.counts == {"units": 4, "captions": 7}


def test_what_is_wrong_with_the_files_is_named(folder):
    with pytest.raises(GroundingValueError, match=r"no images of the split 'restval'; it has \['test', 'val'\]"):
        Karpathy(folder, split="restval")
    with pytest.raises(GroundingValueError, match="dataset must be one of .*'vg'"):
        Karpathy(folder, dataset="vg")
    with pytest.raises(GroundingValueError, match="fold_size must be at least 0"):
        Karpathy(folder, fold_size=-1)
    with pytest.raises(GroundingFileError, match="dataset_flickr8k.json"):
        Karpathy(folder, dataset="flickr8k")
    (folder / "dataset_coco.json").write_text((folder / "dataset_flickr30k.json").read_text())
    with pytest.raises(GroundingValueError, match="the dataset 'flickr30k'; 'coco' is needed"):
        Karpathy(folder)
    values = content()
    values["images"].append(values["images"][1])
    write(folder, values)
    with pytest.raises(GroundingValueError, match="come twice"):
        Karpathy(folder)
    del values["images"][1]["sentences"][0]["raw"]
    write(folder, values)
    with pytest.raises(GroundingValueError, match="image 1, sentence 0 has no 'raw'"):
        Karpathy(folder)
    write_images(folder / "again", NAMES[:1])
    write(folder, content())
    with pytest.raises(GroundingValueError, match="Several images have the name"):
        Karpathy(folder)


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 8), st.randoms(use_true_random=False), st.data())
def test_ranks_depend_on_no_order_count_ties_and_grow_no_worse_with_k(queries, candidates, random, data):
    values = data.draw(st.lists(st.integers(-2, 2), min_size=queries * candidates, max_size=queries * candidates))
    scores = torch.tensor(values, dtype=torch.float32).view(queries, candidates)
    right = torch.zeros(queries, candidates, dtype=torch.bool)
    for query in range(queries):
        right[query, data.draw(st.lists(st.integers(0, candidates - 1), min_size=1, max_size=3))] = True
    ranks, order = ranks_of(scores, right), list(range(candidates))
    random.shuffle(order)
    assert ranks_of(scores[:, order], right[:, order]).equal(ranks)
    for query, rank in enumerate(ranks.tolist()):
        best = scores[query][right[query]].max()
        assert rank == 1 + int((scores[query][~right[query]] >= best).sum())
    recalls = [float((ranks <= k).float().mean()) for k in range(1, candidates + 1)]
    assert recalls == sorted(recalls) and recalls[-1] == 1.0


def test_ranks_refuse_what_has_none():
    right = torch.tensor([[True, False], [True, False]])
    with pytest.raises(GroundingValueError, match="query 1 hold NaN"):
        ranks_of(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]), right)
    with pytest.raises(GroundingValueError, match="Query 0 has no right candidate"):
        ranks_of(torch.zeros(2, 2), right, torch.tensor([[True, False], [False, False]]))
