import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.vision.images import to_rgb


@given(st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]))
def test_every_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (3, 2)))
    assert image.mode == "RGB" and image.size == (3, 2)


def test_transparent_is_white_and_16_bit_is_scaled():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((1, 1), 32768, dtype=np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (128, 128, 128)


def test_paths_and_damage(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 90).save(path)
    assert to_rgb(path).size == (64, 64)
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    for name, words in [("cut.png", "truncated"), ("empty.png", "not an image"), ("none.png", "cannot be opened")]:
        with pytest.raises(GroundingValueError, match=words):
            to_rgb(tmp_path / name)
    assert to_rgb({"bytes": path.read_bytes(), "path": "in/a.tar"}).size == to_rgb({"path": path}).size == (64, 64)
    with pytest.raises(GroundingValueError, match=r"in/a\.png.*not an image"):
        to_rgb({"bytes": b"0", "path": "in/a.png"})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(GroundingValueError, match="too large"):
        to_rgb(path)


def test_other_things_are_refused():
    with pytest.raises(GroundingTypeError, match="got int"):
        to_rgb(3)
    with pytest.raises(GroundingValueError, match="no pixels"):
        to_rgb(Image.new("RGB", (0, 3)))
