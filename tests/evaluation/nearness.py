"""What the tests of evaluations share: a small task of their own, and a folder of images."""

from pathlib import Path

import torch

from tests.tiny import picture
from visual_ground.evaluation.running.plan import Plan, Scores
from visual_ground.evaluation.running.prompts import embed_prompts
from visual_ground.evaluation.running.task import Task


def write_images(folder, names):
    """Write a small picture for each name, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        picture(number).save(folder / name)


class Nearness(Task):
    """How near the model finds images and words: a task with as many units as there are images.

    Args:
        folder: the images.
        calls: where the numbers of each batch are noted.
        stop: raise before this many batches were measured.
    """

    name, primary_metric, unit, dataset, split = "nearness", "nearness", "image", "Nearness", None

    def __init__(self, folder, calls=None, stop=None):
        self.folder, self.calls, self.stop = Path(folder), [] if calls is None else calls, stop
        self.settings, self.files = {}, [Path(folder) / "words.json"]

    def prepare(self, model, images):
        """Read the images."""
        paths = sorted(self.folder.glob("*.png"))
        read = images.read({path.stem: path for path in paths} | {"absent": self.folder / "absent.png"})

        def measure(numbers):
            if len(self.calls) == self.stop:
                raise KeyboardInterrupt
            self.calls.append(numbers)
            texts = embed_prompts(model, [["w5", read.features[n], f"w{6 + n} " * n] for n in numbers])
            pictures = model.embed_images(image_features=read.features[numbers])
            return [{"nearness": float(v)} for v in torch.linalg.vecdot(texts, pictures)]

        return Plan(read.names, measure, read.missing, {"words": 1})

    def score(self, records):
        """Return the mean."""
        return Scores({"nearness": [[record["nearness"]] for record in records]}, {"units": float(len(records))})
