"""Finds where the sentences of plain text end, and cuts an answer that ran out of tokens there."""

from __future__ import annotations

import re
from collections.abc import Sequence

from visual_ground.generation.output import RetrievedImage

ELLIPSIS = "\u2026"
# A full stop of any script with the quotation marks and brackets that close behind it, and then a space or the end.
# Scripts without spaces have stops that end a sentence wherever they stand.
_END = re.compile(r"""(?:[.!?\u2026][\"'\u201d\u2019\u00bb)\]*_]*(?=\s|$))|[\u3002\uff01\uff1f\u0964]|\n""")
# What ends with a full stop and goes on: the number of a list, an initial, a title.
_GOES_ON = re.compile(r"(?:^|[\s(\"'])(?:\d+|[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Fig)\.$")


def sentence_ends(text: str) -> list[int]:
    """Return the positions in a text behind which its sentences end.

    Example:
        >>> text = "Dr. Owl is wise. She reads"
        >>> [text[:end] for end in sentence_ends(text)]
        ['Dr. Owl is wise.']
    """
    ends: list[int] = []
    for match in _END.finditer(text):
        said = text[: match.end()]
        if match.group() == "\n":
            said = said.rstrip()
            # A line that announces what follows, or has nothing but a mark or a number, is no sentence.
            if len(said.split()) < 2 or said.endswith((":", ",")) or ends[-1:] == [len(said)]:
                continue
        if not _GOES_ON.search(said):
            ends.append(len(said))
    return ends


def cut_to_sentences(parts: Sequence[str | RetrievedImage]) -> tuple[str | RetrievedImage, ...]:
    """Return an answer up to the end of its last whole sentence, with the pictures up to there.

    If no sentence has ended, an ellipsis replaces the last word, which may be incomplete.

    Args:
        parts: texts and images in order, of an answer that ran out of tokens.

    Example:
        >>> cut_to_sentences(["It is a fox. It has a bus"])
        ('It is a fox.',)
        >>> cut_to_sentences(["A fox with a bus"])
        ('A fox with a\u2026',)
    """
    text = "".join(part for part in parts if isinstance(part, str))
    ends, rest = sentence_ends(text), ""
    room = ends[-1] if ends else len(text)
    if not ends and text.strip():
        words = text.rstrip()
        room = max(words.rfind(" "), words.rfind("\n"))
        room, rest = (len(words), ELLIPSIS) if room < 1 else (room, ELLIPSIS)
    kept: list[str | RetrievedImage] = []
    for part in parts:
        if isinstance(part, str):
            taken, room = part[:room], room - min(room, len(part))
            kept += [taken] if taken else []
            if len(taken) < len(part):
                break
        else:
            kept.append(part)
    if rest:
        last = max((i for i, part in enumerate(kept) if isinstance(part, str)), default=None)
        if last is not None:
            kept[last] = str(kept[last]) + rest
    return tuple(kept)
