"""Generated pages: nobody's own words in them are ever lost."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from visual_ground.storage.readme import is_edited, render_page

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30)


@given(TEXT, TEXT)
@example("---\na: 1\n---\n", "<!-- visual_ground end -->")
@example("<!-- visual_ground generated {} -->\n", "")
def test_any_text_around_the_generated_one_survives(before, after):
    page = render_page({"a": 1}, "# Title")
    front, rest = page[: page.index("<!--")], page[page.index("<!--") :]
    edited = front + before + "\n" + rest + after
    once = render_page({"a": 2}, "# Other title", edited)
    assert before in once and once.endswith(rest[rest.index("\n<!-- visual_ground end") :] + after)
    assert render_page({"a": 2}, "# Other title", once) == once


@given(TEXT, st.integers(0, 40))
def test_any_edit_of_the_generated_text_survives(words, position):
    page = render_page({"a": 1}, "# Title\n\nsome text that is generated, not written")
    start = page.index("# Title") + position
    edited = page[:start] + words + page[start:]
    once = render_page({"a": 2}, "# Other title", edited)
    assert is_edited(edited) == bool(words)
    assert ("# Other title" in once) != bool(words) or "# Other title" in words
    assert words in once
    assert render_page({"a": 2}, "# Other title", once) == once


@pytest.mark.parametrize("text", ["", "Hello.", "---\na: 1\n---\nHello.", "---\na: [\n---\n", "---\n- a\n---\n"])
def test_pages_without_marks_are_people_s(text):
    assert is_edited(text)
    assert render_page({"a": 2}, "# Title", text) == text or not text


def test_metadata_keys_are_kept_one_by_one():
    page = render_page({"a": 1, "b": [1, 2], "c": "x"}, "# Title")
    assert not is_edited(page)
    edited = page.replace("a: 1\n", "a: 3\nd: new\n").replace("c: x\n", "")
    assert is_edited(edited)
    again = render_page({"a": 5, "b": [3], "c": "y", "e": 1}, "# Title", edited)
    assert again.startswith("---\na: 3\nb:\n- 3\ne: 1\nd: new\n---\n")
    assert render_page({"a": 5, "b": [3], "c": "y", "e": 1}, "# Title", again) == again
