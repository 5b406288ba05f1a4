"""How much the order of the steps decides of image tokens, and whether the mean of several orders tells more.

    RECIPE_CACHE=demo/cache python orders.py ADAPTER

Imitation and captioning steps of `fit`, in three orders each, with the retrieval layers of the demo's adapter. Measures
caption pairs on validation: both captions with both drawings of each concept, four wrong pictures. Writes
results/orders.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from adapters import load_adapter
from lm import CACHE
from torch import Tensor

from visual_ground.demo import emoji
from visual_ground.demo.run import fit_arguments
from visual_ground.evaluation.captions import caption_pair_accuracy
from visual_ground.evaluation.pairs import image_features
from visual_ground.fitting.autocast import autocast_lm
from visual_ground.training import setup
from visual_ground.training.fast_paths import set_compute_plan
from visual_ground.training.initialization.captions import start_captions
from visual_ground.training.initialization.data_dependent import evenly_sampled, start_image_tokens
from visual_ground.training.initialization.retrieval import batched
from visual_ground.training.initialization.statistics import first_examples
from visual_ground.training.losses.objective import GroundingObjective

ORDERS = range(3)
Layer = list[Tensor]


class Study:
    """What steps are run on, and what is measured.

    Args:
        adapter: the demo's, in a folder, whose image projection is replaced again and again.
    """

    def __init__(self, adapter: str) -> None:
        self.model, self.pairs = model, pairs = load_adapter(adapter)
        model.adapter.train().requires_grad_(True)
        self.parameters = list(model.adapter.image_projection.parameters())
        args = fit_arguments(Path(tempfile.gettempdir()), CACHE)
        self.dtype = torch.bfloat16 if args.bf16 else None
        examples = setup.training_examples(pairs.examples(), setup.data_preparation(model, args))
        self.objective, self.collate = GroundingObjective(model), setup.build_collator(model, args)
        plan_batch = self.collate(first_examples(examples, setup.PLAN_EXAMPLES))
        set_compute_plan(self.objective, plan_batch, args, sharded=False)
        self.sampled = evenly_sampled(examples)
        self.features = torch.cat([image_features(model, batch) for batch in batched(self.sampled)])
        self.groups = [i for i in pairs.numbers("validation") for _ in emoji.STYLES for _ in (0, 1)]
        self.captions = [emoji.captions(pairs.concepts[i])[n % 2] for n, i in enumerate(self.groups)]
        self.shown = torch.stack([pairs.features[i, n // 2 % 2] for n, i in enumerate(self.groups)])

    def imitate(self, order: int) -> Layer:
        """Return the layer after imitation."""
        with autocast_lm(self.model.lm, self.dtype):
            start_image_tokens(self.model, self.sampled, self.features, seed=order)
        return self.layer()

    def caption(self, layer: Layer, order: int) -> Layer:
        """Return the layer after captioning steps from this one."""
        self.put(layer)
        with autocast_lm(self.model.lm, self.dtype):
            start_captions(self.objective, self.sampled, self.features, self.collate, seed=order)
        return self.layer()

    def layer(self) -> Layer:
        """Return a copy of the layer of image tokens."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def put(self, layer: Layer) -> None:
        """Make this the layer of image tokens."""
        for parameter, value in zip(self.parameters, layer, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def told(self, layer: Layer) -> float:
        """Return the percentage of caption pairs told with this layer."""
        self.put(layer)
        with autocast_lm(self.model.lm, self.dtype):
            groups = torch.tensor(self.groups)
            return round(caption_pair_accuracy(self.model, self.captions, self.shown, groups=groups), 1)


def mean(layers: Sequence[Layer]) -> Layer:
    """Return the mean of layers, which is as good as the mean of their image tokens."""
    return [torch.stack(same).mean(0) for same in zip(*layers, strict=True)]


def main() -> None:
    """Fit, measure, write."""
    study = Study(sys.argv[1])
    imitated = [study.imitate(order) for order in ORDERS]
    captioned = [[study.caption(layer, order) for order in ORDERS] for layer in imitated]
    found = {
        "imitations": [study.told(layer) for layer in imitated],
        "captioning_steps": [[study.told(layer) for layer in of_one] for of_one in captioned],
        "means_of_captioning_steps": [study.told(mean(of_one)) for of_one in captioned],
        "mean_of_imitations": study.told(mean(imitated)),
        "mean_of_all": study.told(mean([layer for of_one in captioned for layer in of_one])),
    }
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "results" / "orders.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
