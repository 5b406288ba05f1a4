"""`accelerate_index`: what finds the vectors of a saved index faster than a comparison with all."""

from __future__ import annotations

import os
from dataclasses import replace

from visual_ground.index.engines.faiss_index import TARGET_RECALL, FaissIndex
from visual_ground.index.files import read_index, write_index
from visual_ground.index.remote_images import LinkRules


def accelerate_index(
    folder: str | os.PathLike[str], kind: str | None = None, target_recall: float = TARGET_RECALL
) -> FaissIndex:
    """Build a faiss index for a saved image index, and save it in the same folder, with its recall in the README.

    `ImageIndex.from_pretrained` opens it from then on. The vectors stay what they are, and scores are exact.
    """
    state = read_index(folder, LinkRules())
    engine = FaissIndex(state.exact, kind, target_recall)
    write_index(folder, replace(state, engine=engine))
    return engine
