"""The page in a real browser: write, upload, see pictures in answers, go on; needs gradio, Playwright and Chromium."""

import base64
import io
import json
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.tiny import grounded, picture
from visual_ground import ImageIndex

pytest.importorskip("gradio", reason="make test-app installs the extra `app-tests`")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-app installs the extra `app-tests`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    # Other packages' warnings, in threads of theirs.
    pytest.mark.filterwarnings("ignore"),
]
# Headless, without a sandbox of its own (tests run as root in containers), and without calls home.
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
TIMEOUT = 60_000  # Milliseconds; nothing waits longer than it must.


@pytest.fixture(scope="module")
def model():
    """Return a model whose answers do not end by themselves."""
    model = grounded("llama_untied")
    model.tokenizer.chat_template = TEMPLATE
    model.lm.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """Return the address of a running page."""
    import uvicorn

    from visual_ground.app.page import PageSettings
    from visual_ground.app.web import create_page

    secret = tmp_path_factory.mktemp("album") / "secret.png"
    picture(0).save(secret)
    metadata = [{"caption": "<img src=x onerror=alert(1)>", "credit": "Jane", "source": "https://example.org/cat"}]
    index = ImageIndex.build(model, [str(secret)], ["a cat"], metadata)
    app = create_page(model, {"mine": index}, PageSettings(examples=["w4 w5 w6"], max_tokens=12))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Visitor:
    """One person's browser window on the page."""

    def __init__(self, browser, address, **settings):
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.elsewhere, self.alerts = [], []
        self.page.on("request", self._note)
        self.page.on("dialog", lambda dialog: (self.alerts.append(dialog.message), dialog.dismiss()))
        self.page.goto(address, wait_until="domcontentloaded")
        self.page.wait_for_selector("#question textarea")

    def _note(self, request):
        if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", request.url):
            self.elsewhere.append(request.url)

    def write(self, text):
        self.page.fill("#question textarea", text)
        self.page.keyboard.press("Enter")

    def set(self, label, value):
        """Set a slider, whose number is the input of this label."""
        self.page.locator(f'input[type=number][aria-label="number input for {label}"]').fill(str(value))

    def answers(self, count):
        """Wait for so many answers and the end of the last; return their texts."""
        self.page.wait_for_function(
            "n => document.querySelectorAll('#conversation [data-testid=bot]').length >= n", arg=count
        )
        self.page.wait_for_selector("#question .submit-button")
        return self.page.locator("#conversation [data-testid=bot]").all_inner_texts()

    def upload(self, data, name="mine.png"):
        self.page.set_input_files(
            "#question input[type=file]", [{"name": name, "mimeType": "image/png", "buffer": data}]
        )
        self.page.wait_for_selector("#question .thumbnail-item, #question .thumbnails")


@pytest.fixture
def visitor(browser, address):
    visitor = Visitor(browser, address)
    yield visitor
    visitor.context.close()


def test_write_upload_see_the_picture_and_follow_up(visitor, tmp_path):
    visitor.page.locator(".sidebar button.toggle-button, button.toggle-button").first.click()
    visitor.set("How readily pictures come", 30)
    visitor.page.locator("#conversation .example").first.click()
    visitor.answers(1)
    shown = visitor.page.locator("#conversation .vg-picture img")
    shown.first.wait_for()
    assert shown.first.evaluate("img => img.decode().then(() => img.naturalWidth)") == 8
    assert "Jane" in visitor.page.locator(".vg-origin").first.inner_text()
    assert visitor.page.locator(".vg-origin a").first.get_attribute("href") == "https://example.org/cat"
    picture(4).save(tmp_path / "mine.png")
    visitor.upload((tmp_path / "mine.png").read_bytes())
    visitor.write("w9")
    assert len(visitor.answers(2)) == 2
    visitor.write("w8")
    visitor.answers(3)
    assert not visitor.alerts and not visitor.elsewhere, "no script of a caption runs, and nothing calls elsewhere"
    assert "secret" not in visitor.page.content(), "no path leaves the machine"


