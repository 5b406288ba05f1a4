"""Answers as Markdown, JSON and chat messages: nothing is lost, and nothing from a stranger is more than text."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visual_ground.generation.output import InterleavedOutput, RetrievedImage
from visual_ground.index.remote_images import ImageLink

HOSTILE = [
    "<script>x</script>",
    "](javascript:x)",
    "![x](http://evil/x.png)",
    '" onload="x',
    "`]`",
    "[a]: data:x",
    "&lt",
]
CREDIT = {"Title": "A cat", "license": "CC BY 4.0", "author": "Jane [Doe]", "source": "https://a.b/c d"}
texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=6))).map("".join)


def test_markdown_has_the_picture_with_its_credit():
    answer = InterleavedOutput(("See:", RetrievedImage(3, 0.5, "my cat.png", CREDIT), "Nice."))
    assert answer.to_markdown() == (
        'See:\n\n![A cat](my%20cat.png "0\\.50")  \n*Jane \\[Doe\\], CC BY 4\\.0, [source](https://a.b/c%20d)*\n\nNice.'
    )
    assert "(/images/3 " in answer.to_markdown(lambda image: f"/images/{image.id}")
    assert "Jane [Doe], CC BY 4.0" in InterleavedOutput((RetrievedImage(3, metadata=CREDIT),))._repr_html_()


def test_a_picture_without_a_path_is_in_the_markdown_itself():
    answer = InterleavedOutput((RetrievedImage("a", 0.5, Image.new("RGB", (4, 4))), RetrievedImage()))
    assert re.fullmatch(r'!\[a\]\(data:image/png;base64,[\w+/=]+ "0\\\.50"\)\n\n\\\[image\\\]', answer.to_markdown())


@given(texts, texts, texts, texts)
def test_nothing_from_a_stranger_becomes_markup(said, name, address, source):
    metadata = {"caption": name, "source": source, "credit": name}
    page = InterleavedOutput((said, RetrievedImage(name, 0.1, ImageLink(address), metadata))).to_markdown()
    unescaped = re.sub(r"\\.", "", page)
    assert len(re.findall(r"!\[", unescaped)) <= 1, "an image that no index returned"
    assert "<" not in unescaped
    assert not re.search(r"\]\((?!https?://)(?!data:image/png)\s*[a-z]+:", unescaped, re.I)


@given(texts, st.sampled_from([None, "javascript:x", "data:text/html,x", "file:///etc/passwd", "x.png"]))
def test_html_has_no_tags_from_a_stranger(text, address):
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    link = None if address is None else ImageLink(address)
    shown = RetrievedImage(text, 0.1, link, {"credit": text, "licence": text})
    parser.feed(InterleavedOutput((text, shown))._repr_html_())
    assert {tag for tag, _ in tags} <= {"div", "span", "figure", "figcaption", "br"}


def test_json_has_everything_and_nothing_that_is_unknown():
    answer = InterleavedOutput(("é", RetrievedImage("a", 0.5, "a.png", CREDIT), RetrievedImage()))
    image = {"id": "a", "score": 0.5, "uri": "a.png", "caption": "A cat", "source": "https://a.b/c d"}
    image |= {"type": "image", "licence": "CC BY 4.0", "credit": "Jane [Doe]"}
    expected = {"text": "é", "parts": [{"type": "text", "text": "é"}, image, {"type": "image"}]}
    assert json.loads(answer.to_json()) == answer.to_dict() == expected


@pytest.mark.parametrize("image", [Image.new("RGB", (4, 4)), "cat.png"])
def test_messages_have_the_pictures_that_can_be_seen(image):
    answer = InterleavedOutput(("a", RetrievedImage("x", 0.1, image), RetrievedImage("y", 0.1, ImageLink("http://a"))))
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": image}]
    assert answer.to_messages() == [{"role": "assistant", "content": parts}]
