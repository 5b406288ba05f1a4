"""What strangers send to the running server: each is refused in OpenAI's form, and the next request is answered."""

import base64
import http.client
import io
import json
import socket
import time
import urllib.error

import openai
import pytest
import torch

from tests.server.test_server import SHOWS, Running, as_png, chat_body, with_image
from tests.tiny import picture
from visual_ground.server import chats
from visual_ground.server.engine import EngineLimits
from visual_ground.server.http import ServerSettings
from visual_ground.server.pictures import Pictures
from visual_ground.server.requests import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    settings = ServerSettings(max_bytes=500_000, body_seconds=3.0, limits=EngineLimits(max_waiting=8))
    server = Running(tmp_path_factory.mktemp("server"), settings)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def is_up_afterwards(running):
    yield
    assert running.ask(max_tokens=1).choices


def connect(running):
    connection = socket.create_connection(running.server.servers[0].sockets[0].getsockname())
    connection.settimeout(30)
    return connection


def answer_of(connection):
    """Return the status and the JSON that come over a connection."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_server_cannot_do_is_refused_by_name(running, name):
    status, message, _ = running.post(chat_body(**{name: [{"type": "function"}]}))
    assert status == 400 and message.startswith("This server cannot do what ") and name in message
    for harmless in (None, *REFUSED[name]):
        assert running.client.post("/chat/completions", body=json.loads(chat_body(**{name: harmless})), cast_to=object)


def test_calls_of_tools_in_messages_are_refused_by_name(running):
    for changes in ({"role": "tool", "content": "x"}, {"role": "assistant", "content": "x", "tool_calls": [{}]}):
        status, message, _ = running.post(chat_body(messages=[changes]))
        assert status == 400 and ("role" in message or "tool_calls" in message)


def test_openais_client_names_what_it_did_wrong(running):
    with pytest.raises(openai.BadRequestError, match="response_format") as refused:
        running.ask(response_format={"type": "json_object"})
    assert refused.value.code == "unsupported_parameter"
    assert running.ask(max_completion_tokens=2).usage.completion_tokens == 2


@torch.no_grad()
@pytest.mark.parametrize("form", ["float", "base64", None])
def test_embeddings_come_in_the_form_that_is_asked_for(running, form):
    options = {} if form is None else {"encoding_format": form}
    found = running.client.embeddings.create(model="visual-ground", input="w4 w5", dimensions=6, **options).data[0]
    vector = found.embedding
    if isinstance(vector, str):
        vector = torch.frombuffer(bytearray(base64.b64decode(vector)), dtype=torch.float32).tolist()
    assert torch.allclose(torch.tensor(vector), running.model.embed_text(["w4 w5"])[0].cpu(), atol=1e-5)


@pytest.mark.parametrize(
    "body, words",
    [
        ({"input": "w4", "dimensions": 3}, "dimensions"),
        ({"input": "w4", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "w4", "encoding_format": ["base64"]}, "encoding_format"),
        ({"input": [[1, 2, 3]]}, "must be a text"),
        ({"input": [1, 2, 3]}, "must be a text"),
        ({"input": ""}, "not empty"),
        ({"input": []}, "1 to 256"),
        ({"input": ["w4"] * 257}, "1 to 256"),
        ({"input": {"type": "image_url"}}, "image_url"),
        ({}, "must be a text"),
        ([], "JSON object"),
    ],
)
def test_bad_inputs_of_embeddings(running, body, words):
    status, message, _ = running.post(json.dumps(body).encode(), "/v1/embeddings")
    assert status == 400 and words in message


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"query": 3}', b'{"query": "w4", "n": 0}', b'{"query": ["w4"]}'])
def test_bad_searches(running, body):
    assert running.post(body, "/v1/images/search")[0] == 400


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_only_json_is_read_because_a_web_page_may_send_anything_else(running, kind):
    status, message, _ = running.post(chat_body(), **{"Content-Type": kind})
    assert status == 415 and "application/json" in message
    data = chat_body(padding="x" * 400_000)
    assert running.post(data, **{"Content-Type": kind})[0] == 415
    assert running.client.post("/chat/completions", body=json.loads(chat_body()), cast_to=object)


def chunked(data, size=65_536):
    pieces = (data[i : i + size] for i in range(0, len(data), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def test_a_body_in_chunks_is_read_up_to_its_limit(running):
    for data, status in ((chat_body(), 200), (b"x" * 5_000_000, 413)):
        with connect(running) as connection:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(data))
            got, answer = answer_of(connection)
            assert got == status and ("choices" in answer or "500000 bytes" in answer["error"]["message"])


def test_half_a_body_holds_up_nobody(running, caplog):
    with connect(running) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    with connect(running) as waiting:
        waiting.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert running.ask(max_tokens=1).choices
        status, answer = answer_of(waiting)
        assert status == 408 and "within 3 seconds" in answer["error"]["message"]
    for _ in range(100):
        if b'status="499"' in running.get("/metrics")[0]:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a client that left in the middle is not counted")
    assert "Traceback" not in caplog.text


def test_many_large_bodies_at_once_do_not_fill_the_memory(running):
    waiting = [connect(running) for _ in range(30)]
    try:
        for connection in waiting:
            connection.sendall(HEAD + b"Content-Length: 480000\r\n\r\n" + b"x" * 479_000)
        time.sleep(0.5)  # Until they have come, or most of them.
        for connection in waiting:
            connection.sendall(b"x" * 1000)
        statuses = {answer_of(connection)[0] for connection in waiting}
        assert 429 in statuses and statuses <= {400, 408, 429}
    finally:
        for connection in waiting:
            connection.close()


@pytest.mark.parametrize(
    "line", [b"GET /%00 HTTP/1.1", b"POST /images/dog HTTP/1.1", b"BREW /v1/models HTTP/1.1", b"nonsense"]
)
def test_strange_requests(running, line):
    with connect(running) as connection:
        connection.sendall(line + b"\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert 400 <= answer.status < 500


@pytest.mark.parametrize("folder", ["images", "thumbnails"])
@pytest.mark.parametrize(
    "name",
    ["..%2F..%2Fetc%2Fpasswd", "../../etc/passwd", "%2Fetc%2Fpasswd", "secret%20cat.png", "%00", "a" * 8000, "%ff%fe",
     "%ED%A0%80", "-1", "0", "1" * 400, "%F0%9F%90%B1", "..%5c..%5cetc", "dog%00.png", "dog/", "", "%2e%2e/dog"],
)  # fmt: skip
def test_only_ids_of_the_index_are_pictures(running, folder, name):
    with pytest.raises(urllib.error.HTTPError) as refused:
        running.get(f"/{folder}/{name}")
    with refused.value as error:
        body = error.read().decode()
    assert refused.value.code == 404 and json.loads(body)["error"] and "root:" not in body
    assert str(running.index.images[0]).rpartition("/")[0] not in body


def gif_bomb():
    """Return a GIF of a few bytes that claims 65,535 x 65,535 pixels."""
    return (
        b"GIF89a"
        + b"\xff\xff" * 2
        + b"\x80\x00\x00"
        + b"\x00" * 6
        + b"\x2c"
        + b"\x00" * 4
        + b"\xff\xff" * 2
        + b"\x00\x02\x00;"
    )


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:///etc/passwd"/></svg>'


@pytest.mark.parametrize(
    "address",
    [
        "data:image/svg+xml;utf8," + SVG.decode(),
        "data:image/svg+xml;base64," + base64.b64encode(SVG).decode(),
        as_png(SVG),
        as_png(b"\x89PNG\r\n\x1a\n" + SVG),
        as_png(b"GIF89a/*" + SVG + b"*/"),
        as_png(b"%PDF-1.4\n%\xff" + b"x" * 100),
        as_png(b"PK\x03\x04" + b"\x00" * 100),
        as_png(b"BM" + b"\xff" * 60),
        as_png(gif_bomb()),
        as_png(saved(picture(0), "TIFF")[:-20]),
        as_png(b""),
        "data:,",
        "data:image/png;base64",
        "data:image/png;base64;base64,",
        "",
        "//evil.example/x.png",
        "http://169.254.169.254/latest/meta-data",
        "HTTP://127.0.0.1:1/x.png",
        "ftp://127.0.0.1/x.png",
        "javascript:alert(1)",
        "/etc/passwd",
        "\\\\evil\\share\\x.png",
    ],
)
def test_no_address_and_no_file_of_a_stranger_is_more_than_a_picture(running, address):
    status, message, _ = running.post(with_image(address))
    assert status == 400 and "root:" not in message and "Traceback" not in message


def test_a_picture_with_a_page_behind_it_is_read_as_a_picture_alone(running):
    png = saved(picture(0), "PNG") + b"<script>alert(1)</script>"
    assert running.client.post("/chat/completions", body=json.loads(with_image(as_png(png))), cast_to=object)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "w" * 99_000}],
        [{"role": "user", "content": "w4"}] * 9000,
        [{"role": "user", "content": [{"type": "text", "text": "w"}] * 9000}],
    ],
)
def test_a_prompt_that_must_be_too_long_is_refused_before_its_tokens_are_counted(running, messages, monkeypatch):
    monkeypatch.setattr(chats, "CHARACTERS_PER_TOKEN", 4)
    with monkeypatch.context() as broken:
        broken.setattr(type(running.model.processor), "encode", None)
        status, message, _ = running.post(chat_body(messages=messages))
    assert status == 400 and "context" in message


def test_an_answer_that_names_thousands_of_pictures_is_not_looked_through(running, monkeypatch):
    sought = []
    monkeypatch.setattr(Pictures, "find", lambda self, name: sought.append(name))
    gone = {"role": "assistant", "content": "![x](/images/gone) " * 300}
    status, message, _ = running.post(chat_body(messages=[gone] * 60))
    assert status == 400 and "pictures" in message and len(sought) == 1024


@pytest.mark.parametrize("extra", [{"n": -1}, {"n": 9}, {"n": 1.5}, {"n": "2"}, {"n": True}, {"n": [1]}, {"n": 2**63}])
def test_another_number_of_answers_than_can_be_given(running, extra):
    status, message, _ = running.post(chat_body(**extra))
    assert status == 400 and message.startswith("n must be")


WORDS = ['"', "]", "(", "<img src=x onerror=alert(1)>", "\n\n# x", "![y](http://evil/y.png)", "\\", "`"]
WORDS += ["[z](javascript:a)"]


@pytest.mark.parametrize("word", WORDS)
def test_what_an_index_says_of_its_pictures_is_no_markup(tmp_path, word):
    markdown = pytest.importorskip("markdown_it")
    metadata = dict.fromkeys(("caption", "credit", "licence"), f"a {word} b") | {"source": f"https://a.b/{word}"}
    server = Running(tmp_path, names=[f"a {word}", "dog"], metadata=[metadata] * 2)
    try:
        message = server.ask(extra_body={**SHOWS, "images_per_ret": 2, "max_images": 2}).choices[0].message
    finally:
        server.stop()
    page = markdown.MarkdownIt("commonmark", {"html": True}).parse(message.content)
    inside = [one for block in page for one in block.children or ()]
    images = [one.attrs["src"] for one in inside if one.type == "image"]
    links = [one.attrs["href"] for one in inside if one.type == "link_open"]
    assert len(images) == 2 and all(address.startswith("/images/") for address in images)
    assert all(address.startswith("https://a.b/") for address in links)
    assert not [one.type for one in [*page, *inside] if one.type.startswith(("html", "heading", "code"))]
