"""`LinkRules`: which images that are known by their address may be opened. Nothing is, unless the user allows it."""

from __future__ import annotations

import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from visual_ground.errors import GroundingFileError, GroundingValueError

SCHEMES = ("http", "https")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
HOME = re.compile(r"~[^/\\]*[/\\]")  # `~/` and `~name/`, a home folder.
CHUNK_BYTES = 1 << 16  # Small enough that size and time are checked often while an image arrives.


@dataclass(frozen=True)
class LinkRules:
    """Which images that an index or a prompt holds by address may be opened.

    Args:
        hosts: names of the hosts that images may be fetched from; ".example.org" stands for all below it.
        folders: folders that paths may lead into, besides the index's own.
        timeout: seconds for one image, from the request to its last byte.
        max_bytes: the largest image that is fetched.
    """

    hosts: tuple[str, ...] = ()
    folders: tuple[str | os.PathLike[str], ...] = ()
    timeout: float = 10.0
    max_bytes: int = 20_000_000

    def __post_init__(self) -> None:
        for name in ("hosts", "folders"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, os.PathLike)) else tuple(value))
        if not self.timeout > 0 or self.max_bytes < 1:
            raise GroundingValueError(
                f"timeout and max_bytes must be more than 0, got {self.timeout} and {self.max_bytes}."
            )

    def allow_host(self, url: str) -> bool:
        """Return whether an image may be fetched from a URL."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").lower()
        except ValueError:
            return False
        allowed = (name.lower() for name in self.hosts)
        return parts.scheme in SCHEMES and any(
            host.endswith(name) if name.startswith(".") else host == name for name in allowed
        )

    def allow_path(self, path: str, folder: Path) -> bool:
        """Return whether a path leads into the index's folder or another that is allowed, symbolic links followed."""
        try:
            if is_address(path):  # It would be opened elsewhere than where a path of these letters leads.
                return False
            target = Path(path).resolve()
            return any(target.is_relative_to(Path(root).resolve()) for root in (folder, *self.folders))
        except (OSError, ValueError, RuntimeError):  # A null byte, a loop of links.
            return False

    def fetch(self, url: str) -> bytes:
        """Fetch the bytes of an image's file; GroundingFileError where no rule allows it or that takes too long."""
        if not self.allow_host(url):
            raise GroundingFileError(
                f"{url!r} is on no host that is allowed: nothing is fetched from the network unless its host is named. "
                f"LinkRules(hosts=...) names hosts, here {list(self.hosts)}. Prompts follow the rules in "
                "`model.processor.link_rules`, and an index those that it was loaded with; anywhere else, pass "
                "LinkRules.fetch(url)."
            )
        deadline = time.monotonic() + self.timeout
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "visual_ground", "Accept": "image/*"})
            with urllib.request.build_opener(_Redirects(self)).open(request, timeout=self.timeout) as answer:
                return self._read(answer, url, deadline)
        except (OSError, ValueError, urllib.error.URLError) as error:
            if isinstance(error, GroundingFileError):
                raise
            raise GroundingFileError(f"{url!r} cannot be fetched: {error}.") from error

    def _read(self, answer: Any, url: str, deadline: float) -> bytes:
        data = bytearray()
        # read1 returns what has arrived; read would wait for a whole chunk, past the deadline.
        while chunk := answer.read1(CHUNK_BYTES):
            data += chunk
            if len(data) > self.max_bytes:
                raise GroundingFileError(
                    f"{url!r} is larger than {self.max_bytes} bytes; LinkRules(max_bytes=...) sets this."
                )
            if time.monotonic() > deadline:
                raise GroundingFileError(
                    f"{url!r} took longer than {self.timeout} s; LinkRules(timeout=...) sets this."
                )
        return bytes(data)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed hosts only."""

    def __init__(self, rules: LinkRules) -> None:
        self.rules = rules

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not self.rules.allow_host(newurl):
            raise GroundingFileError(f"{req.full_url!r} leads to {newurl!r}, whose host is not allowed.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_url(address: str) -> bool:
    """Return whether an address is on the network rather than a path or a `file:` URL."""
    return "://" in address and address[:5].lower() not in ("file:", "data:")


def is_address(image: Any) -> bool:
    """Return whether an image is given by a URL or from a home folder, and so stands in no folder of one's choice.

    Example:
        >>> is_address("~/cat.png"), is_address("file:///cat.png"), is_address("pictures/cat.png")
        (True, True, False)
    """
    text = os.fsdecode(image) if isinstance(image, (str, os.PathLike)) else ""
    return text[:5].lower() in ("data:", "file:") or bool(HOME.match(text) or SCHEME.match(text))
