"""In what words users ask for pictures, and say what no picture belongs to; "{it}" stands for a thing.

Many different wordings teach more than many things in few of them (docs/recipe.md). They are the lines of texts/*.txt.
"""

from pathlib import Path


def _lines(name: str) -> tuple[str, ...]:
    return tuple((Path(__file__).parent / "texts" / name).read_text(encoding="utf-8").splitlines())


# What captions become: the requests of data that has none, and further ones for `[RET]`'s gate.
REQUESTS = _lines("requests.txt")
# Said first, without wanting a picture. Many are about things as well, so that not every thing that is named is shown.
OTHERS = _lines("others.txt")
# Said in a chat's second turn, the same two kinds.
NEXT_REQUESTS, NEXT_OTHERS = _lines("next_requests.txt"), _lines("next_others.txt")
# Said behind a picture of the user's own.
PICTURED_REQUESTS, PICTURED_OTHERS = _lines("pictured_requests.txt"), _lines("pictured_others.txt")
