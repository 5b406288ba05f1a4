"""Pictures that come with requests, and the index's pictures that go out."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeAlias
from urllib.parse import quote

from PIL import Image

from visual_ground.errors import GroundingError
from visual_ground.generation.output import RetrievedImage
from visual_ground.index.image_index import ImageIndex
from visual_ground.index.milvus.image_index import MilvusImageIndex
from visual_ground.index.remote_images import ImageLink, LinkRules
from visual_ground.server.failures import RequestFailure
from visual_ground.server.restoring import own_pictures
from visual_ground.vision.decoding import decode_file, to_png
from visual_ground.vision.formats import open_image
from visual_ground.vision.images import read_file, to_rgb

MAX_PIXELS = 40_000_000
# Together, of the pictures of one request: a few bytes can claim the most pixels.
MAX_REQUEST_PIXELS = 4 * MAX_PIXELS
MAX_REQUEST_PICTURES = 128
# Addresses of pictures in the answers that a request brings back, most of which may lead nowhere.
MAX_ADDRESSES = 8 * MAX_REQUEST_PICTURES
# Encoders see a few hundred pixels, and a conversation of many photos should not fill the memory.
KEPT_PIXELS = 1024
THUMBNAIL = 256
# Formats that browsers show; anything else leaves as PNG.
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


class Given:
    """The pictures of one request, so many and so large that they fit into the memory."""

    def __init__(self, rules: LinkRules) -> None:
        self.rules, self._pixels, self._pictures = rules, MAX_REQUEST_PIXELS, MAX_REQUEST_PICTURES
        self._addresses = MAX_ADDRESSES

    def read(self, image_url: Any) -> Image.Image:
        """Return the picture of an `image_url`, an address or `{"url": ...}`; RequestFailure for none, or too many."""
        address = image_url.get("url") if isinstance(image_url, Mapping) else image_url
        picture = read_address(address, self.rules, self._pixels)
        self._pixels -= picture.width * picture.height
        return self._counted(picture)

    def open(self, image: Any) -> Image.Image:
        """Return a picture of the server's own index; RequestFailure for one too many."""
        return self._counted(to_rgb(image))

    def note_address(self) -> None:
        """Count an address that is looked up in the index, and raise RequestFailure where there are too many."""
        self._addresses -= 1
        if self._addresses < 0:
            message = f"The answers of a request may name {MAX_ADDRESSES} pictures. Leave older ones out."
            raise RequestFailure(400, message)

    def _counted(self, picture: Image.Image) -> Image.Image:
        self._pictures -= 1
        if self._pictures < 0:
            raise RequestFailure(400, f"A request may have {MAX_REQUEST_PICTURES} pictures. Leave older ones out.")
        return kept(picture)


def kept(picture: Image.Image) -> Image.Image:
    """Return a picture that is no larger than is needed."""
    if max(picture.size) <= KEPT_PIXELS:
        return picture
    small = picture.copy()  # It may be the index's own.
    small.thumbnail((KEPT_PIXELS, KEPT_PIXELS))
    return small


