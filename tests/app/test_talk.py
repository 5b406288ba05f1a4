"""What the page's conversations do, without a browser: answers, failures, what the model hears of them, and markup."""

import copy
import itertools
import re
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import Eye, grounded, image_processor, picture
from visual_ground import GroundingConfig, ImageIndex, RetrievedImage
from visual_ground.app.asking import Asked, Question
from visual_ground.app.bubbles import Album, bubble
from visual_ground.app.talk import Talk, Wishes
from visual_ground.generation.growing import joined
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.index.milvus.image_index import MilvusImageIndex
from visual_ground.index.remote_images import ImageLink
from visual_ground.server.engine import Engine, EngineLimits
from visual_ground.server.pictures import Pictures
from visual_ground.server.sampling import Sampling

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
SHOWS = RetrievalSettings(ret_bias=1e3, max_images=1, min_new_tokens_before_ret=2)


def make_model(**options):
    model = grounded("llama_untied", **options)
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.fixture(scope="module")
def engine():
    engine = Engine(make_model())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def album(engine):
    metadata = [{"caption": "A <b>cat</b>", "author": "Jane", "licence": "CC0", "source": "https://example.org/?a=1&b"}]
    index = ImageIndex.build(engine.model, [picture(0)], ["a/../b"], metadata)
    return Album(index, Pictures(index), "images/0")


def wishes(album=None, retrieval=SHOWS, max_tokens=6, **changes):
    return Wishes(album, "default", Sampling(retrieval=retrieval), max_tokens, **changes)


def said(talk):
    return [(part if isinstance(part, str) else part.id) for turn in talk.turns for part in joined(turn.answer)]


def test_an_answer_is_that_of_generate(engine, album):
    talk = Talk()
    list(talk.say("w4 w5", [], engine, wishes(album)))
    options = {name: getattr(SHOWS, name) for name in ("ret_bias", "max_images", "min_new_tokens_before_ret")}
    chat = [{"role": "user", "content": "w4 w5"}]
    cut = {"do_sample": False, "complete_sentences": True, "max_new_tokens": 6}
    expected = engine.model.generate(chat, album.index, **options, **cut)[0]
    assert said(talk) == [part if isinstance(part, str) else part.id for part in expected.parts]
    assert talk.shown[0] == {"role": "user", "content": "w4 w5"}


def test_pictures_come_out_of_milvus_too(engine, tmp_path):
    index = MilvusImageIndex.create(tmp_path / "images.db", engine.model.config.retrieval_dim)
    index.add(torch.eye(6)[:1], ["a cat"], [picture(0)], [{"caption": "A cat"}])
    pictures = Pictures(index)
    talk = Talk()
    list(talk.say("w4 w5", [], engine, wishes(Album(index, pictures, "images/0"))))
    assert "a cat" in said(talk) and 'src="images/0/a%20cat"' in talk.shown[-1]["content"]
    assert pictures.read("a cat")[0] and "image" in str(talk.turns[0].messages)


def test_pictures_wait_for_the_end_of_a_sentence_where_that_is_asked_for(endless, album):
    for waits in (False, True):
        talk = Talk()
        list(talk.say("w4 w5", [], endless, wishes(album, replace(SHOWS, only_after_sentences=waits))))
        assert ("a/../b" in said(talk)) != waits, "no sentence ends among these words"


def test_the_next_turn_hears_of_all_before_and_of_the_pictures_on_both_sides(engine, album, tmp_path):
    picture(3).save(tmp_path / "mine.png")
    talk = Talk()
    list(talk.say("w4", [str(tmp_path / "mine.png")], engine, wishes(album, system="w9")))
    list(talk.say("w5", [], engine, wishes(album)))
    heard = [message for turn in talk.turns for message in turn.messages]
    kinds = [[part["type"] for part in message["content"]] for message in heard]
    assert [message["role"] for message in heard] == ["user", "assistant"] * 2
    assert kinds[0] == ["image", "text"] and "image" in kinds[1]
    assert talk.shown[0]["content"] == {"path": str(tmp_path / "mine.png")}


