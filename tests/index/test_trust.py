"""An index shows its pictures on the machine that it was saved on, wherever it is used there, and on no other."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.tiny import grounded, picture
from visual_ground import ImageIndex
from visual_ground.index.files import TABLE_FILE
from visual_ground.index.remote_images import ImageLink
from visual_ground.indexing.build import BuildOptions, build_index
from visual_ground.indexing.foreign import read_embeddings
from visual_ground.vision.images import to_rgb

MODEL = grounded("llama_untied").eval()
NAMES = ["a.png", "more/b.png"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Return a folder with two pictures, which is the working folder."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        picture(number).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path / "photos")
    return tmp_path / "photos"


def by_hand(folder):
    ImageIndex.build(MODEL, NAMES).save_pretrained(folder)


def on_the_disk(folder):
    build_index(MODEL, NAMES, folder, BuildOptions(progress=False))


def later(folder):
    ImageIndex.build(MODEL, NAMES[:1]).save_pretrained(folder)
    index = ImageIndex.from_pretrained(folder)
    index.add(MODEL.embed_images(NAMES[1:]), images=NAMES[1:])
    assert to_rgb(index.entry(1)[1]).tobytes() == picture(1).tobytes()
    index.save_pretrained(folder)


@pytest.mark.parametrize("make", [by_hand, on_the_disk, later])
def test_answers_show_pictures_from_any_working_folder_and_on_no_other_machine(
    make, photos, tmp_path, monkeypatch, another_machine
):
    make(tmp_path / "index")
    shutil.copytree(tmp_path / "index", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for folder in ("index", "moved"):
        index = ImageIndex.from_pretrained(tmp_path / folder)
        answer = MODEL.generate("w4", index, ret_bias=100.0, max_new_tokens=12, images_per_ret=2)[0]
        shown = sorted(to_rgb(image.image).tobytes() for image in answer.images)
        assert shown == sorted(picture(number).tobytes() for number in range(2))
    another_machine()
    index = ImageIndex.from_pretrained(tmp_path / "index")
    assert index.images == [ImageLink(str(photos / name)) for name in NAMES]
    index.save_pretrained(tmp_path / "again")
    assert ImageIndex.from_pretrained(tmp_path / "again").images == index.images


def test_an_index_whose_entries_were_changed_by_others_opens_nothing(photos, tmp_path):
    by_hand(tmp_path / "index")
    picture(2).save(photos / "secret.png")
    table = pq.read_table(tmp_path / "index" / TABLE_FILE)
    column = pa.array([str(photos / "secret.png"), None], pa.string())
    pq.write_table(
        table.set_column(table.column_names.index("image"), "image", column), tmp_path / "index" / TABLE_FILE
    )
    assert ImageIndex.from_pretrained(tmp_path / "index").images[0] == ImageLink(str(photos / "secret.png"))


def test_entries_of_others_stay_closed_in_an_index_that_they_are_merged_into(photos, tmp_path, another_machine):
    picture(2).save(tmp_path / "secret.png")
    ImageIndex(torch.eye(6)[:1], ["theirs"], [str(tmp_path / "secret.png")]).save_pretrained(tmp_path / "theirs")
    another_machine()
    ImageIndex(torch.eye(6)[1:2], ["mine"], ["a.png"]).save_pretrained(tmp_path / "mine")
    for index in (ImageIndex.from_pretrained(tmp_path / "mine"), ImageIndex(torch.eye(6)[1:2], ["mine"], ["a.png"])):
        index.merge(ImageIndex.from_pretrained(tmp_path / "theirs"))
        index.update(["theirs"], metadata=[{"n": 1}])
        index.save_pretrained(tmp_path / "both")
        both = dict(zip(index.ids, ImageIndex.from_pretrained(tmp_path / "both").images, strict=True))
        assert both == {"mine": str(photos / "a.png"), "theirs": ImageLink(str(tmp_path / "secret.png"))}


def test_paths_that_other_tools_and_datasets_name_are_not_opened(photos, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    picture(2).save(folder / "own.png")
    np.save(folder / "a.npy", np.eye(2))
    places = [str(photos / "a.png"), str(folder / "own.png")]
    pq.write_table(pa.table({"image_path": places}), folder / "a.parquet")
    index = read_embeddings(folder)
    assert index.images == [ImageLink(places[0]), places[1]]
    index.save_pretrained(tmp_path / "read")
    assert ImageIndex.from_pretrained(tmp_path / "read").images == [ImageLink(places[0]), places[1]]
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for name, data in (("0.png", buffer.getvalue()), ("0.json", json.dumps({"url": places[0]}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    rows = [{"image": buffer.getvalue(), "url": places[0]}]
    for number, source in enumerate((tmp_path / "0.tar", rows)):
        build_index(MODEL, source, tmp_path / str(number), BuildOptions(progress=False))
        assert ImageIndex.from_pretrained(tmp_path / str(number)).images == [None]


def test_a_note_that_is_damaged_or_cannot_be_written_closes_the_pictures(
    photos, tmp_path, state_of_this_machine, monkeypatch
):
    by_hand(tmp_path / "index")
    (note,) = (state_of_this_machine / "visual_ground" / "indexes").iterdir()
    for damage in ("{", "[]", '{"entries": 3}', ""):
        note.write_text(damage)
        assert all(isinstance(one, ImageLink) for one in ImageIndex.from_pretrained(tmp_path / "index").images)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_STATE_HOME", os.fspath(tmp_path / "file"))
    by_hand(tmp_path / "other")
    assert all(isinstance(one, ImageLink) for one in ImageIndex.from_pretrained(tmp_path / "other").images)
