"""Law i of the design, property by property, for one architecture: what its base can do, the grounded one does too.

A property comes out as "yes", or as "base cannot" with the reason that the base itself gave, without anything attached,
in the same test. Anything else is an AssertionError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.builder import VOCABULARY, build
from tests.tiny import Eye, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, RetrievedImage, ground
from visual_ground.generation.retrieval_token import RetLogitsProcessor, RetrievalSettings
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.losses.objective import GroundingObjective

TEXT = torch.tensor([[5, 17, 23, 40, 61, 33, 12]])
SHORT = TEXT[:, :4]
LONGER = torch.tensor([[1, 5, 6, 50, 50, 7, 8, 7, 8, 9]])
PROMPT = ["w5 w6", picture(1), "w7 w8 w7 w8"]
NEW = 5
GREEDY: dict[str, Any] = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


@dataclass
class Case:
    """One architecture: its base, and the same model grounded.

    Args:
        model_type: its name in transformers' mapping.
        num_tokens: tokens of the tokenizer; fewer than the LM has rows give `[RET]` a spare id.
    """

    model_type: str
    num_tokens: int = VOCABULARY
    base: nn.Module = field(init=False)
    lm: nn.Module = field(init=False)
    model: GroundedModel = field(init=False)
    thawed: list[bool] = field(init=False)
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        # Frozen as the grounded one will be: some architectures add up in another order where gradients are wanted.
        self.base, self.lm = build(self.model_type).requires_grad_(False), build(self.model_type)
        self.thawed = [parameter.requires_grad for parameter in self.lm.parameters()]
        self.before = {name: value.clone() for name, value in self.lm.state_dict().items()}
        self.model = grounded(self.lm, self.num_tokens)

    @property
    def ret(self) -> int:
        """The id of `[RET]`."""
        return self.model.ret_token_id


def grounded(lm: nn.Module, num_tokens: int = VOCABULARY) -> GroundedModel:
    """Ground an LM with a tiny encoder; the adapter's weights are large enough to matter."""
    # States are read at `[RET]`, so that its input embedding has a part in the losses.
    prompts = {"caption_prompt": "w7 w8", "image_prompt": "w7 {image} w8", "retrieval_prompt": ""}
    config = GroundingConfig(retrieval_dim=6, num_visual_tokens=2, **prompts)
    torch.manual_seed(0)
    model = ground(lm, Eye(), tokenizer(num_tokens), image_processor, config).eval()
    with torch.no_grad():
        model.adapter.image_projection.weight.mul_(10)
        model.adapter.ret_input.add_(torch.randn_like(model.adapter.ret_input) * 0.1)
    return model


class BaseCannot(Exception):
    """The base itself, with nothing attached, does not do this."""


def whatever_the_base_does(base: Callable[[], None], ours: Callable[[], None]) -> None:
    """Run `ours`, unless `base` fails."""
    try:
        base()
    except Exception as error:  # whatever an architecture raises is its own reason
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseCannot(reason[:160]) from error
    ours()


@torch.no_grad()
def text(case: Case) -> None:
    """Text-only logits, states and greedy text are the base's; [RET] is the only column more that can be said."""
    base, model = case.base(input_ids=TEXT).logits, case.model(TEXT).logits
    keep = [i for i in range(base.shape[-1]) if i != case.ret]
    assert torch.equal(model[..., keep], base[..., keep])
    said = torch.isfinite(model).all(1)[0].nonzero()[:, 0].tolist()
    assert said == sorted({*torch.isfinite(base).all(1)[0].nonzero()[:, 0].tolist(), case.ret})
    with case.model.disable_adapter():
        assert torch.equal(case.model(TEXT).logits, base)
    said: list[Tensor] = []
    options = dict(GREEDY, suppress_tokens=[case.ret])
    whatever_the_base_does(
        lambda: said.append(case.base.generate(input_ids=TEXT, **options)),
        lambda: same(case.lm.generate(input_ids=TEXT, **options), said[0]),
    )


def same(ours: Tensor, theirs: Tensor) -> None:
    """Assert that two tensors of ids are equal."""
    assert ours.tolist() == theirs.tolist()


@torch.no_grad()
def images(case: Case) -> None:
    """One image, and several between words, each with its own effect, on what comes after it only."""
    causal = is_causal(case.base)
    for prompt, changed, start in (
        (["w5 w6", picture(1), "w7 w8"], ["w5 w6", picture(2), "w7 w8"], 3),
        (["w5", picture(1), "w6", picture(2), "w7 w8"], ["w5", picture(1), "w6", picture(3), "w7 w8"], 5),
    ):
        batches = [case.model.prepare([p]) for p in (prompt, changed)]
        one, two = (case.model(**batch).logits for batch in batches)
        assert one.shape[:2] == batches[0]["input_ids"].shape
        assert not torch.isfinite(one[..., case.model.frozen_lm.vocabulary.first_image_id :]).any()
        finite = torch.isfinite(one)
        assert torch.equal(finite, torch.isfinite(two)) and finite[..., case.ret].all() and finite[..., 10:80].all()
        moved = torch.where(finite, (one - two).abs(), 0).amax(-1)[0]
        assert moved[start:].max() > 1e-5, "the image has no effect"
        if causal:
            assert moved[:start].max() <= 1e-4, "the image changes what stands before it"


