"""The page itself, made with gradio: a conversation, and how one wants to be answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visual_ground.app.bubbles import STYLE, Album
from visual_ground.app.talk import Talk, Wishes
from visual_ground.errors import GroundingStateError
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.server.engine import Engine
from visual_ground.server.sampling import Sampling

try:
    import gradio as gr
    from fastapi import FastAPI
except ImportError as error:
    message = "The page needs gradio; install it with: pip install 'visual-ground[app]'"
    raise GroundingStateError(message) from error

MAX_FILE = "20mb"
# Fonts of the reader's own machine: those of gradio's themes would be fetched from the network.
FONTS = ["system-ui", "sans-serif"]
NO_ALBUM = "no pictures"
EXAMPLES = ("Show me a penguin.", "Can I see an elephant?", "My daughter wants to know how a violin looks.")


@dataclass(frozen=True)
class PageSettings:
    """What a page says at first.

    Args:
        title: its heading.
        system: the system message; everyone can change it.
        examples: questions to begin with.
        max_tokens: the most tokens of an answer.
        max_images: the most places of an answer at which it shows pictures.
        only_after_sentences: whether pictures come only where a sentence has just ended.
    """

    title: str = "visual_ground"
    system: str = ""
    examples: Sequence[str] = EXAMPLES
    max_tokens: int = 64
    max_images: int = 4
    only_after_sentences: bool = False


class Page:
    """What happens on the page."""

    def __init__(self, engine: Engine, albums: Mapping[str, Album], settings: PageSettings) -> None:
        self.engine, self.albums, self.settings = engine, albums, settings

    def mount(self, app: FastAPI) -> FastAPI:
        """Put the page into a web application, beside what that has already."""
        blocks, limits = self.blocks(), self.engine.limits
        blocks.queue(max_size=limits.max_waiting, default_concurrency_limit=limits.max_batch)
        theme = gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"]).set(
            block_title_background_fill="transparent",
            block_title_text_color="*body_text_color",
            block_title_padding="0",
            # On a light page, the theme's own are all but white: nobody would see where to write or to tick.
            block_border_width="1px",
            checkbox_border_color="*neutral_400",
            input_border_color="*neutral_200",
            input_border_width="1px",
        )
        look = {"theme": theme, "css": STYLE, "footer_links": [], "ssr_mode": False}
        mounted: FastAPI = gr.mount_gradio_app(app, blocks, "/", max_file_size=MAX_FILE, **look)
        return mounted

    def blocks(self) -> gr.Blocks:
        """Return the page."""
        options: dict[str, Any] = {"analytics_enabled": False, "fill_height": True, "delete_cache": (3600, 86400)}
        blocks: gr.Blocks
        with gr.Blocks(title=self.settings.title, **options) as blocks:
            talk = gr.State(Talk)
            with gr.Sidebar(open=False, position="right", width=360):
                controls = self._controls()
            gr.Markdown(f"## {self.settings.title}")
            chatbot = gr.Chatbot(
                show_label=False,
                scale=1,
                height="72vh",
                layout="bubble",
                buttons=["copy"],
                placeholder="Ask for something, or show a picture and ask about it.",
                examples=[{"text": text} for text in self.settings.examples],
                elem_id="conversation",
            )
            box = gr.MultimodalTextbox(
                placeholder="Write, and paste or drop pictures",
                file_types=["image"],
                file_count="multiple",
                show_label=False,
                autofocus=True,
                stop_btn=False,
                elem_id="question",
            )
            outputs = [chatbot, talk, box]
            gr.on([box.submit], self.submit, [box, talk, *controls], outputs)
            chatbot.example_select(self.begin, [talk, *controls], outputs)
            chatbot.retry(self.retry, [talk, *controls], outputs)
            chatbot.undo(self.undo, [talk], outputs)
            chatbot.clear(self.clear, None, outputs)
            box.stop(Talk.stop, [talk], None, queue=False)
        return blocks

    def _controls(self) -> list[Any]:
        """Return the controls, in the order in which `wishes` takes them."""
        albums, adapters = [*self.albums, NO_ALBUM], list(self.engine.model.adapters)
        return [
            gr.Dropdown(albums, value=albums[0], label="Pictures from"),
            gr.Dropdown(adapters, value=self.engine.model.active_adapter, label="Adapter", visible=len(adapters) > 1),
            gr.Slider(-10, 30, 0, step=0.5, label="How readily pictures come", info="ret_bias"),
            gr.Slider(0, 16, self.settings.max_images, step=1, label="Most pictures in an answer"),
            gr.Slider(1, 6, 1, step=1, label="Pictures at one place"),
            gr.Slider(1, 1024, self.settings.max_tokens, step=1, label="Longest answer, in tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest word"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Only the likeliest words (top p)"),
            gr.Checkbox(self.settings.only_after_sentences, label="Pictures only after whole sentences"),
            gr.Checkbox(False, label="The model sees the pictures that it shows"),
            gr.Textbox(self.settings.system, lines=4, label="System message"),
        ]

    def wishes(self, album: str, adapter: str, bias: float, most: int, at_once: int, *rest: Any) -> Wishes:
        """Return what the controls say."""
        length, temperature, top_p, waits, sees, system = rest
        # Not `complete_sentences`, which would hold words back until their sentence ends; `Talk` cuts what ran out.
        choices = {"only_after_sentences": bool(waits), "see_images": bool(sees)}
        retrieval = RetrievalSettings(int(at_once), int(most), float(bias), **choices)
        sampling = Sampling(float(temperature), float(top_p), None, retrieval)
        return Wishes(self.albums.get(album), adapter, sampling, int(length), system or "")

    def submit(self, message: Mapping[str, Any], talk: Talk, *controls: Any) -> Iterator[list[Any]]:
        """Answer what was written."""
        text, files = message.get("text") or "", message.get("files") or []
        # A browser may send half a character, which no tokenizer takes.
        text = text.encode(errors="replace").decode()
        if text.strip() or files:
            yield from self._say(talk, text, files, controls)

    def begin(self, chosen: gr.SelectData, talk: Talk, *controls: Any) -> Iterator[list[Any]]:
        """Answer an example."""
        yield from self._say(talk, str(chosen.value["text"]), [], controls)

    def retry(self, talk: Talk, *controls: Any) -> Iterator[list[Any]]:
        """Answer the last question again."""
        if turn := talk.take_back():
            yield from self._say(talk, turn.text, turn.files, controls)

    def undo(self, talk: Talk) -> list[Any]:
        """Take the last question back into the box."""
        turn = talk.take_back()
        value: Any = None if turn is None else {"text": turn.text, "files": list(turn.files)}
        return [talk.shown, talk, gr.MultimodalTextbox(value=value)]

    def clear(self) -> list[Any]:
        """Begin anew."""
        return [[], Talk(), _ready()]

    def _say(self, talk: Talk, text: str, files: Sequence[str], controls: Sequence[Any]) -> Iterator[list[Any]]:
        box: Any = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        for _ in talk.say(text, files, self.engine, self.wishes(*controls)):
            yield [talk.shown, talk, box]
            box = gr.skip()  # Left alone from then on: the next question may be written while this one is answered.
        yield [talk.shown, talk, _ready()]


def _ready() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
