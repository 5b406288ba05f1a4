"""The notebook runs from its first cell to its last, and shows the answer with its picture."""

import ast
import json

import pytest

from tests.local_hub import documentation, hub  # noqa: F401
from tests.paths import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())


def shown_by(source, names):
    """Run a cell as IPython does; return the value of its last line, where that is an expression."""
    code = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%")))
    last = code.body.pop() if code.body and isinstance(code.body[-1], ast.Expr) else None
    exec(compile(code, "quickstart.ipynb", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "quickstart.ipynb", "eval"), names)


def test_it_is_saved_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert not any(cell["outputs"] or cell["execution_count"] for cell in NOTEBOOK["cells"] if "outputs" in cell)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Those of the libraries that load and train.
def test_it_runs_and_shows_a_picture(documentation, capsys):  # noqa: F811
    names = {}
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    shown = [shown_by(source, names) for source in cells]
    pages = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert len(pages) == 1 and "<img" in pages[0]
    said = capsys.readouterr().out
    assert "[image" in said and "tensor(" in said
