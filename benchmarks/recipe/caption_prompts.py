"""What stands before and behind an image in the captioning prompt: what each wording makes of words, and of pictures.

    RECIPE_CACHE=demo/cache python caption_prompts.py words [smollm2|gemma3]
    RECIPE_CACHE=demo/cache python caption_prompts.py pictures

"words" puts the mean embedding of a thing's words in the image's place, so nothing is fitted: what an LM makes of it is
the most that any image token can give (validation concepts, three wrong ones each, captions that are names). "pictures"
fits image tokens to four fifths of the training families, by imitation at layer 8 and 10 captioning steps of 16, as the
package does, and measures on the rest and on the validation concepts (two wrong ones). Writes
results/caption_prompts.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from data import Data, families
from fitting import Form, Moments, Solver, folds, unit
from image_tokens import Captioner, names_said, pair_accuracy, word_targets
from imitation import Imitation
from lm import CACHE, Kept, States, load
from torch import Tensor
from transformers.cache_utils import DynamicCache

WORDS = (
    "{image}:",
    "{image} means",
    "The word {image} means",
    "Image of {image}:",
    "A picture of {image}. It shows",
    "A picture of {image}. The picture shows",
    "cat: a cat. house: a house. {image}:",
    "Picture of a dog: a brown dog sits. Picture of {image}:",
    "Image of cat: cat; Image of red car: red car; Image of {image}:",
    "Image of cat: a cat. Image of house: a house. Image of {image}:",
    "Image of cat: A cat. Image of red car: A red car. Image of happy child: A happy child. Image of {image}:",
    "A picture of cat. The picture shows a cat. A picture of red car. The picture shows a red car. "
    "A picture of {image}. The picture shows",
)
PICTURES = (WORDS[3], WORDS[9], WORDS[10], WORDS[11])
STEPS, BATCH = 10, 16
# The package's, see `training.initialization.captions`.
BIAS_STEP, WEIGHT_STEP = 0.06, 0.08


def of_words(lm: torch.nn.Module, data: Data, captioner: Captioner) -> dict[str, object]:
    """Measure what the LM makes of words in the image's place."""
    train, held_out = data.split["train"], data.split["validation"]
    # Gemma's embeddings are scaled as they are looked up.
    table = lm.get_input_embeddings()
    rows = word_targets(data, table(torch.arange(table.num_embeddings)).detach().float(), train)[:, None]
    names, seen = data.captions(0), train[::29]
    return {
        "pair_accuracy": pair_accuracy(captioner, rows[held_out], [names[i] for i in held_out], 3),
        "name_or_keyword_said": names_said([data.concepts[i] for i in seen], captioner.captions(rows[seen], 8)),
    }


