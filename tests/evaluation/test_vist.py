"""VIST: official files, six kinds of recall, stories with missing pictures, and the published protocol."""

import json

import pytest
import torch

from tests.evaluation.nearness import write_images
from tests.tiny import grounded
from visual_ground import evaluate
from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.evaluation.tasks.retrieval.vist import Vist
from visual_ground.prompts.encoded import EncodedPrompt

FILE = "val.story-in-sequence.json"
STORIES = 3
IMAGES = [str(100 + i) for i in range(4 * STORIES + 2)]


def photo(story, place):
    return IMAGES[4 * story + place]  # A story's last picture is the next one's first.


def caption(story, place):
    return f"w{10 + 7 * story + place} w{40 + place}"


def annotation(story, place, **changes):
    entry = {
        "original_text": f"W{story}",
        "album_id": "1",
        "photo_flickr_id": photo(story, place),
        "setting": "first-2-pick-and-tell",
        "worker_id": "w",
        "story_id": f"s{story}",
        "tier": "story-in-sequence",
        "worker_arranged_photo_order": place,
        "text": caption(story, place),
        "storylet_id": f"{story}{place}",
    }
    return [{**entry, **changes}]


@pytest.fixture
def content():
    images = [{"id": name, "album_id": "1", "secret": "x", "media": "photo"} for name in IMAGES]
    return {"images": images, "albums": [], "annotations": [annotation(s, p) for s in range(STORIES) for p in range(5)]}


@pytest.fixture
def folder(tmp_path, content):
    write_images(tmp_path / "images" / "val", [f"{name}.png" for name in IMAGES])
    (tmp_path / "sis").mkdir()
    write(tmp_path, content)
    return tmp_path


def write(folder, content, name=FILE):
    (folder / "sis" / name).write_text(json.dumps(content))


def picture_of(folder, name):
    return str(folder / "images" / "val" / f"{name}.png")


def expected(model, folder, stories, vectors_of, images=IMAGES):
    """Return recalls by going over every story and every picture, one at a time."""
    gallery = {name: model.embed_images([picture_of(folder, name)])[0] for name in images}
    found = {}
    for context, (captions, shown) in {
        "captions_1": (1, 0),
        "captions_5": (5, 0),
        "captions_5_images_4": (5, 4),
    }.items():
        for story in stories:
            vector = vectors_of(story, captions, shown)
            scores = {name: float(vector @ other) for name, other in gallery.items()}
            target, earlier = photo(story, 4), {photo(story, place) for place in range(4)}
            for suffix, searched in (("", set(images)), ("_masked", set(images) - earlier)):
                better = sum(scores[name] >= scores[target] for name in searched - {target})
                for k in (1, 5, 10):
                    found.setdefault(f"{context}{suffix}_r{k}", []).append(100.0 * (better < k))
    return {name: sum(hits) / len(hits) for name, hits in found.items()}


@pytest.mark.parametrize("family", ["llama_untied", "mamba"])
def test_recalls_are_those_of_every_story_alone(folder, family):
    model = grounded(family)

    def vectors_of(story, captions, shown):
        texts = [caption(story, place) for place in range(5)]
        prompt = " ".join(texts[-captions:])
        if shown:
            prompt = [texts[0]]
            for place in range(4):
                prompt += [picture_of(folder, photo(story, place)), f" {texts[place + 1]}"]
        return model.embed_text([prompt])[0]

    report = evaluate(model, "vist", data=folder, batch_size=2, progress=False)
    assert report.metrics == pytest.approx(expected(model, folder, range(STORIES), vectors_of), abs=1e-6)
    assert len(report.metrics) == 18 and report.counts == {"units": STORIES, "images": len(IMAGES)}
    assert report.split == "val" and not report.missing
    for name in ("captions_1", "captions_5", "captions_5_images_4"):
        for k in (1, 5, 10):
            assert report.metrics[f"{name}_masked_r{k}"] >= report.metrics[f"{name}_r{k}"]


