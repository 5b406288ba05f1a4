"""Which folders an index opens pictures in, because it was saved on this machine with pictures from there.

An index names images by path, and one from elsewhere could name any file of its reader's. So the folders are written
down outside of the index, under a hash of what it says: they hold for an index of exactly this content, wherever on
this machine it is, and an index that was saved elsewhere has none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc

from visual_ground.errors import GroundingFileError
from visual_ground.index.table.entries import Entries
from visual_ground.storage.atomic import replacing
from visual_ground.vision.link_rules import LinkRules, is_address

# What a path's folder is: all before the last "/", or backslash on Windows.
LAST_NAME = r"[/\\][^/\\]*$" if os.name == "nt" else r"/[^/]*$"


def folders_of(entries: Entries, folder: Path | None, rules: LinkRules) -> list[str]:
    """Return the folders of the pictures that an index may open, as absolute paths, without those within others.

    Args:
        entries: of the index.
        folder: where it was loaded from; None where it was made here.
        rules: what it may open besides what was given here.
    """
    found = set[str]()
    for segment in entries.segments:
        for address in pc.unique(pc.replace_substring_regex(segment.table["image"], LAST_NAME, "/")).to_pylist():
            # A path without a folder stays as it is, and leads to a file of the working folder.
            place = None if address is None or is_address(address) else os.path.join(os.path.dirname(address), "")
            if place is not None and (segment.given or (folder is not None and rules.allow_path(place, folder))):
                with suppress(OSError, ValueError):  # A null byte, a loop of links.
                    found.add(os.path.realpath(place))
    found -= {Path(one).anchor for one in found}  # In the root is everything, and not only pictures.
    return [one for one in sorted(found) if not any(os.fspath(above) in found for above in Path(one).parents)]


def trust(entries: Path, about: Path, folders: Iterable[str]) -> None:
    """Write down the folders that a saved index opens pictures in; where that cannot be written, it opens none."""
    with suppress(GroundingFileError, OSError), replacing(_note(about)) as temporary:
        temporary.write_text(json.dumps({"entries": _digest(entries), "folders": list(folders)}), encoding="utf-8")


def trusted(rules: LinkRules, entries: Path, about: Path) -> LinkRules:
    """Return rules that also allow the folders that were written down for an index; the rest as in `trust`."""
    try:
        note = json.loads(_note(about).read_text(encoding="utf-8"))
        if note["entries"] == _digest(entries):
            return replace(rules, folders=(*rules.folders, *map(str, note["folders"])))
    except (OSError, ValueError, TypeError, KeyError):  # There is no note, or it is damaged.
        pass
    return rules


def _note(about: Path) -> Path:
    """Return the file for an index's folders; it need not exist."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "visual_ground" / "indexes" / f"{_digest(about)}.json"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
