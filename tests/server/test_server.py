"""The running server, asked by OpenAI's own client: answers, pictures, refusals, and nothing that leaks."""

import base64
import io
import json
import re
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import grounded, picture
from visual_ground import ImageIndex, RetrievedImage
from visual_ground.generation.growing import StopText, joined
from visual_ground.index.milvus.image_index import MilvusImageIndex
from visual_ground.index.remote_images import LinkRules
from visual_ground.server.engine import EngineLimits
from visual_ground.server.failures import RequestFailure
from visual_ground.server.http import ServerSettings, create_app
from visual_ground.server.pictures import Given, Pictures
from visual_ground.server.restoring import own_pictures
from visual_ground.server.sampling import RowSampling, Sampling

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
SHOWS = {"ret_bias": 1e3, "max_images": 1}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class Running:
    """A server on a free port of this machine."""

    def __init__(self, folder, settings=None, names=("a/../b c", "dog"), metadata=None, **model_options):
        picture(0).save(folder / "secret cat.png")
        self.model = grounded("llama_untied", **model_options)
        self.model.tokenizer.chat_template = TEMPLATE
        metadata = metadata or [{"caption": "<b>](x)", "source": "/home/me/secret", "author": "Jane"}, {}]
        images = [str(folder / "secret cat.png"), picture(1)]
        self.index = ImageIndex.build(self.model, images, list(names), metadata)
        app = create_app(self.model, self.index, settings)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0)

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()

    def ask(self, text="w4 w5", **options):
        messages = options.pop("messages", [{"role": "user", "content": text}])
        options = {"temperature": 0, "max_tokens": 6, **options}
        return self.client.chat.completions.create(model="visual-ground", messages=messages, **options)

    def get(self, path):
        with urllib.request.urlopen(self.url + path) as answer:
            return answer.read(), answer.headers

    def post(self, data, path="/v1/chat/completions", **headers):
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        with refused.value as error:
            return error.code, json.loads(error.read())["error"]["message"], error.headers


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    server = Running(tmp_path_factory.mktemp("server"), ServerSettings(max_bytes=500_000))
    yield server
    server.stop()


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_an_answer_is_that_of_generate(running):
    answer = running.ask(max_tokens=5)
    expected = running.model.generate([{"role": "user", "content": "w4 w5"}], max_new_tokens=5, do_sample=False)[0]
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason in ("length", "stop")


def test_a_streamed_answer_is_the_whole_one(running):
    whole = running.ask(extra_body=SHOWS)
    chunks = list(running.ask(extra_body=SHOWS, stream=True, stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content and "![" in said
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_an_answer_ends_at_a_sentence_where_that_is_asked_for(running):
    options = dict(max_new_tokens=5, do_sample=False, complete_sentences=True)
    expected = running.model.generate([{"role": "user", "content": "w4 w5"}], **options)[0]
    given = dict(max_tokens=5, extra_body={"complete_sentences": True})
    assert running.ask(**given).choices[0].message.content == expected.text
    said = "".join(c.choices[0].delta.content or "" for c in running.ask(stream=True, **given) if c.choices)
    assert said == expected.text and said.endswith("\u2026")


def test_pictures_have_addresses_and_no_paths(running):
    message = running.ask(extra_body={**SHOWS, "images_per_ret": 2, "max_images": 2}).choices[0].message
    shown = {part["id"]: part for part in message.parts if part["type"] == "image"}
    assert set(shown) == {"a/../b c", "dog"} and "secret" not in json.dumps(message.model_dump())
    assert "<" not in message.content.replace("\\<", "") and "Jane" in message.content
    for part in shown.values():
        data, headers = running.get(part["uri"])
        assert data.startswith(b"\x89PNG") and headers["X-Content-Type-Options"] == "nosniff"
        assert running.get(part["thumbnail"])[0].startswith(b"\x89PNG")


def test_pictures_of_both_sides_are_seen_in_the_next_turn(running):
    url = data_url(picture(3))
    question = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "w4"}],
    }
    message = running.ask(messages=[question], extra_body=SHOWS).choices[0].message
    answer = {"role": "assistant", "content": message.content}
    follow = running.ask(messages=[question, answer, {"role": "user", "content": "w5"}])
    k = running.model.config.num_visual_tokens
    one = running.ask(messages=[question]).usage.prompt_tokens
    assert follow.usage.prompt_tokens >= one + k
    assert len(running.model.active.recent_features) >= 2


