import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.paths import ROOT
from visual_ground.errors import GroundingError, GroundingTypeError, GroundingValueError
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.features.cache import FeatureCache
from visual_ground.vision.features.store import FEATURES_FILE, INDEX_FILE
from visual_ground.vision.identity import encoder_fingerprint, image_key
from visual_ground.vision.preprocessing import TransformProcessor


def to_pixels(image):
    return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1) / 255


class Tiny(nn.Module):
    """Eight features; counts the images that it sees, and is random while training."""

    def __init__(self, seed=0, scale=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.dropout, self.scale, self.seen = nn.Linear(48, 8), nn.Dropout(0.5), scale, 0

    def forward(self, pixels):
        self.seen += len(pixels)
        return self.dropout(self.layer(pixels.flatten(1))) * self.scale


def encoder(seed=0, scale=1.0, transform=to_pixels):
    vision = VisionEncoder(Tiny(seed, scale).eval(), TransformProcessor(transform))
    vision.model.seen = 0
    return vision


def pictures(n, seed=0):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for _ in range(n)]


def exact(vision, images):
    return torch.cat([vision(vision.preprocess([image])) for image in images])


def close(cached, computed):
    """Float16 has ten bits after the first, and rounds to a fixed step below 2^-14."""
    return torch.allclose(cached, computed, rtol=2**-10, atol=2**-24)


def test_cached_equals_computed_and_the_second_call_computes_nothing(tmp_path):
    images, vision = pictures(7), encoder()
    cache = FeatureCache(tmp_path, vision)
    first = cache.features(images, batch_size=3)
    assert vision.model.seen == 7 and len(cache) == 7
    assert first.dtype == torch.float32 and first.shape == (7, cache.feature_dim)
    again = FeatureCache(tmp_path, encoder())
    assert torch.equal(again.features(images), first) and again.vision.model.seen == 0
    assert close(first, exact(vision, images))


def test_results_are_in_order_with_duplicates_computed_once(tmp_path):
    a, b, c = pictures(3)
    vision = encoder()
    cache = FeatureCache(tmp_path, vision)
    cache.features([b])
    given = [a, b, a, c, b, a]
    assert close(cache.features(given, batch_size=2), exact(encoder(), given))
    assert vision.model.seen == 3 == len(cache)
    assert cache.features([]).shape == (0, 8)


def test_the_key_is_the_content(tmp_path):
    image = pictures(1)[0]
    image.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    data = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "shard/a.png"}
    files = (tmp_path / "a.png", str(tmp_path / "b.png"), data, {"bytes": None, "path": str(tmp_path / "b.png")})
    assert len({FeatureCache.key(i) for i in files}) == 1
    assert image_key(image) == image_key(image.convert("RGBA")) != image_key(tmp_path / "a.png")
    assert image_key(image) != image_key(image.transpose(Image.Transpose.ROTATE_90))


def test_a_known_file_is_not_decoded_again(tmp_path, monkeypatch):
    pictures(1)[0].save(tmp_path / "a.png")
    first = FeatureCache(tmp_path / "cache", encoder()).features([tmp_path / "a.png"])
    cache = FeatureCache(tmp_path / "cache", encoder())
    monkeypatch.setattr("visual_ground.vision.features.cache.decode_file", None)
    assert torch.equal(cache.features([tmp_path / "a.png"]), first)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_refused_one_by_one(tmp_path, workers):
    images, refused = pictures(5), {}
    (tmp_path / "bad.png").write_bytes(b"no image")
    cache = FeatureCache(tmp_path / "cache", encoder())
    given = [*images[:2], tmp_path / "bad.png", 3, *images[2:], images[0]]
    rows = cache.place(given, batch_size=2, workers=workers, refuse=lambda i, error: refused.update({i: error}))
    assert sorted(refused) == [2, 3] and "bad.png" in str(refused[2]) and "int" in str(refused[3])
    assert rows[2] == rows[3] == -1 and rows[7] == rows[0]
    assert close(cache.file.read(rows[rows >= 0]), exact(encoder(), [*images, images[0]]))
    stream = FeatureCache(tmp_path / "other", encoder())
    assert stream.place(iter(images), batch_size=2).tolist() == [0, 1, 2, 3, 4]


def test_a_folder_of_another_encoder_is_named(tmp_path):
    cache = FeatureCache(tmp_path, encoder())
    cache.features(pictures(1))
    with pytest.raises(GroundingValueError, match=cache.folder.name):
        FeatureCache(cache.folder, encoder(seed=1))


