"""The house: imports go one way between folders, in no circle between files, and files and functions are small."""

import ast

import pytest

from tests.folders import BLOCK, DOORS, ORDER, PAGE, circles, drawn, file_graph, files, folder_graph, imports_of

LINES_A_FILE, LINES_A_FUNCTION, PARAMETERS = 250, 40, 8
FILES = sorted(files().items())


def test_every_folder_has_its_place():
    assert set(folder_graph()) <= set(ORDER), "a new folder gets its place in tests/folders.py"


def test_no_import_goes_upward():
    upward = {
        f"{folder} -> {other}"
        for folder, others in folder_graph().items()
        for other in others
        if ORDER.index(other) > ORDER.index(folder)
    }
    assert not upward


def test_no_files_import_each_other_in_a_circle():
    assert not circles(file_graph())


def test_the_checks_see_imports_in_functions_and_for_type_checkers():
    for_types = "if TYPE_CHECKING:\n    from visual_ground.model import A\n"
    source = for_types + "def f():\n    from .. import b\n    import visual_ground.c\n"
    assert imports_of("x.y", ast.parse(source)) >= {"model", "c"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})


@pytest.mark.parametrize("name, path", FILES, ids=[name for name, _ in FILES])
def test_rooms_are_small(name, path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= LINES_A_FUNCTION, node.name
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([p for p in parameters if p.arg not in ("self", "cls")])
            assert count <= PARAMETERS, f"{node.name} has {count} parameters"


def test_no_class_inherits_from_another_concrete_class_of_the_package():
    classes, abstract = {}, {"Protocol", "ABC"}
    for path in files().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = {base.id if isinstance(base, ast.Name) else "" for base in node.bases}
    errors = {name for name in classes if name.endswith("Error") or name == "GroundingError"}
    concrete = {name for name, bases in classes.items() if not bases & abstract} - errors
    assert not {name: bases & concrete for name, bases in classes.items() if bases & concrete}


def test_every_folder_says_in_three_lines_what_it_is_for():
    for name, path in files().items():
        if name.endswith("__init__"):
            page = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert page and len(page.splitlines()) <= 3, name


def test_folders_are_neither_empty_nor_crowded():
    for folder in ORDER:
        members = [name for name in files() if name.replace(".", "/").rpartition("/")[0] == folder]
        members = [name for name in members if name.rpartition(".")[2] not in DOORS]
        assert len(members) <= 14, folder


def test_the_page_shows_the_folders_as_they_are():
    block = BLOCK.search(PAGE.read_text())
    assert block, "docs/architecture.md has the marks of the graph"
    assert drawn() in block[0], "run `python -m tests.folders`"
