"""Names in error texts exist: whoever follows an error finds what it speaks of."""

import ast
import builtins
import re
from dataclasses import fields, is_dataclass
from importlib import import_module

import pytest

from tests.paths import ROOT
from visual_ground import errors

PACKAGE = ROOT / "visual_ground"
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
# Besides exceptions, what is logged or printed for people to act on.
SPEAKERS = {"warning", "error", "warn", "print"}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def classes():
    """Return for each name of a class in the package the modules that define it."""
    found = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module_of(path))
    return found


def joined(node):
    """Return the text of a string expression; in place of each computed part stands a space."""
    parts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return " ".join(parts)


def texts():
    """Yield place and text of every error and warning, and of every string that a function returns for one."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", ""))
            if isinstance(node, ast.Call) and (name.endswith("Error") or name in SPEAKERS):
                for argument in node.args:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", joined(argument)
            elif isinstance(node, ast.Dict):  # Such as reasons by name, which an error puts into its text.
                for value in node.values:
                    yield f"{path.relative_to(ROOT)}:{value.lineno}", joined(value)
            elif isinstance(node, ast.Return) and node.value is not None:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", joined(node.value)


def exists(dotted):
    parts = dotted.split(".")
    value = import_module(parts[0])
    for i, part in enumerate(parts[1:], 1):
        if not hasattr(value, part):
            try:
                import_module(".".join(parts[: i + 1]))
            except ImportError:
                return False
        value = getattr(value, part)
    return True


def has_attribute(kind, name):
    own = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    return hasattr(kind, name) or name in own or any(name in getattr(k, "__annotations__", {}) for k in kind.__mro__)


def test_dotted_names_in_error_texts_exist():
    known, checked = classes(), 0
    for place, text in texts():
        for dotted in re.findall(r"\bvisual_ground(?:\.\w+)+", text):
            assert exists(dotted), f"{place} names {dotted}, which does not exist"
            checked += 1
        for name, attribute in re.findall(r"(?<![\w./])([A-Z]\w*[a-z]\w*)\.([a-z_]\w*)(?![\w/])", text):
            kinds = [getattr(import_module(module), name) for module in known.get(name, [])]
            assert kinds, f"{place} names {name}.{attribute}, and the package has no class {name}"
            assert any(has_attribute(kind, attribute) for kind in kinds), f"{place} names {name}.{attribute}"
            checked += 1
    assert checked >= 7


def test_functions_and_classes_called_in_error_texts_exist():
    """`ground()`, `LinkRules(folders=...)` and the like: whatever an error tells to call is defined in the package."""
    defined = set(classes()) | {
        node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    # What a user calls of Python, PEFT and transformers.
    outside = {"LoraConfig", "get_peft_model", "get_input_embeddings", "get_output_embeddings", *dir(builtins)}
    for place, text in texts():
        for name in re.findall(r"(?<![\w.])([A-Za-z_]\w+)\((?=[\w)=.\"])", text):
            assert name in defined | outside, f"{place} says to call {name}(), which the package does not have"


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GroundingError)],
)
def test_every_error_is_a_grounding_error_and_a_builtin(kind):
    builtin = [
        base
        for base in kind.__mro__
        if base.__module__ == "builtins" and base not in (Exception, BaseException, object)
    ]
    assert kind is errors.GroundingError or builtin
