"""One door for every form of image; deep pictures are scaled by their mode, whatever is in them."""

import base64
import io
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import picture
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.vision.identity import image_key
from visual_ground.vision.images import image_name, is_single, to_rgb

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
MODES += ["I;16", "I;16L", "I;16B", "I;16N"]


@given(st.sampled_from(MODES))
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
    for bad in (3, None, {}, {"path": 3}, io.StringIO("a"), torch.zeros(2, 2, dtype=torch.complex64)):
        with pytest.raises(GroundingTypeError):
            to_rgb(bad)
    for bad in (Image.new("RGB", (0, 3)), np.zeros((0, 3)), torch.zeros(3, 0, 4)):
        with pytest.raises(GroundingValueError, match="no pixels"):
            to_rgb(bad)
    for shape in ((3,), (5, 5, 5), (1, 3, 4, 4), (5, 6, 7)):
        with pytest.raises(GroundingValueError, match="shape"):
            to_rgb(np.zeros(shape))


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_every_form_of_one_picture_is_that_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image, path = picture(3), tmp_path / "my c#t?.png"
    data = png(image)
    path.write_bytes(data)
    text, pixels = base64.b64encode(data).decode(), np.asarray(image)
    used = io.BytesIO(data)
    used.read()
    forms = [image, str(path), path, "~/my c#t?.png", pathlib.Path("~/my c#t?.png"), path.as_uri(), f"file:{path}"]
    forms += [f"file://{path}", f"data:image/png;base64,{text}", f"DATA:;base64,{text.rstrip('=')}", text]
    forms += [f"data:image/png;base64,{text.replace('+', '%2B')}", base64.urlsafe_b64encode(data).decode()]
    forms += [data, bytearray(data), memoryview(data), used, {"bytes": data}, {"path": str(path)}]
    tensor = torch.from_numpy(pixels.copy())
    forms += [pixels, pixels.astype(np.int64), pixels / 255, pixels.astype(np.uint16) * 257, pixels.transpose(2, 0, 1)]
    forms += [
        tensor,
        tensor.permute(2, 0, 1),
        tensor / 255,
        (tensor / 255).double().requires_grad_(),
        pixels[:, ::-1][:, ::-1],
    ]
    for form in forms:
        assert to_rgb(form).tobytes() == image.tobytes(), image_name(form)
        assert is_single(form) and image_key(form) and len(image_name(form)) < 200
    with open(path, "rb") as file:
        assert to_rgb(file).tobytes() == to_rgb(file).tobytes() == image.tobytes()
    with pytest.raises(GroundingValueError, match="closed"):
        to_rgb(file)
    assert not is_single([path]) and not is_single(pixels[None]) and not is_single(np.array(["a.png"]))


@given(st.integers(1, 4), st.integers(1, 4))
def test_channels_are_found_on_either_side(height, width):
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
        wanted = to_rgb(Image.fromarray(values[..., 0] if channels == 1 else values)).tobytes()
        assert to_rgb(values).tobytes() == wanted
        assert to_rgb(torch.from_numpy(values).permute(2, 0, 1)).tobytes() == wanted, mode


def test_only_some_addresses_are_opened():
    for address, words in [
        ("https://a.org/cat.png", r"LinkRules\(hosts="),
        ("s3://bucket/cat.png", "Download it first"),
        ("file://other/cat.png", "three slashes"),
        ("data:image/png;base64", "no data: URL"),
        ("data:image/png;base64,", "no data: URL"),
        ("data:image/png;base64,?", "no data: URL"),
        ("A" * 100_000, "99,920 more"),
    ]:
        with pytest.raises(GroundingValueError, match=words) as caught:
            to_rgb(address)
        assert len(str(caught.value)) < 600


# Deep pictures.


@given(st.lists(st.integers(0, 65535), min_size=2, max_size=6))
def test_16_bits_are_scaled_by_65535_whatever_is_in_the_picture(values):
    deep = Image.fromarray(np.array([values], np.uint16))
    forms = [deep, np.array([values], np.uint16), png(deep), Image.fromarray(np.array([values], np.int32))]
    for form in forms:
        assert np.asarray(to_rgb(form))[0, :, 0].tolist() == [round(value / 257) for value in values]


@given(
    st.lists(st.floats(-0.25, 1.25, width=32, allow_subnormal=False), min_size=2, max_size=6),
    st.sampled_from(["TIFF", None]),
)
def test_floats_are_scaled_by_1_whatever_is_in_the_picture(values, kind):
    array = np.array([values], np.float32)
    form = Image.fromarray(array)
    if kind:
        file = io.BytesIO()
        form.save(file, format=kind)
        form = file.getvalue()
    shown = np.asarray(to_rgb(form))[0, :, 0]
    assert np.abs(shown - np.clip(array[0], 0, 1) * 255).max() <= 0.5 + 1e-3
    assert np.array_equal(shown, np.asarray(to_rgb(array))[0, :, 0])


def test_other_units_are_refused_and_missing_values_are_black():
    for bad in (np.array([[0.0, 255.0]]), np.array([[-1.0, 1.0]]), np.array([[0, 256]]), np.array([[-1, 5]])):
        with pytest.raises(GroundingValueError, match="is black and"):
            to_rgb(bad)
    with pytest.raises(GroundingValueError, match="is black and 65535 is white"):
        to_rgb(Image.fromarray(np.array([[70_000]], np.int32)))
    holes = to_rgb(np.array([[np.nan, -np.inf, np.inf, 0.5]], np.float32))
    assert np.asarray(holes)[0, :, 0].tolist() == [0, 0, 255, 128]
    assert np.asarray(to_rgb(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]
    assert np.asarray(to_rgb(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)))[0, :, 0].tolist() == [255, 0]


def test_a_picture_keeps_nothing_but_its_pixels():
    image = picture(1)
    image.info["icc_profile"] = b"x"
    assert not to_rgb(image).info and image.info
