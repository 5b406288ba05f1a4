"""An entry's vector may be moved towards its caption's; an index knows how far."""

import json

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import grounded, picture
from visual_ground import GroundingError, ImageIndex
from visual_ground.index.card import index_card
from visual_ground.index.files import ENTRIES_FILE
from visual_ground.index.publishing import publishable
from visual_ground.indexing.build import BuildOptions, build_index

MODEL = grounded("llama_untied").eval()
PICTURES = [picture(i) for i in range(4)]
METADATA = [{"caption": "w4 w5"}, {"year": 1990}, {"Title": "w6"}, {"caption": ""}]


def built_at_once(folder, weight):
    ImageIndex.build(MODEL, PICTURES, metadata=METADATA, batch_size=1, caption_weight=weight).save_pretrained(folder)


def built_in_parts(folder, weight):
    rows = [{"image": image, **values} for image, values in zip(PICTURES, METADATA, strict=True)]
    build_index(MODEL, rows, folder, BuildOptions(3, part_size=3, caption_weight=weight, progress=False))


@pytest.mark.parametrize("make", [built_at_once, built_in_parts])
@pytest.mark.parametrize("weight", [0, 0.25, 1.0])
def test_a_vector_is_the_weighted_mean_of_picture_and_caption_where_there_is_one(make, weight, tmp_path):
    make(tmp_path, weight)
    images, texts = MODEL.embed_images(PICTURES), MODEL.embed_text(["w4 w5", "w6"])
    wanted = images.clone()
    wanted[[0, 2]] = F.normalize((1 - weight) * images[[0, 2]] + weight * texts, dim=-1)
    index = ImageIndex.from_pretrained(tmp_path)
    assert torch.allclose(index.vectors, wanted, atol=1e-5)
    assert index.info()["caption_weight"] == weight
    state = publishable(index._state, [None] * 4, copy_images=False)
    assert ("caption's" in index_card(state, "me/index", None)) == bool(weight)
    index.save_pretrained(tmp_path)
    assert ImageIndex.from_pretrained(tmp_path).info()["caption_weight"] == weight


def test_indexes_of_other_weights_are_not_mixed(tmp_path):
    built_at_once(tmp_path / "a", 0.5)
    built_at_once(tmp_path / "b", 0.25)
    one = ImageIndex.from_pretrained(tmp_path / "a")
    other = ImageIndex(torch.empty(0, 6))
    other.merge(one)
    assert other.info()["caption_weight"] == 0.5
    other.remove(other.ids)
    other.merge(ImageIndex.from_pretrained(tmp_path / "b"))
    with pytest.raises(GroundingError, match=r"caption_weight=0\.25, and the other with 0\.5"):
        other.merge(one)
    assert len(other) == 4


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan"), "a", True, None])
def test_a_weight_that_is_none_is_refused(weight, tmp_path):
    with pytest.raises(GroundingError, match="caption_weight"):
        ImageIndex.build(MODEL, PICTURES, caption_weight=weight)
    with pytest.raises(GroundingError, match="caption_weight"):
        BuildOptions(caption_weight=weight)
    built_at_once(tmp_path, 0.5)
    about = json.loads((tmp_path / ENTRIES_FILE).read_text())
    (tmp_path / ENTRIES_FILE).write_text(json.dumps({**about, "caption_weight": weight}))
    with pytest.raises(GroundingError, match="damaged"):
        ImageIndex.from_pretrained(tmp_path)
