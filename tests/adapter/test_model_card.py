"""The card: what it says, and that nobody's own words in it are lost."""

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.tiny import grounded, picture
from visual_ground import ImageIndex
from visual_ground.adapter.metadata import AdapterMetadata
from visual_ground.adapter.model_card import PICTURE_FILE, render_card
from visual_ground.adapter.report import Report
from visual_ground.config import GroundingConfig
from visual_ground.generation.gallery import with_samples

NAMES = {"base_model_name_or_path": "some/lm", "revision": "a" * 40, "vision_encoder": "some/vision"}
RESULTS = {"text_to_image": {"r1": 10.5, "r10": 50.0}, "image_to_text": {"r1": 9.0}, "caption_pair_accuracy": 71.25}


def metadata(**changes):
    report = Report(license="mit", datasets=("some/pairs",), training={"max_steps": 110, "learning_rate": 1e-3})
    report = report.measured("some/pairs", RESULTS, pairs=150, revision="b" * 40, split="test")
    return AdapterMetadata(GroundingConfig(), {**NAMES, **changes}, None, report)


def test_the_metadata_is_the_hub_s():
    card = ModelCard(render_card(metadata(), 1000, "me/adapter"))
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("visual_ground", "image-text-to-text", "mit")
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("some/lm", "adapter")
    assert data.datasets == ["some/pairs"] and "visual_ground" in data.tags
    found = {(r.metric_type, r.metric_name): r for r in data.eval_results}
    recall = found["recall", "Recall at 10, text to image (percent)"]
    assert (recall.metric_value, recall.dataset_type, recall.dataset_split) == (50.0, "some/pairs", "test")
    assert recall.dataset_revision == "b" * 40 and len(found) == 4
    assert found["accuracy", "Caption pair accuracy (percent)"].metric_value == 71.25


def test_the_body_says_what_the_record_says():
    text = render_card(metadata(), 1234567, "me/adapter")
    for words in ("1,234,567", "`some/lm`", "| max_steps | 110 |", "| 50 |", 'from_pretrained("me/adapter")'):
        assert words in text
    bare = render_card(AdapterMetadata(GroundingConfig(), {}), 1)
    assert "Nothing has been measured" in bare and "base_model" not in bare and "model-index" not in bare
    assert "base_model:" not in render_card(metadata(base_model_name_or_path="/home/me/lm"), 1)


def test_rendering_again_is_byte_identical_and_follows_the_record():
    first = render_card(metadata(), 10, "me/adapter")
    assert render_card(metadata(), 10, "me/adapter", first) == first
    assert render_card(metadata(), 11, "me/adapter", first) == render_card(metadata(), 11, "me/adapter")


def test_what_people_write_around_the_generated_text_and_into_the_metadata_stays():
    first = render_card(metadata(), 10, "me/adapter")
    edited = first.replace("license: mit", "license: apache-2.0\nlanguage: en").replace(
        "pipeline_tag: image-text-to-text\n", ""
    )
    edited = edited.replace("<!-- visual_ground generated", "## Who made it\n\nMe.\n\n<!-- visual_ground generated")
    edited += "\nPS: at the very end.\n"
    new = render_card(metadata(), 99, "me/adapter", edited.replace("\n", "\r\n"))
    data = yaml.safe_load(new.split("---\n")[1])
    assert (data["license"], data["language"], data["base_model"]) == ("apache-2.0", "en", "some/lm")
    assert "pipeline_tag" not in data
    assert "99 parameters" in new and new.endswith("\nPS: at the very end.\n")
    assert new.index("---\n\n## Who made it\n\nMe.\n\n") < new.index("# adapter\n")
    assert render_card(metadata(), 99, "me/adapter", new) == new


def test_generated_text_that_people_edit_is_theirs_from_then_on():
    edited = render_card(metadata(), 10, "me/adapter").replace(
        "- The language model is", "- It is shy. The language model is"
    )
    new = render_card(metadata(base_model_name_or_path="other/lm"), 99, "me/adapter", edited)
    assert "It is shy" in new and "10 parameters" in new and "99 parameters" not in new
    assert yaml.safe_load(new.split("---\n")[1])["base_model"] == "other/lm"
    assert render_card(metadata(base_model_name_or_path="other/lm"), 100, "me/adapter", new) == new


def test_a_page_of_somebody_s_own_stays_as_it_is():
    theirs = "---\nlicense: openrail  # mind it\n---\n\nHello.\n\n## Use\n\nAsk me.\n"
    assert render_card(metadata(), 10, "me/adapter", theirs) == theirs
    broken = "---\na: [\n---\n\nHello.\n"
    assert render_card(metadata(), 10, "me/adapter", broken) == broken
    only_metadata = render_card(metadata(), 10, "me/adapter", "---\nlicense: openrail\n---\n")
    assert "license: openrail" in only_metadata and "base_model: some/lm" in only_metadata and "## Use" in only_metadata


def test_samples_have_a_small_picture_that_is_saved_and_loaded(tmp_path):
    model = grounded("llama_untied")
    index = ImageIndex.build(model, [picture(i) for i in range(3)], list("abc"))
    answers = model.generate(["w4", "w5"], index, ret_bias=100.0, max_new_tokens=2)
    model.active.report = with_samples(model.active.report, ["w4", "w5"], answers)
    model.save_pretrained(tmp_path)
    assert (tmp_path / PICTURE_FILE).read_bytes() == model.active.report.picture and len(
        model.active.report.picture
    ) < 20_000
    text = (tmp_path / "README.md").read_text()
    assert f"]({PICTURE_FILE})" in text and str(answers[0]) in text


@pytest.mark.parametrize(
    "bad",
    [{"license": 3}, {"datasets": (3,)}, {"training": {"a": [1]}}, {"training": {3: 1}}],
)
def test_a_report_of_the_wrong_kind_is_refused(bad):
    from visual_ground import GroundingError

    with pytest.raises(GroundingError, match=next(iter(bad))):
        Report(**bad)
