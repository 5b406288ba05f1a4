"""A store of records says by name where it cannot be."""

import pytest

from tests.tiny import Eye, image_processor, picture
from visual_ground.errors import GroundingFileError
from visual_ground.storage.append_only import AppendOnlyStore
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.features.cache import FeatureCache


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_folders_place_is_named(tmp_path, below):
    place = tmp_path / "store"
    place.write_text("mine")
    store = AppendOnlyStore(place / below, "records")
    for act in (store.refresh, lambda: store.add({"a": b"one"})):
        with pytest.raises(GroundingFileError, match="store.* cannot be written"):
            act()
    assert place.read_text() == "mine"


def test_a_feature_cache_that_cannot_be_made_is_named(tmp_path):
    place = tmp_path / "cache"
    place.write_text("mine")
    with pytest.raises(GroundingFileError, match="cache.* cannot be written"):
        FeatureCache(place, VisionEncoder(Eye(), image_processor)).features([picture(0)])
