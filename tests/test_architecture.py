"""Reading order is dependency order: what docs/architecture.md lists, and nothing imports what comes later."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "visual_ground"


def listed():
    text = (ROOT / "docs" / "architecture.md").read_text()
    return re.findall(r"^\d+\. `([\w.]+)`", text, re.MULTILINE)


def modules():
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports(tree):
    """Yield what a module imports when it is imported."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("visual_ground."):
            base = node.module.removeprefix("visual_ground.")
            yield from [f"{base}.{alias.name}" for alias in node.names] + [base]


def test_every_module_is_listed_and_imports_only_what_is_above_it():
    order, found = listed(), modules()
    assert set(order) == {name for name in found if not name.endswith("__")}
    for name, path in found.items():
        if name.endswith("__"):
            continue
        for other in set(imports(ast.parse(path.read_text()))) & set(order):
            assert order.index(other) < order.index(name), f"{name} imports {other}, which is read later"


def test_rooms_are_small():
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 330, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, (name, node.name)
