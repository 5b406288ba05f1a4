"""The demo's page and contact sheet say which things were seen, and count right answers."""

import pytest
from PIL import Image

from tests.tiny import picture
from visual_ground.demo.conversations import CONVERSATIONS, SEEN, UNSEEN, Exchange, Request
from visual_ground.demo.page import write_page
from visual_ground.demo.run import counted
from visual_ground.demo.sheet import OVERVIEW_WIDTHS, WIDTH, write_contact_sheet, write_overview
from visual_ground.generation.output import InterleavedOutput, RetrievedImage

RECALLS = {way: {"r1": 1.0, "r5": 2.0, "r10": 3.0} for way in ("text_to_image", "image_to_text")}


@pytest.fixture
def shown():
    answer = InterleavedOutput(("A fox & a bus.", RetrievedImage("fox", 0.5, picture())))
    conversations = {talk.title: [Exchange(talk.turns[0], answer)] for talk in CONVERSATIONS}
    return conversations, [Request("Fox?", "fox", answer), Request("Bus?", "bus", answer)]


def test_nine_conversations_of_both_kinds_ask_for_whole_sentences():
    assert len(CONVERSATIONS) == len({talk.title for talk in CONVERSATIONS}) == 9
    assert {talk.part for talk in CONVERSATIONS} == {SEEN, UNSEEN}


def test_the_page_has_both_parts_and_marks_what_is_right(shown, tmp_path):
    conversations, requests = shown
    counts = counted([*requests, Request("Cat?", "cat", InterleavedOutput(("No.",)))], 9)
    assert counts == {"asked": 3, "answered_with_a_picture": 2, "answered_with_the_right_picture": 1, "pictures": 9}
    results = {"seen": RECALLS, "unseen": RECALLS, "baselines": {"chance": RECALLS}, "requests": counts}
    write_page(tmp_path / "index.html", conversations, requests, results)
    page = (tmp_path / "index.html").read_text()
    assert 0 < page.index(">Seen<") < page.index(">2 requests<") < page.index(">Unseen<")
    assert page.count('class="card right"') == page.count('class="card wrong"') == 1
    assert "fox &amp; a bus" in page and "&lt;poodle&gt;" in page


def test_the_contact_sheet_is_one_picture(shown, tmp_path):
    write_contact_sheet(tmp_path / "sheet.png", *shown)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == WIDTH and 1000 < sheet.height < 4000


def test_the_overview_is_wider_than_high(shown, tmp_path):
    conversations, requests = shown
    write_overview(tmp_path / "overview.png", conversations, 20 * requests)
    with Image.open(tmp_path / "overview.png") as overview:
        assert overview.width == sum(OVERVIEW_WIDTHS) > overview.height
