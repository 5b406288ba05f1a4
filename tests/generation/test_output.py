import pytest
from PIL import Image

from visual_ground.adapter.report import Report
from visual_ground.generation.gallery import with_samples
from visual_ground.generation.output import InterleavedOutput, RetrievedImage


def test_an_answer_as_text_html_and_page(tmp_path):
    shown = RetrievedImage("x<y", 0.5, Image.new("RGBA", (300, 10)))
    answer = InterleavedOutput(("Look & see.", shown, " More.", RetrievedImage()))
    assert str(answer) == "Look & see. [image x<y] More. [image]"
    assert answer.text == "Look & see. More." and answer.images[0] is shown
    answer.save(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "Look &amp; see." in page and "x&lt;y (0.50)" in page and "data:image/png;base64," in page


@pytest.mark.parametrize("content", [None, b"", b"no image", "a folder"])
def test_a_picture_that_is_gone_or_damaged_leaves_the_rest_of_the_answer(tmp_path, content):
    path = tmp_path / "cat & dog.png"
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    good = RetrievedImage("good", 0.4, Image.new("RGB", (8, 8)))
    answer = InterleavedOutput(("Look.", RetrievedImage("cat", 0.5, str(path)), good))
    answer.save(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    only, both = (
        with_samples(Report(), ["a"], [InterleavedOutput(parts)]).picture for parts in ((good,), answer.parts)
    )
    assert both == only and with_samples(Report(), ["a"], [InterleavedOutput(answer.parts[:2])]).picture is None
    assert "Look." in page and "cat (0.50): the picture cannot be opened" in page and page.count("<img") == 1
