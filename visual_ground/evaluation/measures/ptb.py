"""The words of a caption, as Stanford's tokenizer gives them to the published caption metrics; without Java."""

from __future__ import annotations

import re

# What the published scripts leave out. They also list brackets, but in capitals, after everything was put into lower
# case: brackets stay.
LEFT_OUT = frozenset(("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"))
# Stanford's tokenizer writes quotes and dashes in ASCII, and every currency as if it had only two.
SAME = str.maketrans(
    {
        "\u2018": "`",
        "\u2019": "'",
        "\u201c": "``",
        "\u201d": "''",
        "\u2013": "--",
        "\u2014": "--",
        "\u00a3": "#",
        "\u20ac": "$",
    }
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
TWO_WORDS = re.compile(
    r"(?<!\w)(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b)|y'(?=all\b)|'t(?=(?:is|was)\b))"
)
CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
TOKEN = re.compile(
    r"""
      https?://\S*[^\s.,:;!?()] | [\w.+-]+@[\w-]+\.[\w.-]*\w
    | n't(?!\w) | '(?:s|re|ve|ll|d|m)(?!\w) | '\d0s | y' | 't(?!\w)
    | (?:[a-z]\.)+(?<=\.[a-z]\.)                            # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|prof|vs|etc|al|inc|co|corp|ltd|dept|ft|mt)\.(?!\w)
    | (?:(?<!\w)-(?=\d))?\w+(?:(?:[-/.&]+|'|(?<=\d)[,:](?=\d))\w+)*(?:\+\+)?   # rock-n-roll, 1,000
    | `` | '' | -{2,} | \.{2,} | [?!]+ | \*+ | \S
    """,
    re.VERBOSE,
)


def caption_words(caption: str) -> str:
    """Return a caption's words in lower case with spaces between them, without punctuation.

    Example:
        >>> caption_words("A man's dog isn't happy, in the U.S.")
        "a man 's dog is n't happy in the u.s."
    """
    text = CLITIC.sub(r" \1", TWO_WORDS.sub(r"\1 ", caption.lower().translate(SAME)))
    words = [BRACKETS.get(word, word) for word in TOKEN.findall(text)]
    dots = [re.sub(r"^\.{2,}$", "...", word) for word in words]
    return " ".join(word for word in dots if word not in LEFT_OUT)
