import itertools
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops
from torch.nn import functional as F

from tests.storage.test_tensors import until_stopped
from visual_ground.errors import GroundingError, GroundingFileError, GroundingValueError
from visual_ground.index.files import ENTRIES_FILE, TABLE_FILE, VECTORS_FILE
from visual_ground.index.image_index import ImageIndex
from visual_ground.index.remote_images import ImageLink, LinkRules
from visual_ground.vision.images import to_rgb


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
def test_search_equals_brute_force(n, width, k, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(n, width, generator=generator), dim=-1)
    queries = torch.randn(3, width, generator=generator)
    found = ImageIndex(vectors).search(queries, k)
    for query, scores, positions in zip(queries, found.scores, found.positions, strict=True):
        brute = sorted((float(query @ v) for v in vectors), reverse=True)[:k]
        assert torch.allclose(scores, torch.tensor(brute), atol=1e-5)
        assert torch.allclose(scores, vectors[positions] @ query, atol=1e-5)


def test_a_saved_index_finds_the_same(tmp_path, another_machine):
    index = ImageIndex(
        F.normalize(torch.randn(5, 4), dim=-1), list("abcde"), [f"{c}.png" for c in "abcde"], [{"x": 1}] * 5
    )
    index.save_pretrained(tmp_path)
    another_machine()
    again = ImageIndex.from_pretrained(tmp_path)
    query, path = torch.randn(2, 4), os.path.abspath("c.png")
    assert torch.equal(index.search(query, 3).positions, again.search(query, 3).positions)
    assert again.entry(2) == ("c", ImageLink(path), {"x": 1})
    assert ImageIndex.from_pretrained(tmp_path, LinkRules(folders=["."])).entry(2) == ("c", path, {"x": 1})


def test_bad_input():
    index = ImageIndex(torch.eye(3))
    for call in (
        lambda: index.search(torch.zeros(1, 2), 1),
        lambda: index.search(torch.zeros(1, 3), 0),
        lambda: index.entry(3),
        lambda: ImageIndex(torch.eye(2), ["a", "a"]),
        lambda: ImageIndex(torch.eye(2), ["a"]),
        lambda: ImageIndex(torch.full((1, 2), torch.nan)),
        lambda: ImageIndex.from_pretrained("/nowhere"),
    ):
        with pytest.raises(GroundingError):
            call()


def test_pil_images_are_saved_beside_the_index_and_paths_are_kept(tmp_path):
    images = ["there.png", Image.new("CMYK", (3, 2), (9, 99, 9, 9)), None, Image.new("RGBA", (2, 2), (9, 0, 0, 99))]
    ImageIndex(torch.eye(4), images=images).save_pretrained(tmp_path)
    places = [
        os.path.abspath("there.png"),
        str(tmp_path / "images/00000001.png"),
        None,
        str(tmp_path / "images/00000003.png"),
    ]
    again = ImageIndex.from_pretrained(tmp_path)
    assert again.images == places
    for i in (1, 3):
        assert not ImageChops.difference(to_rgb(places[i]), to_rgb(images[i])).getbbox()
    again.save_pretrained(tmp_path)
    assert ImageIndex.from_pretrained(tmp_path).images == places
    (tmp_path / "moved").mkdir()
    for name in (VECTORS_FILE, TABLE_FILE, ENTRIES_FILE, "images"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert ImageIndex.from_pretrained(tmp_path / "moved").images[1] == str(tmp_path / "moved/images/00000001.png")


def test_a_new_image_is_not_written_over_one_that_the_index_still_has(tmp_path):
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    ImageIndex(torch.eye(1), images=[red]).save_pretrained(tmp_path)
    old = ImageIndex.from_pretrained(tmp_path).images[0]
    ImageIndex(torch.eye(2), images=[blue, old]).save_pretrained(tmp_path)
    again = ImageIndex.from_pretrained(tmp_path)
    assert [to_rgb(image).getpixel((0, 0)) for image in again.images] == [(0, 0, 255), (255, 0, 0)]


def test_a_stop_at_any_point_leaves_the_old_or_the_new_index(tmp_path):
    def save(folder, value):
        color = (value, value, value)
        images = [Image.new("RGB", (1, 1), color)] * value
        ImageIndex(torch.full((value, 2), float(value)), images=images).save_pretrained(folder)

    seen = []
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        save(folder, 1)
        stopped = until_stopped(n, lambda folder=folder: save(folder, 2))
        index = ImageIndex.from_pretrained(folder)
        values = {len(index), int(index.vectors.max()), *(to_rgb(image).getpixel((0, 0))[0] for image in index.images)}
        assert len(values) == 1
        seen += values
        if not stopped:
            break
    assert seen == sorted(seen) and set(seen) == {1, 2}


def saved_table(folder):
    images = ["a.png", Image.new("RGB", (1, 1))]
    ImageIndex(torch.eye(2), ["a", 1], images, [{"m": 1}, {"m": None}]).save_pretrained(folder)
    return pq.read_table(folder / TABLE_FILE)


@pytest.mark.parametrize("name", [ENTRIES_FILE, VECTORS_FILE, TABLE_FILE])
def test_a_damaged_or_truncated_file_is_named(name, tmp_path):
    saved_table(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for damage in (b"{", b"", b"\xff" * 20, whole[: len(whole) // 2], whole[:-2]):
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(GroundingFileError, match=name):
            ImageIndex.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"dim": -1}, {"has_images": 1}, {"next_id": None}, {"more": 1}, {"num_entries": True}]
)
def test_a_damaged_description_is_refused(changes, tmp_path):
    saved_table(tmp_path)
    about = json.loads((tmp_path / ENTRIES_FILE).read_text())
    (tmp_path / ENTRIES_FILE).write_text(json.dumps({**about, **changes}))
    with pytest.raises(GroundingFileError, match="damaged"):
        ImageIndex.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{"dim": 3}, {"num_entries": 1}, {"format_version": 2}, {"format_version": 99}])
def test_a_description_of_another_index_is_refused(changes, tmp_path):
    saved_table(tmp_path)
    about = json.loads((tmp_path / ENTRIES_FILE).read_text())
    (tmp_path / ENTRIES_FILE).write_text(json.dumps({**about, **changes}))
    with pytest.raises(GroundingValueError):
        ImageIndex.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "column, values, error",
    [
        ("id", ["a", "b"], GroundingFileError),
        ("id", [None, None], GroundingFileError),
        ("id_number", [1, None], GroundingFileError),
        ("file", [1, 2], GroundingFileError),
        *(("file", [None, name], GroundingFileError) for name in ("../a.png", "/etc/a.png", "images/../../a.png")),
        *(("file", [None, name], GroundingFileError) for name in ("C:a.png", "..\\a.png", "..")),
        ("file", ["b.png", None], GroundingFileError),
        ("m", [[1], [2]], GroundingFileError),
    ],
)
def test_a_table_that_no_index_wrote_is_refused(column, values, error, tmp_path):
    table = saved_table(tmp_path)
    table = table.set_column(table.column_names.index(column), column, pa.array(values))
    pq.write_table(table, tmp_path / TABLE_FILE)
    with pytest.raises(error):
        ImageIndex.from_pretrained(tmp_path)


def test_what_cannot_be_saved_leaves_the_old_index(tmp_path):
    ImageIndex(torch.eye(2), ["old", "er"]).save_pretrained(tmp_path)
    with pytest.raises(GroundingValueError, match="not an image"):
        ImageIndex(torch.eye(1), images=[b"no image"]).save_pretrained(tmp_path)
    assert ImageIndex.from_pretrained(tmp_path).ids == ["old", "er"]