@torch.no_grad()
def is_causal(base: nn.Module) -> bool:
    """Whether the base's logits depend on what comes before only."""
    other = TEXT.clone()
    other[0, -1] = 70
    first, second = base(input_ids=TEXT).logits, base(input_ids=other).logits
    return torch.allclose(first[:, :-1], second[:, :-1], atol=1e-4)


def objective(model: GroundedModel) -> Tensor:
    """Return all losses of a batch of three."""
    rows = [{"image": picture(i), "caption": f"w{10 + i} w{20 + 2 * i} w9"} for i in range(3)]
    dataset = ExampleDataset(rows, sample=False)
    batch = ExampleCollator(model, concat_captions_prob=0.0)([dataset[i] for i in range(3)])
    return GroundingObjective(model)(**batch).loss


def carries_gradients(base: nn.Module) -> None:
    """Assert that gradients pass through the base to its embeddings, with nothing attached."""
    shift = torch.zeros((), requires_grad=True)
    handle = base.get_input_embeddings().register_forward_hook(lambda module, args, output: output + shift)
    try:
        base(input_ids=TEXT, use_cache=False).logits.logsumexp(-1).sum().backward()
    finally:
        handle.remove()
    assert shift.grad is not None, "it passes no gradients to its embeddings"


def gradients(case: Case) -> None:
    """Every tensor of the adapter gets a gradient, and nothing of the LM or the encoder."""

    def ours() -> None:
        case.model.zero_grad()
        loss = objective(case.model)
        assert torch.isfinite(loss)
        loss.backward()
        for name, parameter in case.model.adapter.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name
        frozen = [*case.lm.named_parameters(), *case.model.vision.named_parameters()]
        assert not [name for name, parameter in frozen if parameter.requires_grad or parameter.grad is not None]

    whatever_the_base_does(lambda: carries_gradients(case.base), ours)


def step(case: Case) -> None:
    """An optimizer step changes the adapter, lowers the loss, and changes nothing else."""

    def ours() -> None:
        parameters = [p for p in case.model.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = objective(case.model)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[1] < losses[0]
        assert not [i for i, (a, b) in enumerate(zip(start, parameters, strict=True)) if torch.equal(a, b)]
        unchanged(case)

    whatever_the_base_does(lambda: carries_gradients(case.base), ours)


def unchanged(case: Case) -> None:
    """Assert that the LM's state dict is bit for bit what it was."""
    now = case.lm.state_dict()
    assert now.keys() == case.before.keys()
    assert not [name for name, value in now.items() if not torch.equal(value, case.before[name])]


def agrees_with_uncached(answer: Any, start: int, forward: Callable[[Tensor], Tensor]) -> None:
    """Assert that each step of an answer, from a cache, had the logits that reading everything anew gives."""
    for stop in range(start, answer.sequences.shape[1]):
        anew = forward(answer.sequences[:, :stop])[:, -1]
        close(answer.logits[stop - start], anew, "its cached decoding differs from its uncached")


@torch.no_grad()
def ret(case: Case) -> None:
    """`[RET]` is said, read again, and the rest is said after it; with a cache as without, as far as the base's is."""
    options = dict(GREEDY, return_dict_in_generate=True, output_logits=True)

    def base() -> None:
        for text in (TEXT, LONGER):
            answer = case.base.generate(input_ids=text, **options)
            agrees_with_uncached(answer, text.shape[1], lambda ids: case.base(input_ids=ids).logits)

    def ours() -> None:
        batch = case.model.prepare([PROMPT])
        ids, steer = batch["input_ids"], RetrievalSettings(max_images=1, ret_bias=1e6)
        with case.model.frozen_lm.bind(case.model.active.image_tokens(batch["pixel_values"])):
            processors = [RetLogitsProcessor(case.ret, ids.shape[1], steer)]
            answer = case.lm.generate(input_ids=ids, logits_processor=processors, **options)
            agrees_with_uncached(answer, ids.shape[1], lambda ids: case.model.frozen_lm.run(ids).logits)
        assert (answer.sequences[0, ids.shape[1] :] == case.ret).tolist() == [True] + [False] * (NEW - 1)
        out = case.model.generate([PROMPT], max_images=1, ret_bias=1e6, max_new_tokens=NEW, min_new_tokens=NEW)[0]
        assert isinstance(out.parts[0], RetrievedImage)

    whatever_the_base_does(base, ours)


@torch.no_grad()
def left_padding(case: Case) -> None:
    """A short prompt padded on the left to a longer one's length is read as it is alone."""
    ids = torch.cat([TEXT, nn.functional.pad(SHORT, (TEXT.shape[1] - SHORT.shape[1], 0))])
    mask = torch.ones_like(ids)
    mask[1, : -SHORT.shape[1]] = 0

    def base() -> None:
        alone = [case.base(input_ids=part).logits[0, -1] for part in (TEXT, SHORT)]
        options: dict[str, Any] = {"attention_mask": mask}
        if case.model.frozen_lm.takes_positions:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        batch = case.base(input_ids=ids, **options).logits[:, -1]
        close(batch, torch.stack(alone), "it reads a left-padded prompt in another way than the prompt alone")

    def ours() -> None:
        prompts = [["w5 w6", picture(1), "w7 w8 w9"], ["w5", picture(2)]]
        batch = case.model(**case.model.prepare(prompts)).logits[:, -1]
        alone = [case.model(**case.model.prepare([prompt])).logits[0, -1] for prompt in prompts]
        width = min(alone[0].shape[0], alone[1].shape[0])
        close(batch[:, :width], torch.stack([row[:width] for row in alone]), "a padded prompt is read in another way")

    whatever_the_base_does(base, ours)


def close(ours: Tensor, theirs: Tensor, otherwise: str) -> None:
    """Assert that finite logits agree."""
    finite = torch.isfinite(ours) & torch.isfinite(theirs)
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs)), otherwise
    assert torch.allclose(ours[finite], theirs[finite], atol=1e-3 * max(1.0, float(theirs[finite].std()))), otherwise


