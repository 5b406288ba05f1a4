"""Thumbnails stay on the disk until they are shown, and with their entries whatever is done to an index."""

import gc
import shutil

import pyarrow as pa
import pytest
import torch
from PIL import Image

from visual_ground import ImageIndex
from visual_ground.errors import GroundingFileError
from visual_ground.index.table.thumbnails import THUMBNAILS_FILE, write_thumbnails
from visual_ground.vision.decoding import to_thumbnail

SIDE = 64


def grey(number):
    return Image.new("RGB", (SIDE, SIDE), (number % 256,) * 3)


def with_thumbnails(numbers, folder):
    """Save an index whose images are away and whose thumbnails tell which they are."""
    index = ImageIndex(torch.randn(len(numbers), 4), list(numbers), [f"http://a.org/{n}.png" for n in numbers])
    entries = index._state.entries.with_thumbnails([to_thumbnail(grey(n), SIDE) if n % 5 else None for n in numbers])
    object.__setattr__(index._state, "entries", entries)
    index.save_pretrained(folder)
    return ImageIndex.from_pretrained(folder)


def assert_right(index):
    for id, image in ((one[0], one[1]) for one in index.entries(list(index.find(index.ids).values()))):
        if id % 5:
            assert image.size == (SIDE, SIDE) and abs(image.getpixel((0, 0))[0] - id % 256) <= 1
        else:
            assert image.address == f"http://a.org/{id}.png"


def test_thumbnails_go_with_their_entries(tmp_path):
    index = with_thumbnails(range(20), tmp_path / "one")
    index.remove([0, 3, 19])
    index.merge(with_thumbnails(range(100, 110), tmp_path / "two"))
    for n in range(40, 60):
        index.add(torch.randn(1, 4), [n * 5], [f"http://a.org/{n * 5}.png"])
    index.update([7, 105], torch.randn(2, 4))
    assert_right(index)
    for folder in ("three", "one"):
        index.save_pretrained(tmp_path / folder)
        again = ImageIndex.from_pretrained(tmp_path / folder)
        assert again.ids == index.ids
        assert_right(again)
    again.save_pretrained(tmp_path / "four")
    assert (tmp_path / "four" / THUMBNAILS_FILE).read_bytes() == (tmp_path / "one" / THUMBNAILS_FILE).read_bytes()
    again.remove(again.ids)
    again.add(torch.randn(1, 4), [5])
    again.save_pretrained(tmp_path / "one")
    assert ImageIndex.from_pretrained(tmp_path / "one").entry(0)[1] is None


def test_opening_and_saving_read_no_thumbnail_into_memory(tmp_path):
    size = 1 << 20
    index = ImageIndex(torch.randn(64, 4))
    data = [bytes([n]) * size for n in range(64)]
    object.__setattr__(index._state, "entries", index._state.entries.with_thumbnails(data))
    index.save_pretrained(tmp_path / "index")
    del index, data
    gc.collect()
    before = pa.total_allocated_bytes()
    index = ImageIndex.from_pretrained(tmp_path / "index")
    assert pa.total_allocated_bytes() - before < size
    index.merge(ImageIndex(torch.randn(1, 4), ["more"]))
    index.merge(ImageIndex(torch.randn(100, 4), [f"{i}" for i in range(100)]))
    assert pa.total_allocated_bytes() - before < size
    shutil.rmtree(tmp_path / "index")
    write_thumbnails(tmp_path / "again.arrow", index._state.entries)
    assert pa.total_allocated_bytes() - before < size
    assert index._state.entries.cell(63, "thumbnail") == bytes([63]) * size


def test_a_damaged_file_of_thumbnails_is_named(tmp_path):
    with_thumbnails(range(20), tmp_path)
    path = tmp_path / THUMBNAILS_FILE
    whole = path.read_bytes()
    other = pa.table({"thumbnail": pa.array([b""] * 3, pa.binary())})
    with pa.ipc.new_file(str(tmp_path / "other"), other.schema) as file:
        file.write_table(other)
    with pa.ipc.new_file(str(tmp_path / "strings"), pa.schema([("thumbnail", pa.string())])) as file:
        file.write_table(pa.table({"thumbnail": ["a"] * 20}))
    damages = [b"", b"ARROW1", whole[: len(whole) // 2], whole[:-2], b"\0" * len(whole)]
    for damage in (*damages, (tmp_path / "other").read_bytes(), (tmp_path / "strings").read_bytes()):
        path.write_bytes(damage)
        with pytest.raises(GroundingFileError, match=THUMBNAILS_FILE):
            ImageIndex.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(GroundingFileError, match=THUMBNAILS_FILE):
        ImageIndex.from_pretrained(tmp_path)