@pytest.mark.parametrize(
    "data, words",
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "cannot be read"),
        (b"GIF89a not a picture", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_picture_that_is_none_is_said_in_plain_words_and_forgotten(engine, album, tmp_path, data, words):
    (tmp_path / "x.png").write_bytes(data)
    talk = Talk()
    list(talk.say("w4", [str(tmp_path / "x.png")], engine, wishes(album)))
    assert words in talk.shown[-1]["content"] and not talk.turns[0].messages
    list(talk.say("w4", [], engine, wishes(album)))
    fresh = Talk()
    list(fresh.say("w4", [], engine, wishes(album)))
    # Scores differ by a rounding, as only the first of these answers reads its branches one by one.
    again, anew = ([getattr(part, "id", part) for part in turn.answer] for turn in (talk.turns[1], fresh.turns[0]))
    assert again == anew, "what failed is not heard of again"


def test_a_conversation_that_is_too_long_says_so(engine):
    talk = Talk()
    list(talk.say("w4 " * 3000, [], engine, wishes()))
    assert "context holds" in talk.shown[-1]["content"] or "holds at most" in talk.shown[-1]["content"]


def test_a_full_queue_says_so_and_closing_a_page_frees_it():
    engine = Engine(make_model(), EngineLimits(max_batch=1, max_waiting=0))
    try:
        talk = Talk()
        list(talk.say("w4", [], engine, wishes()))
        assert "Too many" in talk.shown[-1]["content"]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def endless():
    """Return an engine whose answers do not end by themselves."""
    model = make_model()
    model.lm.generation_config.eos_token_id = None
    engine = Engine(model)
    yield engine
    engine.close()


SILENT = RetrievalSettings(max_images=0)


def test_stopping_keeps_what_was_said(endless):
    talk = Talk()
    steps = talk.say("w4", [], endless, wishes(retrieval=SILENT, max_tokens=10**3))
    lengths = [len(said(talk)[0]) for _ in itertools.islice(steps, 4) if talk.turns[0].answer]
    talk.stop()
    list(steps)
    assert len(talk.turns[0].messages) == 2 and talk.turns[0].failure is None
    assert lengths == sorted(set(lengths)) and len(said(talk)[0].split()) < 1000, (
        "it grew, and was stopped before its end"
    )
    assert talk.take_back().text == "w4" and not talk.turns and talk.take_back() is None


def test_an_answer_that_is_stopped_before_it_is_asked_for_does_not_go_on(endless):
    talk = Talk()
    steps = talk.say("w4", [], endless, wishes(retrieval=SILENT, max_tokens=10**3))
    next(steps)
    talk.stop()
    list(steps)
    assert len("".join(said(talk)).split()) <= 1 and talk.turns[0].failure is None


def test_a_page_that_draws_slowly_is_not_sent_what_is_out_of_date(endless):
    talk = Talk()
    steps = talk.say("w4", [], endless, wishes(retrieval=SILENT, max_tokens=100))
    next(steps)
    next(steps)
    while not talk._asked._job.finished:
        time.sleep(0.01)
    left = list(steps)
    assert talk._asked._job.tokens == 100 and len(said(talk)[0].split()) > 90
    assert len(left) <= 2, "what is left, and the end"


def test_conversations_at_once_do_not_mix(engine, album):
    texts = [f"w{i} w{i + 1}" for i in range(4, 20)]

    def hold(text, talk):
        for _ in range(2):
            list(talk.say(text, [], engine, wishes(album)))

    alone, together = [Talk() for _ in texts], [Talk() for _ in texts]
    for text, talk in zip(texts, alone, strict=True):
        hold(text, talk)
    threads = [threading.Thread(target=hold, args=pair) for pair in zip(texts, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said(talk) for talk in together] == [said(talk) for talk in alone]


def test_a_batch_waits_for_requests_that_are_being_read_and_for_nobody_else():
    engine, plain = Engine(make_model(), EngineLimits(gather_seconds=60)), Sampling(retrieval=SILENT)

    def ask():
        messages = [{"role": "user", "content": [{"type": "text", "text": "w4"}]}]
        return Asked(engine, Question(messages, None, "default", plain, 2))

    try:
        with engine.expecting():
            asked = [ask()]
            time.sleep(0.3)
            asked.append(ask())
        assert len({"".join(itertools.chain(*one.parts())) for one in asked}) == 1 and engine.batches == [1, 2]
        started = time.monotonic()
        list(ask().parts())
        assert engine.batches == [2, 3] and time.monotonic() - started < 30
    finally:
        engine.close()


def test_each_question_is_answered_by_the_adapter_that_it_names():
    model = make_model()
    torch.manual_seed(3)
    settings = GroundingConfig(retrieval_dim=6, caption_prompt="w7", image_prompt="{image}", retrieval_prompt="")
    model.add_adapter("other", settings, Eye(), image_processor=image_processor)
    image = [{"role": "user", "content": [{"type": "image", "image": picture(5)}, {"type": "text", "text": "w4"}]}]
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model.generate(image, max_images=0, max_new_tokens=5, do_sample=False)[0].text
    engine = Engine(model)
    try:
        plain = Sampling(retrieval=RetrievalSettings(max_images=0))
        names = ["default", "other", "default", "other", "other"]
        asked = [Asked(engine, Question(image, None, name, plain, 5)) for name in names]
        assert ["".join(itertools.chain(*one.parts())) for one in asked] == [expected[name] for name in names]
    finally:
        engine.close()


def test_a_new_page_begins_with_a_conversation_of_its_own(engine):
    talk = Talk()
    list(talk.say("w4", [], engine, wishes(max_tokens=1)))
    assert talk.turns and not copy.deepcopy(talk).turns


def test_a_picture_has_its_name_score_credit_licence_and_source(album):
    metadata = album.index.entry(0)[2]
    shown = bubble(["See ", RetrievedImage("a/../b", 0.5, picture(), metadata), " here."], album)
    assert "<b>A &lt;b&gt;cat&lt;/b&gt;</b>" in shown and "0.50" in shown and "Jane · CC0" in shown
    assert 'href="https://example.org/?a=1&amp;b"' in shown and 'src="images/0/a%2F..%2Fb"' in shown
    assert shown.startswith("See") and shown.endswith("here.")


def test_pictures_that_cannot_be_shown_say_so(album):
    link = ImageLink("https://example.org/x.png")
    assert 'href="https://example.org/x.png"' in bubble([RetrievedImage("x", 0.1, link)], album)
    assert "<img" not in bubble([RetrievedImage("x", 0.1, None), RetrievedImage()], album)


HOSTILE = st.text(st.sampled_from("<>\"'&()[]!`\n\\ ajs:/x"), max_size=30)


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_no_metadata_and_no_words_of_the_model_become_tags(album, words, name, caption, source):
    image = RetrievedImage(name, 0.5, Image.new("RGB", (2, 2)), {"caption": caption, "source": source, "author": name})
    shown = bubble([words, image], album)
    tags = {tag.split()[0].strip("</>") for tag in re.findall(r"<[^>]*>", shown)}
    assert tags <= {"span", "a", "img", "b", "br"}
    assert all(re.match(r"(https?://|images/0/)", address) for address in re.findall(r'(?:href|src)="([^"]*)', shown))
