"""Names of repositories on the Hub, told from local paths."""

from __future__ import annotations

import os
import re

from visual_ground.errors import GroundingFileError

# "name" or "owner/name", as the Hub has them; "open_clip:" or "timm:" before it, and "#part" after it, say how.
HUB_NAME = re.compile(r"(?:open_clip:|timm:)?[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?(?:#[\w.]+)?")


def is_hub_name(name: str) -> bool:
    """Return whether a name could be one of the Hub's, and is no local path.

    Example:
        >>> is_hub_name("me/adapter"), is_hub_name("timm:vit_tiny"), is_hub_name("/home/me/lm"), is_hub_name("../lm")
        (True, True, False, False)
    """
    bare = name.split(":", 1)[-1]
    parts = (bare, *bare.split("/")) if ":" in name else (bare,)
    return HUB_NAME.fullmatch(name) is not None and ".." not in name and not any(map(os.path.exists, parts))


def rooted(name: str) -> str:
    """Return the name of a model with the local path in it, if any, made absolute: it holds in every working folder.

    Example:
        >>> rooted("openai/clip-vit-base-patch32"), rooted("timm:..") == f"timm:{os.path.abspath('..')}"
        ('openai/clip-vit-base-patch32', True)
    """
    library, colon, bare = name.partition(":") if name.startswith(("timm:", "open_clip:")) else ("", "", name)
    path, mark, part = (bare, "", "") if os.path.exists(bare) else bare.partition("#")
    if os.path.exists(path):
        return f"{library}{colon}{os.path.abspath(path)}{mark}{part}"
    architecture, _, file = bare.partition("/")
    # A file of weights has a suffix, which tells it from one of open_clip's tags.
    if library and os.path.splitext(file)[1] and os.path.isfile(file):
        return f"{library}:{architecture}/{os.path.abspath(file)}"
    return name


def check_name(name: str, what: str) -> None:
    """Raise GroundingFileError if a model's name is no local path that exists and could be none of the Hub's."""
    if not os.path.exists(name) and not is_hub_name(name):
        raise GroundingFileError(f"There is no folder {name!r} to load the {what} from. Give a folder, or a Hub id.")
