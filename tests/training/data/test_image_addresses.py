"""The image column holds images in any form; a folder goes before relative paths only, and words are never paths."""

import os

from PIL import Image

from tests.tiny import grounded, picture
from visual_ground.training.data.columns import Columns
from visual_ground.training.data.examples import ExampleCollator


def test_a_folder_goes_before_relative_paths_only():
    columns = Columns(folder="pictures")
    addresses = ["https://a.org/x.png", "file:///x.png", "data:image/png;base64,AA", "~/x.png", "/x.png", b"bytes"]
    assert columns.images({"image": addresses}) == addresses
    relative = ["x.png", "~x.png"]
    assert columns.images({"image": relative}) == [os.path.join("pictures", path) for path in relative]


def test_a_request_that_reads_like_a_path_is_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(1).save("w4.png")
    for template in (None, "{% for m in messages %}{{ m.content }}{% endfor %}"):
        model = grounded()
        model.tokenizer.chat_template = template
        collator = ExampleCollator(model)
        for request in ("w4.png", "missing.png"):
            example = {"caption": "w5", "request": request, "image": Image.new("RGB", (8, 8))}
            assert min(collator.retrieval(example).ids) >= 0  # No image's mark.
