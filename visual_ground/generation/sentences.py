"""Finds where the sentences of plain text end, and cuts an answer that ran out of tokens there."""

from __future__ import annotations

import re
from collections.abc import Sequence

from visual_ground.generation.output import RetrievedImage

ELLIPSIS = "\u2026"
# A full stop of any script with the quotation marks and brackets that close after it, and then a space or the end.
# Scripts without spaces have stops that end a sentence wherever they stand. A line break ends a sentence only after the
# last line of a list item; other line breaks may be in mid-sentence, and a heading announces what follows.
_ITEM = r"[ \t]*(?:[-*+\u2022]|\d{1,3}[.)])[ \t]"
_END = re.compile(
    r"""(?:[.!?\u2026][\"'\u201d\u2019\u00bb)\]*_]*(?=\s|\Z))|[\u3002\uff01\uff1f\u0964]|"""
    rf"""\n(?=[ \t]*(?:\n|\Z)|{_ITEM})"""
)
_IS_ITEM = re.compile(rf"{_ITEM}+\S.*[^:,\s]\s*\Z")
# What ends with a full stop in mid-sentence: the number of a list, an initial, a title.
_GOES_ON = re.compile(r"(?:^|[\s(\"'])(?:\d+|[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Fig)\.$")


def sentence_ends(text: str) -> list[int]:
    """Return the positions in a text at which its sentences end.

    Example:
        >>> text = "Dr. Owl is wise. She reads"
        >>> [text[:end] for end in sentence_ends(text)]
        ['Dr. Owl is wise.']
    """
    ends: list[int] = []
    for match in _END.finditer(text):
        before = text[: match.end()]
        if match.group() == "\n":
            before = before.rstrip()
            # An item that announces others, or has nothing but its mark, is no sentence.
            if not _IS_ITEM.match(before.rpartition("\n")[2]) or ends[-1:] == [len(before)]:
                continue
        if not _GOES_ON.search(before):
            ends.append(len(before))
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
    kept = _up_to(parts, room)
    if rest:
        last = max((i for i, part in enumerate(kept) if isinstance(part, str)), default=None)
        if last is not None:
            kept[last] = str(kept[last]) + rest
    return tuple(kept)


def _up_to(parts: Sequence[str | RetrievedImage], room: int) -> list[str | RetrievedImage]:
    """Return the parts up to so many characters, with the images up to there."""
    kept: list[str | RetrievedImage] = []
    for part in parts:
        if isinstance(part, str):
            taken, room = part[:room], room - min(room, len(part))
            kept += [taken] if taken else []
            if len(taken) < len(part):
                break
        else:
            kept.append(part)
    return kept


class GrowingSentences:
    """Releases a growing answer sentence by sentence.

    Joined, what it released equals `cut_to_sentences` of the whole, or the whole if the LM ended the answer itself.

    Example:
        >>> growing = GrowingSentences()
        >>> growing.add(["It is a fox. It"]), growing.add([" has a bus"]), growing.end(is_whole=False)
        (['It is a fox.'], [], [])
    """

    def __init__(self) -> None:
        self._parts: list[str | RetrievedImage] = []
        self._out: tuple[int, int] = 0, 0  # Characters and images that are out.

    def add(self, parts: Sequence[str | RetrievedImage]) -> list[str | RetrievedImage]:
        """Take what has been generated since, and return what can now be released."""
        self._parts += parts
        text = "".join(part for part in self._parts if isinstance(part, str))
        # The letter keeps a full stop at the very end from counting: what comes next may continue it ("3." and "5").
        ends = sentence_ends(text + "x")
        return self._let_out(_up_to(self._parts, ends[-1])) if ends else []

    def end(self, is_whole: bool) -> list[str | RetrievedImage]:
        """Return the rest: all of it if the LM ended the answer itself, else what `cut_to_sentences` leaves."""
        return self._let_out(self._parts if is_whole else cut_to_sentences(self._parts))

    def _let_out(self, parts: Sequence[str | RetrievedImage]) -> list[str | RetrievedImage]:
        """Return what these parts of the answer, from its beginning, have beyond what is out."""
        characters, images = self._out
        new: list[str | RetrievedImage] = []
        for part in parts:
            if isinstance(part, str):
                new += [part[characters:]] if part[characters:] else []
                characters = max(0, characters - len(part))
            else:
                new += [part] if images < 1 else []
                images -= 1
        count = sum(len(part) for part in parts if isinstance(part, str))
        self._out = count, sum(not isinstance(part, str) for part in parts)
        return new