def test_published_gives_every_caption_its_own_bos_and_skips_stories(folder):
    (folder / "images" / "val" / f"{photo(0, 1)}.png").unlink()
    model = grounded()
    ids = lambda text: [1, *(int(word[1:]) for word in text.split())]  # noqa: E731

    def vectors_of(story, captions, shown):
        sequence = []
        for number, place in enumerate(range(5 - captions, 5)):
            sequence += [*ids(caption(story, place)), *([-1 - number] if number < shown else [])]
        encoded = EncodedPrompt((*sequence, model.ret_token_id), ())
        batch = model.processor.batch([encoded])
        pictures = [picture_of(folder, photo(story, place)) for place in range(shown)]
        tokens = model.active.image_tokens(image_features=model.vision.encode(pictures)) if shown else None
        last = torch.tensor([batch["input_ids"].shape[1] - 1])
        states = model.frozen_lm.hidden_states(batch["input_ids"], batch["attention_mask"], last, image_tokens=tokens)
        return model.active.embed_states(states)[0].detach()

    report = evaluate(model, "vist", data=folder, variant="published", progress=False)
    assert report.missing == {
        "images that are not there": [photo(0, 1)],
        "stories without a picture that is needed": ["s0"],
    }
    assert report.dataset == "VIST (published protocol)" and report.counts["units"] == 2
    kept = [name for name in IMAGES if name != photo(0, 1)]
    metrics = expected(model, folder, [1, 2], vectors_of, kept)
    assert report.metrics == pytest.approx(metrics, abs=1e-6)


def test_an_earlier_picture_that_is_missing_leaves_the_other_contexts(folder):
    (folder / "images" / "val" / f"{photo(2, 1)}.png").write_bytes(b"damaged")
    report = evaluate(grounded(), "vist", data=folder, progress=False)
    assert report.counts == {"units": 3, "images": len(IMAGES) - 1}
    assert report.missing == {
        "images that cannot be read": [photo(2, 1)],
        "stories that lack an earlier picture, not in captions_5_images_4": ["s2"],
    }
    (folder / "images" / "val" / f"{photo(1, 4)}.png").unlink()  # Story 2's first, too.
    report = evaluate(grounded(), "vist", data=folder, progress=False)
    assert report.missing["stories without a picture that is needed"] == ["s1"] and report.counts["units"] == 2


def test_captions_are_read_in_the_order_of_the_story(folder, content):
    expected = evaluate(grounded(), "vist", data=folder, progress=False).metrics
    content["annotations"].reverse()
    write(folder, content)
    assert evaluate(grounded(), "vist", data=folder, progress=False).metrics == pytest.approx(expected)


def test_what_is_wrong_with_the_files_is_named(folder, content, tmp_path):
    with pytest.raises(GroundingFileError, match=r"train.story-in-sequence.json.*it has \['val.story-in"):
        Vist(folder, split="train")
    with pytest.raises(GroundingFileError, match="no folder"):
        Vist(folder / "none")
    with pytest.raises(GroundingTypeError, match="needs data="):
        evaluate(grounded(), "vist")
    with pytest.raises(GroundingValueError, match=r"split must be one of .* got 'validation'"):
        Vist(folder, split="validation")
    story = content["annotations"]
    for broken, match in [
        ({"images": [], "annotations": [[{"story_id": "1"}]]}, "annotation 0 has no 'worker_arranged_photo_order'"),
        ({"annotations": story}, "val.story-in-sequence.json has no 'images', only"),
        ({"images": [{"id": 3}], "annotations": story}, "image 0: 'id' must be a string, got a whole number"),
        ({**content, "annotations": [*story, annotation(0, 0)]}, r"annotation 15, .*come twice: \[0\]"),
    ]:
        write(folder, broken)
        with pytest.raises(GroundingValueError, match=match):
            Vist(folder)
    write(folder, [])
    with pytest.raises(GroundingFileError, match="must hold an object, got a list"):
        Vist(folder)
    (folder / "sis" / FILE).write_text('{"images": [')
    with pytest.raises(GroundingFileError, match="cannot be read as JSON"):
        Vist(folder)


def test_stories_that_are_none_are_counted(folder, content):
    content["annotations"] += [annotation(3, 0, photo_flickr_id=IMAGES[0])]
    content["annotations"][7] = annotation(1, 2, text=" ")
    content["images"].append({"id": IMAGES[3]})
    write(folder, content)
    report = evaluate(grounded(), "vist", data=folder, progress=False)
    assert report.missing == {
        "stories without five captions": ["s3"],
        "stories with an empty caption": ["s1"],
        "further entries of an image": [IMAGES[3]],
    }
    assert report.counts["images"] == len(IMAGES)


def test_an_empty_gallery_is_refused(folder, content):
    for path in (folder / "images" / "val").iterdir():
        path.unlink()
    with pytest.raises(GroundingValueError, match="nothing is left to measure .14 images that are not there"):
        evaluate(grounded(), "vist", data=folder, progress=False)
