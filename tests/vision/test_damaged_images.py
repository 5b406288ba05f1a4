"""Whatever is in an image's file: it is a picture, or one GroundingError says why not.

`make fuzz` tries 20,000 damaged files of every plugin that Pillow can write, and of some that it only reads; the
default suite a few hundred.
"""

import io
import random
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.tiny import picture
from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.vision.images import to_rgb

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of what it can read in spite of damage.

# Files that need programs or handlers outside Pillow, or that are no pictures.
LEFT_OUT = {"PDF", "EPS", "BUFR", "GRIB", "HDF5", "WMF", "PALM"}
# Headers of files whose pixels Pillow leaves to other programs, or to nobody; of these there is no whole picture.
HEADERS = {
    "BUFR": b"BUFR" + bytes(28),
    "GRIB": b"GRIB\0\0\0\1" + bytes(24),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(24),
    "WMF": struct.pack("<6sHHHHHH", b"\xd7\xcd\xc6\x9a\0\0", 0, 0, 4, 4, 72, 0).ljust(22, b"\0")
    + b"\1\0\t\0"
    + bytes(54),
    "EMF": struct.pack("<10i", 1, 0, 0, 0, 4, 4, 0, 0, 99, 99) + b" EMF" + bytes(40),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n",
    "MPEG": b"\0\0\1\xb3\0\x40\4" + bytes(24),
}
MODES = {"MSP": "1", "XBM": "1", "SPIDER": "F", "BLP": "P"}
# What Pillow reads and does not write, as small as it goes: (4, 4) pixels, or a header at least.
READ_ONLY = {
    "FITS": b"".join(
        card.ljust(80)
        for card in (
            b"SIMPLE  =                    T", b"BITPIX  =                    8", b"NAXIS   =                    2",
            b"NAXIS1  =                    4", b"NAXIS2  =                    4", b"END",
        )
    ).ljust(2880) + bytes(range(16)),
    "SUN": struct.pack(">8I", 0x59A66A95, 4, 4, 24, 48, 1, 0, 0) + bytes(48),
    "FLI": struct.pack("<IHHHHHHI", 128 + 16, 0xAF12, 1, 4, 4, 8, 3, 70).ljust(128, b"\0")
    + struct.pack("<IHH", 16, 0xF1FA, 0) + bytes(8),
    "GBR": struct.pack(">7I", 30, 2, 4, 4, 1, 0x47494D50, 1) + b"a\0" + bytes(16),
    "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + bytes(12) + bytes(2) + bytes(48),
    "PIXAR": b"\200\350\0\0".ljust(416, b"\0") + struct.pack("<6H", 4, 4, 0, 0, 14, 2).ljust(608, b"\0") + bytes(48),
    "XPM": b'/* XPM */\nstatic char *a[] = {\n"2 2 2 1",\n"a c #000000",\n"b c #ffffff",\n"ab",\n"ba"\n};\n',
    "IMT": b"width 4\nheight 4\npixel n8\n\x0c" + bytes(16),
    "IPTC": b"".join(
        b"\x1c" + bytes(tag) + struct.pack(">H", len(data)) + data
        for tag, data in (
            ((3, 60), b"\1\0"), ((3, 20), b"\4"), ((3, 30), b"\4"), ((3, 120), b"\1"), ((8, 10), bytes(range(16))),
        )
    ),
    "XVTHUMB": b"P7 332\n#END_OF_COMMENTS\n4 4 255\n" + bytes(16),
    "FTEX": b"FTEX" + struct.pack("<5i", 1, 4, 4, 1, 1) + struct.pack("<2i", 1, 32) + struct.pack("<i", 48) + bytes(48),
    "MCIDAS": struct.pack(">64i", *[0, 4, 0, 0, 0, 0, 0, 0, 4, 4, 1, 0, 0, 1, 0, *[0] * 18, 256, *[0] * 30])
    + bytes(64),
    "ICO in CUR": b"\0\0\2\0\1\0" + struct.pack("<4B2H2I", 2, 2, 0, 0, 0, 0, 72, 22)
    + struct.pack("<3I2H6I", 40, 2, 4, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(32),
    "PCD": bytes(2048) + b"PCD_" + bytes(96 * 2048 + 1024),
}  # fmt: skip


def written():
    """Return for each plugin that writes files one file of it."""
    Image.init()
    files = {**READ_ONLY, **HEADERS}
    for plugin in sorted(set(Image.SAVE) - LEFT_OUT):
        file = io.BytesIO()
        try:
            image = picture(1).convert(MODES.get(plugin, "RGB")).resize((16, 16))
            image = image.point(lambda value: value / 255 + 0) if image.mode == "F" else image
            image.save(file, format=plugin)
        except (OSError, KeyError):  # A Pillow without the library for it.
            continue
        files[plugin] = file.getvalue()
    files["DCX"] = struct.pack("<3I", 0x3ADE68B1, 12, 0) + files["PCX"]
    for name, options in {
        "TIFF lzw": dict(format="TIFF", compression="tiff_lzw"),
        "TIFF deflate": dict(format="TIFF", compression="tiff_deflate"),
        "JPEG progressive": dict(format="JPEG", progressive=True),
        "PNG with text": dict(format="PNG", pnginfo=text_chunk("a", "b")),
        "GIF moving": dict(format="GIF", save_all=True, append_images=[picture(2)]),
        "JPEG turned": dict(format="JPEG", exif=turned()),
    }.items():
        file = io.BytesIO()
        picture(1).save(file, **options)
        files[name] = file.getvalue()
    return files


def text_chunk(name, text):
    info = PngImagePlugin.PngInfo()
    info.add_text(name, text, zip=True)
    return info


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow deprecates some of its plugins.
    FILES = written()


def damaged(data, dice):
    """Return bytes in which a few were flipped, cut, doubled or written over; the header more often than the rest."""
    data = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        end = len(data) if dice.random() < 0.5 else min(len(data), 64)
        at = dice.randrange(max(1, end))
        act = dice.choice(["flip", "flip", "flip", "set", "cut", "drop", "put"])
        if act in ("flip", "set") and data:
            data[at] = data[at] ^ (1 << dice.randrange(8)) if act == "flip" else dice.choice([0, 1, 127, 128, 255])
        elif act == "cut":
            del data[max(at, 8) :]
        elif act == "drop":
            del data[at : at + dice.randint(1, 16)]
        elif act == "put":
            data[at:at] = dice.randbytes(dice.randint(1, 8))
    return bytes(data)


def sealed(data):
    """Return a PNG whose checksums fit again, so that damage gets past them."""
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 <= len(data):
            data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def try_all(count, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # A damaged size may be large, and decoding it slow.
    dice, names, read = random.Random(0), sorted(FILES), 0
    for number in range(count):
        name = names[number % len(names)]
        data = damaged(FILES[name], dice)
        data = sealed(data) if data[:4] == b"\x89PNG" else data
        try:
            image = to_rgb(data)
        except GroundingError:
            continue
        except BaseException as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error} for {data[:200].hex()}")
        assert image.mode == "RGB" and 0 not in image.size
        read += 1
    assert read


def test_a_damaged_file_is_a_picture_or_one_error(monkeypatch):
    try_all(400, monkeypatch)


@pytest.mark.fuzz
def test_20000_damaged_files_are_pictures_or_one_error(monkeypatch):
    try_all(20_000, monkeypatch)


@pytest.mark.parametrize("name", FILES)
def test_whole_files_of_every_plugin_are_read(name):
    if name in {"PCD", *HEADERS}:
        pytest.skip("no whole file of it is as small as that, or none can be read")
    to_rgb(FILES[name])


def test_every_plugin_of_pillow_has_a_file_here_that_it_knows():
    known = set()
    for data in FILES.values():
        with Image.open(io.BytesIO(data)) as image:
            known.add(image.format.upper())
    # Two need a package of their own, and some a library that this Pillow may lack.
    without_a_file = {"FPX", "MIC", *(plugin for plugin in Image.SAVE if plugin not in FILES)}
    assert {name.upper() for name in {*Image.OPEN} - without_a_file} <= known


@pytest.mark.parametrize("name", HEADERS)
def test_what_other_programs_would_have_to_draw_is_refused_and_starts_none(name, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", None)
    with pytest.raises(GroundingValueError, match="Pillow|no pixels"):
        to_rgb(FILES[name])


def png_with(kind, body):
    file = io.BytesIO()
    picture(1).save(file, format="PNG")
    data = file.getvalue()
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:33] + chunk + data[33:]


def test_what_pillow_itself_refuses_is_one_error():
    bombs = [
        png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20))),
        png_with(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 << 20))),
    ]
    for data in bombs:
        try:
            assert to_rgb(data).size == (8, 8)
        except GroundingValueError as error:
            assert "damaged" in str(error)
    with io.BytesIO() as file:
        picture(1).save(file, format="PNG")
        with Image.open(file) as image:
            pass
        with pytest.raises(GroundingValueError, match="closed"):
            to_rgb(image)
    for path in ("a\0b.png", "\ud800.png", "x" * 5000, "/"):
        with pytest.raises(GroundingValueError, match="cannot be opened"):
            to_rgb(path)


def test_a_photo_with_a_broken_tag_in_its_exif_is_still_turned_upright():
    exif = bytearray(turned())
    whole = Image.Exif()
    whole.load(bytes(exif))
    whole[0x829A] = 0.5  # Exposure time, a rational; then -1/0, which Pillow cannot write again.
    data = whole.tobytes().replace(struct.pack(">II", 1, 2), struct.pack(">iI", -1, 0))
    data = data.replace(struct.pack("<II", 1, 2), struct.pack("<iI", -1, 0))
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(file, format="JPEG", exif=data)
    assert to_rgb(file).size == (4, 8)
