"""The image formats: how the names of their files end, and the one place where a file of any format is opened."""

from __future__ import annotations

import io
import os
from typing import TypeAlias

from PIL import Image

File: TypeAlias = bytes | str | os.PathLike[str]

# The endings of image files that Pillow reads.
IMAGE_SUFFIXES = frozenset(
    (
        ".apng .avif .avifs .bmp .bw .cur .dcx .dds .dib .fit .fits .flc .fli .gif .icb .icns .ico .iim .im .j2c .j2k "
        ".jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr .qoi "
        ".ras .rgb .rgba .sgi .tga .tif .tiff .vda .vst .webp .xbm .xpm"
    ).split()
)
# Endings of images and films that it reads only with a plugin or another program, or not at all: these are no text.
OTHER_SUFFIXES = frozenset(
    (
        ".arw .blp .bufr .cr2 .cr3 .dng .emf .eps .ftc .ftu .gbr .grib .h5 .hdf .heic .heif .hif .jxl .mpeg .mpg .nef "
        ".orf .ps .raw .rw2 .svg .svgz .wmf"
    ).split()
)


def open_image(file: File) -> Image.Image:
    """Open the bytes or the path of an image's file by its content; no more than its header is read.

    Every file is opened here. A format that Pillow reads only with a plugin needs that plugin registered above; one
    that Pillow cannot read becomes a PIL image here.

    Raises:
        Exception: of any kind, for what is no image; plugins raise what they like.
    """
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
