"""In what words users ask for pictures, and say what no picture belongs to; "{it}" stands for a thing.

Many different wordings teach more than many things in few of them (docs/recipe.md). Each line is one of them:

- `requests.txt`: what captions become if the data has no requests.
- `others.txt`: said first, without wanting a picture. Many are about things as well, so that not every thing that is
  named is shown.
- `next_requests.txt`, `next_others.txt`: said in a chat's second turn, the same two kinds.
"""

from importlib.resources import files


def _lines(name: str) -> tuple[str, ...]:
    return tuple(files(__name__).joinpath(name).read_text(encoding="utf-8").splitlines())


REQUESTS, OTHERS = _lines("requests.txt"), _lines("others.txt")
NEXT_REQUESTS, NEXT_OTHERS = _lines("next_requests.txt"), _lines("next_others.txt")
