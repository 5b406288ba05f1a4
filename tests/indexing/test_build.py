import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time

import datasets
import psutil
import pytest
import torch
from PIL import Image

from tests.paths import ROOT
from tests.tiny import grounded, picture
from visual_ground import GroundingError, ImageIndex
from visual_ground.index.files import FILES
from visual_ground.indexing.build import BuildOptions, build_index
from visual_ground.indexing.parts import PARTS_FOLDER
from visual_ground.vision.images import to_rgb

MODEL = grounded("llama_untied").eval()
OPTIONS = BuildOptions(batch_size=2, part_size=4, thumbnail_size=4, progress=False)


def photos(folder, count):
    folder.mkdir()
    for i in range(count):
        picture(i).save(folder / f"{i:02}.png")
    return folder


class StopsAt:
    """A model that stops the process's work at the n-th batch."""

    def __init__(self, batches):
        self.left, self.vision, self.image_space = batches, MODEL.vision, MODEL.image_space

    def embed_images(self, *, image_features):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return MODEL.embed_images(image_features=image_features)


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES[:4] if (folder / name).is_file()}


def kill(source, folder, *point):
    """Run a build that is killed at a point; return the process that has ended."""
    command = [sys.executable, "-m", "tests.indexing.killed", str(source), str(folder), *map(str, point)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_build_that_was_stopped_at_any_point_makes_the_same_index(tmp_path):
    source = photos(tmp_path / "photos", 11)
    (source / "03.png").write_bytes(b"no image")
    report = build_index(MODEL, source, tmp_path / "whole", OPTIONS)
    assert report.num_images == 10 and [name for name, _ in report.unreadable] == [str(source / "03.png")]
    index = ImageIndex.from_pretrained(tmp_path / "whole")
    readable = [str(source / f"{i:02}.png") for i in range(11) if i != 3]
    assert index.ids == readable and not (tmp_path / "whole" / PARTS_FOLDER).exists()
    assert torch.allclose(index.vectors, MODEL.embed_images(readable), atol=1e-5)
    for n in range(6):
        folder = tmp_path / str(n)
        with pytest.raises(KeyboardInterrupt):
            build_index(StopsAt(n), source, folder, OPTIONS)
        assert build_index(MODEL, source, folder, OPTIONS).unreadable == report.unreadable
        assert files_of(folder) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["another folder", "one more path", "a photo less", "a photo more", "other rows"])
def test_a_build_is_not_continued_with_another_source(change, tmp_path):
    source, folder = photos(tmp_path / "photos", 11), tmp_path / "index"
    rows = [{"image": picture(i), "id": f"{i}"} for i in range(11)]
    begun, then = {
        "another folder": (source, source / "04.png"),
        "one more path": ([source], [source, source / "04.png"]),
        "a photo less": (source, source),
        "a photo more": (source, source),
        "other rows": (rows, rows[:3] + rows[4:] + rows[3:4]),
    }[change]
    with pytest.raises(KeyboardInterrupt):
        build_index(StopsAt(3), begun, folder, OPTIONS)
    if change == "a photo less":
        (source / "01.png").unlink()
    if change == "a photo more":
        picture(1).save(source / "00b.png")
    with pytest.raises(GroundingError, match="unfinished build of|has changed since"):
        build_index(MODEL, then, folder, OPTIONS)


