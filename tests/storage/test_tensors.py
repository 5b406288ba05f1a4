import itertools
import json
import os

import pytest
import torch
from torch import nn

import visual_ground.storage.tensors
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.storage.tensors import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_adapter_config,
    read_tensors,
    resolve,
    write_adapter,
    write_folder,
)


class Stop(BaseException):
    """The machine stops here."""


def until_stopped(n, act):
    """Run `act`, stopping at the n-th call that touches the disk; say whether there was one.

    Every later call stops as well, since a stopped machine cleans nothing up.
    """
    calls = itertools.count(1)

    def wrapped(function):
        def call(*args, **kwargs):
            if next(calls) >= n:
                raise Stop
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, wrapped(getattr(os, name)))
        patch.setattr("visual_ground.storage.tensors.save_file", wrapped(visual_ground.storage.tensors.save_file))
        try:
            act()
        except Stop:
            return True
    return False


def load_tensors_into(module, path):
    module.load_state_dict(read_tensors(path, module.state_dict()))


def write(folder, width=3):
    torch.manual_seed(0)
    layer = nn.Linear(width, 2)
    write_adapter(folder, layer.state_dict(), {"a": 1}, "card")
    return layer


def test_save_load_save_is_byte_identical(tmp_path):
    write(tmp_path / "one")
    layer = nn.Linear(3, 2)
    load_tensors_into(layer, tmp_path / "one" / WEIGHTS_FILE)
    write_adapter(tmp_path / "two", layer.state_dict(), {"a": 1}, "card")
    for name in (CONFIG_FILE, WEIGHTS_FILE, "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_a_crash_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    layer = write(tmp_path / "a")
    before = {name: (tmp_path / "a" / name).read_bytes() for name in os.listdir(tmp_path / "a")}

    def crash(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("visual_ground.storage.tensors.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(tmp_path / "a", layer.state_dict(), {"a": 2}, "other")
    assert before == {name: (tmp_path / "a" / name).read_bytes() for name in os.listdir(tmp_path / "a")}
    assert os.listdir(tmp_path) == ["a"]


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    write(tmp_path / "a")
    layer = nn.Linear(4, 2)
    before = layer.weight.clone()
    with pytest.raises(GroundingValueError, match=r"\(2, 3\).*\(2, 4\)"):
        load_tensors_into(layer, tmp_path / "a" / WEIGHTS_FILE)
    assert torch.equal(layer.weight, before)
    with pytest.raises(GroundingValueError, match="unexpected: bias"):
        load_tensors_into(nn.Linear(3, 2, bias=False), tmp_path / "a" / WEIGHTS_FILE)


def test_missing_damaged_and_newer_folders(tmp_path):
    with pytest.raises(GroundingFileError, match="no adapter folder"):
        read_adapter_config(tmp_path)
    layer = write(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS_FILE).write_bytes(b"\x08")
    with pytest.raises(GroundingFileError, match="damaged"):
        load_tensors_into(layer, tmp_path / "a" / WEIGHTS_FILE)
    (tmp_path / "a" / WEIGHTS_FILE).unlink()
    with pytest.raises(GroundingFileError, match="half-written"):
        load_tensors_into(layer, tmp_path / "a" / WEIGHTS_FILE)
    for text, error in [("{", GroundingFileError), (json.dumps({"format_version": 99}), GroundingValueError)]:
        (tmp_path / "a" / CONFIG_FILE).write_text(text)
        with pytest.raises(error):
            read_adapter_config(tmp_path / "a")


def write_filled(folder, value):
    write_adapter(folder, {"weight": torch.full((2, 3), float(value))}, {"a": value}, f"card {value}")


def read_filled(folder):
    """Return what each of the three files says."""
    layer = nn.Linear(3, 2, bias=False)
    config = read_adapter_config(folder)
    load_tensors_into(layer, folder / WEIGHTS_FILE)
    card = resolve(folder, "README.md").read_text()
    return config["a"], layer.weight.unique().tolist(), card


def says(value):
    return value, [float(value)], f"card {value}"


def test_a_stop_at_any_point_leaves_the_old_or_the_new_adapter(tmp_path, monkeypatch):
    seen = []
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        write_filled(folder, 1)
        (folder / "notes.txt").write_text("mine")
        stopped = until_stopped(n, lambda folder=folder: write_filled(folder, 2))
        with monkeypatch.context() as patch:  # Where the folder cannot be written, it is read as it is.
            patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(PermissionError()))
            as_it_is = read_filled(folder)
        seen.append(read_filled(folder))
        assert as_it_is == seen[-1] and seen[-1] in (says(1), says(2))
        write_filled(folder, 3)
        assert read_filled(folder) == says(3)
        assert sorted(os.listdir(folder)) == ["README.md", CONFIG_FILE, WEIGHTS_FILE, "notes.txt"]
        assert (folder / "notes.txt").read_text() == "mine"
        if not stopped:
            break
    assert seen == sorted(seen) and seen[0] == says(1) and seen[-1] == says(2)
    assert len(seen) > 12


def test_a_stop_while_a_reader_finishes_a_commit_loses_nothing(tmp_path, monkeypatch):
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        write_filled(folder, 1)
        with monkeypatch.context() as patch, pytest.raises(GroundingFileError, match="the machine stops"):
            patch.setattr(os, "replace", _only_within_staging(os.replace))
            write_filled(folder, 2)
        stopped = until_stopped(n, lambda folder=folder: read_filled(folder))
        assert read_filled(folder) == says(2)
        if not stopped:
            break
    assert n > 4


def _only_within_staging(replace):
    def call(source, target):
        if ".staged-" not in str(target):
            raise PermissionError("the machine stops after the commit")
        replace(source, target)

    return call


def test_the_first_write_is_whole_or_absent(tmp_path):
    for n in itertools.count(1):
        stopped = until_stopped(n, lambda folder=tmp_path / str(n): write_filled(folder, 1))
        try:
            assert read_filled(tmp_path / str(n)) == says(1)
        except GroundingFileError as error:
            assert stopped and "no adapter folder" in str(error)
        if not stopped:
            break


def test_write_folder_makes_subfolders_and_a_failing_writer_changes_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise ValueError("no more")

    write_folder(
        tmp_path, {"a.txt": lambda path: path.write_text("a"), "deep/b.txt": lambda path: path.write_text("b")}
    )
    with pytest.raises(ValueError, match="no more"):
        write_folder(tmp_path, {"a.txt": lambda path: path.write_text("new"), "deep/b.txt": fail})
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a.txt", "deep", "deep/b.txt"]
    assert ((tmp_path / "a.txt").read_text(), (tmp_path / "deep/b.txt").read_text()) == ("a", "b")
