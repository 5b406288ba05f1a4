"""The README.md of an index."""

from __future__ import annotations

import os
from pathlib import Path

from visual_ground.index.engines.saved import SAVED_ENGINES
from visual_ground.index.state import IndexState
from visual_ground.storage.hub import CARD_FILE
from visual_ground.storage.readme import render_page


def read_page(folder: str | os.PathLike[str]) -> str | None:
    """Return the text of a folder's README.md, if there is one."""
    page = Path(folder) / CARD_FILE
    return page.read_text(encoding="utf-8", errors="replace") if page.is_file() else None


def index_card(contents: IndexState, repo_id: str, page: str | None) -> str:
    """Return the text of an index's README.md; what people wrote into an earlier `page` is kept."""
    opening = (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"An image index of visual_ground: {len(contents.engine):,} vectors of width {contents.engine.dim}, with ids"
        f"{', images or their addresses' if contents.entries.has_images else ''}"
        f"{' and metadata' if contents.entries.has_metadata else ''}. It "
        "fits adapters whose image layer made these vectors, and those moved from them to other language models."
    )
    if (weight := contents.caption_weight) > 0:
        opening += (
            f" The vector of an entry with a caption is {100 * (1 - weight):g} % its picture's and {100 * weight:g} % "
            "its caption's, scaled to length 1."
        )
    engine = contents.engine
    if isinstance(engine, SAVED_ENGINES) and engine.description:
        opening += f"\n\n{engine.description}"
    use = (
        "```python\nfrom visual_ground import ImageIndex\n\n"
        f'index = ImageIndex.from_pretrained("{repo_id}")\n```\n\n'
        "Images that are addresses on the network are fetched only from hosts that you allow: see "
        "`visual_ground.index.remote_images.LinkRules`."
    )
    metadata = {"library_name": "visual_ground", "tags": ["visual_ground", "image-retrieval"]}
    return render_page(metadata, f"{opening}\n\n## Use\n\n{use}", page)
