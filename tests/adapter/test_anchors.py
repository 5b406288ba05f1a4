import pytest
import torch

from visual_ground.adapter.anchors import ANCHORS_FILE, Anchors
from visual_ground.errors import GroundingFileError, GroundingValueError


def anchors():
    return Anchors([["a dog", "один пёс"], ["a cat"], ["犬"]], torch.arange(12.0).view(3, 4))


def test_saved_anchors_are_the_same(tmp_path):
    anchors().save(tmp_path / "a")
    loaded = Anchors.load(tmp_path / "a")
    assert loaded.captions == anchors().captions and torch.equal(loaded.features, anchors().features)
    assert loaded.features.dtype == torch.float16
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a" / ANCHORS_FILE).read_bytes() == (tmp_path / "b" / ANCHORS_FILE).read_bytes()


def test_some_are_taken_with_their_own_captions():
    some = anchors().take(2, seed=1)
    rows = {tuple(row.tolist()): captions for row, captions in zip(anchors().features, anchors().captions, strict=True)}
    assert len(some) == 2
    assert all(rows[tuple(f.tolist())] == c for f, c in zip(some.features, some.captions, strict=True))
    assert len(anchors().take(9)) == 3


@pytest.mark.parametrize(
    ("captions", "features"),
    [
        ([["a"]], torch.zeros(2, 4)),
        ([[]], torch.zeros(1, 4)),
        ([[" "]], torch.zeros(1, 4)),
        ([["a"]], torch.zeros(4)),
        ([["a"]], torch.full((1, 4), 1e9)),
        ([], torch.zeros(0, 4)),
    ],
)
def test_bad_anchors_are_refused(captions, features):
    with pytest.raises(GroundingValueError):
        Anchors(captions, features)


def test_damaged_files_are_said(tmp_path):
    assert Anchors.find(tmp_path) is None
    with pytest.raises(GroundingFileError, match="has no anchors"):
        Anchors.load(tmp_path)
    anchors().save(tmp_path)
    raw = (tmp_path / ANCHORS_FILE).read_bytes()
    for damaged in (raw[:40], raw[:-3], raw.replace(b'["a cat"]', b'["a cat"}'), raw.replace(b'"F16"', b'"F99"')):
        (tmp_path / ANCHORS_FILE).write_bytes(damaged)
        with pytest.raises(GroundingFileError, match="damaged"):
            Anchors.find(tmp_path)


def test_groups_join_captions_of_one_image_and_images_of_one_caption():
    anchors = Anchors([["a", "b"], ["c"], ["b", "d"], ["e"], ["d"]], torch.zeros(5, 3))
    assert anchors.groups.tolist() == [0, 0, 1, 0, 0, 3, 0]