def test_answers_that_see_their_pictures_are_those_of_generate_beside_others_that_do_not(running):
    shows = {"ret_bias": 1e3, "max_images": 2, "min_new_tokens_before_ret": 1, "min_new_tokens_between_rets": 2}
    texts = [f"w{i} w{i + 1}" for i in range(4, 12)]

    def ask(text):
        return running.ask(text, max_tokens=7, extra_body={**shows, "see_images": text[1] != "4"}).choices[0].message

    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(ask, texts))
    for text, message in zip(texts, together, strict=True):
        options = {**shows, "see_images": text[1] != "4", "do_sample": False}
        chat = [{"role": "user", "content": text}]
        expected = running.model.generate(chat, running.index, max_new_tokens=7, **options)[0]
        assert [p.get("id", p.get("text")) for p in message.parts] == [getattr(p, "id", p) for p in expected.parts]


def test_sampling_is_by_seed_and_choice(running):
    options = dict(temperature=1.0, seed=3, n=3, max_tokens=8)
    said = [[choice.message.content for choice in running.ask(**options).choices] for _ in range(2)]
    assert said[0] == said[1] and len(set(said[0])) > 1


def test_answers_in_a_batch_are_those_that_come_alone(running):
    texts = [f"w{i} " * (1 + i % 5) for i in range(4, 24)]
    alone = [running.ask(text, extra_body=SHOWS).choices[0].message.content for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(lambda text: running.ask(text, extra_body=SHOWS), texts))
    assert [answer.choices[0].message.content for answer in together] == alone
    numbers = dict(line.split() for line in running.get("/metrics")[0].decode().splitlines() if line[0] != "#")
    assert float(numbers["visual_ground_batched_answers_total"]) > float(numbers["visual_ground_batches_total"])


def test_sampled_answers_beside_others_with_pictures_are_those_that_come_alone(running):
    pictures = [{"type": "image_url", "image_url": {"url": data_url(picture(i))}} for i in range(3)]

    def ask(i):
        content = [{"type": "text", "text": f"w{4 + i}"}, *pictures[: i % 4]]
        options = dict(temperature=1.0, seed=i, top_p=(1.0, 0.9)[i % 2], max_tokens=10)
        return running.ask(messages=[{"role": "user", "content": content}], **options).choices[0].message.content

    alone = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone and len(set(alone)) == 8


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p):
    scores = torch.tensor([[0.4, 0.0, 0.1, 0.2, 0.3]]).log()
    drawn = torch.zeros(5)
    rows = RowSampling(9, 0, [Sampling(1.0, top_p, 0)])
    for _ in range(4000):
        drawn[rows(torch.zeros(1, 1, dtype=torch.long), scores).argmax()] += 1
    kept = {1.0: [4, 0, 1, 2, 3], 0.5: [4, 0, 0, 0, 3], 0.0: [1, 0, 0, 0, 0]}[top_p]
    assert torch.allclose(drawn / 4000, torch.tensor(kept) / sum(kept), atol=0.03)


def test_a_stop_string_ends_an_answer_before_it(running):
    whole = running.ask(max_tokens=6).choices[0].message.content
    stop = whole.split()[2]
    for stream in (False, True):
        got = running.ask(max_tokens=6, stop=[stop], stream=stream)
        text = "".join(c.choices[0].delta.content or "" for c in got) if stream else got.choices[0].message.content
        assert text == whole[: whole.index(stop)]


def test_a_stop_string_ends_an_answer_when_it_comes_though_its_sentence_is_held_back(running):
    given = dict(max_tokens=400, extra_body={"complete_sentences": True})  # No sentence ends among these words.
    whole = running.ask(max_tokens=400).choices[0].message.content
    stop = whole.split()[2]
    for stream in (False, True):
        more = {"stream_options": {"include_usage": True}} if stream else {}
        got = running.ask(stop=stop, stream=stream, **given, **more)
        chunks = list(got) if stream else []
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        text = text if stream else got.choices[0].message.content
        assert text == whole[: whole.index(stop)]
        assert (chunks[-1] if stream else got).usage.completion_tokens == 3, "nothing is generated behind it"
        assert (chunks[-2] if stream else got).choices[0].finish_reason == "stop"


@given(
    st.lists(st.sampled_from(["a", "b", ". ", "c. a", "ab", 0, 1]), max_size=30),
    st.lists(st.sampled_from(["a", "b", "ab", ". a", "c"]), max_size=2),
)
def test_what_a_stop_leaves_is_the_text_before_it_however_it_comes(pieces, stops):
    stop, whole = StopText(stops), joined(piece for piece in map(as_part, pieces))
    shown = joined(one for piece in map(as_part, pieces) for one in stop.cut(piece))
    shown = shown if stop.has_come else joined([*shown, *stop.flush()])
    expected = []
    for part in whole:
        places = [part.index(one) for one in stops if one in part] if isinstance(part, str) else []
        expected.append(part[: min(places)] if places else part)
        if places:
            break
    assert shown == joined(part for part in expected if part) and stop.has_come == (shown != whole)