def test_other_encoders_do_not_share(tmp_path):
    images = pictures(2)
    FeatureCache(tmp_path, encoder()).features(images)
    tanh = encoder()
    tanh.model.dropout = nn.Tanh()
    others = [encoder(seed=1), encoder(transform=lambda image: to_pixels(image) * 2), tanh]
    for vision in others:
        assert close(FeatureCache(tmp_path, vision).features(images), exact(vision, images))
        assert vision.model.seen == 4
    assert encoder_fingerprint(encoder()) == encoder_fingerprint(encoder())
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("name", [INDEX_FILE, FEATURES_FILE])
def test_files_cut_short_anywhere_never_give_a_wrong_row(tmp_path, name):
    images, more = pictures(5), pictures(2, seed=1)
    folder = FeatureCache(tmp_path, encoder()).folder
    FeatureCache(tmp_path, encoder()).features(images, batch_size=2)
    whole = {file: (folder / file).read_bytes() for file in (INDEX_FILE, FEATURES_FILE)}
    expected = exact(encoder(), [*more, *images])
    for size in range(0, len(whole[name]), 7):
        for file, data in whole.items():
            (folder / file).write_bytes(data[:size] if file == name else data)
        vision = encoder()
        cache = FeatureCache(tmp_path, vision)
        kept = len(cache)
        assert close(cache.features([*more, *images]), expected)
        assert vision.model.seen == 7 - kept and len(FeatureCache(tmp_path, encoder())) == 7


def test_an_open_cache_notices_that_it_was_emptied(tmp_path):
    images = pictures(3)
    cache = FeatureCache(tmp_path, encoder())
    cache.features(images)
    for name in (INDEX_FILE, FEATURES_FILE):
        (cache.folder / name).unlink()
    assert close(cache.features(images), exact(encoder(), images))


def test_garbage_in_the_index_is_computed_again(tmp_path):
    images = pictures(4)
    cache = FeatureCache(tmp_path, encoder())
    cache.features(images, batch_size=2)
    lines = (cache.folder / INDEX_FILE).read_bytes().splitlines(keepends=True)
    for damage in (b"\0\0\0\n", b"5\n", b"{}\n", lines[1]):
        (cache.folder / INDEX_FILE).write_bytes(damage + lines[1])
        assert close(FeatureCache(tmp_path, encoder()).features(images), exact(encoder(), images))


def test_an_unreadable_image_is_named_and_whole_batches_are_kept(tmp_path):
    images = pictures(3)
    (tmp_path / "bad.png").write_bytes(b"no image")
    cache = FeatureCache(tmp_path / "cache", encoder())
    with pytest.raises(GroundingValueError, match=r"images\[3\].*bad\.png"):
        cache.features([*images, tmp_path / "bad.png"], batch_size=2)
    assert len(cache) == 2 and os.path.getsize(cache.folder / FEATURES_FILE) == 2 * 8 * 2
    with pytest.raises(GroundingTypeError, match=r"images\[1\].*got int"):
        cache.features([images[0], 3])
    with pytest.raises(GroundingValueError, match="batch_size"):
        cache.features(images, batch_size=0)
    assert close(cache.features(images), exact(encoder(), images))


@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_what_float16_cannot_hold_is_refused_by_name(tmp_path, scale):
    pictures(1)[0].save(tmp_path / "a.png")
    cache = FeatureCache(tmp_path / "cache", encoder(scale=scale))
    for images in ([tmp_path / "a.png"], pictures(1)):
        with pytest.raises(GroundingValueError, match=r"images\[0\].*float16"):
            cache.features(images)
    assert len(cache) == 0
    with pytest.raises(GroundingError, match=r"a\.png"):
        cache.features([tmp_path / "a.png"])


def test_an_encoder_left_in_training_mode_is_not_random_and_is_left_so(tmp_path):
    vision, images = encoder(), pictures(2)
    vision.model.train()
    assert close(FeatureCache(tmp_path, vision).features(images), exact(encoder(), images))
    assert vision.model.training


def test_two_at_once_share_one_cache(tmp_path):
    images = pictures(40)
    orders = [images, images[::-1], images[20:] + images[:20]]
    found = {}

    def work(i):
        found[i] = FeatureCache(tmp_path, visions[i]).features(orders[i], batch_size=3)

    visions = [encoder() for _ in orders]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, order in enumerate(orders):
        assert close(found[i], exact(encoder(), order))
    cache = FeatureCache(tmp_path, encoder())
    assert len(cache) == 40 == os.path.getsize(cache.folder / FEATURES_FILE) // 16
    assert close(cache.features(images), exact(encoder(), images)) and cache.vision.model.seen == 0


def test_a_killed_process_leaves_right_rows(tmp_path):
    code = (
        "import itertools, sys; from tests.vision.test_feature_cache import *\n"
        "cache = FeatureCache(sys.argv[1], encoder())\n"
        "for seed in itertools.count(): cache.features(pictures(6, seed), batch_size=2)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    cache = FeatureCache(tmp_path, encoder())
    deadline = time.monotonic() + 60
    while len(cache) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert len(cache) >= 20
    images = [image for seed in range(6) for image in pictures(6, seed)]
    again = FeatureCache(tmp_path, encoder())
    assert close(again.features(images), exact(encoder(), images))
    assert again.vision.model.seen <= 36 - 20
