"""A disk that is full: one error, and what was there before is whole."""

import random
import resource
from contextlib import contextmanager

import pytest
import torch

from tests.tiny import grounded, picture
from visual_ground import ImageIndex
from visual_ground.errors import GroundingFileError
from visual_ground.index.files import FILES
from visual_ground.indexing.build import BuildOptions, build_index
from visual_ground.vision.decoding import to_thumbnail

MODEL = grounded("llama_untied").eval()


@contextmanager
def no_file_above(size):
    """Let no file grow past some bytes, which a write meets as it meets a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def index_of(count, **large):
    """Return an index of which one file is large."""
    index = ImageIndex(
        torch.randn(count, large.get("width", 4)),
        [f"{i}" + random.Random(i).randbytes(large.get("name", 0)).hex() for i in range(count)],
        [picture(i).resize((large["side"],) * 2) for i in range(count)] if "side" in large else None,
    )
    if "thumbnail" in large:
        thumbnails = [to_thumbnail(picture(i).resize((large["thumbnail"],) * 2), 512) for i in range(count)]
        object.__setattr__(index._state, "entries", index._state.entries.with_thumbnails(thumbnails))
    return index


@pytest.mark.parametrize("large", [{"width": 3000}, {"name": 9000}, {"side": 200}, {"thumbnail": 500}])
def test_an_index_that_does_not_fit_leaves_the_old_one(large, tmp_path):
    index_of(3).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    index = index_of(5, **large)
    with no_file_above(8000), pytest.raises(GroundingFileError, match="cannot be written"):
        index.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before
    index.save_pretrained(tmp_path)
    assert len(ImageIndex.from_pretrained(tmp_path)) == 5


@pytest.mark.parametrize("size", [200, 2500, 6000])
def test_a_build_goes_on_when_there_is_room_again(size, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(9):
        picture(i).resize((300, 300)).save(tmp_path / "photos" / f"{i}.png")
    options = BuildOptions(2, part_size=4, thumbnail_size=256, progress=False)
    build_index(MODEL, tmp_path / "photos", tmp_path / "whole", options)
    with no_file_above(size), pytest.raises(GroundingFileError, match="cannot be"):
        build_index(MODEL, tmp_path / "photos", tmp_path / "index", options)
    build_index(MODEL, tmp_path / "photos", tmp_path / "index", options)
    for name in FILES[:4]:
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
