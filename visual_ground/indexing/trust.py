"""Which folders an index was built from on this machine, so that it shows its own pictures here.

An index names images by path, and one from elsewhere could name any file of its reader's. So the folders are written
down outside of the index, under a hash of what it says: they hold for an index of exactly this content, wherever on
this machine it is, and an index that was built elsewhere has none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from visual_ground.errors import GroundingFileError
from visual_ground.index.files import ENTRIES_FILE
from visual_ground.storage.atomic import replacing, resolve


def trust(index: str | os.PathLike[str], folders: Sequence[str | os.PathLike[str]]) -> None:
    """Write down the folders that a saved index was built from; where that cannot be written, nothing is trusted.

    Args:
        index: folder of the index.
        folders: where its images are.
    """
    with suppress(GroundingFileError), replacing(_note(index)) as temporary:
        temporary.write_text(json.dumps(sorted({os.path.realpath(folder) for folder in folders})), encoding="utf-8")


def trusted_folders(index: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the folders that an index was built from on this machine; none where it was not built here."""
    try:
        return tuple(str(folder) for folder in json.loads(_note(index).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return ()


def _note(index: str | os.PathLike[str]) -> Path:
    """Return the file for an index's folders; it need not exist.

    Raises:
        OSError: no such index.
    """
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    digest = hashlib.sha256(resolve(index, ENTRIES_FILE).read_bytes()).hexdigest()
    return Path(state) / "visual_ground" / "indexes" / f"{digest}.json"
