"""Markdown in which texts, addresses and names from strangers are escaped, so that they cannot act as markup."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

# What Markdown, HTML or a template may read as more than itself. Letters, digits and spaces are never escaped.
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~&$:@\"'=^])")
# Links lead to the web or nowhere: an address of another scheme, also one in disguise, stays text.
_LINK = re.compile(r"\]\((?!https?://)", re.IGNORECASE)
_DEFINITION = re.compile(r"\]:(?!\s*https?://)", re.IGNORECASE)
_SCHEME = re.compile(r"\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)
# Characters that are safe in an address in Markdown; the percent sign is, because it starts an escape already made.
_ADDRESS = "/:?#@,;=&%~+-._$"


def escape(text: str) -> str:
    """Return a text on one line in which nothing is markup.

    Example:
        >>> escape("a <b> [link](x)")
        'a \\\\<b\\\\> \\\\[link\\\\]\\\\(x\\\\)'
    """
    return _PUNCTUATION.sub(r"\\\1", " ".join(text.split()))


def made_harmless(text: str) -> str:
    """Return Markdown that a model wrote, with HTML, images, and links to anything but the web turned into plain text.

    An image that the model writes by itself would be fetched by whoever reads the answer. What is not of these kinds,
    such as lists and emphasis, stays.

    Example:
        >>> made_harmless("**A cat** ![x](http://a.b/c) <script>")
        '**A cat** !\\\\[x](http://a.b/c) &lt;script>'
    """
    text = text.replace("<", "&lt;").replace("![", "!\\[")
    return _DEFINITION.sub(r"]\\:", _LINK.sub(r"]\\(", text))


def web_address(address: object) -> str | None:
    """Return an address of the web with its special characters escaped, or None for anything else."""
    if not isinstance(address, str):
        return None
    try:
        parts = urlsplit(address.strip())
    except ValueError:
        return None
    is_web = parts.scheme.lower() in ("http", "https") and bool(parts.netloc)
    return quote(address.strip(), safe=_ADDRESS) if is_web else None


def escaped_address(address: str) -> str | None:
    """Return a web or relative address, given percent-encoded, as Markdown takes it; None if it has another scheme."""
    if _SCHEME.match(address) and not web_address(address):
        return None
    return quote(address.strip(), safe=_ADDRESS)


def image_address(address: str) -> str | None:
    """Return the address of an image as Markdown takes it: of the web, a path, or a data URI of a PNG.

    Example:
        >>> image_address("my pictures/cat (1).png"), image_address("javascript:alert(1)")
        ('my%20pictures/cat%20%281%29.png', None)
    """
    if address.startswith("data:image/png;base64,"):
        return address
    if web := web_address(address):
        return web
    if _SCHEME.match(address):
        return None
    return quote(address, safe="/-._~")


def image(alt: str, address: str, title: str = "") -> str:
    """Return an image in Markdown.

    Args:
        alt: the text in its place if it cannot be seen.
        address: as `image_address` returns it.
        title: what is shown beside it; none if empty.
    """
    return f"![{escape(alt)}]({address}" + (f' "{escape(title)}")' if title else ")")
