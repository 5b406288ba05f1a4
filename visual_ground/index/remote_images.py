"""Images that an index holds by address only: on the network, or outside its folder."""

from __future__ import annotations

from dataclasses import dataclass

from visual_ground.vision.link_rules import LinkRules, is_url

__all__ = ["ImageLink", "LinkRules", "is_url"]


@dataclass(frozen=True)
class ImageLink:
    """An image that is known by its address and was not opened.

    Args:
        address: a URL or a path.
    """

    address: str

    @property
    def is_remote(self) -> bool:
        """Whether the address is on the network."""
        return is_url(self.address)

    def __str__(self) -> str:
        return self.address
