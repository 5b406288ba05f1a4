"""Imitation by squared distances or by distances, from several seeds, and with fewer concepts to fit to.

    RECIPE_CACHE=demo/cache python imitation_loss.py losses [SEED ...]
    RECIPE_CACHE=demo/cache python imitation_loss.py concepts [PART ...]

Image tokens are fitted to four fifths of the training families behind the package's caption prompt: 100 steps of
imitation at layer 8, of 128 images. "losses" measures caption pairs then (every second held-out concept, names and
sentences, four wrong pictures). "concepts" fits to a part of the families, adds 20 captioning steps of 32, and measures
all held-out concepts, also by the vectors of the retrieval space. Float32. Writes results/imitation_loss.json.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from caption_prompts import Pictures
from data import Data, families
from fitting import Form, Maps, Moments, Solver, unit
from image_tokens import Captioner, pair_accuracy, word_targets
from imitation import Imitation, mean_square
from lm import CACHE, Kept, States, load
from torch import Tensor

from visual_ground import GroundingConfig
from visual_ground.training.initialization.data_dependent import mean_distance

LOSSES = {"squares": mean_square, "distances": mean_distance}
# What `Pictures` keeps the names' states under, and the sentences'.
KEPT = ("caption_prompts", "captions1")


class Study(Pictures):
    """As `Pictures`, with both kinds of captions in the retrieval space and in what is measured.

    Args:
        lm: the LM.
        data: the concepts.
        captioner: runs the caption prompt.
        part: of the families fitted to, at random.
    """

    def __init__(self, lm: torch.nn.Module, data: Data, captioner: Captioner, part: float = 1.0) -> None:
        super().__init__(lm, data)
        self.captioner, self.captions = captioner, [data.captions(kind) for kind in (0, 1)]
        of, draw = families(data), random.Random(1)
        kept = sorted({of[i] for i in self.fitted})
        draw.shuffle(kept)
        kept = set(kept[: int(part * len(kept))])
        states = Kept(CACHE / "recipe" / "smollm2-fp32", States(lm, self.table.weight.mean(0)))
        looks = {"looks": data.ids(" It looks like a")}
        read = [
            states.get(name, [data.caption(text) for text in texts], looks, 1)["looks"]
            for name, texts in zip(KEPT, self.captions, strict=True)
        ]
        self.texts = [unit(one[:, -1].float()) for one in read]
        self.fit_to([i for i in self.fitted if of[i] in kept])

    def fit_to(self, concepts: list[int]) -> None:
        """Take these concepts as what is fitted to, and give each picture its place in their retrieval space."""
        self.fitted, self.places = concepts, torch.tensor(concepts)
        self.words = word_targets(self.data, self.table.weight.detach(), concepts)
        maps = self._maps(beta=1)
        z = (self.data.features - maps.image_mean) @ maps.image.T
        self.z = z / z[self.places].square().mean().sqrt()

    def _maps(self, beta: float) -> Maps:
        pairs = [(texts[self.places], self.data.features[self.places, n]) for texts in self.texts for n in (0, 1)]
        texts, images = (torch.cat(side) for side in zip(*pairs, strict=True))
        return Solver(Moments.of(texts, images)).solve(Form(a=1, b=3, beta=beta))

    def imitate(self, seed: int, loss: str) -> tuple[Tensor, Tensor]:
        """Return weight and bias after imitation."""
        imitation, own = Imitation(self.lm, self.captioner, (8,)), self.z[self.places]
        wanted = imitation.told(self.fitted)
        start = self._closed()
        return imitation.fit(own, start, wanted, self.mean, self.std, batch=128, seed=seed, measure=LOSSES[loss])

    def captioned(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias after captioning steps."""
        base = Imitation(self.lm, self.captioner, (8,)).base
        return self._steps(self.captioner, base, weight, bias, steps=20, batch=32)

    def pairs(self, weight: Tensor, bias: Tensor, every: int = 1) -> float:
        """Return the percentage of caption pairs told by likelihoods."""
        chosen = self.held_out[::every]
        rows = (self.mean + self.std * (self.z @ weight.T + bias))[:, :, None]
        own = torch.stack([rows[i, n // 2 % 2] for n, i in enumerate(chosen)])
        return pair_accuracy(self.captioner, own, [self.captions[n % 2][i] for n, i in enumerate(chosen)], 4)

    def shared(self) -> float:
        """Return the percentage of all pairs of held-out captions and pictures told by vectors."""
        maps, held_out = self._maps(beta=0.5), list(enumerate(self.held_out))
        texts = torch.stack([maps.texts(self.texts[n % 2][i]) for n, i in held_out])
        images = torch.stack([maps.images(self.data.features[i, n // 2 % 2]) for n, i in held_out])
        scores, others = texts @ images.T, ~torch.eye(len(held_out), dtype=torch.bool)
        return round(100 * float((scores.diagonal()[:, None] > scores)[others].double().mean()), 1)


def main() -> None:
    """Measure, write."""
    what, *given = sys.argv[1:]
    lm, tokenizer = load("smollm2")
    data = Data(tokenizer)
    captioner, out = Captioner(lm, tokenizer, data, GroundingConfig().image_prompt), Path(__file__).parent / "results"
    out = out / "imitation_loss.json"
    known = json.loads(out.read_text()) if out.exists() else {}
    for one in given or (("0", "2") if what == "losses" else ("0.25", "0.5", "1")):
        found: dict[str, object] = {}
        study = Study(lm, data, captioner, 1.0 if what == "losses" else float(one))
        if what == "losses":
            for loss in LOSSES:
                found[loss] = {"pairs": study.pairs(*study.imitate(int(one), loss), every=2)}
        else:
            pairs = study.pairs(*study.captioned(*study.imitate(0, "distances")))
            found = {"concepts": len(study.fitted), "pairs": pairs, "shared_space": study.shared()}
        print(what, one, found, flush=True)
        known.setdefault(what, {})[one] = found
        out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
