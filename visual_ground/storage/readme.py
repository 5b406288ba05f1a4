"""README.md files that are generated again without losing what people wrote into them.

The generated text stands between two HTML comments, the first of which holds hashes of it and of each metadata value:

- What stands before and after the two comments is never touched.
- The text between them is generated anew as long as it has its hash. Once edited, it stays as it is.
- A metadata key (YAML between two `---`) whose value was edited, added or removed by hand stays so.
- A page without the comments is somebody's own and stays as it is, unless it has nothing but metadata.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

END = "<!-- visual_ground end -->"
BLOCK = re.compile(rf"<!-- visual_ground generated (\{{.*?\}}) -->\n(.*?)\n{END}", re.DOTALL)
METADATA = re.compile(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class _Page:
    """A page in parts: metadata as text and as values, the generated body with its hashes, and what is around it."""

    yaml: str
    metadata: Mapping[str, Any]
    hashes: Mapping[str, Any] | None
    body: str
    before: str
    after: str


def render_page(metadata: Mapping[str, Any], body: str, earlier: str | None = None) -> str:
    """Return a page of metadata and Markdown, with what people wrote into its earlier version, where there is one."""
    body = f"\n{body.strip()}\n"
    page = _Page("", {}, None, "", "\n", "\n") if earlier is None else _parse(earlier)
    if page is None or (page.hashes is None and page.before.strip()):
        return earlier or ""
    generated = page.hashes["metadata"] if page.hashes else {}
    kept = {key: value for key, value in page.metadata.items() if generated.get(key) != _hash(value)}
    new = {key: value for key, value in metadata.items() if key in page.metadata or key not in generated}
    values = {**new, **kept}
    # Comments inside the YAML survive only where nothing in it changes.
    front = page.yaml if page.metadata == values else _to_yaml(values)
    hashes = _hashes(metadata, body)
    if page.hashes and page.hashes.get("body") != _hash(page.body):
        # Edited: the text stays, and so does the hash that it no longer has.
        body, hashes["body"] = page.body, page.hashes.get("body")
    block = f"<!-- visual_ground generated {json.dumps(hashes)} -->\n{body}\n{END}"
    return f"---\n{front.strip()}\n---\n{page.before}{block}{page.after}"


def is_edited(text: str) -> bool:
    """Return whether people wrote something into a page."""
    page = _parse(text)
    return page is None or page.hashes != _hashes(page.metadata, page.body) or bool((page.before + page.after).strip())


def _parse(text: str) -> _Page | None:
    """Cut a page into its parts; return None where its metadata or hashes cannot be read."""
    import yaml

    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    front = METADATA.match(text)
    rest = text[front.end() :] if front else text
    block = BLOCK.search(rest)
    try:
        metadata = (yaml.safe_load(front[1]) if front else None) or {}
        hashes: Any = json.loads(block[1]) if block else None
        if not isinstance(metadata, dict) or (block and not isinstance(hashes["metadata"], dict)):
            raise ValueError("not a mapping")
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        logger.warning("The metadata of README.md cannot be read, so the page stays as it is: %s", error)
        return None
    parts = (
        (block[2], rest[: block.start()], rest[block.end() :]) if block else ("", rest if rest.strip() else "\n", "\n")
    )
    return _Page(front[1] if front else "", metadata, hashes, *parts)


def _hashes(metadata: Mapping[str, Any], body: str) -> dict[str, Any]:
    return {"body": _hash(body), "metadata": {key: _hash(value) for key, value in metadata.items()}}


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _to_yaml(metadata: Mapping[str, Any]) -> str:
    from huggingface_hub.repocard_data import CardData

    return str(CardData(**metadata).to_yaml(line_break="\n"))