def read_address(address: Any, rules: LinkRules, pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image of an `image_url`: a data URL, or an address of the web if the rules allow it.

    Raises:
        RequestFailure: any other address, no image that can be read, or one of more pixels than are allowed.
    """
    if not isinstance(address, str):
        raise RequestFailure(400, 'image_url must be {"url": "data:image/...;base64,..."}.')
    try:
        if address.startswith("data:"):
            return decode_picture(_data_of(address), pixels)
        if rules.allow_host(address):
            return decode_picture(rules.fetch(address), pixels)
    except GroundingError as error:
        raise RequestFailure(400, f"The image cannot be read: {error}", code="invalid_image") from error
    message = "This server fetches no images from that address. Send the image itself as a data URL."
    raise RequestFailure(400, message, code="invalid_image_url")


def _data_of(address: str) -> bytes:
    head, comma, data = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestFailure(400, "A data URL must be data:image/...;base64,...", code="invalid_image_url")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestFailure(400, "The data URL is not valid base64.", code="invalid_image_url") from error


def decode_picture(data: bytes, most: int = MAX_PIXELS) -> Image.Image:
    """Return the picture of a stranger's file as upright RGB.

    Raises:
        RequestFailure: no picture, or one with too many pixels.
        GroundingValueError: a damaged one.
    """
    try:
        with open_image(data) as opened:
            pixels = opened.width * opened.height
    except Exception as error:  # Whatever a decoder says of bytes from a stranger.
        raise RequestFailure(
            400, "The image cannot be read; send PNG, JPEG, GIF or WebP.", code="invalid_image"
        ) from error
    if pixels > (most := min(most, MAX_PIXELS)):
        message = f"The image has {pixels} pixels; at most {most} are read"
        message += "." if most == MAX_PIXELS else f", as all of a request may have {MAX_REQUEST_PIXELS} together."
        raise RequestFailure(400, message, code="invalid_image")
    return decode_file(data, "the image")


# The indexes whose pictures can be shown: they find entries by id.
ShownIndex: TypeAlias = ImageIndex | MilvusImageIndex


class Pictures:
    """The pictures of an index by the addresses under which a server shows them.

    Args:
        index: the index, or None.
        secret: signs the addresses, so that only pictures of answers are shown; None shows all.
    """

    def __init__(self, index: ShownIndex | None, secret: str | None = None) -> None:
        self.index, self._secret = index, secret

    def address(self, name: str | int, folder: str = "images") -> str:
        """Return the path of a picture in the server."""
        signature = "" if self._secret is None else f"?signature={self._signature(str(name))}"
        return f"/{folder}/{quote(str(name), safe='')}{signature}"

    def _signature(self, name: str) -> str:
        assert self._secret is not None, "asked for with a secret only"
        return hmac.new(self._secret.encode(), name.encode(), hashlib.sha256).hexdigest()[:32]

    def check(self, name: str, signature: str) -> None:
        """Raise RequestFailure if an address was not given out by this server."""
        if self._secret is not None and not hmac.compare_digest(self._signature(name).encode(), signature.encode()):
            raise RequestFailure(401, "The signature does not fit this picture.", "authentication_error")

    def described(self, picture: RetrievedImage) -> dict[str, Any]:
        """Return what is known of a picture for JSON, with its addresses in this server; paths do not leave it."""
        if picture.id is None:
            return {"type": "image"}
        address = self.address(picture.id) if picture.is_readable else ""
        shown = {name: value for name, value in picture.to_dict(address).items() if value != ""}
        if not str(shown.get("source", "")).startswith(("http://", "https://")):
            shown.pop("source", None)
        return {**shown, "thumbnail": self.address(picture.id, "thumbnails")} if picture.is_readable else shown

    def find(self, name: str) -> Any:
        """Return a picture by id, as the index has it, or None if it has none that can be read."""
        if self.index is None:
            return None
        found = self.index.find([name, int(name)] if name.isdecimal() and len(name) < 19 else [name])
        position = next(iter(found.values()), None)
        if position is None:
            return None
        image = self.index.entry(position)[1]
        return None if isinstance(image, ImageLink) else image

    def read(self, name: str) -> tuple[bytes, str]:
        """Return a picture's bytes and media type; only images ever leave, whatever a file's name says."""
        image = self._existing(name)
        try:
            if not isinstance(image, Image.Image):
                data = read_file(image)
                with open_image(data) as opened:
                    if media_type := MEDIA_TYPES.get(opened.format or ""):
                        return data, media_type
            return to_png(to_rgb(image)), "image/png"
        except (GroundingError, OSError) as error:
            raise RequestFailure(404, f"The picture {name!r} cannot be read.", code="not_found") from error

    def thumbnail(self, name: str) -> bytes:
        """Return a picture made small, as PNG."""
        try:
            small = to_rgb(self._existing(name))
        except GroundingError as error:
            raise RequestFailure(404, f"The picture {name!r} cannot be read.", code="not_found") from error
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return to_png(small)

    def _existing(self, name: str) -> Any:
        image = self.find(name)
        if image is None:
            raise RequestFailure(404, f"There is no picture {name!r}.", code="not_found")
        return image

    def restore(self, text: str, images: Given) -> list[Any]:
        """Cut Markdown that this server has sent into texts and its pictures, so that a model sees them again.

        Args:
            text: an answer, which may be empty.
            images: opens the pictures; the address of one that has gone since stays text.
        """
        parts: list[Any] = []
        start = 0
        for begin, end, name in own_pictures(text):
            images.note_address()
            with suppress(GroundingError):
                if (image := self.find(name)) is not None:
                    parts += [text[start:begin], images.open(image)]
                    start = end
        parts = [part for part in (*parts, text[start:]) if not isinstance(part, str) or part.strip()]
        return parts or [text]