def test_a_picture_that_is_none_is_answered_in_plain_words(visitor):
    visitor.upload(b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    visitor.write("w4")
    assert "cannot be read" in visitor.answers(1)[0]
    visitor.write("w4 " * 3000)
    assert "context" in visitor.answers(2)[1]
    assert not visitor.alerts


def test_a_file_that_is_too_large_is_refused_in_plain_words_and_the_page_goes_on(visitor, tmp_path):
    with open(tmp_path / "large.png", "wb") as large:
        large.truncate(100_000_000)
    visitor.page.set_input_files("#question input[type=file]", tmp_path / "large.png")
    visitor.page.get_by_text("exceed the maximum allowed size").first.wait_for()
    assert not visitor.page.locator("#question .thumbnail-item").count()
    visitor.write("w4")
    assert visitor.answers(1)[0].strip()


def test_a_picture_is_pasted_from_the_clipboard(browser, address):
    visitor = Visitor(browser, address, permissions=["clipboard-read", "clipboard-write"])
    buffer = io.BytesIO()
    picture(4).resize((64, 48)).save(buffer, "PNG")
    copy = """async data => {
        const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));
        const item = new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})});
        await navigator.clipboard.write([item]);
    }"""
    try:
        visitor.page.evaluate(copy, base64.b64encode(buffer.getvalue()).decode())
        visitor.page.locator("#question textarea").focus()
        visitor.page.keyboard.press("Control+V")
        visitor.page.locator("#question .thumbnail-item").first.wait_for()
        visitor.write("w9")
        assert "cannot be read" not in visitor.answers(1)[0]
        shown = visitor.page.locator("#conversation [data-testid=user] img, #conversation .user img").first
        assert shown.evaluate("img => img.decode().then(() => img.naturalWidth)") == 64
    finally:
        visitor.context.close()


PNG = b"\x89PNG\r\n\x1a\n<script>alert(1)</script>"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


@pytest.mark.parametrize(
    "name, data",
    [("a.svg", SVG), ("a.html", SVG), ("a.png", SVG), ("a.png", PNG), ("a.gif", b"GIF89a/*<script>*/=1;alert(1)")],
)
def test_no_browser_takes_an_upload_for_a_page(address, name, data):
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
    body = f"{head}Content-Type: text/html\r\n\r\n".encode() + data + b"\r\n--x--\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, form)) as answer:
        path = json.loads(answer.read())[0]
    with urllib.request.urlopen(f"{address}gradio_api/file={path}") as answer:
        kind, disposition = answer.headers["Content-Type"], answer.headers["Content-Disposition"]
    assert kind in ("image/png", "image/gif") or disposition.startswith("attachment")


def test_two_visitors_do_not_hear_each_other(browser, address):
    visitors = [Visitor(browser, address) for _ in range(2)]
    try:
        for turn in range(1, 4):
            for number, visitor in enumerate(visitors):
                visitor.write(f"w{5 + number} w{7 + turn}")
            for visitor in visitors:
                visitor.answers(turn)
        for number, visitor in enumerate(visitors):
            asked = visitor.page.locator("#conversation [data-testid=user]").all_inner_texts()
            assert [text.strip() for text in asked] == [f"w{5 + number} w{7 + turn}" for turn in range(1, 4)]
        said = [visitor.answers(3) for visitor in visitors]
    finally:
        for visitor in visitors:
            visitor.context.close()
    alone = Visitor(browser, address)
    try:
        for turn in range(1, 4):
            alone.write(f"w5 w{7 + turn}")
            alone.answers(turn)
        assert alone.answers(3) == said[0], "each answer is the one that comes alone"
    finally:
        alone.context.close()


@pytest.mark.slow
def test_two_visitors_chat_for_five_minutes(browser, address):
    until, words, firsts = time.monotonic() + 300, ("w5", "w6"), {}
    visitors, asked, said = [Visitor(browser, address) for _ in words], [[], []], [[], []]
    try:
        while time.monotonic() < until:
            turn = len(asked[0]) + 1
            if turn > 12:  # A conversation may fill its context; each begins anew then.
                for visitor in visitors:
                    visitor.page.locator("button[aria-label='Clear']").click()
                    visitor.page.wait_for_selector("#conversation .example")
                asked, said, turn = [[], []], [[], []], 1
            for number, visitor in enumerate(visitors):
                asked[number].append(f"{words[number]} w{7 + turn}")
                visitor.write(asked[number][-1])
            said = [visitor.answers(turn) for visitor in visitors]
            for number, visitor in enumerate(visitors):
                heard = visitor.page.locator("#conversation [data-testid=user]").all_inner_texts()
                assert [text.strip() for text in heard] == asked[number] and len(said[number]) == turn
                first = firsts.setdefault((number, turn), said[number])
                assert said[number] == first, "the same conversation has the same answers each time"
        assert len(firsts) > 2 and not any(visitor.alerts or visitor.elsewhere for visitor in visitors)
    finally:
        for visitor in visitors:
            visitor.context.close()


@pytest.fixture
def slow_model(model):
    """Let the model take its time for each token, so that there is some to stop it."""
    hook = model.lm.register_forward_pre_hook(lambda module, given: time.sleep(0.1))
    yield
    hook.remove()


def test_an_answer_is_stopped_taken_back_and_begun_anew(visitor, slow_model):
    visitor.page.locator(".sidebar button.toggle-button, button.toggle-button").first.click()
    visitor.set("Longest answer, in tokens", 1024)
    visitor.write("w4")
    visitor.page.wait_for_function(
        "() => /w[0-9]/.test(document.querySelector('#conversation [data-testid=bot]')?.textContent)"
    )
    visitor.page.fill("#question textarea", "what comes next")
    visitor.page.locator("#question .stop-button").click()
    assert 0 < len(visitor.answers(1)[0].split()) < 1000
    assert visitor.page.input_value("#question textarea") == "what comes next", "it can be written meanwhile"
    visitor.page.locator("button[aria-label='Undo']").click()
    visitor.page.wait_for_function("() => document.querySelector('#question textarea').value == 'w4'")
    assert not visitor.page.locator("#conversation [data-testid=bot]").count()


@pytest.mark.parametrize("settings", [{"viewport": {"width": 390, "height": 844}}, {"color_scheme": "dark"}])
def test_a_telephone_and_a_dark_screen(browser, address, settings):
    visitor = Visitor(browser, address, **settings)
    try:
        visitor.write("w4")
        visitor.answers(1)
        wide = visitor.page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= visitor.page.viewport_size["width"], "nothing has to be scrolled sideways"
        if "color_scheme" in settings:
            color = visitor.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
            assert max(map(int, re.findall(r"\d+", color)[:3])) < 90
    finally:
        visitor.context.close()


def test_only_pictures_of_the_index_are_there(address):
    with urllib.request.urlopen(f"{address}images/0/a%20cat") as answer:
        assert answer.read().startswith(b"\x89PNG") and answer.headers["X-Content-Type-Options"] == "nosniff"
    for path in ("images/1/a%20cat", "images/-1/a%20cat", "images/0/none", "images/0/..%2F..%2Fetc%2Fpasswd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + path)
