"""The walk over every image encoder: features of the right width, or an error that says why."""

import os

import pytest

from benchmarks.vision_page import page
from tests.vision.encoders import (
    RESULTS,
    build_open_clip,
    build_timm,
    build_transformers,
    open_clip_names,
    record,
    timm_names,
    transformers_names,
    walk,
)

MAPPED, WHOLE = transformers_names()
# An image encoder must not be refused, and a refusal must say one of these: the reasons that are known.
REFUSALS = ("reads videos", "frames, tiles or loose patches", "tiles or crops", "natten", "scipy", "gave no features")
QUICK = {
    "transformers": ["resnet", "vit_mae", "clip_vision_model", "siglip_vision_model", "videomae"],
    "timm": ["test_resnet", "test_vit", "test_byobnet"],
}


def check(group, build, name):
    row = walk(build, name)
    if os.environ.get("VISUAL_GROUND_RECORD"):
        record(group, row)
    if "width" not in row:
        assert any(reason in row["reason"] for reason in REFUSALS), row["reason"]


pytestmark = pytest.mark.filterwarnings("ignore")  # These models' own.


@pytest.mark.vision
@pytest.mark.parametrize("name", MAPPED)
def test_image_mapping(name):
    check("transformers' image mapping", build_transformers, name)


@pytest.mark.vision
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_and_towers(name):
    check("whole text-and-image models, and towers of such", build_transformers, name)


@pytest.mark.vision
@pytest.mark.parametrize("name", open_clip_names())
def test_open_clip(name):
    check("open_clip, one of each family", build_open_clip, name)


@pytest.mark.vision
@pytest.mark.parametrize("name", timm_names().values(), ids=timm_names())
def test_timm(name):
    check("timm, one of each family", build_timm, name)


def test_the_page_is_what_the_results_say():
    assert (RESULTS.parent / "vision.md").read_text() == page()


@pytest.mark.parametrize("name", QUICK["transformers"])
def test_some_of_transformers(name):
    row = walk(build_transformers, name)
    assert row.get("width") or "videos" in row["reason"]


@pytest.mark.parametrize("name", QUICK["timm"])
def test_some_of_timm(name):
    assert walk(build_timm, name)["width"]
