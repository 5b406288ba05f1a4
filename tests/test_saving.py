import json
import os

import pytest
import torch
from torch import nn

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.saving import CONFIG_FILE, WEIGHTS_FILE, load_tensors_into, read_adapter_config, write_adapter


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

    monkeypatch.setattr("visual_ground.saving.save_file", crash)
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
