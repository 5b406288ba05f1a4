"""A tiny LM, encoder and dataset on disk, for what loads by name."""

from pathlib import Path

from tests.paths import GOLDEN
from tests.tiny import picture


def saved_parts(folder: Path) -> tuple[str, str, str]:
    """Write eight pictures and a table of captions; return the names of an LM, an encoder and the table."""
    lines = ["image\tcaption"]
    for i in range(8):
        picture(i).resize((32, 32)).save(folder / f"{i}.png")
        lines.append(f"{i}.png\tthe number {i} of all")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return str(GOLDEN / "lm"), str(GOLDEN / "vision"), str(folder / "pairs.tsv")
