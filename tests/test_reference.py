"""Every public name has a page of reference, and every page a public name."""

from importlib.util import find_spec
from pathlib import Path

import pytest

import visual_ground

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"


@pytest.mark.parametrize("name", visual_ground.__all__)
def test_a_public_name_has_a_page(name):
    assert f"::: visual_ground.{name}\n" in (PAGES / f"{name}.md").read_text()
    assert f"      - {name}: reference/{name}.md\n" in (ROOT / "mkdocs.yml").read_text(), "not in the navigation"
    assert f"| [`{name}`]({name}.md) | " in (PAGES / "index.md").read_text(), "not in the table of names"


def test_a_page_has_a_public_name():
    assert {page.stem for page in PAGES.glob("*.md")} == {*visual_ground.__all__, "index"}


@pytest.mark.parametrize("name", visual_ground.__all__)
def test_no_module_has_a_public_name(name):
    """Importing such a module would put it in the place of what `visual_ground.NAME` is meant to be."""
    assert find_spec(f"visual_ground.{name}") is None
