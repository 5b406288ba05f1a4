from PIL import Image

from visual_ground.generation.output import InterleavedOutput, RetrievedImage


def test_an_answer_as_text_html_and_page(tmp_path):
    shown = RetrievedImage("x<y", 0.5, Image.new("RGBA", (300, 10)))
    answer = InterleavedOutput(("Look & see.", shown, " More.", RetrievedImage()))
    assert str(answer) == "Look & see. [image x<y] More. [image]"
    assert answer.text == "Look & see. More." and answer.images[0] is shown
    answer.save(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "Look &amp; see." in page and "x&lt;y (0.50)" in page and "data:image/png;base64," in page
