"""Pages that are rendered again without losing what people wrote into them.

A page has metadata (YAML between two `---`) and sections, one for each `## ` heading. Its last line says, in a comment,
what each part looked like when it was rendered, as a short hash. A part that no longer has its hash was edited, and
stays as it is; so do parts that people added, and those that they removed stay away.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MARK = re.compile(r"\n*<!-- visual_ground rendered: (\{.*?\}) -->")
FRONT = re.compile(r"^---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page in parts.

    Args:
        metadata: by key.
        sections: text by heading, in order; the text before the first `## ` heading is under "".
        rendered: the hash of each part when it was rendered: "meta:KEY" or "section:HEADING".
        front: the metadata as it was written.
    """

    metadata: Mapping[str, Any]
    sections: Mapping[str, str]
    rendered: Mapping[str, str]
    front: str = ""

    @classmethod
    def parse(cls, text: str) -> Page:
        """Cut a page into its parts.

        Raises:
            ValueError: metadata that is no YAML mapping.
        """
        import yaml

        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        mark = MARK.search(text)
        rendered = _hashes(mark[1]) if mark else {}
        text = MARK.sub("", text)
        front = FRONT.match(text)
        try:
            metadata = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
        if not isinstance(metadata or {}, dict):
            raise ValueError("the metadata between the two --- is no mapping")
        body = text[front.end() :] if front else text
        return cls(metadata or {}, _sections(body), rendered, front[1] if front else "")

    def edits(self) -> tuple[dict[str, Any], dict[str, str], set[str]]:
        """Return what people wrote into metadata and sections, and the names of the parts that they removed."""
        metadata = {k: v for k, v in self.metadata.items() if self.rendered.get(f"meta:{k}") != _hash(v)}
        sections = {h: t for h, t in self.sections.items() if self.rendered.get(f"section:{h}") != _hash(t)}
        present = {*(f"meta:{key}" for key in self.metadata), *(f"section:{heading}" for heading in self.sections)}
        return metadata, sections, set(self.rendered) - present


def render_page(metadata: Mapping[str, Any], sections: Mapping[str, str], pages: Sequence[str] = ()) -> str:
    """Return the text of a page, with what people wrote into earlier versions of it.

    Args:
        metadata: as rendered now.
        sections: as rendered now, text by heading.
        pages: earlier versions; where two of them edited the same part, the later one counts.

    Returns:
        The page. One whose metadata cannot be read is returned as it is, since nobody else could repair it.
    """
    sections = {heading: text.strip() for heading, text in sections.items()}
    rendered = {f"meta:{key}": _hash(value) for key, value in metadata.items()}
    rendered |= {f"section:{heading}": _hash(text) for heading, text in sections.items()}
    metadata, sections, front = dict(metadata), dict(sections), ""
    for text in pages:
        try:
            page = Page.parse(text)
        except ValueError as error:
            logger.warning("The card's metadata cannot be read, so the card stays as it is: %s", error)
            return text
        own_metadata, own_sections, removed = page.edits()
        metadata |= own_metadata
        sections = _put(sections, own_sections, list(page.sections))
        for part in removed & set(rendered):
            kind, _, name = part.partition(":")
            (metadata if kind == "meta" else sections).pop(name, None)
        front = page.front if page.metadata == metadata else front
    body = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items())
    mark = json.dumps(rendered, ensure_ascii=False).replace("--", "-\\u002d")
    return f"---\n{front or _yaml(metadata)}\n---\n\n{body}\n\n<!-- visual_ground rendered: {mark} -->\n"


def _put(sections: Mapping[str, str], own: Mapping[str, str], order: Sequence[str]) -> dict[str, str]:
    """Return the sections with people's own in the place of the rendered ones, or after those that they followed."""
    placed = {heading: own.get(heading, text) for heading, text in sections.items()}
    for heading, text in own.items():
        if heading in placed:
            continue
        before = [known for known in order[: order.index(heading)] if known in placed]
        items = list(placed.items())
        at = list(placed).index(before[-1]) + 1 if before else 0
        placed = dict([*items[:at], (heading, text), *items[at:]])
    return placed


def _sections(body: str) -> dict[str, str]:
    """Cut a body at its `## ` headings, but not inside fenced code; a repeated heading stays inside the one before."""
    sections: dict[str, list[str]] = {"": []}
    heading, fence = "", ""
    for line in body.strip().split("\n"):
        if found := re.match(r"(`{3,}|~{3,})", line):
            fence = found[1] if not fence else "" if line.rstrip() == fence else fence
        if not fence and line.startswith("## ") and line[3:].strip() not in sections:
            heading = line[3:].strip()
            sections[heading] = []
        else:
            sections[heading].append(line)
    texts = {heading: "\n".join(lines).strip() for heading, lines in sections.items()}
    return {heading: text for heading, text in texts.items() if heading or text}


def _hashes(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in found.items()}


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _yaml(metadata: Mapping[str, Any]) -> str:
    from huggingface_hub.repocard_data import CardData

    return CardData(**metadata).to_yaml(line_break="\n").strip()
