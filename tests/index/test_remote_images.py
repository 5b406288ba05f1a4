"""Images that an index only speaks of: nothing is opened or fetched that the user did not allow."""

import io
import os
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.storage.hub_client import hub  # noqa: F401
from tests.tiny import grounded, picture
from visual_ground import GroundingError, ImageIndex, InterleavedOutput, RetrievedImage
from visual_ground.errors import GroundingFileError
from visual_ground.generation.retrieval_token import RetrievalSettings, retrieve
from visual_ground.index.files import FILES, TABLE_FILE
from visual_ground.index.remote_images import ImageLink, LinkRules
from visual_ground.vision.images import to_rgb


def png():
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def web():
    """Serve an image, and what is none: gone, slow, endless, elsewhere."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            requests.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                return self.end_headers()
            self.send_response(404 if self.path == "/gone" else 200)
            self.end_headers()
            with suppress(OSError):
                if self.path == "/endless":
                    while True:
                        self.wfile.write(b"x" * 65536)
                if self.path.startswith("/together"):
                    meeting.wait(20)
                if self.path == "/slow":
                    stop.wait(30)
                if self.path == "/drip":
                    while not stop.wait(0.05):
                        self.wfile.write(b"x")
                        self.wfile.flush()
                self.wfile.write(b"<html>" if self.path == "/page" else png())

    stop, meeting = threading.Event(), threading.Barrier(3)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_allowed_host_is_fetched_from_when_its_image_is_shown_and_only_then(tmp_path):
    with web() as (url, requests):
        ImageIndex(torch.eye(2), images=[f"{url}/a.png", f"{url}/b.png"]).save_pretrained(tmp_path)
        index = ImageIndex.from_pretrained(tmp_path, LinkRules(hosts=["127.0.0.1"]))
        index.search(torch.eye(2), 1)
        assert not requests
        assert index.entry(1)[1].tobytes() == picture(0).tobytes() and requests == ["/b.png"]
        for unasked in (ImageIndex.from_pretrained(tmp_path), ImageIndex(torch.eye(1), images=[f"{url}/a.png"])):
            assert unasked.entry(0)[1] == ImageLink(f"{url}/a.png")
        assert requests == ["/b.png"]


def test_what_cannot_be_fetched_is_named_and_shown_as_its_address(caplog):
    with web() as (url, requests):
        rules = LinkRules(hosts="127.0.0.1", timeout=0.5, max_bytes=100_000)
        other = "http://localhost:9/x.png"
        for path, words in [
            ("/gone", "404"),
            ("/page", "not an image"),
            ("/endless", "larger than 100000"),
            ("/slow", "timed out"),
            ("/drip", "longer than"),
            (f"/to/{other}", "not allowed"),
            ("/to/file:///etc/passwd", "not allowed"),
        ]:
            with pytest.raises(GroundingError, match=words):
                to_rgb(url + path, rules)
            index = ImageIndex(torch.eye(1), images=[url + path], rules=rules)
            assert index.entry(0)[1] == ImageLink(url + path)
        assert to_rgb(f"{url}/to/{url}/a.png", rules).size == (8, 8)
    assert "cannot be shown" in caplog.text


def test_an_image_that_is_gone_makes_room_for_the_next_best():
    with web() as (url, _):
        addresses = [f"{url}/gone", f"{url}/a.png", f"{url}/b.png"]
        index = ImageIndex(torch.eye(3), images=addresses, rules=LinkRules(hosts="127.0.0.1"))
        query = torch.tensor([[0.9, 0.4, 0.1]])
        for count, ids in ((1, [1]), (2, [1, 2]), (3, [1, 2, 0])):
            (images,) = retrieve(query, index, RetrievalSettings(images_per_ret=count))
            assert [image.id for image in images] == ids
        first, second = retrieve(query.repeat(2, 1), index, RetrievalSettings())
        assert [first[0].id, second[0].id] == [1, 2]
        unasked = ImageIndex(torch.eye(3), images=addresses)  # Links are what is wanted here.
        assert retrieve(query, unasked, RetrievalSettings())[0][0].id == 0


def test_a_local_image_that_is_gone_makes_room_for_the_next_best_too(tmp_path):
    model, paths = grounded(), [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    index = ImageIndex.build(model, list(map(str, paths)))
    options = dict(max_new_tokens=1, ret_bias=100.0)
    whole = model.generate("w4", index, images_per_ret=5, **options)[0].images
    os.remove(whole[0].image)
    left = model.generate("w4", index, images_per_ret=2, **options)[0].images
    assert [one.image for one in left] == [one.image for one in whole[1:3]]
    for path in paths:
        path.unlink(missing_ok=True)
    lost = model.generate("w4", index, images_per_ret=2, **options)[0].images
    assert [one.image for one in lost] == [one.image for one in whole[:2]]


def test_images_of_an_answer_are_fetched_side_by_side():
    with web() as (url, requests):
        addresses = [f"{url}/together/{i}" for i in range(3)]
        index = ImageIndex(torch.eye(3), images=addresses, rules=LinkRules(hosts="127.0.0.1"))
        query = torch.tensor([[0.9, 0.4, 0.1]])
        images = retrieve(query, index, RetrievalSettings(images_per_ret=3))[0]  # Each waits for the two others.
        assert [image.image.size for image in images] == [(8, 8)] * 3
        for queries in (query.repeat(3, 1), torch.eye(3)):
            answers = retrieve(queries, index, RetrievalSettings())
            assert [(one.id, one.image.size) for (one,) in answers] == [(i, (8, 8)) for i in range(3)]
        assert len(requests) == 9
        # Of one that is gone, only as many others are fetched as are missing.
        addresses = [f"{url}/gone", *(f"{url}/{i}.png" for i in range(4))]
        index = ImageIndex(torch.eye(5), images=addresses, rules=LinkRules(hosts="127.0.0.1"))
        (images,) = retrieve(torch.tensor([[0.9, 0.5, 0.4, 0.3, 0.2]]), index, RetrievalSettings(images_per_ret=2))
        assert [image.id for image in images] == [1, 2] and sorted(requests[9:]) == ["/0.png", "/1.png", "/gone"]


def test_which_hosts_are_allowed():
    rules = LinkRules(hosts=["a.org", ".b.org"])
    allowed = ["http://a.org/x", "https://A.org:8/x", "https://w.b.org/x"]
    refused = ["http://b.org/x", "http://w.a.org/x", "file://a.org/x", "ftp://a.org/x", "http://a.org@c.org/x"]
    refused.append("http://[")
    assert all(map(rules.allow_host, allowed)) and not any(map(rules.allow_host, refused))
    assert not LinkRules().allow_host("http://a.org/x")
    for bad in ({"timeout": 0}, {"max_bytes": 0}):
        with pytest.raises(GroundingError, match="more than 0"):
            LinkRules(**bad)
    with pytest.raises(GroundingFileError, match="no host that is allowed"):
        rules.fetch("http://c.org/x")


def test_no_path_leads_out_of_the_folder(tmp_path, another_machine):
    secret = tmp_path / "secret.png"
    picture(3).save(secret)
    folder = tmp_path / "index"
    (folder / "images").mkdir(parents=True)
    os.symlink(secret, folder / "link.png")
    outside = [str(secret), str(folder / "../secret.png"), str(folder / "link.png"), "/a\0b", "~/x.png"]
    outside[1] = os.path.abspath(outside[1])
    ImageIndex(torch.eye(6), images=[*outside, str(folder / "inside.png")]).save_pretrained(folder)
    another_machine()
    index = ImageIndex.from_pretrained(folder)
    assert index.images == [*map(ImageLink, outside), str(folder / "inside.png")]
    allowed = ImageIndex.from_pretrained(folder, LinkRules(folders=[tmp_path]))
    assert allowed.images[:3] == outside[:3]
    index.save_pretrained(tmp_path / "again")
    for name in FILES[:3]:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    table = pq.read_table(folder / TABLE_FILE)
    for name, value in (("image", None), ("file", "link.png")):
        table = table.set_column(table.column_names.index(name), name, pa.array([value] * 6, pa.string()))
    pq.write_table(table, folder / TABLE_FILE)
    with pytest.raises(GroundingFileError, match="not inside the folder"):
        ImageIndex.from_pretrained(folder).entry(0)


def test_addresses_that_only_read_like_paths_of_the_folder_are_not_opened(tmp_path, monkeypatch, another_machine):
    picture(3).save(tmp_path / "secret.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "index"
    places = [f"file:{tmp_path}/secret.png", (tmp_path / "secret.png").as_uri(), "~/secret.png"]
    ImageIndex(torch.eye(3), images=places).save_pretrained(folder)
    another_machine()
    monkeypatch.chdir(folder)  # As a relative path, each of them would be inside the folder.
    assert ImageIndex.from_pretrained(folder).images == [*map(ImageLink, places)]
    mine = ImageIndex(torch.eye(3), images=places)
    assert [to_rgb(mine.entry(i)[1]).tobytes() for i in range(3)] == [picture(3).tobytes()] * 3


def test_prompts_fetch_images_where_their_rules_allow_it():
    with web() as (url, requests):
        model = grounded()
        with pytest.raises(GroundingError, match=r"model\.processor\.link_rules"):
            model.prepare([["w4", f"{url}/a.png"]])
        assert not requests
        model.processor.link_rules = LinkRules(hosts=["127.0.0.1"])
        model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        part = {"type": "image_url", "image_url": {"url": f"{url}/a"}}
        fetched = model.prepare([["w4", f"{url}/a.png"], [{"role": "user", "content": [part]}]])["pixel_values"]
        assert torch.equal(fetched, model.prepare([["w4", picture(0)]])["pixel_values"].expand(2, -1, -1, -1))
        assert requests == ["/a.png", "/a"]


def test_an_image_that_was_not_opened_is_a_link_on_the_page():
    link = ImageLink('https://a.org/"x"<b>.png')
    shown = RetrievedImage("one", 0.5, link)
    html = InterleavedOutput((shown, RetrievedImage("two", 0.5, ImageLink("javascript:alert(1)"))))._repr_html_()
    assert "<img" not in html and "<b>" not in html
    assert 'href="https://a.org/' in html and 'href="javascript' not in html
    assert shown.uri == link.address


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_an_index_goes_to_the_hub_and_back(hub, tmp_path, monkeypatch, caplog):  # noqa: F811
    picture(1).save(tmp_path / "mine.png")
    images = [picture(0), str(tmp_path / "mine.png"), "http://a.org/x.png", None]
    vectors = torch.nn.functional.normalize(torch.randn(4, 5), dim=-1)
    index = ImageIndex(vectors, list("abcd"), images, [{"n": i} for i in range(4)])
    address = index.push_to_hub("me/index", token="writer", commit_message="four")
    assert address.startswith(f"{hub.url}/datasets/me/index/commit/") and "1 images are local files" in caplog.text
    pushed = hub.files("me/index", kind="datasets")
    assert set(pushed) == {
        ".gitattributes",
        "README.md",
        "index.json",
        "index.safetensors",
        "entries.parquet",
        "images/00000000.png",
    }
    assert all(str(tmp_path).encode() not in data for data in pushed.values())
    again = ImageIndex.from_pretrained("me/index")
    assert torch.equal(again.vectors, vectors) and (again.ids, again.metadata) == (index.ids, index.metadata)
    assert again.images[1:] == [None, ImageLink("http://a.org/x.png"), None]
    assert Image.open(again.images[0]).convert("RGB").tobytes() == picture(0).tobytes()
    again.save_pretrained(tmp_path / "local")
    assert (tmp_path / "local" / "index.safetensors").read_bytes() == pushed["index.safetensors"]
    index.push_to_hub("me/index", token="writer", revision="all", copy_images=True)
    assert "images/00000001.png" in hub.files("me/index", "all", "datasets")
    ImageIndex(vectors).push_to_hub("me/index", token="writer", revision="all")
    assert "images/00000001.png" not in hub.files("me/index", "all", "datasets")
    monkeypatch.setattr(socket, "create_connection", None)
    assert len(ImageIndex.from_pretrained("me/index", local_files_only=True)) == 4
    with pytest.raises(GroundingFileError, match="Repository Not Found|cached"):
        ImageIndex.from_pretrained("me/none", local_files_only=True)