@torch.no_grad()
def beams(case: Case) -> None:
    """Beam search with a cache says what it says without, over an image and a `[RET]` in the prompt.

    Not compared with the base's text: beams are ranked by probabilities, of which `[RET]` has a part.
    """
    options = dict(GREEDY, num_beams=3)

    def base() -> None:
        plain = case.base.generate(input_ids=TEXT, use_cache=False, **options)
        assert torch.equal(case.base.generate(input_ids=TEXT, **options), plain), (
            "its cached beams differ from uncached"
        )

    def ours() -> None:
        batch = case.model.prepare([PROMPT])
        ids = torch.cat([batch["input_ids"], torch.tensor([[case.ret, 9]])], 1)
        with case.model.frozen_lm.bind(case.model.active.image_tokens(batch["pixel_values"])):
            plain = case.lm.generate(input_ids=ids, use_cache=False, **options)
            same(case.lm.generate(input_ids=ids, **options), plain)
        assert len(case.model.generate([PROMPT], num_beams=3, max_new_tokens=NEW)) == 1

    whatever_the_base_does(base, ours)


@torch.no_grad()
def processors(case: Case) -> None:
    """A repetition penalty and no repeated n-grams, which gather logits by the prompt's ids, run over ours too."""
    options = dict(repetition_penalty=1.3, no_repeat_ngram_size=2)
    said: list[Tensor] = []
    plain = dict(GREEDY, suppress_tokens=[case.ret], **options)

    def ours() -> None:
        same(case.lm.generate(input_ids=TEXT, **plain), said[0])
        out = case.model.generate(
            [PROMPT], max_images=1, ret_bias=1e6, max_new_tokens=NEW, min_new_tokens=NEW, **options
        )
        assert sum(isinstance(part, RetrievedImage) for part in out[0].parts) == 1

    whatever_the_base_does(lambda: said.append(case.base.generate(input_ids=TEXT, **plain)), ours)


def spare_id(case: Case) -> None:
    """All but training, where `[RET]` takes an id that the LM has and its tokenizer does not, and so a column too."""
    spare = Case(case.model_type, VOCABULARY - 5)
    assert spare.ret == VOCABULARY - 5 and spare.model(TEXT).logits.shape[-1] >= VOCABULARY
    for check in (text, images, ret, unground):
        with contextlib.suppress(BaseCannot):
            check(spare)


@torch.no_grad()
def unground(case: Case) -> None:
    """The LM that comes back is the LM that went in: state dict, hooks, gradients' flags, outputs."""
    lm = case.model.unground()
    unchanged(case)
    hooks = [module for module in lm.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert len(hooks) == len([m for m in case.base.modules() if m._forward_hooks or m._forward_pre_hooks])
    assert [parameter.requires_grad for parameter in lm.parameters()] == case.thawed
    assert torch.equal(lm.requires_grad_(False)(input_ids=TEXT).logits, case.base(input_ids=TEXT).logits)


PROPERTIES: dict[str, Callable[[Case], None]] = {
    "text": text,
    "images": images,
    "gradients": gradients,
    "step": step,
    "ret": ret,
    "left_padding": left_padding,
    "beams": beams,
    "processors": processors,
    "spare_id": spare_id,
    "unground": unground,
}