def test_what_could_not_be_read_is_looked_at_anew_where_nothing_was_done(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"no image")
    with pytest.raises(GroundingError, match="no image that can be read"):
        build_index(MODEL, tmp_path / "photo.png", tmp_path / "index", OPTIONS)
    picture(1).save(tmp_path / "photo.png")
    assert build_index(MODEL, tmp_path / "photo.png", tmp_path / "index", OPTIONS).num_images == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "points",
    [
        [("write_table", 1), ("write_table", 2), ("write_json", 3)],
        [("write_json", 1), ("write_index", 1), ("write_index", 1)],
        [("_features", 2), ("write_part", 2), ("read_table", 2)],
    ],
)
def test_a_build_that_was_killed_makes_the_same_index(points, tmp_path):
    source = photos(tmp_path / "photos", 11)
    build_index(MODEL, source, tmp_path / "whole", OPTIONS)
    for point in points:
        assert kill(source, tmp_path / "killed", *point).returncode == -signal.SIGKILL, point
    build_index(MODEL, source, tmp_path / "killed", OPTIONS)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_processes_that_read_do_not_outlive_a_build_that_was_killed(tmp_path):
    source = photos(tmp_path / "photos", 11)
    killed = kill(source, tmp_path / "killed", "_features", 2, 2)
    left = [int(number) for number in killed.stdout.split()]
    assert killed.returncode == -signal.SIGKILL and len(left) == 2
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, left)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_features_are_a_source_like_images(tmp_path):
    source = photos(tmp_path / "photos", 5)
    paths = sorted(source.iterdir())
    features = MODEL.vision.encode([str(path) for path in paths])
    rows = [
        {"id": path.name, "image_features": row.tolist(), "n": i}
        for i, (path, row) in enumerate(zip(paths, features, strict=True))
    ]
    build_index(MODEL, rows, tmp_path / "index", OPTIONS)
    index = ImageIndex.from_pretrained(tmp_path / "index")
    assert index.ids == [path.name for path in paths] and index.metadata[3] == {"n": 3}
    assert torch.allclose(index.vectors, MODEL.embed_images([str(path) for path in paths]), atol=1e-5)
    with pytest.raises(GroundingError, match="of one width"):
        build_index(MODEL, [*rows, {"image_features": [0.0]}], tmp_path / "two", BuildOptions(progress=False))
    for wrong in ([0.0, 1.0], [float("nan")] * MODEL.vision.feature_dim):
        with pytest.raises(GroundingError, match="has features of width"):
            build_index(MODEL, [{"image_features": wrong}], tmp_path / "wrong", BuildOptions(progress=False))


def test_a_build_that_is_repeated_replaces_the_index(tmp_path):
    source = photos(tmp_path / "photos", 3)
    build_index(MODEL, source, tmp_path / "index", OPTIONS)
    before = files_of(tmp_path / "index")
    with pytest.raises(KeyboardInterrupt):
        build_index(StopsAt(0), source, tmp_path / "index", OPTIONS)
    assert len(ImageIndex.from_pretrained(tmp_path / "index")) == 3
    with pytest.raises(GroundingError, match="unfinished build"):
        build_index(MODEL, source, tmp_path / "index", BuildOptions(half=True, progress=False))
    build_index(MODEL, source, tmp_path / "index", OPTIONS)
    assert files_of(tmp_path / "index") == before


def test_shards_merge_to_the_whole(tmp_path):
    source = photos(tmp_path / "photos", 5)
    parts = []
    for i in range(2):
        build_index(MODEL, source, tmp_path / str(i), BuildOptions(shard=(i, 2), progress=False))
        parts.append(ImageIndex.from_pretrained(tmp_path / str(i)))
    parts[0].merge(parts[1])
    assert sorted(parts[0].ids) == [str(source / f"{i:02}.png") for i in range(5)]


