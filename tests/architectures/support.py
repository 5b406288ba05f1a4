"""docs/support.md, made of docs/support.json, which a whole walk writes."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from importlib.metadata import version
from typing import Any

from tests.paths import DOCS

RESULTS, PAGE = DOCS / "support.json", DOCS / "support.md"

COLUMNS = {
    "text": ("text", "text-only logits and greedy text are the base's, bit for bit, on all columns but `[RET]`'s"),
    "images": ("images", "one image and several are read where they stand, and change what comes after them"),
    "gradients": ("gradients", "every adapter tensor gets a gradient, and nothing of the base"),
    "step": ("step", "two optimizer steps: a lower loss, a changed adapter, an unchanged base"),
    "ret": ("[RET]", "`[RET]` is said and read again; each step from the cache has the logits of reading anew"),
    "left_padding": ("padding", "a left-padded prompt is read as it is alone"),
    "beams": ("beams", "beam search, over images and `[RET]`"),
    "processors": ("penalties", "repetition penalty and no repeated n-grams, over images and `[RET]`"),
    "spare_id": ("spare id", "the same where `[RET]` takes an id that the LM has and its tokenizer lacks"),
    "unground": ("unground", "state dict and outputs come back bit for bit"),
}


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def count(results: dict[str, Any]) -> tuple[int, int]:
    """Return how many language models do all that their base does, and how many there are."""
    models = [found for found in results["architectures"].values() if "refused" not in found]
    return sum(not any(value.startswith("no: ") for value in found.values()) for found in models), len(models)


def dump(results: dict[str, Any]) -> str:
    """Return the results as JSON."""
    return json.dumps(results, indent=1) + "\n"


def render(results: dict[str, Any]) -> str:
    """Return the page."""
    good, all_of_them = count(results)
    made = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join(
        [
            "# Language models",
            "",
            "Written by `make test-architectures`, not by hand: a tiny random model of every entry of transformers'",
            f"causal-LM mapping ({made}), in float32 on a CPU, with nothing but its own config class.",
            f"**{good} of {all_of_them}** language models do, grounded, all that their base does. "
            + ("All rows are of one run." if results["of_one_run"] else "A row is of its architecture's last run."),
            "",
            "✓ holds; *base* means that the plain model, with nothing attached, fails the same check beside it.",
            "",
            *[f"- **{short}**: {long}" for short, long in COLUMNS.values()],
            "",
            *_table(results["architectures"]),
            "",
            "## What a base cannot",
            "",
            *_reasons(results["architectures"]),
            "",
            "Doge and DeepSeek V3.2 keep the highest-scored keys of a long prompt, 2,048 by default. Where a prompt",
            "has more, their cached decoding differs from their uncached on some texts, plain or grounded (seen with 8",
            "and 2 keys kept); the prompts of this table have fewer.",
            "",
            "## Refused",
            "",
            "Entries of the mapping that are no language models of text:",
            "",
            *[f"- `{m}`: {f['refused']}" for m, f in results["architectures"].items() if "refused" in f],
            "",
        ]
    )


def _table(architectures: dict[str, dict[str, str]]) -> list[str]:
    heads = [short for short, _ in COLUMNS.values()]
    lines = ["| architecture | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for model_type, found in architectures.items():
        if "refused" not in found:
            lines.append(f"| {model_type} | " + " | ".join(_mark(found[name]) for name in COLUMNS) + " |")
    return lines


def _mark(result: str) -> str:
    return "✓" if result == "yes" else "*base*" if result.startswith("base cannot") else "**no**"


def _reasons(architectures: dict[str, dict[str, str]]) -> list[str]:
    whose: dict[tuple[str, str], list[str]] = defaultdict(list)
    for model_type, found in architectures.items():
        for name, result in found.items():
            if name in COLUMNS and result.startswith("base cannot: "):
                whose[name, result.removeprefix("base cannot: ").strip()].append(model_type)
    rows = sorted(whose.items(), key=lambda item: (list(COLUMNS).index(item[0][0]), item[0][1]))
    return [f"- **{COLUMNS[name][0]}**, {', '.join(models)}: {reason}" for (name, reason), models in rows]
