"""`visual-ground index`: good files are indexed, others named; on this machine the index shows its own pictures."""

import os
import shutil
from argparse import Namespace

import pytest

from tests.golden_parts import saved_parts
from tests.tiny import picture
from visual_ground import GroundingConfig, ImageIndex, ground
from visual_ground.cli.main import main
from visual_ground.cli.shared.arguments import load_index, load_model
from visual_ground.index.remote_images import ImageLink


@pytest.fixture
def parts(tmp_path):
    """Return the names of an LM and an adapter, and a folder of good, damaged and hidden files."""
    (tmp_path / "table").mkdir()
    lm, vision, _ = saved_parts(tmp_path / "table")
    ground(lm, vision, config=GroundingConfig(retrieval_dim=6)).save_pretrained(tmp_path / "adapter")
    photos = tmp_path / "my photos"
    (photos / ".thumbnails").mkdir(parents=True)
    for name in ("a.png", "b.JFIF", "c d.jpg", ".thumbnails/a.png"):
        picture(1).resize((32, 32)).save(photos / name, format="PNG" if "png" in name else "JPEG")
    (photos / "._a.png").write_bytes(b"\0\5\26\7 of macOS")
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:40])
    (photos / "notes.txt").write_text("no image")
    return lm, str(tmp_path / "adapter"), photos


def test_files_that_cannot_be_read_are_named_and_left_out(parts, tmp_path, capsys):
    lm, adapter, photos = parts
    out = str(tmp_path / "index")
    assert main(["index", "build", lm, adapter, str(photos), str(photos / "a.png"), "--output", out]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"3 images in {out}, 1 unreadable") and "broken.png" in shown.err
    assert "._a.png" not in shown.err
    ids = [str(photos / name) for name in ("a.png", "b.JFIF", "c d.jpg")]
    assert ImageIndex.from_pretrained(out).ids == ids


@pytest.mark.parametrize("images", ["broken.png", "nothing", "notes.txt", ".thumbnails/nothing"])
def test_nothing_to_index_is_one_line_and_writes_nothing(parts, images, tmp_path, capsys):
    lm, adapter, photos = parts
    assert main(["index", "build", lm, adapter, str(photos / images), "--output", str(tmp_path / "index")]) == 2
    assert os.path.basename(images) in capsys.readouterr().err
    assert not (tmp_path / "index" / "index.safetensors").exists()


def test_a_model_is_put_on_the_device_that_is_named(parts):
    lm, adapter, _ = parts
    model = load_model(Namespace(lm=lm, adapter=adapter, vision=None, device="meta"))
    for part in (model.lm, model.vision, model.adapter):
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}


class Options:
    host, images = (), ()


def test_an_index_shows_its_own_pictures_on_this_machine_and_on_no_other(
    parts, tmp_path, capsys, monkeypatch, another_machine
):
    lm, adapter, photos = parts
    monkeypatch.chdir(photos)
    assert main(["index", "build", lm, adapter, "a.png", "c d.jpg", "--output", str(tmp_path / "index")]) == 0
    monkeypatch.chdir(tmp_path)
    options = Options()
    shutil.move(tmp_path / "index", tmp_path / "moved")
    options.index = str(tmp_path / "moved")
    opened = load_index(options).images
    assert [os.path.samefile(path, photos / name) for path, name in zip(opened, ("a.png", "c d.jpg"), strict=True)]
    another_machine()
    assert all(isinstance(image, ImageLink) for image in load_index(options).images)


def test_an_index_that_is_added_to_ones_own_opens_no_more_than_it_did(parts, tmp_path, monkeypatch, another_machine):
    lm, adapter, photos = parts
    mine, theirs, secret = (str(tmp_path / name) for name in ("mine", "theirs", "secret"))
    picture(2).save(tmp_path / "secret.png")
    assert main(["index", "build", lm, adapter, str(photos / "a.png"), "--output", theirs]) == 0
    ImageIndex(ImageIndex.from_pretrained(theirs).vectors, [secret], [f"{secret}.png"]).save_pretrained(theirs)
    another_machine()
    assert main(["index", "build", lm, adapter, str(photos / "a.png"), "--output", mine]) == 0
    assert main(["index", "add", lm, adapter, mine, theirs, str(photos / "b.JFIF")]) == 0
    names = [str(photos / "a.png"), ImageLink(f"{secret}.png"), str(photos / "b.JFIF")]
    assert ImageIndex.from_pretrained(mine).images == names


def test_what_is_added_is_built_as_the_index_was(parts, tmp_path):
    lm, adapter, photos = parts
    out = str(tmp_path / "index")
    assert main(["index", "build", lm, adapter, str(photos / "a.png"), "--output", out, "--caption-weight", "0.5"]) == 0
    assert main(["index", "add", lm, adapter, out, str(photos / "b.JFIF")]) == 0
    info = ImageIndex.from_pretrained(out).info()
    assert (info["entries"], info["caption_weight"]) == (2, 0.5)
