"""What reaches an image processor is bounded, however long and thin the image is; others reach it as they are."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import Eye, image_processor
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.preprocessing import MAX_RATIO, MIN_SIDE, SQUARE_SIDE, bounded_size

SIDES = st.one_of(st.integers(1, 50), st.integers(1, 100_000))


@given(SIDES, SIDES)
def test_an_image_is_bounded_in_both_directions(width, height):
    across, down = bounded_size(width, height)
    assert bounded_size(height, width) == (down, across)
    short, long = sorted((across, down))
    assert MIN_SIDE <= short and long <= MAX_RATIO * short
    # A processor that scales the short side to t makes an image of at most t x (MAX_RATIO * t).
    assert short <= max(min(width, height), SQUARE_SIDE) and long <= max(width, height, MIN_SIDE)
    if max(width, height) <= MAX_RATIO * min(width, height) and min(width, height) >= MIN_SIDE:
        assert (across, down) == (width, height)


def short_side_to_8(images, return_tensors="pt"):
    """Scale the short side to 8 and cut out the middle, as CLIP's processor does."""
    cut = []
    for image in images:
        short_side_to_8.seen.append(image.size)
        scale = 8 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        left, top = (image.width - 8) // 2, (image.height - 8) // 2
        cut.append(image.crop((left, top, left + 8, top + 8)))
    return image_processor(cut)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (70_000, 30), (3, 3), (1, 1)])
def test_a_few_bytes_do_not_become_gigabytes(size):
    short_side_to_8.seen = []
    vision = VisionEncoder(Eye(), short_side_to_8)
    file = io.BytesIO()
    Image.new("L", size, 200).save(file, format="PNG")
    features = vision.encode([file.getvalue()])
    short, long = sorted(short_side_to_8.seen[-1])
    assert MIN_SIDE <= short <= SQUARE_SIDE and long <= MAX_RATIO * SQUARE_SIDE
    assert torch.allclose(features, vision.encode(Image.new("L", (8, 8), 200)), atol=1e-4)


def test_a_thin_picture_is_squeezed_and_none_of_it_is_cut_away():
    short_side_to_8.seen = []
    vision = VisionEncoder(Eye(), image_processor)
    ramp = np.linspace(0, 255, 4000).round().astype(np.uint8)[None]
    pixels = vision.preprocess([ramp])
    assert pixels[0, 0, 0, 0] < -0.8 and pixels[0, 0, 0, -1] > 0.8


def test_arrays_paths_and_single_images_are_encoded_alike(tmp_path):
    vision = VisionEncoder(Eye(), image_processor)
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    wanted = vision.encode([Image.fromarray(one) for one in array])
    assert torch.equal(vision.encode(array), wanted)
    assert torch.equal(vision.encode(torch.from_numpy(array).permute(0, 3, 1, 2)), wanted)
    Image.fromarray(array[0]).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for one in (array[0], data, io.BytesIO(data), (tmp_path / "a.png").as_uri(), {"bytes": data}):
        assert torch.allclose(vision.encode(one), wanted[:1], atol=1e-5)
