"""CIRR, CIRCO and FashionIQ, from their official files to the numbers, against vectors compared one by one."""

import json

import numpy as np
import pytest
import torch

from tests.evaluation import miniatures
from tests.tiny import grounded
from visual_ground import evaluate
from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.formats.composed import read_circo, read_cirr, read_fashioniq


def run(model, task, folder, **settings):
    return evaluate(model, task, data=folder, batch_size=3, progress=False, **settings)


def similarities(model, folder, composed, way):
    """Return, one pair at a time, how similar each query is to each image; rows and columns as in the files."""
    paths = {name: str(folder / path) for name, path in composed.images.items()}
    images = model.embed_images(list(paths.values()))
    rows = []
    for query in composed.queries:
        if way == "image_only":
            vector = model.embed_images([paths[query.reference]])
        else:
            prompt = query.text if way == "text_only" else [paths[query.reference], query.text]
            vector = model.embed_text([prompt])
        rows.append(torch.cosine_similarity(vector, images).double().numpy())
    return np.stack(rows), list(paths)


def recall(scores, names, composed, k, drop_reference, among=None):
    hits = []
    for row, query in zip(scores, composed.queries, strict=True):
        allowed = [n for n in (query.members if among else names) if not (drop_reference and n == query.reference)]
        best = sorted(allowed, key=lambda name: -row[names.index(name)])[:k]
        hits.append(query.right[0] in best)
    return 100 * np.mean(hits)


@pytest.mark.parametrize("way, prefix", [("composed", ""), ("text_only", "text_only_"), ("image_only", "image_only_")])
def test_cirr_is_recall_without_the_query_image(tmp_path, way, prefix):
    model, folder = grounded(), miniatures.cirr(tmp_path)
    report = run(model, "cirr", folder)
    composed, _ = read_cirr(folder, "val")
    scores, names = similarities(model, folder, composed, way)
    for k in (1, 5):
        assert report.metrics[f"{prefix}r{k}"] == pytest.approx(recall(scores, names, composed, k, True), abs=1e-6)
    for k in (1, 2, 3):
        expected = recall(scores, names, composed, k, True, among="members")
        assert report.metrics[f"{prefix}rs{k}"] == pytest.approx(expected, abs=1e-6)
    assert report.metrics[f"{prefix}r10"] == 100, "there are only seven others"
    assert report.counts == {"units": 8, "images": 8} and not report.missing


def test_the_files_for_cirrs_server_have_its_format(tmp_path):
    model, folder = grounded(), miniatures.cirr(tmp_path / "data", "test1")
    report = run(model, "cirr", folder, split="test1")
    assert report.metrics == {"queries": 8} and report.primary_metric == "queries"
    report.save(tmp_path / "report.json")
    everything = json.loads((tmp_path / "report-cirr-test1-recall.json").read_text())
    subset = json.loads((tmp_path / "report-cirr-test1-recall_subset.json").read_text())
    assert everything.pop("version") == subset.pop("version") == "rc2"
    assert everything.pop("metric") == "recall" and subset.pop("metric") == "recall_subset"
    assert everything.keys() == subset.keys() == {str(9 + i) for i in range(8)}
    assert "test1-0-0-img0" not in everything["9"] and len(everything["9"]) == 7 and len(subset["9"]) == 3


def average_precision(ranked, right, k):
    precisions = [
        len(set(ranked[: i + 1]) & right) / (i + 1) for i in range(k) if ranked[i : i + 1] and ranked[i] in right
    ]
    return sum(precisions) / min(k, len(right))


def test_circo_is_mean_average_precision_over_all_that_is_right(tmp_path):
    model, folder = grounded(), miniatures.circo(tmp_path)
    report = run(model, "circo", folder)
    composed, _ = read_circo(folder, "val")
    for way, prefix in (("composed", ""), ("text_only", "text_only_"), ("image_only", "image_only_")):
        scores, names = similarities(model, folder, composed, way)
        for k in (5, 10):
            found = [
                average_precision([names[i] for i in np.argsort(-row)], set(query.right), k)
                for row, query in zip(scores, composed.queries, strict=True)
            ]
            assert report.metrics[f"{prefix}map{k}"] == pytest.approx(100 * np.mean(found), abs=1e-6)
    assert report.files["circo-val.json"].keys() == {str(i) for i in range(8)}
    assert all(isinstance(name, int) for ranked in report.files["circo-val.json"].values() for name in ranked)


def test_fashioniq_is_the_mean_of_three_categories(tmp_path):
    model, folder = grounded(), miniatures.fashioniq(tmp_path, number=12)
    report = run(model, "fashioniq", folder)
    found = []
    for category in ("dress", "shirt", "toptee"):
        composed, _ = read_fashioniq(folder, category, "val")
        scores, names = similarities(model, folder, composed, "composed")
        found.append(recall(scores, names, composed, 10, False))
        assert report.metrics[f"{category}_r10"] == pytest.approx(found[-1], abs=1e-6)
    assert report.metrics["r10"] == pytest.approx(np.mean(found), abs=1e-6)
    assert report.metrics.keys() >= {"text_only_r50", "image_only_r10", "shirt_image_only_r50"}
    assert report.counts["images"] == 36 and len(report.files["fashioniq-dress-val.json"][0]["ranking"]) == 12


def test_queries_that_name_a_missing_image_are_counted_and_named(tmp_path):
    folder = miniatures.cirr(tmp_path, number=16)
    (folder / "dev/val-3-0-img0.png").unlink()
    (folder / "dev/val-15-0-img0.png").write_bytes(b"no image")
    report = run(grounded(), "cirr", folder)
    assert report.missing["images that are not there"] == ["val-3-0-img0"]
    assert report.missing["images that cannot be read"] == ["val-15-0-img0"]
    # The six similar images of a query are those from its own on: queries 4 to 9 reach neither.
    left_out = report.missing["queries that name an image that is missing"]
    assert left_out == [str(9 + i) for i in range(16) if not 4 <= i <= 9] and report.counts["units"] == 6


def test_an_empty_gallery_is_refused(tmp_path):
    folder = miniatures.circo(tmp_path)
    for path in (folder / "COCO2017_unlabeled/unlabeled2017").iterdir():
        path.unlink()
    with pytest.raises(GroundingValueError, match=r"circo: nothing is left to measure \(8 images that are not there"):
        run(grounded(), "circo", folder)


def test_scores_that_are_not_numbers_are_refused(tmp_path):
    model = grounded()
    model.adapter.text_retrieval_projection[0].weight.data.fill_(float("nan"))
    with pytest.raises(GroundingValueError, match="are not numbers"):
        run(model, "circo", miniatures.circo(tmp_path))
