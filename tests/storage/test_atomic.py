"""What cannot be written is named with the system's reason, and what was there stays whole."""

import errno
import os
import subprocess
import sys
import threading

import pytest
import torch

from tests.paths import ROOT
from tests.tiny import grounded
from visual_ground import GroundedModel, ImageIndex
from visual_ground.adapter.files import push_saved
from visual_ground.errors import GroundingFileError
from visual_ground.storage.atomic import STAGED_PREFIX, replacing, write_folder
from visual_ground.storage.hub import PushOptions

WRITERS = {"a.txt": lambda path: path.write_text("new"), "deep/b.txt": lambda path: path.write_text("new")}
MODEL = grounded()
OLD = {"a.txt": lambda path: path.write_text("old"), "deep/b.txt": lambda path: path.write_text("old")}


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("function", ["mkdir", "open", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_whatever_the_system_refuses_is_named_and_the_old_state_whole(tmp_path, monkeypatch, function, number):
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), "/some/file")

    with monkeypatch.context() as patch:
        if function == "open":
            patch.setitem(WRITERS, "deep/b.txt", refuse)
        else:
            patch.setattr(os, function, refuse)
        with pytest.raises(GroundingFileError, match=os.strerror(number)) as raised:
            write_folder(folder, WRITERS)
    assert repr(str(folder)) in str(raised.value) and STAGED_PREFIX not in str(raised.value)
    assert content(folder) == {"a.txt": "old", "deep/b.txt": "old"}
    write_folder(folder, WRITERS)
    assert content(folder) == {"a.txt": "new", "deep/b.txt": "new"}


def test_a_file_in_the_folder_s_place_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(GroundingFileError, match="cannot be written"):
            write_folder(path, WRITERS)
        with pytest.raises(GroundingFileError, match="cannot be written"), replacing(path / "a") as temporary:
            temporary.write_text("new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(GroundingFileError, match="cannot be written"), replacing(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\udcff\0", "y" * 5000], ids=["null", "long", "bytes", "longer"])
def test_a_name_that_no_file_can_have_is_named_wherever_it_is_given(name, tmp_path):
    model, index = MODEL, ImageIndex(torch.eye(2))
    for write in (
        lambda: write_folder(tmp_path / name, WRITERS),
        lambda: model.save_pretrained(tmp_path / name),
        lambda: index.save_pretrained(tmp_path / name),
        lambda: GroundedModel.from_pretrained(model.lm, tmp_path / name),
        lambda: ImageIndex.from_pretrained(tmp_path / name),
        lambda: ImageIndex.from_pretrained(name),
        lambda: push_saved(name, "me/x", PushOptions()),
    ):
        with pytest.raises(GroundingFileError):
            write()
    assert not list(tmp_path.iterdir())


def test_a_file_within_a_staged_folder_is_named_by_the_folder(tmp_path):
    def full(path):
        with replacing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(GroundingFileError, match="No space left") as raised:
        write_folder(tmp_path / "adapter", {"a.txt": full})
    assert STAGED_PREFIX not in str(raised.value) and repr(str(tmp_path / "adapter")) in str(raised.value)


def test_a_second_writer_is_refused_by_name_and_the_first_one_s_state_is_whole(tmp_path):
    folder, other, seen = tmp_path / "adapter", tmp_path / "other", []
    code = (
        "import sys\nfrom visual_ground.storage.atomic import write_folder\n"
        "write_folder(sys.argv[1], {'a.txt': lambda path: path.write_text('third')})"
    )
    in_process = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT
    )

    def in_thread():
        try:
            write_folder(folder, OLD)
        except GroundingFileError as error:
            seen.append(str(error))

    def slow(path):
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        seen.append(in_process().stderr)
        write_folder(other, OLD)
        path.write_text("new")

    write_folder(folder, {"a.txt": slow, "deep/b.txt": slow})
    assert len(seen) == 4 and all("written by another process" in error for error in seen)
    assert content(folder) == {"a.txt": "new", "deep/b.txt": "new"} and content(other) == dict.fromkeys(
        content(other), "old"
    )
    assert in_process().returncode == 0 and content(folder)["a.txt"] == "third"
