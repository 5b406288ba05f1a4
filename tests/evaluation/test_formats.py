"""The official files of benchmarks: what is read of them, and what is said of those that are wrong."""

import json

import pytest

from tests.evaluation import miniatures
from tests.evaluation.miniatures import edit
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.evaluation.formats.coco_captions import read_coco_captions
from visual_ground.evaluation.formats.composed import read_circo, read_cirr, read_fashioniq
from visual_ground.evaluation.formats.vqa import read_vqa

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
CAPTIONS = "annotations/captions_val2017.json"
CIRR, CIRR_IMAGES = "cirr/captions/cap.rc2.val.json", "cirr/image_splits/split.rc2.val.json"
CIRCO, CIRCO_IMAGES = "annotations/val.json", "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
DRESSES = "captions/cap.dress.val.json"


def test_vqa_is_read_with_each_persons_answer(tmp_path):
    one = read_vqa(miniatures.vqa(tmp_path), "val2014")[2]
    assert (one.question_id, one.question, one.answer_type, one.common_answer) == (402, "w12 w5", "other", "w22")
    assert one.image == "val2014/COCO_val2014_000000000041.jpg" and (tmp_path / one.image).is_file()
    assert one.answers == ("w30", "w30", *["w22"] * 8)


def test_captions_are_read_with_all_references(tmp_path):
    images, _ = read_coco_captions(miniatures.coco_captions(tmp_path), "val2017")
    assert [len(image.captions) for image in images] == [1, 2, 3, 4, 5]
    assert images[1].captions == ("w11 w20 w9 w31 .", "w11 w21 w9 w31 .")
    assert all((tmp_path / image.image).is_file() for image in images)


def test_cirr_is_read_without_the_reference_among_the_members(tmp_path):
    composed, _ = read_cirr(miniatures.cirr(tmp_path), "val")
    query = composed.queries[0]
    assert (query.name, query.reference, query.text) == ("9", "val-0-0-img0", "w10 w6")
    assert query.right == ("val-1-0-img0",) and query.members == tuple(f"val-{i}-0-img0" for i in range(1, 6))
    assert all((tmp_path / path).is_file() for path in composed.images.values())


def test_circo_is_read_with_all_that_is_right(tmp_path):
    composed, _ = read_circo(miniatures.circo(tmp_path), "val")
    assert composed.queries[2].right == ("503", "504", "505") and composed.queries[2].reference == "502"
    assert all((tmp_path / path).is_file() for path in composed.images.values())


def test_fashioniq_is_read_with_both_captions_as_one(tmp_path):
    composed, _ = read_fashioniq(miniatures.fashioniq(tmp_path), "shirt", "val")
    assert composed.queries[1].text == "w11 w6 and w21" and composed.queries[1].right == ("B10002",)
    assert all((tmp_path / path).is_file() for path in composed.images.values())


def test_test_sets_have_queries_without_what_is_right(tmp_path):
    read = [
        read_cirr(miniatures.cirr(tmp_path, "test1"), "test1"),
        read_circo(miniatures.circo(tmp_path, "test"), "test"),
        read_fashioniq(miniatures.fashioniq(tmp_path, "test"), "dress", "test"),
    ]
    assert all(query.right == () for composed, _ in read for query in composed.queries)


def drop(key, *way):
    def change(content):
        for step in way:
            content = content[step]
        del content[key]

    return change


def put(value, *way):
    def change(content):
        for step in way[:-1]:
            content = content[step]
        content[way[-1]] = value

    return change


def twice(*way):
    def change(content):
        for step in way:
            content = content[step]
        content.append(content[0])

    return change


