"""Messages as transformers, OpenAI, Anthropic, gradio and agents write them; what is typed an image is opened."""

import base64
import io
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import grounded, picture
from visual_ground.errors import GroundingError, GroundingTypeError, GroundingValueError
from visual_ground.prompts.chat import chat_message, typed_message
from visual_ground.prompts.parts import read_content, read_part
from visual_ground.prompts.types import ImagePart, is_image_string
from visual_ground.training.data.prompts import SplitPrompt
from visual_ground.vision.formats import IMAGE_SUFFIXES, OTHER_SUFFIXES
from visual_ground.vision.images import to_rgb

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
PICTURE = picture(1)
MODEL = grounded()
MODEL.tokenizer.chat_template = TEMPLATE


def png(image=PICTURE):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


BASE64 = base64.b64encode(png()).decode()
URL = f"data:image/png;base64,{BASE64}"
IMAGES = {
    "transformers": {"type": "image", "image": PICTURE},
    "transformers url": {"type": "image", "url": URL},
    "transformers base64": {"type": "image", "base64": BASE64},
    "openai": {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
    "openai as a string": {"type": "image_url", "image_url": URL},
    "openai responses": {"type": "input_image", "image_url": URL},
    "anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
    "mcp": {"type": "image", "data": BASE64, "mimeType": "image/png"},
    "gradio 6": {"type": "file", "file": {"path": URL, "mime_type": "image/png"}},
    "gradio file": {"path": URL, "alt_text": "w4"},
    "gradio component": {"component": "image", "value": URL},
    "datasets": {"bytes": png(), "path": "x.png"},
    "bytes": png(),
    "a file": io.BytesIO(png()),
    "raw base64": {"type": "image", "image": BASE64},
}


@pytest.mark.parametrize("part", IMAGES.values(), ids=IMAGES)
def test_every_way_to_write_an_image_is_that_image(part):
    for read in (read_part(part), read_content([part])):
        assert to_rgb(read[0].image).tobytes() == PICTURE.tobytes() and len(read) == 1


def test_every_way_to_write_a_text_is_that_text():
    texts = [{"type": kind, "text": "w4.png"} for kind in ("text", "input_text", "output_text")]
    texts += [
        {"type": "text", "text": {"value": "w4.png", "annotations": []}},
        {"type": "refusal", "refusal": "w4.png"},
    ]
    assert read_content(texts) == ["w4.png"] * 5
    assert read_content("w4.png") == ["w4.png"] and read_content(["w4", "w5"]) == ["w4", "w5"]
    assert read_content(None) == []
    assert read_content(("cat.png",)) == [ImagePart("cat.png")]
    assert read_content({"text": "w4", "files": [{"path": "cat.png"}]}) == [ImagePart("cat.png"), "w4"]


@pytest.mark.parametrize("kind", ["video", "audio", "input_audio", "video_url", "tool_use", "tool_result", "thinking"])
def test_other_parts_are_named(kind):
    with pytest.raises(GroundingTypeError, match=rf"content\[1\] of a message of 'user'.*{kind}"):
        read_content([{"type": "text", "text": "w4"}, {"type": kind, kind: "x"}], "user")


@pytest.mark.parametrize("bad", [{"type": "image"}, {"type": "image_url", "image_url": {}}, {"type": "text"}, 3, {}])
def test_parts_without_what_their_type_says_are_errors(bad):
    with pytest.raises(GroundingError):
        read_content([bad])
    with pytest.raises(GroundingTypeError, match="video/mp4"):
        read_content([{"type": "file", "file": {"path": "a.mp4", "mime_type": "video/mp4"}}])


class Role(Enum):
    USER = "user"


@dataclass
class Message:
    role: Any
    content: Any


def test_a_whole_chat_of_objects_and_tool_calls_is_read():
    model = grounded()
    model.tokenizer.chat_template = TEMPLATE
    mixed = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w4", "arguments": {}}}]},
        {"role": "tool", "content": "w5", "tool_call_id": "1"},
        Message(Role.USER, [IMAGES["openai"], {"type": "input_text", "text": " w6"}]),
    ]
    batch = model.prepare(mixed)
    assert len(batch["pixel_values"]) == 1 and 6 in batch["input_ids"]
    assert model.prepare({"role": "user", "content": "w4"})["input_ids"].shape[0] == 1
    with pytest.raises(GroundingTypeError, match="'user' has no content"):
        model.prepare([{"role": "user", "content": None}])


