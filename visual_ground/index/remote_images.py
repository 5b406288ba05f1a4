"""Images that an index holds by address only: on the network, or outside its folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.vision.decoding import decode_file
from visual_ground.vision.images import to_rgb
from visual_ground.vision.link_rules import LinkRules, is_url

__all__ = ["ImageLink", "LinkRules", "follow", "is_away", "is_url", "shown", "shown_together"]

logger = logging.getLogger(__name__)

AT_ONCE = 8  # Images that are fetched at the same time.


@dataclass(frozen=True)
class ImageLink:
    """An image that is known by its address and was not opened.

    Args:
        address: a URL or a path.
        failed: whether it was allowed and could not be fetched.
    """

    address: str
    failed: bool = field(default=False, compare=False)

    @property
    def is_remote(self) -> bool:
        """Whether the address is on the network."""
        return is_url(self.address)

    def __str__(self) -> str:
        return self.address


def shown(image: Any, thumbnail: bytes | None, name: str, rules: LinkRules) -> Any:
    """Return the image that an answer shows: the image itself, or its thumbnail if it is elsewhere.

    Args:
        image: an object, a path, an address or an `ImageLink`.
        thumbnail: a JPEG file, if there is one.
        name: of the entry.
        rules: which addresses may be fetched if there is no thumbnail.
    """
    if thumbnail is not None and is_away(image):
        return decode_file(thumbnail, f"the thumbnail of {name!r}")
    return follow(image, rules)


def shown_together(images: Sequence[tuple[Any, bytes | None, str]], rules: LinkRules) -> list[Any]:
    """Return what `shown` returns for several images, their thumbnails and names; fetched side by side."""

    def show(one: tuple[Any, bytes | None, str]) -> Any:
        return shown(*one, rules)

    away = [one for one in images if one[1] is None and is_away(one[0])]
    if len(away) < 2:
        return [show(one) for one in images]
    with ThreadPoolExecutor(min(len(away), AT_ONCE), "fetching") as pool:
        return list(pool.map(show, images))


def is_away(image: Any) -> bool:
    """Return whether an image is not here: none, a link, or an address on the network."""
    return image is None or isinstance(image, ImageLink) or (isinstance(image, str) and is_url(image))


def follow(image: Any, rules: LinkRules) -> Any:
    """Return an image that is an address on the network as a PIL image if the rules allow to fetch it.

    It is an `ImageLink` if not, or if that fails; any other image is returned as it is.
    """
    address = image.address if isinstance(image, ImageLink) else image
    if not isinstance(address, str) or not is_url(address):
        return image
    if rules.allow_host(address):
        try:
            return to_rgb(address, rules)
        except (GroundingFileError, GroundingValueError) as error:
            logger.warning("An image of the index cannot be shown: %s", error)
            return ImageLink(address, failed=True)
    return ImageLink(address)
