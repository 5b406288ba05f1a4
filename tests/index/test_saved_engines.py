"""An engine of `SAVED_ENGINES` is saved, opened, described and published with an index; nothing else knows it."""

import logging

import pytest
import torch

from tests.index.foreign import ListEngine
from visual_ground import ImageIndex
from visual_ground.errors import GroundingFileError
from visual_ground.index import card, files, publishing, state
from visual_ground.index.engines.exact import ExactIndex


class Named(ListEngine):
    """A `SavedEngine` whose one file is a name."""

    FILES = ("name.txt",)

    def __init__(self, exact, name):
        super().__init__(exact.vectors, exact.dim)
        self.exact, self.name, self.description = exact, name, f"Its engine is {name}."

    def remove(self, positions):
        super().remove(positions)
        self.exact = self.exact.changed(positions, torch.empty(0, self.dim))

    def whole(self):
        return Named(ExactIndex(self.exact.vectors), self.name)

    def writers(self, belongs_to):
        return {"name.txt": lambda path: path.write_text(f"{belongs_to()} {self.name}")}

    @classmethod
    def read(cls, folder, exact, belongs_to):
        checksum, name = (folder / "name.txt").read_text().split()
        if checksum != belongs_to:
            raise GroundingFileError(f"{name} is of other vectors.")
        return cls(exact, name)


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    for module in (card, files, publishing, state):
        monkeypatch.setattr(module, "SAVED_ENGINES", (Named,))


def test_a_listed_engine_is_saved_opened_and_described(tmp_path):
    index = ImageIndex(Named(ExactIndex(torch.eye(4)), "Ann"), list("abcd"))
    index.remove(["b"])
    index.save_pretrained(tmp_path)
    assert "Its engine is Ann." in (tmp_path / "README.md").read_text()
    opened = ImageIndex.from_pretrained(tmp_path)
    assert isinstance(opened.engine, Named) and opened.engine.name == "Ann" and opened.ids == ["a", "c", "d"]
    best = opened.search(torch.tensor([[0.0, 0.1, 0.9, 0.0]]), 1)
    assert opened.entry(int(best.positions))[0] == "c" and torch.equal(opened.vectors, index.vectors)
    published = publishing.publishable(opened._state, [], copy_images=False)
    assert isinstance(published.engine, Named) and len(published.engine) == 3


def test_an_engine_of_other_vectors_is_left_alone_and_the_search_is_exact(tmp_path, caplog):
    ImageIndex(Named(ExactIndex(torch.eye(4)), "Ann")).save_pretrained(tmp_path)
    ImageIndex(torch.eye(4).flip(0)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        opened = ImageIndex.from_pretrained(tmp_path)
    assert isinstance(opened.engine, ExactIndex) and "Ann is of other vectors" in caplog.text
