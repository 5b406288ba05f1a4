"""VQAv2, easy-VQA and captions, from their official files to the numbers, against the model asked one by one."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.evaluation import miniatures
from tests.tiny import grounded, picture
from visual_ground import evaluate
from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.evaluation.formats.coco_captions import read_coco_captions
from visual_ground.evaluation.formats.vqa import read_vqa
from visual_ground.evaluation.measures.captions import caption_scores
from visual_ground.evaluation.measures.vqa import vqa_accuracy
from visual_ground.evaluation.running.questions import Question, QuestionPrompt, likeliest
from visual_ground.evaluation.tasks.answers.captions import first_sentence
from visual_ground.evaluation.tasks.answers.easy_vqa import EasyVQA
from visual_ground.evaluation.tasks.registry import load_task

PROMPT = "w50 {image} w51 {question} w52"


def run(model, task, folder=None, **settings):
    return evaluate(model, task, data=folder, batch_size=2, progress=False, **settings)


def test_free_answers_are_those_of_generate(tmp_path):
    model, folder = grounded(), miniatures.vqa(tmp_path)
    report = run(model, "vqav2", folder, prompt=PROMPT)
    expected, said = [], {}
    for one in read_vqa(folder, "val2014"):
        prompt = ["w50 ", str(folder / one.image), f" w51 {one.question} w52"]
        answer = str(model.generate([prompt], max_new_tokens=10, max_images=0)[0]).strip()
        said[one.question_id] = answer
        expected.append(100 * vqa_accuracy(answer, one.answers))
    assert report.metrics["accuracy"] == pytest.approx(np.mean(expected), abs=1e-6)
    results = report.files["vqav2-val2014-results.json"]
    assert {one["question_id"]: one["answer"] for one in results} == said
    assert report.counts == {"units": 3, "questions": 6}


@pytest.mark.parametrize("family", ["llama_untied", "mamba"])
@pytest.mark.parametrize("shots", [0, 2])
def test_chosen_answers_are_the_likeliest(tmp_path, family, shots):
    model, folder = grounded(family), miniatures.vqa(miniatures.vqa(tmp_path), "train2014", 12)
    report = run(model, "vqav2", folder, prompt=PROMPT, choices=4, shots=shots)
    task = load_task("vqav2", folder, prompt=PROMPT, choices=4, shots=shots)
    assert task.choices == ["w20", "w21", "w22"]
    expected = []
    for one in read_vqa(folder, "val2014"):
        prompt = []
        for shot in task._shots(one):
            assert shot.image != one.image and shot.image.startswith("train2014/")
            prompt += ["w50 ", str(folder / shot.image), f" w51 {shot.question} w52 {shot.common_answer}"]
        prompt += ["w50 ", str(folder / one.image), f" w51 {one.question} w52"]
        likelihoods = model.log_likelihood([prompt] * 3, task.choices)
        expected.append(100 * vqa_accuracy(task.choices[int(likelihoods.argmax())], one.answers))
    assert report.metrics["accuracy"] == pytest.approx(np.mean(expected), abs=1e-6)
    by_kind = [report.metrics[f"accuracy_{kind}"] for kind in ("yes_no", "number", "other")]
    assert by_kind == pytest.approx([np.mean(expected[i::3]) for i in range(3)], abs=1e-6)


def test_an_answer_of_several_tokens_is_chosen_where_all_of_it_is_likeliest():
    model = grounded()
    choices = [f"w{i} w{j}" for i in range(4, 10) for j in range(30, 34)] + ["w40", "w41"]
    prompts = [[f"w{i}", torch.randn(12), "w6"] for i in range(20, 26)]
    found = likeliest(model, prompts, choices)
    for prompt, number in zip(prompts, found, strict=True):
        first, features, last = prompt
        encoded = model.processor.encode([first, picture(), last]).ids
        tokens = model.active.image_tokens(image_features=features[None])
        scores = []
        for choice in choices:
            ids = [*encoded, *model.processor.continue_text(f" {choice}")]
            ids = [model.frozen_lm.vocabulary.first_image_id if i < 0 else i for i in ids]
            batch = torch.tensor([ids])
            length = [len(choice.split())]
            score = model.frozen_lm.log_likelihood(batch, torch.ones_like(batch), length, tokens)
            scores.append(float(score.detach()))
        assert scores[number] == pytest.approx(max(scores), abs=1e-5)


def test_a_sample_of_images_has_all_their_questions_and_is_called_so(tmp_path):
    folder = miniatures.vqa(tmp_path)
    report = run(grounded(), "vqav2", folder, images=2, seed=1)
    assert report.counts == {"units": 2, "questions": 4} and report.dataset == "VQAv2 (0 shots, 2 images)"
    assert report.to_json() == run(grounded(), "vqav2", folder, images=2, seed=1).to_json()


def test_questions_whose_image_is_missing_are_counted_and_named(tmp_path):
    folder = miniatures.vqa(tmp_path)
    (folder / "val2014/COCO_val2014_000000000041.jpg").unlink()
    report = run(grounded(), "vqav2", folder)
    assert report.missing["images that are not there"] == ["val2014/COCO_val2014_000000000041.jpg"]
    assert report.missing["questions that lack an image, theirs or a shot's"] == ["402", "403"]
    assert report.counts == {"units": 2, "questions": 4}


def test_bad_settings_of_vqav2_are_refused(tmp_path):
    miniatures.vqa(miniatures.vqa(tmp_path), "train2014", 4)
    for wrong in ({"shots": -1}, {"choices": 1}, {"images": 0}):
        with pytest.raises(GroundingValueError, match="shots must be at least 0, choices 0 or at least 2"):
            load_task("vqav2", tmp_path, **wrong)
    with pytest.raises(GroundingValueError, match="prompt must be 'chat', or a text with {question} and {image} once"):
        load_task("vqav2", tmp_path, prompt="What is in {image}?")
    with pytest.raises(GroundingValueError, match="train2014 has 2 other images, too few for 8 shots"):
        run(grounded(), "vqav2", tmp_path, shots=8)


def test_braces_in_a_question_stay_as_they_are():
    parts = QuestionPrompt("{image} Q: {question} A:").parts(Question("is {image} red?", None))
    assert parts == [None, " Q: is {image} red? A:"]


def test_a_chat_has_the_answered_questions_as_turns():
    one, other = torch.zeros(12), torch.ones(12)
    turns = QuestionPrompt("chat").parts(Question("what?", other), [Question("who?", one, "a cat")])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"] and turns[1]["content"] == "a cat"
    assert [turn["content"][1]["text"] for turn in turns[::2]] == ["who?", "what?"]
    assert turns[0]["content"][0] is one and turns[2]["content"][0] is other
    assert QuestionPrompt("chat").gap == ""


def test_choices_that_have_no_tokens_of_their_own_are_refused():
    with pytest.raises(GroundingValueError, match="Choices need tokens, each its own"):
        likeliest(grounded(), [["w4"]], ["yes", "no"])
    model = grounded()
    model.adapter.image_projection.weight.data.fill_(float("nan"))
    with pytest.raises(GroundingValueError, match="1 of 1 prompts have answers whose likelihood is not a number"):
        likeliest(model, [["w4", torch.randn(12)]], ["w5", "w6"])


@pytest.fixture
def easy(tmp_path, monkeypatch):
    """Put a miniature in the place of the package: 3 test images, 8 questions, and a training set."""
    test = [("w30 w31", "w20", 0), ("w32", "w21", 0), ("w33", "w22", 1), ("w30 w31", "w21", 1)]
    test += [("w32", "w21", 2), ("w33", "w20", 2), ("w34", "w22", 2), ("w32", "w20", 1)]
    train = [("w30 w31", "w20", 0), ("w32", "w21", 0), ("w32", "w21", 1), ("w32", "w22", 1), ("w33", "w22", 0)]
    for number in range(3):
        miniatures.paint(tmp_path / f"{number}.png", number)
    miniatures.write(tmp_path / "data/test/questions.json", test)
    columns = {
        name: [list(column) for column in zip(*rows, strict=True)] for name, rows in (("train", train), ("test", test))
    }
    package = SimpleNamespace(
        __file__=str(tmp_path / "__init__.py"),
        get_answers=lambda: ["w20", "w21", "w22"],
        get_train_questions=lambda: columns["train"],
        get_test_questions=lambda: columns["test"],
        get_train_image_paths=lambda: {},
        get_test_image_paths=lambda: {number: str(tmp_path / f"{number}.png") for number in range(3)},
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", package)
    return package, test


def test_easy_vqa_has_the_question_only_majority_beside(easy):
    model, (package, test) = grounded(), easy
    report = run(model, "easy-vqa", prompt=PROMPT)
    right = []
    for question, answer, image in test:
        prompt = ["w50 ", package.get_test_image_paths()[image], f" w51 {question} w52"]
        likelihoods = model.log_likelihood([prompt] * 3, package.get_answers())
        right.append(package.get_answers()[int(likelihoods.argmax())] == answer)
    assert report.metrics["accuracy"] == pytest.approx(100 * np.mean(right), abs=1e-6)
    # By hand: "w30 w31" is mostly w20, "w32" w21, "w33" w22; "w34" was never asked. 4 of 8 are right.
    assert report.metrics["question_only"] == 50
    assert report.counts == {"units": 3, "questions": 8} and report.data.keys() == {"questions.json"}


def test_easy_vqa_can_be_measured_on_some_pictures(easy):
    report = run(grounded(), "easy-vqa", prompt=PROMPT, images=2, seed=3)
    assert report.counts["units"] == 2 and report.dataset == "easy-VQA (2 images)"
    with pytest.raises(GroundingValueError, match="images must be at least 1"):
        EasyVQA(images=0)


def test_easy_vqa_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(GroundingStateError, match=r"visual-ground\[demo\]"):
        EasyVQA()


def test_the_real_package_has_the_known_majority():
    pytest.importorskip("easy_vqa")
    task = EasyVQA()
    common = task._common_answers()
    records = [
        {"said": [common[q] for q, _ in asked], "right": [a for _, a in asked], "common": [common[q] for q, _ in asked]}
        for asked in task._images.values()
    ]
    means = task.score(records).means()
    assert round(means["question_only"], 1) == round(means["accuracy"], 1) == 67.0
    assert sum(len(record["said"]) for record in records) == 9673


def test_captions_are_generated_behind_the_prompt_of_training_and_scored(tmp_path):
    model, folder = grounded(), miniatures.coco_captions(tmp_path)
    report = run(model, "captions", folder, max_new_tokens=5)
    images = {str(one.image_id): one for one in read_coco_captions(folder, "val2017")[0]}
    said = {}
    for name, one in images.items():
        prompt = ["w7 ", str(folder / one.image), " w8"]
        said[name] = first_sentence(str(model.generate([prompt], max_new_tokens=5, max_images=0)[0]))
    assert {str(one["image_id"]): one["caption"] for one in report.files["captions-val2017-results.json"]} == said
    scores = caption_scores(said, {name: one.captions for name, one in images.items()})
    assert report.metrics["cider"] == pytest.approx(100 * np.mean(list(scores.cider.values())), abs=1e-6)
    found = [report.metrics[f"bleu{n}"] for n in range(1, 5)]
    assert found == pytest.approx([100 * value for value in scores.bleu], abs=1e-6)
    assert "cider" in report.intervals


def test_an_image_without_its_file_is_no_caption(tmp_path):
    folder = miniatures.coco_captions(tmp_path)
    (folder / "val2017/000000000072.jpg").write_bytes(b"")
    report = run(grounded(), "captions", folder, max_new_tokens=2)
    assert report.missing == {"images that cannot be read": ["72"]}
    assert [one["image_id"] for one in report.files["captions-val2017-results.json"]] == [70, 71, 73, 74]
    with pytest.raises(GroundingValueError, match="max_new_tokens must be at least 1"):
        load_task("captions", folder, max_new_tokens=0)
    with pytest.raises(GroundingValueError, match="tokenizer must be one of"):
        load_task("captions", folder, tokenizer="java")


def test_results_are_written_beside_the_report(tmp_path):
    run(grounded(), "vqav2", miniatures.vqa(tmp_path / "data")).save(tmp_path / "report.json")
    results = json.loads((tmp_path / "report-vqav2-val2014-results.json").read_text())
    assert [one["question_id"] for one in results] == list(range(400, 406))