def launch(*words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "tests.indexing.together", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    return done.returncode, sorted(done.stdout.splitlines()), done.stderr


@pytest.mark.slow
def test_processes_that_accelerate_launched_build_one_index_together(tmp_path):
    source = photos(tmp_path / "photos", 21)
    (source / "03.png").write_bytes(b"no image")
    code, lines, errors = launch(source, tmp_path / "index")
    assert code == 0 and lines == ["0 20 1", "1 20 1"], errors[-2000:]
    index = ImageIndex.from_pretrained(tmp_path / "index")
    readable = [str(source / f"{i:02}.png") for i in range(21) if i != 3]
    assert sorted(index.ids) == readable and not (tmp_path / "index" / PARTS_FOLDER).exists()
    assert torch.allclose(index.vectors, MODEL.embed_images(index.ids), atol=1e-5)
    code, _, _ = launch(source, tmp_path / "again", "1")
    assert code != 0
    with pytest.raises(GroundingError, match="another number of processes"):
        build_index(MODEL, source, tmp_path / "again", OPTIONS)
    assert launch(source, tmp_path / "again")[:2] == (0, ["0 20 1", "1 20 1"])
    assert files_of(tmp_path / "again") == files_of(tmp_path / "index")
    code, lines, _ = launch(source, tmp_path / "failed", "fail0")
    assert lines[0] == "0 GroundingValueError no more"
    assert lines[1].startswith("1 GroundingStateError") and lines[1].endswith("process 0: no more")


def test_thumbnails_are_shown_where_the_images_cannot_be(tmp_path, another_machine):
    source = photos(tmp_path / "photos", 2)
    build_index(MODEL, source, tmp_path / "index", OPTIONS)
    assert to_rgb(ImageIndex.from_pretrained(tmp_path / "index").entry(0)[1]).size == (8, 8)
    another_machine()
    index = ImageIndex.from_pretrained(tmp_path / "index")
    assert index.entry(0)[1].size == (4, 4)
    index.update([index.ids[0]], metadata=[{"new": 1}])
    index.save_pretrained(tmp_path / "again")
    again = ImageIndex.from_pretrained(tmp_path / "again")
    assert [again.entry(i)[1].size for i in range(2)] == [(4, 4), (4, 4)]


def png(i):
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_of_webdataset_and_rows_of_datasets_are_read_with_their_metadata(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for i in range(3):
            for suffix, data in (("png", png(i)), ("txt", b"a cat"), ("json", json.dumps({"n": i}).encode())):
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    build_index(MODEL, tmp_path / "0.tar", tmp_path / "tar", OPTIONS)
    index = ImageIndex.from_pretrained(tmp_path / "tar")
    assert index.ids == ["0.tar/000", "0.tar/001", "0.tar/002"] and index.metadata[1] == {"caption": "a cat", "n": 1}
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "year": [1, 2, 3], "id": list("abc")}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    for number, source in enumerate((rows, rows.to_iterable_dataset())):
        build_index(MODEL, source, tmp_path / f"rows{number}", OPTIONS)
        again = ImageIndex.from_pretrained(tmp_path / f"rows{number}")
        assert again.ids == list("abc") and again.metadata[2] == {"year": 3}
        assert torch.allclose(again.vectors, index.vectors, atol=1e-6)


def test_bad_input_is_said(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    (tmp_path / "x.tar").write_bytes(b"no shard")
    twice = [{"image": picture(0), "id": "a"}] * 2
    for source, words in (
        (tmp_path / "none", "no file or folder"),
        (tmp_path / "x.png", "no image that can be read"),
        (tmp_path / "x.tar", "no tar file"),
        (3, "must be paths or rows"),
        ([{"n": 3}], "needs an image"),
        (twice, "distinct"),
    ):
        with pytest.raises(GroundingError, match=words):
            build_index(MODEL, source, tmp_path / f"out{words[:4]}", OPTIONS)
    for options in ({"batch_size": 0}, {"workers": -1}, {"shard": (2, 2)}, {"thumbnail_size": 0}, {"batch_size": 1.5}):
        with pytest.raises(GroundingError):
            BuildOptions(**options)


def test_processes_read_the_same(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    from visual_ground.vision.encoder import VisionEncoder
    from visual_ground.vision.identity import ImageSpace

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    vision = VisionEncoder(ViTModel(config).eval(), ViTImageProcessor(size={"height": 8, "width": 8}))

    class Model:
        def __init__(self):
            self.vision = vision
            self.image_space = ImageSpace.of(torch.eye(2, 8))

        def embed_images(self, *, image_features):
            return torch.nn.functional.normalize(image_features, dim=-1)

    source = photos(tmp_path / "photos", 5)
    (source / "01.png").write_bytes(b"no image")
    for workers in (0, 1):
        options = BuildOptions(batch_size=2, workers=workers, progress=False)
        build_index(Model(), source, tmp_path / str(workers), options)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1")
    Image.new("RGB", (2, 2)).save(source / "new.png")


def test_a_damaged_shard_gives_what_is_whole_in_it(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for i in range(3):
            picture(i).save(tmp_path / "one.png")
            shard.add(tmp_path / "one.png", f"{i}.png")
    whole = (tmp_path / "0.tar").read_bytes()
    second = whole.index(b"1.png")
    (tmp_path / "0.tar").write_bytes(whole[:second] + b"\xff" + whole[second + 1 :])
    report = build_index(MODEL, tmp_path / "0.tar", tmp_path / "index", OPTIONS)
    assert ImageIndex.from_pretrained(tmp_path / "index").ids == ["0.tar/0", "0.tar/2"]
    assert len(report.unreadable) == 1 and "of 0.tar are damaged" in report.unreadable[0][0]