def as_part(piece):
    return piece if isinstance(piece, str) else RetrievedImage(piece)


@torch.no_grad()
def test_embeddings_and_search(running):
    answer = running.client.embeddings.create(model="visual-ground", input=["w4 w5", "w6"])
    found = answer.data
    read = [len(running.model.processor.encode_queries([text])[0].ids) for text in ("w4 w5", "w6")]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(read) and read[0] == read[1] + 1
    assert torch.allclose(torch.tensor(found[0].embedding), running.model.embed_text(["w4 w5"])[0].cpu(), atol=1e-5)
    body = {"query": {"type": "image_url", "image_url": {"url": data_url(picture(1))}}, "n": 1}
    best = running.client.post("/images/search", body=body, cast_to=object)["data"]
    assert [one["id"] for one in best] == ["dog"] and best[0]["score"] == pytest.approx(1, abs=1e-3)
    assert [model.id for model in running.client.models.list()] == ["visual-ground"]
    assert running.client.models.retrieve("visual-ground").id == "visual-ground"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other/x'"):
        running.client.models.retrieve("other/x")
    assert json.loads(running.get("/health")[0])["status"] == "ok"


def png_of_claimed_size(width, height):
    """Return a PNG without pixels that claims to be so large."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def as_png(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chat_body(**changes):
    return json.dumps({"messages": [{"role": "user", "content": "w4"}], **changes}).encode()


SMALL = {"type": "image_url", "image_url": {"url": data_url(picture(0))}}


def with_image(url):
    return chat_body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


@pytest.mark.parametrize(
    "data, status, words",
    [
        (b"{", 400, "not valid JSON"),
        (b"[" * 100_000, 400, "not valid JSON"),
        (b"[]", 400, "JSON object"),
        (b"x" * 600_000, 413, "500000 bytes"),
        (b"x" * 20_000_000, 413, "500000 bytes"),
        (chat_body(model="gpt-5"), 404, "gpt-5"),
        (chat_body(n=0), 400, "n must be"),
        (chat_body(n=10**9), 400, "n must be"),
        (chat_body(temperature="hot"), 400, "temperature"),
        (chat_body(top_p=float("nan")), 400, "top_p"),
        (chat_body(max_tokens=True), 400, "max_tokens"),
        (chat_body(max_completion_tokens=0), 400, "max_completion_tokens"),
        (chat_body(stream_options="usage"), 400, "stream_options"),
        (chat_body(stream_options={"include_usage": 3}), 400, "include_usage"),
        (chat_body(stop=[1]), 400, "stop"),
        (chat_body(stop="w4" * 10**5), 400, "1000 characters"),
        (chat_body(seed=10**400), 400, "seed must be"),
        (chat_body(temperature=10**400), 400, "temperature must be"),
        (chat_body(stream="yes"), 400, "stream must be true or false"),
        (chat_body(see_images=1), 400, "see_images must be true or false"),
        (chat_body(messages=[{"role": "user", "content": "w4 \ud800"}]), 400, "UTF-8"),
        (chat_body().decode().replace("w4", "\ud800").encode(errors="surrogatepass"), 400, "UTF-8"),
        (chat_body(messages=[{"role": "user", "content": [SMALL] * 129}]), 400, "128 pictures"),
        (chat_body(messages=[{"role": "assistant", "content": "![x](/images/dog) " * 129}]), 400, "128 pictures"),
        (chat_body(messages=[]), 400, "messages"),
        (chat_body(messages=[{"role": "tool", "content": "x"}]), 400, "role"),
        (chat_body(messages=["x"]), 400, "role"),
        (chat_body(messages=[{"role": "user", "content": 3}]), 400, "content"),
        (chat_body(messages=[{"role": "user", "content": [{"type": "video"}]}]), 400, "image_url"),
        (with_image("http://127.0.0.1/x.png"), 400, "fetches no images"),
        (with_image("file:///etc/passwd"), 400, "fetches no images"),
        (with_image("data:image/png;base64,????"), 400, "base64"),
        (with_image("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()), 400, "cannot be read"),
        (with_image(data_url(picture(0))[:62]), 400, "The "),
        (with_image(as_png(png_of_claimed_size(8_000, 8_000))), 400, "pixels"),
        (with_image(as_png(png_of_claimed_size(60_000, 60_000))), 400, "cannot be read"),
        (with_image(as_png(b"<html><script>alert(1)</script>")), 400, "cannot be read"),
        (chat_body(messages=[{"role": "user", "content": "w4 " * 3000}]), 400, "context"),
    ],
)
def test_bad_requests_are_refused_in_openais_form(running, data, status, words):
    got, message, _ = running.post(data)
    assert got == status and words in message
    assert running.ask(max_tokens=1).choices


def test_a_path_in_a_text_opens_no_file(running):
    secret = str(running.index.images[0])
    between = [{"type": "image_url", "image_url": {"url": data_url(picture(0))}}, {"type": "text", "text": secret}]
    before = len(running.model.active.recent_features)
    running.ask(messages=[{"role": "user", "content": secret}])
    running.ask(messages=[{"role": "user", "content": [*between, between[0]]}])
    assert len(running.model.active.recent_features) <= before + 1, "only the picture of the request is encoded"


def test_pictures_that_are_not_there(running):
    for path in ("/images/none", "/thumbnails/none", "/images/..%2F..%2Fetc%2Fpasswd", "/nothing"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            running.get(path)


def test_a_key_and_signed_pictures(tmp_path):
    server = Running(tmp_path, ServerSettings(api_key="key"))
    try:
        part = server.ask(extra_body=SHOWS).choices[0].message.parts[-1]
        parts = [p for p in server.ask(extra_body=SHOWS).choices[0].message.parts if p["type"] == "image"]
        assert part and server.get(parts[0]["uri"])[0]
        assert server.post(chat_body())[0] == 401
        assert server.post(chat_body(), Authorization="Bearer no")[0] == 401
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.get(parts[0]["uri"].split("?")[0])
        assert server.get("/health")
    finally:
        server.stop()


def test_a_server_says_how_many_pictures_an_answer_has_and_a_request_may_say_otherwise(tmp_path):
    server = Running(tmp_path, ServerSettings(max_images=0))
    try:
        counts = [
            sum(part["type"] != "text" for part in server.ask(extra_body=body).choices[0].message.parts)
            for body in ({"ret_bias": 1e3}, {"ret_bias": 1e3, "max_images": 1})
        ]
        assert counts == [0, 1]
    finally:
        server.stop()


def test_a_full_queue_says_when_to_come_back_and_leaving_frees_it(tmp_path):
    limits = EngineLimits(max_batch=1, max_waiting=2)
    server = Running(tmp_path, ServerSettings(limits=limits))
    try:
        server.model.lm.generation_config.eos_token_id = None
        endless = [server.ask(max_tokens=2000, stream=True) for _ in range(3)]
        for stream in endless:
            next(iter(stream))
        status, message, headers = server.post(chat_body())
        assert status == 429 and headers["Retry-After"] == "1" and "waiting" in message
        for stream in endless:
            stream.close()
        for _ in range(200):
            try:
                assert server.ask(max_tokens=2).usage.completion_tokens == 2
                break
            except openai.RateLimitError:
                time.sleep(0.05)
        else:
            raise AssertionError("the queue was not freed")
    finally:
        server.stop()


def send(server, **changes):
    """Send a request through a bare connection, which is returned; the answer is not read."""
    body = chat_body(**{"temperature": 0, "max_tokens": 1900, **changes})
    connection = socket.create_connection(server.server.servers[0].sockets[0].getsockname())
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    return connection


def test_clients_that_leave_or_do_not_read_hold_up_nobody(tmp_path):
    server = Running(tmp_path, ServerSettings(limits=EngineLimits(max_batch=2)))
    try:
        server.model.lm.generation_config.eos_token_id = None
        with send(server, stream=True) as slow:
            assert slow.recv(4).startswith(b"HTTP")
            send(server).close()
            assert server.ask(max_tokens=2).usage.completion_tokens == 2
            for _ in range(300):
                if b'status="499"} 1' in server.get("/metrics")[0]:
                    break
                time.sleep(0.1)
            else:
                raise AssertionError("the answer was not ended")
    finally:
        server.stop()


def test_an_answer_that_takes_too_long_ends(tmp_path):
    server = Running(tmp_path, ServerSettings(limits=EngineLimits(timeout=0.2)))
    try:
        server.model.lm.generation_config.eos_token_id = None
        with pytest.raises(openai.APIStatusError) as late:
            server.ask(max_tokens=2000)
        assert late.value.status_code == 504
    finally:
        server.stop()


def test_large_pictures_are_made_smaller_and_many_of_them_are_refused_before_they_are_decoded():
    request = Given(LinkRules())
    one = Image.new("RGB", (7000, 5000))
    assert [request.read(data_url(one)).size for _ in range(4)] == [(1024, 731)] * 4
    with pytest.raises(RequestFailure, match="at most 20000000 are read, as all of a request"):
        request.read({"url": as_png(png_of_claimed_size(7000, 5000))})
    own = picture(0).resize((2000, 10))
    assert Given(LinkRules()).open(own).width == 1024 and own.width == 2000


def test_an_answer_without_words_goes_back_in(running):
    for answer in ("", "  ", "w6 ![gone](/images/none)"):
        messages = [{"role": role, "content": text} for role, text in (("user", "w4"), ("assistant", answer))]
        assert running.ask(messages=[*messages, {"role": "user", "content": "w5"}]).choices


def test_pictures_that_have_gone_stay_text(tmp_path):
    picture(0).save(tmp_path / "a.png")
    pictures = Pictures(ImageIndex(torch.eye(2), ["a", "b"], [str(tmp_path / "a.png"), picture(1)]))
    shown = "See ![a](/images/a) and ![b](x/images/b?signature=1)."
    assert [type(part) for part in pictures.restore(shown, Given(LinkRules()))] == [str, Image.Image] * 2 + [str]
    (tmp_path / "a.png").unlink()
    texts = [part for part in pictures.restore(shown, Given(LinkRules())) if isinstance(part, str)]
    assert texts == ["See ![a](/images/a) and ", "."]


PIECES = ["![", "](", "]", ")", "\\", '"', " ", "a", "/images/", "/images/a", "?"]


@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_pictures_are_found_where_a_slow_pattern_finds_them(pieces):
    text = "".join(pieces)
    slow = r'!\[((?:\\.|[^\]\\])*)\]\([^()\s?]*/images/([^()\s?/]+)(?:\?[^()\s]*)?(?: "(?:\\.|[^"\\])*")?\)'
    expected = [(one.start(), one.end(), one[2]) for one in re.finditer(slow, text)]
    assert [one for one in own_pictures(text) if one in expected] == expected


def test_a_stranger_cannot_make_the_search_for_pictures_slow():
    for text in ("![" * 10**6, "![](" + "/images/" * 10**5, '![](x "' * 10**5, "![\\" * 10**5):
        assert not list(own_pictures(text)), "a pattern that reads on to the end from each place takes hours here"
    stop = StopText(["w" * 10**6])
    assert stop.cut("w" * 10) == [] and stop.cut("x") == ["w" * 10 + "x"] and not stop.has_come


def test_what_nobody_thought_of_is_answered_in_openais_form_too(running, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Pictures, "find", lambda self, name: 1 / 0)
        with pytest.raises(urllib.error.HTTPError, match="500") as failed:
            running.get("/images/dog")
    assert "log" in json.loads(failed.value.read())["error"]["message"]
    assert running.get("/images/dog")


def test_pictures_only_after_sentences(running):
    given = {**SHOWS, "only_after_sentences": True}
    chat = [{"role": "user", "content": "w4 w5"}]
    expected = running.model.generate(chat, running.index, **given, max_new_tokens=6, do_sample=False)[0]
    message = running.ask(extra_body=given).choices[0].message
    assert "![" not in message.content and message.content == expected.text, "no sentence ends among these words"


def test_pictures_of_one_answer_may_repeat_where_that_is_asked_for(running):
    several = {"ret_bias": 1e3, "min_new_tokens_between_rets": 0, "max_images": 3, "allow_repeats": True}
    shown = running.ask(max_tokens=3, extra_body=several).choices[0].message.parts
    assert len(shown) == 3 and len({part["id"] for part in shown}) < 3


def test_a_batch_that_fails_leaves_the_server_up(running, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(running.model.frozen_lm, "generate", None)
        with pytest.raises(openai.InternalServerError, match="log"):
            running.ask()
    assert running.ask().choices


def test_pictures_of_an_index_in_milvus_are_found_by_their_ids(tmp_path):
    index = MilvusImageIndex.create(tmp_path / "images.db", 2)
    index.add(torch.eye(2), ["a", 7], [picture(0), None])
    pictures = Pictures(index)
    assert pictures.find("a").size == picture(0).size
    assert pictures.find("7") is None and pictures.find("none") is None and pictures.find("9" * 30) is None


def test_a_picture_is_found_by_its_id_after_others_were_removed_and_added():
    index = ImageIndex(torch.eye(4), ["a", "b", 7, "c"], [picture(i) for i in range(4)])
    pictures = Pictures(index)
    index.remove(["a", "b"])
    index.add(torch.eye(4)[:1], ["new"], [picture(5)])
    assert pictures.find("a") is None
    for name, number in (("7", 2), ("c", 3), ("new", 5)):
        assert pictures.find(name).tobytes() == picture(number).tobytes()