# What a bare list holds.


@pytest.mark.parametrize("suffix", ["avif", "jfif", "png", ""])
def test_a_typed_image_is_opened_or_raises_and_is_never_words(suffix):
    model = grounded()
    model.tokenizer.chat_template = TEMPLATE
    for key in ("image", "url", "path"):
        for value in (f"missing.{suffix}", "~/missing", "file:///missing", "data:image/png;base64,", "ftp://a.org/x"):
            with pytest.raises(GroundingValueError):
                model.prepare([{"role": "user", "content": [{"type": "image", key: value}]}])
        with pytest.raises(GroundingValueError, match=r"LinkRules\(hosts="):
            model.prepare([{"role": "user", "content": [{"type": "image", key: "https://a.org/x"}]}])


def test_a_bare_string_is_an_image_by_its_content_and_a_path_is_never_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("upload", "cat.avif", "my cat.jfif"):
        PICTURE.save(name, format="AVIF" if "avif" in name else "PNG")
    (tmp_path / "notes").write_text("no image")
    (tmp_path / "broken.png").write_text("no image")
    model = grounded()
    for path in ("upload", "cat.avif", "my cat.jfif", "~/upload", (tmp_path / "upload").as_uri(), URL):
        assert len(model.prepare([["w4", path]])["pixel_values"]) == 1
    for words in ("notes", "w4 cat.png", "https://example.org", "w4\ncat.png", "\0", "a" * 5000):
        assert not is_image_string(words)
    for path in ("missing.png", "./my missing.png", "broken.png", "cat.heic", "https://a.org/x.png?a=b"):
        with pytest.raises(GroundingValueError, match='"type": "text"'):
            model.prepare([["w4", path]])
    assert "pixel_values" not in model.prepare([["w4", {"type": "text", "text": "missing.png"}]])


@pytest.mark.parametrize("form", ["path", "URL", "data", "bytes", "image"])
def test_an_image_of_any_form_stays_one_in_a_chat_message(form, tmp_path):
    PICTURE.save(path := tmp_path / "x.png")
    part = {"path": str(path), "URL": path.as_uri(), "data": URL, "bytes": path.read_bytes(), "image": PICTURE}[form]
    message = chat_message("user", ["w4", part, "w5"])
    assert [one["type"] for one in message["content"]] == ["text", "image", "text"]
    assert to_rgb(message["content"][1]["image"]).tobytes() == PICTURE.tobytes()
    assert [one["type"] for one in typed_message("user", [str(path), PICTURE])["content"]] == ["text", "image"]


def test_a_chats_words_are_never_a_path(tmp_path):
    PICTURE.save(tmp_path / "x.png")
    model = grounded()
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for content in (str(tmp_path / "x.png"), [{"type": "text", "text": str(tmp_path / "x.png")}]):
        assert "pixel_values" not in model.prepare([{"role": "user", "content": content}])


def test_every_ending_that_pillow_opens_is_an_image_s():
    Image.init()
    opened = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    assert opened <= IMAGE_SUFFIXES | OTHER_SUFFIXES
    for ending in opened:
        assert is_image_string(f"missing{ending.upper()}")


@given(st.sampled_from(["", " ", "\n", "\t\r\n"]), st.sampled_from(["", " ", "\n", "\r\n"]), st.sampled_from(range(5)))
def test_white_space_around_an_address_makes_no_words_of_it(tmp_path_factory, before, after, kind):
    folder = tmp_path_factory.mktemp("images")
    PICTURE.save(folder / "cat.png")
    data = base64.b64encode((folder / "cat.png").read_bytes()).decode()
    path = str(folder / "cat.png")
    ways = [path, f"file:{path}", f"data:application/octet-stream;base64,{data}", f"DATA:;base64,{data}", data]
    parts = [to_rgb(part.image) for part in read_part(before + ways[kind] + after)]
    assert [part.tobytes() for part in parts] == [PICTURE.convert("RGB").tobytes()]