class Pictures:
    """Image tokens fitted to four fifths of the training families, and measured on the other concepts.

    Args:
        lm: the LM.
        data: the concepts.
    """

    def __init__(self, lm: torch.nn.Module, data: Data) -> None:
        self.lm, self.data, self.table = lm, data, lm.get_input_embeddings()
        train, of = data.split["train"], families(data)
        part = folds([of[i] for i in train], 5, 0).tolist()
        self.fitted = [i for i, n in zip(train, part, strict=True) if n]
        self.held_out = data.split["validation"] + [i for i, n in zip(train, part, strict=True) if not n]
        self.places, x = torch.tensor(self.fitted), data.features
        states = Kept(CACHE / "recipe" / "smollm2-fp32", States(lm, self.table.weight.mean(0)))
        names, looks = [data.caption(text) for text in data.captions(0)], {"looks": data.ids(" It looks like a")}
        texts = unit(states.get("caption_prompts", names, looks, 1)["looks"][:, -1].float())
        moments = Moments.of(texts[self.places], x[self.places, 0]) + Moments.of(texts[self.places], x[self.places, 1])
        maps = Solver(moments).solve(Form(a=1, b=3, beta=1))
        z = (x - maps.image_mean) @ maps.image.T
        self.z = z / z[self.places].square().mean().sqrt()
        self.mean, self.std = self.table.weight.mean(0), self.table.weight.std(0)
        self.words = word_targets(data, self.table.weight.detach(), self.fitted)

    def __call__(self, captioner: Captioner) -> dict[str, object]:
        """Fit, and measure."""
        imitation = Imitation(self.lm, captioner, (8,))
        own = self.z[self.places]
        weight, bias = imitation.fit(own, self._closed(), imitation.told(self.fitted), self.mean, self.std)
        weight, bias = self._steps(captioner, imitation.base, weight, bias)
        rows, names = (self.mean + self.std * (self.z @ weight.T + bias))[:, :, None], self.data.captions(0)
        unseen = torch.stack([rows[i, n % 2] for n, i in enumerate(self.held_out)])
        said, seen = {}, self.fitted[::16]
        for kind, chosen in (("unseen", self.held_out[:40]), ("seen", seen)):
            concepts = [self.data.concepts[i] for i in chosen]
            said[kind] = names_said(concepts, captioner.captions(rows[chosen, 0]))
        found = pair_accuracy(captioner, unseen, [names[i] for i in self.held_out], 2)
        return {"pair_accuracy": found, "name_or_keyword_said": said}

    def _closed(self, penalty: float = 10.0) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a ridge regression to the words' embeddings, which are as spread as these."""
        own = self.z[self.places].flatten(0, 1)
        aims = ((self.words - self.mean) / self.std)[self.places].repeat_interleave(self.z.shape[1], 0)
        middle, centre = aims.mean(0), own.mean(0)
        own = own - centre
        gram = own.T @ own / len(own)
        penalised = gram + torch.eye(len(gram)) * gram.diagonal().mean() * penalty
        weight = torch.linalg.solve(penalised, own.T @ (aims - middle) / len(own)).T
        weight = weight * aims.std(0).norm() / (own @ weight.T).std(0).norm()
        return weight, middle - weight @ centre

    def _steps(
        self,
        captioner: Captioner,
        base: DynamicCache,
        weight: Tensor,
        bias: Tensor,
        steps: int = STEPS,
        batch: int = BATCH,
    ) -> tuple[Tensor, Tensor]:
        """Return weight and bias after the captioning steps."""
        ids = [[self.data.ids(" " + text) for text in self.data.captions(kind)] for kind in (0, 1)]
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        groups = [{"params": [weight], "lr": WEIGHT_STEP / weight.shape[1]}, {"params": [bias], "lr": BIAS_STEP}]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        draw = torch.Generator().manual_seed(0)
        for _ in range(steps):
            chosen = torch.randint(len(self.fitted), (batch,), generator=draw).tolist()
            kinds = torch.randint(2, (2, batch), generator=draw).tolist()
            z = torch.stack([self.z[self.fitted[i], style] for i, style in zip(chosen, kinds[0], strict=True)])
            texts = [ids[kind][self.fitted[i]] for i, kind in zip(chosen, kinds[1], strict=True)]
            rows = self.mean + self.std * (z @ weight.T + bias)
            optimizer.zero_grad()
            torch.autograd.backward(self._loss(captioner, base, rows, texts))
            optimizer.step()
            schedule.step()
        return weight.detach(), bias.detach()

    def _loss(self, captioner: Captioner, base: DynamicCache, rows: Tensor, texts: list[tuple[int, ...]]) -> Tensor:
        """Return the mean cross entropy of texts, each behind its row, (b, d)."""
        count, length = len(rows), max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
        mask = torch.tensor([[1.0] * len(text) + [0.0] * (length - len(text)) for text in texts])
        cache = DynamicCache()
        for n, layer in enumerate(base.layers):
            cache.update(layer.keys.expand(count, -1, -1, -1), layer.values.expand(count, -1, -1, -1), n)
        after = self.table(captioner.after).expand(count, -1, -1)
        read = torch.cat([rows[:, None], after, self.table(ids[:, :-1])], 1)
        states = self.lm.get_decoder()(inputs_embeds=read, cache=cache, use_cache=True).last_hidden_state
        logits = self.lm.lm_head(states[:, after.shape[1] :])
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
        return (losses.view_as(mask) * mask).sum() / mask.sum()


def main() -> None:
    """Measure each prompt, write."""
    what, name = (*sys.argv[1:], "smollm2")[:2]
    lm, tokenizer = load(name)
    data = Data(tokenizer)
    measure = Pictures(lm, data) if what == "pictures" else lambda captioner: of_words(lm, data, captioner)
    out = Path(__file__).parent / "results" / "caption_prompts.json"
    for prompt in PICTURES if what == "pictures" else WORDS:
        found = measure(Captioner(lm, tokenizer, data, prompt))
        print(prompt, found, flush=True)
        known = json.loads(out.read_text()) if out.exists() else {}
        known.setdefault(f"{name}, {what}", {})[prompt] = found
        out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
