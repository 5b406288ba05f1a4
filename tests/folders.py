"""The package's folders and the imports between them, read from the source; draws the graph in docs/architecture.md.

`python -m tests.folders` writes the graph anew.
"""

import ast
import re
from pathlib import Path

from tests.paths import DOCS, ROOT

PACKAGE = ROOT / "visual_ground"
PAGE = DOCS / "architecture.md"
# From low to high: a file imports from its own folder and from those before it. Folders within folders stand by
# themselves; files at the top of the package are folders of one.
ORDER = (
    "errors",
    "processes",
    "regression",
    "rows",
    "progress",
    "shared_space",
    "storage",
    "config",
    "lm/base",
    "lm",
    "vision",
    "vision/features",
    "prompts",
    "adapter",
    "index/table",
    "index/engines",
    "index",
    "index/milvus",
    "indexing",
    "scoring",
    "generation/logits",
    "generation",
    "components",
    "model",
    "grounding",
    "evaluation",
    "evaluation/measures",
    "evaluation/formats",
    "evaluation/running",
    "training/data",
    "training/speedups",
    "training/losses",
    "training/initialization",
    "training/selection",
    "training/saving",
    "training",
    "fitting",
    "transferring",
    "importers/fromage",
    "demo",
    "evaluation/tasks/retrieval",
    "evaluation/tasks/composed",
    "evaluation/tasks/answers",
    "evaluation/tasks",
    "server",
    "app",
    "terminal",
    "cli/shared",
    "cli/commands",
    "cli",
)
# Files that only name what is elsewhere: the package's and folders' own pages, and `python -m visual_ground`.
DOORS = ("__init__", "__main__")


def files() -> dict[str, Path]:
    """Return the package's files by dotted name, such as "training.losses.objective"."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def folder_of(name: str) -> str:
    """Return the folder of a file, such as "training/losses"; the file itself at the top."""
    *folders, leaf = name.split(".")
    return "/".join(folders) or leaf


def imports_of(name: str, tree: ast.AST) -> set[str]:
    """Return the dotted names in this package that a file imports anywhere, also in functions and for type checkers."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["visual_ground", *name.split(".")][: -node.level]
                base = ".".join([*above, base]).rstrip(".")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("visual_ground.") for name in found if name.startswith("visual_ground.")}


def file_graph() -> dict[str, set[str]]:
    """Return for each file the files of this package that it imports; importing a folder is importing its page."""
    names = files()
    graph = {}
    for name, path in names.items():
        found = imports_of(name, ast.parse(path.read_text()))
        graph[name] = {other for other in found if other in names} - {name}
        graph[name] |= {f"{other}.__init__" for other in found if f"{other}.__init__" in names} - {name}
        # Names that the package exports, such as `from visual_ground import ground`, are not followed.
    return graph


def folder_graph() -> dict[str, set[str]]:
    """Return for each folder those that its files import, without the pages of the package."""
    graph: dict[str, set[str]] = {folder: set() for folder in ORDER}
    for name, others in file_graph().items():
        if _is_door(name):
            continue
        folder = folder_of(name)
        graph.setdefault(folder, set()).update(folder_of(other) for other in others if not _is_door(other))
    return {folder: others - {folder} for folder, others in graph.items()}


def _is_door(name: str) -> bool:
    return name.rpartition(".")[2] in DOORS


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return a circle of imports for each file that is in one."""
    found = []
    for start in graph:
        path, seen = [(start, [start])], set()
        while path:
            name, way = path.pop()
            for other in graph.get(name, ()):
                if other == start:
                    found.append(way)
                    path = []
                    break
                if other not in seen:
                    seen.add(other)
                    path.append((other, [*way, other]))
    return found


def drawn() -> str:
    """Return the folders' graph in Mermaid; an arrow that two others imply is left out."""
    graph = folder_graph()
    reached: dict[str, set[str]] = {}
    for folder in ORDER:
        reached[folder] = set(graph[folder]).union(*(reached[other] for other in graph[folder]))
    lines = ["```mermaid", "graph BT"]
    lines += [f'    {_node(folder)}["{folder}"]' for folder in ORDER]
    for folder in ORDER:
        implied = set().union(*(reached[other] for other in graph[folder]))
        lines += [f"    {_node(folder)} --> {_node(other)}" for other in ORDER if other in graph[folder] - implied]
    return "\n".join([*lines, "```"])


def _node(folder: str) -> str:
    return folder.replace("/", "_")


BLOCK = re.compile(r"(<!-- folders:begin -->\n).*?(\n<!-- folders:end -->)", re.DOTALL)


def main() -> None:
    """Write the graph into the page."""
    PAGE.write_text(BLOCK.sub(lambda found: found[1] + drawn() + found[2], PAGE.read_text()))


if __name__ == "__main__":
    main()
