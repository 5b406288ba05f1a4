"""The real huggingface_hub client against a server of the Hub's API on loopback: pushed, pulled, refused, cut short."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image

from tests.golden_parts import GOLDEN
from tests.storage.hub_client import hub  # noqa: F401
from tests.tiny import Eye, build, grounded, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, ground
from visual_ground.adapter.anchors import ANCHORS_FILE, Anchors
from visual_ground.adapter.files import push_saved
from visual_ground.errors import GroundingError, GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.storage.hub import PushOptions, cached_commit
from visual_ground.storage.hub_names import is_hub_name
from visual_ground.storage.tensors import CONFIG_FILE, WEIGHTS_FILE

# huggingface_hub's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAMES = {"README.md", CONFIG_FILE, WEIGHTS_FILE}
PROMPTS = ["w4 w5 w6", ["w9", picture(0), "w5", picture(1)]]


def folder_of(name):
    return {path.name: path.read_bytes() for path in (GOLDEN / name).iterdir()}


@pytest.fixture
def models(hub):  # noqa: F811
    """A Hub that has an LM and an encoder."""
    hub.put("models", "some/lm", folder_of("lm"))
    hub.put("models", "some/vision", folder_of("vision"))
    return hub


def pull(lm=None, name="me/adapter", **options):
    lm = build("llama_untied") if lm is None else lm
    return GroundedModel.from_pretrained(lm, name, Eye(), tokenizer(), image_processor, **options)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@torch.no_grad()
def assert_same_outputs(one, two):
    ids = torch.randint(4, 95, (2, 6))
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert torch.equal(one.embed_text(["w4 w5"]), two.embed_text(["w4 w5"]))
    features = torch.randn(2, 12)
    assert torch.equal(one.embed_images(image_features=features), two.embed_images(image_features=features))


def test_pushed_pulled_into_an_empty_cache_is_the_same_byte_for_byte(hub, tmp_path):  # noqa: F811
    model = grounded("llama_untied")
    address = model.push_to_hub("me/adapter", token="writer", commit_message="a first one")
    assert address == f"{hub.url}/me/adapter/commit/{hub.repos['models', 'me/adapter'].branches['main']}"
    pushed = hub.files("me/adapter")
    assert set(pushed) == {*NAMES, ".gitattributes"}
    assert hub.repos["models", "me/adapter"].messages == ["initial", "a first one"]
    again = pull()
    assert_same_outputs(model, again)
    pulled = next((tmp_path / "cache" / "models--me--adapter" / "snapshots").iterdir())
    assert files_in(pulled) == {name: pushed[name] for name in NAMES}
    again.save_pretrained(tmp_path / "saved")
    saved = files_in(tmp_path / "saved")
    assert all(saved[name] == pushed[name] for name in (CONFIG_FILE, WEIGHTS_FILE))


def test_anchors_are_pushed_and_pulled_with_their_adapter_and_damaged_ones_are_not(hub, tmp_path):  # noqa: F811
    model = grounded("llama_untied")
    model.active.anchors = Anchors([["w9"], ["w5", "w6 w7"]], torch.arange(24.0).view(2, 12))
    model.push_to_hub("me/adapter", token="writer")
    loaded = GroundedModel.from_pretrained(build("llama_untied"), "me/adapter", model.vision, tokenizer())
    assert loaded.active.anchors.captions == model.active.anchors.captions
    assert torch.equal(loaded.active.anchors.features, model.active.anchors.features)
    loaded.save_pretrained(tmp_path)
    push_saved(tmp_path, "me/again", PushOptions(token="writer"))
    assert hub.files("me/again")[ANCHORS_FILE] == hub.files("me/adapter")[ANCHORS_FILE]
    (tmp_path / ANCHORS_FILE).write_bytes(b"nothing")
    with pytest.raises(GroundingFileError, match="damaged"):
        push_saved(tmp_path, "me/third", PushOptions(token="writer"))
    assert ("models", "me/third") not in hub.repos


def test_a_part_inside_a_model_has_the_models_commit(tmp_path):
    snapshot = tmp_path / "models--me--clip" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert cached_commit("me/clip#vision_model", cache_dir=tmp_path) == "abc"


def test_what_is_pushed_is_little_more_than_the_weights(hub):  # noqa: F811
    model = grounded("llama_untied", retrieval_dim=4096)
    model.push_to_hub("me/adapter", token="writer")
    sizes = {name: len(data) for name, data in hub.files("me/adapter").items()}
    assert 3 <= len(sizes) <= 5 and sum(sizes.values()) < 1.1 * sizes[WEIGHTS_FILE]


def test_an_adapter_alone_loads_the_models_that_it_names(models, tmp_path):
    model = ground("some/lm", "some/vision")
    assert not model.push_to_hub("me/adapter", token="writer").endswith("None")
    values = json.loads(models.files("me/adapter")[CONFIG_FILE])
    lm, vision = (models.repos["models", name].branches["main"] for name in ("some/lm", "some/vision"))
    assert (values["base_model_name_or_path"], values["revision"]) == ("some/lm", lm)
    assert (values["vision_encoder"], values["vision_revision"]) == ("some/vision", vision)
    prompt = [[picture(0).resize((32, 32)), "What is it?"]]
    said = [model.eval().generate(prompt, max_new_tokens=5, do_sample=False)[0]]
    # The names' newest revisions are others by now; the adapter's own are taken.
    for name in ("some/lm", "some/vision"):
        models.repos["models", name].commit("main", {}, "all gone")
    alone = GroundedModel.from_pretrained("me/adapter", cache_dir=tmp_path / "elsewhere")
    said.append(alone.generate(prompt, max_new_tokens=5, do_sample=False)[0])
    assert sorted(path.name for path in (tmp_path / "elsewhere").glob("models--*")) == [
        "models--me--adapter",
        "models--some--lm",
        "models--some--vision",
    ]
    alone.unground()
    started = ground(alone.lm, adapter="me/adapter", tokenizer=alone.tokenizer)
    assert any(parameter.requires_grad for parameter in started.adapter.parameters())
    said.append(started.generate(prompt, max_new_tokens=5, do_sample=False)[0])
    assert said[0] == said[1] == said[2]
    offline = GroundedModel.from_pretrained("me/adapter", cache_dir=tmp_path / "elsewhere", local_files_only=True)
    assert offline.active.metadata == alone.active.metadata
    assert GroundingConfig.from_pretrained("me/adapter") == model.config


def test_the_card_s_code_runs(models, tmp_path, monkeypatch):
    ground("some/lm", "some/vision").push_to_hub("me/adapter", token="writer")
    code = models.files("me/adapter")["README.md"].decode().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save("photo.jpg")
    exec(code, {})
    assert (tmp_path / "answer.html").is_file()


def test_branches_subfolders_and_pull_requests(hub):  # noqa: F811
    one, two = grounded("llama_untied"), grounded("llama_untied", retrieval_dim=7)
    one.push_to_hub("me/adapter", token="writer", private=True)
    two.push_to_hub("me/adapter", token="writer", revision="wide")
    assert pull(token="writer").config.retrieval_dim == 6
    assert pull(token="reader", revision="wide").config.retrieval_dim == 7
    head = hub.repos["models", "me/adapter"].branches["main"]
    address = two.push_to_hub("me/adapter", token="writer", create_pr=True)
    assert address.endswith("/discussions/1") and hub.repos["models", "me/adapter"].branches["main"] == head
    assert pull(token="writer", revision="refs/pr/1").config.retrieval_dim == 7
    assert pull(token="writer", revision=head).config.retrieval_dim == 6
    hub.put("models", "me/many", {f"deep/one/{name}": data for name, data in hub.files("me/adapter").items()})
    assert pull(name="me/many", subfolder="deep/one").config.retrieval_dim == 6
    with pytest.raises(GroundingValueError, match="default branch"):
        one.push_to_hub("me/adapter", token="writer", revision="wide", create_pr=True)


@pytest.mark.parametrize(
    "token, name, words",
    [(False, "me/adapter", "401"), ("reader", "me/adapter", "403"), ("wrong", "me/adapter", "401")]
    + [("writer", "you/adapter", "403"), ("writer", "a/b/c", "repo")],
)
def test_a_push_without_the_right_to_it(hub, token, name, words):  # noqa: F811
    with pytest.raises(GroundingFileError, match=words):
        grounded("llama_untied").push_to_hub(name, token=token)
    assert not hub.repos


def test_what_the_hub_does_not_give(hub):  # noqa: F811
    grounded("llama_untied").push_to_hub("me/adapter", token="writer", private=True)
    for name, options, words in [
        ("me/none", {}, "Repository Not Found"),
        ("me/adapter", {}, "Repository Not Found"),
        ("me/adapter", {"token": "stranger"}, "Repository Not Found"),
        ("me/adapter", {"token": "reader", "revision": "none"}, "Revision Not Found"),
        ("me/adapter", {"token": "reader", "subfolder": "none"}, "no adapter folder"),
        ("me/other", {"local_files_only": True}, "cached"),
        ("/nowhere/at/all", {}, "no local folder"),
        ("../me/adapter", {}, "no local folder"),
        ("me/ad apter", {}, "no local folder"),
    ]:
        before = len(hub.requests)
        with pytest.raises(GroundingFileError, match=words):
            pull(name=name, **options)
        assert len(hub.requests) == before or not words.startswith(("no local", "cached"))
    with pytest.raises(GroundingTypeError, match="torch_dtype"):
        pull(torch_dtype="auto")
    with pytest.raises(GroundingTypeError, match="Which adapter"):
        GroundedModel.from_pretrained(build("gpt2"))


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for_as_long_as_it_asks(hub, status):  # noqa: F811
    model, busy = grounded("llama_untied"), {"headers": {"Retry-After": "7"}}
    for method, pattern in [
        ("POST", "/api/repos/create"),
        ("POST", "/preupload/"),
        ("PUT", "/lfs/"),
        ("POST", "/commit/main"),
    ]:
        hub.fail(method, pattern, status, **busy)
    model.push_to_hub("me/adapter", token="writer")
    assert len([wait for wait in hub.waits if wait in (7, 8)]) == 4
    assert len(hub.repos["models", "me/adapter"].messages) == 2
    assert_same_outputs(model, pull())


def test_a_hub_that_stays_busy_is_given_up_and_holds_what_it_held(hub):  # noqa: F811
    one, two = grounded("llama_untied"), grounded("llama_untied", retrieval_dim=7)
    one.push_to_hub("me/adapter", token="writer")
    before = hub.files("me/adapter")
    hub.fail("POST", "/commit/main", 503, times=99)
    with pytest.raises(GroundingFileError, match="Nothing was pushed to 'me/adapter'.*503"):
        two.push_to_hub("me/adapter", token="writer")
    assert hub.files("me/adapter") == before


def test_a_commit_that_somebody_overtook_is_made_again_on_theirs(hub):  # noqa: F811
    model = grounded("llama_untied")
    model.push_to_hub("me/adapter", token="writer")
    repo = hub.repos["models", "me/adapter"]
    commit = hub.commit

    def overtaken(*args, **kwargs):
        hub.commit = commit
        held = dict(repo.commits[repo.branches["main"]])
        page = held["README.md"]
        held["README.md"] = type(page)(page.data + b"\n## From the website\n\nMine.\n")
        repo.commit("main", held, "an edit on the website")
        return commit(*args, **kwargs)

    hub.commit = overtaken
    model.active.report = model.active.report.measured("some/pairs", {"caption_pair_accuracy": 71.0})
    model.push_to_hub("me/adapter", token="writer")
    page = hub.files("me/adapter")["README.md"].decode()
    assert "## From the website\n\nMine." in page and "| 71 |" in page


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub):  # noqa: F811
    model = grounded("llama_untied", retrieval_dim=512)
    model.push_to_hub("me/adapter", token="writer")
    hub.fail("GET", "/cdn/", cut_after=5000)
    hub.fail("GET", "/resolve/.*adapter_config.json", cut_after=10)
    assert_same_outputs(model, pull())
    assert [path for _, path in hub.requests if path.startswith("/cdn/")][1:]


def test_a_download_that_is_always_cut_leaves_nothing_loaded(hub):  # noqa: F811
    grounded("llama_untied", retrieval_dim=512).push_to_hub("me/adapter", token="writer")
    hub.fail("GET", "/cdn/", cut_after=0, times=99)
    lm = build("llama_untied")
    with pytest.raises(GroundingFileError, match="did not give it"):
        pull(lm)
    hub.faults.clear()
    assert pull(lm).config.retrieval_dim == 512


def test_a_second_push_changes_only_what_changed_and_removes_what_is_gone(hub):  # noqa: F811
    model = grounded("llama_untied")
    model.push_to_hub("me/adapter", token="writer")
    first = hub.repos["models", "me/adapter"].branches["main"]
    assert model.push_to_hub("me/adapter", token="writer").endswith(first)
    held = dict(hub.repos["models", "me/adapter"].commits[first])
    held |= {name: type(held["README.md"])(b"x") for name in ("samples.jpg", "notes.txt")}
    hub.repos["models", "me/adapter"].commit("main", held, "by hand")
    model.push_to_hub("me/adapter", token="writer")
    assert set(hub.files("me/adapter")) == {*NAMES, ".gitattributes", "notes.txt"}


def test_local_paths_are_not_published(hub, caplog):  # noqa: F811
    model = ground(str(GOLDEN / "lm"), str(GOLDEN / "vision"))
    model.push_to_hub("me/adapter", token="writer")
    assert "without a name" in caplog.text
    assert all(str(GOLDEN).encode() not in data for data in hub.files("me/adapter").values())
    with pytest.raises(GroundingValueError, match="no name can load"):
        GroundedModel.from_pretrained("me/adapter")
    again = GroundedModel.from_pretrained(str(GOLDEN / "lm"), "me/adapter", str(GOLDEN / "vision"))
    assert torch.equal(again.embed_text(["a dog"]), model.eval().embed_text(["a dog"]))


def test_an_adapter_from_the_hub_may_not_name_local_paths(hub, tmp_path):  # noqa: F811
    grounded("llama_untied").push_to_hub("me/adapter", token="writer")
    files = hub.files("me/adapter")
    (tmp_path / "evil").mkdir()
    for key in ("base_model_name_or_path", "vision_encoder"):
        for bad in (str(tmp_path / "evil"), "../evil", "./x", "open_clip:/tmp/x.pt/openai", "local-dir:x", "timm:../x"):
            values = json.loads(files[CONFIG_FILE]) | {key: bad}
            hub.put("models", "me/adapter", files | {CONFIG_FILE: json.dumps(values).encode()})
            with pytest.raises(GroundingFileError, match="local paths"):
                pull()


def test_names_of_the_hub():
    assert all(map(is_hub_name, ["gpt2", "me/adapter", "timm:vit_tiny", "open_clip:ViT-B-32/laion2b_s34b_b79k"]))
    assert not any(map(is_hub_name, ["/a", "a/b/c", "..", "a/..", "~/a", "tests", "C:\\x", "open_clip:tests/x", ""]))


def test_code_that_comes_with_a_model_is_not_run(hub, tmp_path):  # noqa: F811
    mark = tmp_path / "ran"
    files = folder_of("lm")
    config = json.loads(files["config.json"]) | {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    files |= {"config.json": json.dumps(config).encode(), "code.py": f"open({str(mark)!r}, 'w')".encode()}
    hub.put("models", "some/lm", files)
    with pytest.raises(GroundingError, match="cannot be loaded"):
        ground("some/lm", str(GOLDEN / "vision"))
    assert not mark.exists()


def test_saving_and_loading_local_folders_never_touch_the_network(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def forbidden(*args, **kwargs):
        raise AssertionError("the network was touched")

    model = ground(str(GOLDEN / "lm"), str(GOLDEN / "vision"))
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, forbidden)
    model.save_pretrained(tmp_path / "adapter")
    GroundingConfig.from_pretrained(tmp_path / "adapter")
    alone = GroundedModel.from_pretrained(tmp_path / "adapter")
    GroundedModel.from_pretrained(str(GOLDEN / "lm"), tmp_path / "adapter", is_trainable=True).unground()
    with pytest.raises(GroundingFileError, match="no local folder"):
        GroundedModel.from_pretrained(tmp_path / "none")
    assert alone.active.metadata == model.active.metadata


# Imports once, then pushes in a process of its own for each line that it reads.
PUSHES = """
import os, sys
from tests.tiny import grounded
model = grounded("llama_untied", retrieval_dim=7)
for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        model.push_to_hub("me/adapter", token="writer")
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


def test_a_push_that_is_killed_leaves_the_revision_that_was(hub):  # noqa: F811
    model = grounded("llama_untied")
    model.push_to_hub("me/adapter", token="writer")
    before = hub.files("me/adapter")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": os.getcwd()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", PUSHES], env=environment, **pipes) as process:
        for method, pattern in [("PUT", "/lfs/"), ("POST", "/commit/main")]:
            # Killed while the server has the request; what it then does with it counts as never sent.
            stop = hub.fail(method, pattern, 503, times=9, release=threading.Event())
            process.stdin.write("push\n")
            pid = int(process.stdout.readline())
            assert stop.reached.wait(60)
            os.kill(pid, signal.SIGKILL)
            stop.release.set()
            hub.faults.clear()
            assert hub.files("me/adapter") == before
    assert_same_outputs(model, pull())
    grounded("llama_untied", retrieval_dim=7).push_to_hub("me/adapter", token="writer")
    assert pull().config.retrieval_dim == 7