READERS = {
    "vqa": (miniatures.vqa, lambda folder: read_vqa(folder, "val2014")),
    "captions": (miniatures.coco_captions, lambda folder: read_coco_captions(folder, "val2017")),
    "cirr": (miniatures.cirr, lambda folder: read_cirr(folder, "val")),
    "circo": (miniatures.circo, lambda folder: read_circo(folder, "val")),
    "fashioniq": (miniatures.fashioniq, lambda folder: read_fashioniq(folder, "dress", "val")),
}
WRONG = [
    ("vqa", QUESTIONS, drop("question", "questions", 3), r"questions, entry 3 has no 'question', only \['image_id'"),
    ("vqa", QUESTIONS, drop("questions"), r"has no 'questions'"),
    ("vqa", QUESTIONS, put("400", "questions", 0, "question_id"), "'question_id' must be a whole number, got a string"),
    ("vqa", QUESTIONS, twice("questions"), r"question_id: these ids come twice: \[400\]"),
    ("vqa", QUESTIONS, drop(5, "questions"), r"only the second \[405\] \(1\)"),
    ("vqa", QUESTIONS, put("train2014", "data_subtype"), "of the split 'train2014', and 'val2014' was expected"),
    ("vqa", QUESTIONS, put("1.9", "info", "version"), "is of VQA version 1.9"),
    ("vqa", QUESTIONS, put(7, "questions", 0, "image_id"), "is about image 7, but .* about another"),
    ("vqa", QUESTIONS, put([], "questions"), "must be a list of entries, got an empty one"),
    ("vqa", ANNOTATIONS, drop(9, "annotations", 1, "answers"), "entry 1 has 9 answers; VQAv2 has 10"),
    ("vqa", ANNOTATIONS, drop("answer", "annotations", 1, "answers", 4), "entry 1, answers, entry 4 has no 'answer'"),
    ("captions", CAPTIONS, drop("images"), "has no 'images'"),
    ("captions", CAPTIONS, twice("images"), r"images: these ids come twice: \[70\]"),
    ("captions", CAPTIONS, twice("annotations"), r"annotations: these ids come twice: \[0\]"),
    ("captions", CAPTIONS, put(1, "annotations", 0, "image_id"), "about the image 1, which .* does not list"),
    ("captions", CAPTIONS, drop(0, "annotations"), r"no captions of 1 images, such as \[70\]"),
    ("captions", CAPTIONS, put(None, "annotations", 0, "caption"), "'caption' must be a string, got NoneType"),
    ("cirr", CIRR, drop("caption", 2), "entry 2 has no 'caption'"),
    ("cirr", CIRR, drop("target_hard", 0), "entry 0 has no 'target_hard'"),
    ("cirr", CIRR, twice(), r"ids of queries: these ids come twice: \['9'\]"),
    ("cirr", CIRR, put("dev-1", 0, "target_hard"), "the query 9 names the image 'dev-1', which is not among the 8"),
    ("cirr", CIRR, put("dev-1", 0, "reference"), "the reference 'dev-1' is not among the members"),
    ("cirr", CIRR_IMAGES, put(7, "val-0-0-img0"), "'val-0-0-img0' must be a string, got a whole number"),
    ("circo", CIRCO, drop("gt_img_ids", 0), "entry 0 has no 'gt_img_ids'"),
    ("circo", CIRCO, put([], 0, "gt_img_ids"), "gt_img_ids is empty"),
    ("circo", CIRCO, put([501, 501], 0, "gt_img_ids"), r"gt_img_ids: these ids come twice: \['501'\]"),
    ("circo", CIRCO, put([True], 0, "gt_img_ids"), "must be a whole number, got a bool"),
    ("circo", CIRCO_IMAGES, twice("images"), r"images: these ids come twice: \[500\]"),
    ("fashioniq", DRESSES, drop("target", 0), "entry 0 has no 'target'"),
    ("fashioniq", DRESSES, put("B9", 0, "candidate"), "names the image 'B9'"),
]


@pytest.mark.parametrize("name, file, change, message", WRONG, ids=[f"{row[0]}: {row[3]}" for row in WRONG])
def test_a_wrong_entry_is_named_with_its_file(tmp_path, name, file, change, message):
    build, read = READERS[name]
    edit(build(tmp_path) / file, change)
    with pytest.raises(GroundingValueError, match=message) as caught:
        read(tmp_path)
    assert file.rpartition("/")[2] in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_a_folder_without_the_files_is_told_which_are_missing(tmp_path, name):
    with pytest.raises(GroundingFileError, match=r"must hold one file '.*json'"):
        READERS[name][1](tmp_path)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (miniatures.vqa(tmp_path) / QUESTIONS).write_text(json.dumps({"questions": []})[:-3])
    with pytest.raises(GroundingFileError, match=rf"{QUESTIONS}' cannot be read as JSON"):
        read_vqa(tmp_path, "val2014")