BOTH = [("text", {"type": "text", "text": "w4"}), ("image", {"type": "image", "image": PICTURE})]


@pytest.mark.parametrize("kind, part", BOTH)
def test_a_part_of_one_type_loses_nothing_of_the_other(kind, part):
    other, value = ("text", "w5") if kind == "image" else ("image", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(GroundingTypeError, match="would be lost"):
        read_content([{**part, other: value}])
    # Tables of parts fill up with these.
    assert read_content([{**part, other: None}]) == read_content([{**part, other: ""}]) == read_content([part])
    assert read_content([{"text": "w4", "image": PICTURE}]) == [ImagePart(PICTURE), "w4"]


@pytest.mark.parametrize("key", ["image", "image_url", "files", "attachments", "audio", "video", "videos"])
def test_images_beside_a_message_s_content_are_read_or_named(key):
    model = grounded()
    model.tokenizer.chat_template = TEMPLATE
    with pytest.raises(GroundingTypeError, match=rf"\['{key}'\], which would not be read"):
        model.prepare([{"role": "user", "content": "w4", key: [PICTURE]}])
    for message in (
        {"role": "user", "content": ["w4", PICTURE], "images": PICTURE},
        {"role": "user", "content": "w4", "images": [PICTURE, PICTURE]},
        {
            "role": "user",
            "parts": [{"text": "w4"}, {"inline_data": {"mime_type": "image/png", "data": BASE64}}, PICTURE],
        },
        {"role": "user", "content": None, "images": [BASE64, PICTURE]},
    ):
        assert len(model.prepare([message])["pixel_values"]) == 2
        assert len(SplitPrompt.of([message], lambda image: image).images) == 2
    with pytest.raises(GroundingTypeError, match="has no content"):
        model.prepare([{"role": "user", "name": "w4"}])
    for role in (None, 3, ["user"]):
        with pytest.raises(GroundingTypeError, match="role of a message is a text"):
            model.prepare([{"role": role, "content": "w4"}])


class Part:
    """A part as clients' libraries have it."""

    def __init__(self, **values):
        self.__dict__.update(values)


def test_parts_that_are_objects_are_read_as_mappings_are():
    for image in (URL, Part(url=URL, detail="low")):
        parts = read_content(
            [Part(type="output_text", text="w4", annotations=[]), Part(type="image_url", image_url=image)]
        )
        assert parts[0] == "w4" and to_rgb(parts[1].image).tobytes() == PICTURE.tobytes()
    with pytest.raises(GroundingTypeError, match="'audio'"):
        read_content([Part(type="audio", data="x")])


def test_what_is_not_an_image_by_its_kind_or_holds_itself_is_one_error():
    for kind in ("mime_type", "media_type", "mimeType", "mediaType"):
        with pytest.raises(GroundingTypeError, match="application/pdf"):
            read_content([{"type": "file", "url": URL, kind: "application/pdf"}])
    circle = {"type": "image"}
    circle["image"] = circle
    with pytest.raises(GroundingValueError, match="holds no image"):
        read_content([circle])


@given(st.text(st.characters(), max_size=9))
def test_any_text_is_read_or_named_as_half_a_character(text):
    text = f"w4 {text}"
    for read in (
        lambda: MODEL.prepare([[{"type": "text", "text": text}, PICTURE]]),
        lambda: MODEL.prepare([{"role": "user", "content": text}]),
        lambda: MODEL.embed_text([text]),
        lambda: MODEL.log_likelihood(["w5"], [text]),
    ):
        try:
            text.encode()
        except UnicodeEncodeError:
            with pytest.raises(GroundingValueError, match="half a character"):
                read()
        else:
            read()
