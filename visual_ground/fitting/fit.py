"""`fit`: a whole adapter in minutes, by closed-form fits and a few short optimisations, without a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from visual_ground.adapter.initialization import initialize_from_lm
from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.evaluation.pairs import image_features
from visual_ground.fitting.autocast import autocast_lm
from visual_ground.model import GroundedModel
from visual_ground.progress import counted
from visual_ground.training import setup
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.data.columns import is_stream
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.fast_paths import set_compute_plan
from visual_ground.training.initialization.captions import start_captions
from visual_ground.training.initialization.data_dependent import evenly_sampled, start_image_tokens
from visual_ground.training.initialization.emission import finish_emission, start_emission
from visual_ground.training.initialization.ret_token import fit_ret
from visual_ground.training.initialization.retrieval import BATCH_SIZE, batched, fit_prompts, fit_retrieval
from visual_ground.training.initialization.statistics import first_examples, standardise
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.losses.retrieval import CaptionLikelihoods


def fit(model: GroundedModel, pairs: Any, args: GroundingTrainingArguments | None = None) -> None:
    """Fit a whole adapter to image-caption pairs in minutes; what it had learnt before is replaced.

    The retrieval layers are fitted to all pairs in closed form, from second moments, so that memory does not grow with
    their number; image tokens and `[RET]` to at most 6,144 pairs. `GroundingTrainer` may continue from there.

    Args:
        model: the grounded model; its adapter is fitted in place, or, if anything fails, left as it was.
        pairs: rows with images and captions, as for `GroundingTrainer`. If rows have a `request`, requests and
            captions are fitted together; if none has, captions are also put into requests.
        args: where the columns, the caches and the device are, and with `bf16` or `fp16` that the LM reads in mixed
            precision; the settings of steps are not used.

    Raises:
        GroundingTypeError: not a `GroundedModel`, or a stream.
        GroundingValueError: a dataset that cannot be used, pairs of one group only, features that are all the same or
            not finite, or an adapter with `scaling="none"`, whose layers have no closed form.
        GroundingStateError: an adapter that is frozen, or whose image side is.

    Example:
        >>> fit(model, pairs)  # doctest: +SKIP
    """
    _check(model, pairs)
    args = GroundingTrainingArguments(prefix_cache_gb=1.0) if args is None else args
    examples = setup.training_examples(pairs, setup.data_preparation(model, args))
    assert isinstance(examples, ExampleDataset), "streams are refused"
    before = {name: tensor.detach().clone() for name, tensor in model.adapter.state_dict().items()}
    try:
        _fit(model, examples, args)
    except BaseException:
        model.adapter.load_state_dict(before)
        raise
    settings = {"method": "closed form", "pairs": len(examples), "library_version": version("visual-ground")}
    model.active.record_training(settings)


def _check(model: GroundedModel, pairs: Any) -> None:
    if not isinstance(model, GroundedModel):
        raise GroundingTypeError(f"fit needs a GroundedModel, got {type(model).__name__}; make one with ground().")
    if is_stream(pairs):
        raise GroundingTypeError("fit reads its pairs twice, and got a stream; give a list or a dataset with a length.")
    # An earlier fit may have left the embeddings of `[RET]` as what is no longer trained.
    trained = [p for name, p in model.adapter.named_parameters() if not name.startswith("ret_")]
    if not all(parameter.requires_grad for parameter in trained):
        raise GroundingStateError(
            "The adapter, or its image side, is frozen. Fit a new one, or load it with is_trainable=True."
        )
    if model.config.scaling == "none":
        raise GroundingValueError('fit needs scaling="embedding", got "none". Train such an adapter instead.')


def _fit(model: GroundedModel, examples: ExampleDataset, args: GroundingTrainingArguments) -> None:
    _forget(model)
    standardise(model, examples)
    objective, collator = GroundingObjective(model), setup.build_collator(model, args)
    set_compute_plan(objective, collator(first_examples(examples, setup.PLAN_EXAMPLES)), args, sharded=False)
    sampled = evenly_sampled(examples)
    with autocast_lm(model.lm, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None):
        folder = Path(args.features_folder, setup.ANSWERS_FOLDER)
        begun = start_emission(model, sampled, folder, args.shows_progress)
        pairs = fit_retrieval(objective, _read(examples, args, "captions and requests"), collator, steps_follow=False)
        features = torch.cat([image_features(model, batch) for batch in batched(sampled)])
        start_image_tokens(model, sampled, features, progress=args.shows_progress)
        start_captions(objective, sampled, features, collator, progress=args.shows_progress)
        finish_emission(model, begun, sampled, features, folder, args.shows_progress)
        fit_prompts(objective, pairs, _read(examples, args, "prompts"), collator)
        if begun is None:
            _fit_ret_token(objective, sampled, collator)


def _read(
    examples: ExampleDataset, args: GroundingTrainingArguments, what: str
) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Yield all examples in batches, twice: a row's several images and captions take turns."""
    count = 2 * len(examples)
    batches = batched(examples[i] for i in range(count))
    yield from counted(batches, f"fit: {what}", "batches", args.shows_progress, -(-count // BATCH_SIZE))


@torch.no_grad()
def _forget(model: GroundedModel) -> None:
    """Give the adapter the start values of a new one."""
    adapter = model.adapter
    adapter.feature_mean.zero_()
    adapter.feature_std.fill_(1)
    initialize_from_lm(adapter, model.frozen_lm)


def _fit_ret_token(
    objective: GroundingObjective, sampled: Sequence[Mapping[str, Any]], collator: ExampleCollator
) -> None:
    """Fit where `[RET]` is said, if the LM can read captions up to it and continue from there."""
    if objective.prefixes is not None:
        batches = [collator.texts(batch) for batch in batched(sampled)]
        likelihoods = [objective.prefixes.likelihoods(batch) for batch in batches]
        fit_ret(objective.model.adapter, CaptionLikelihoods.joined(likelihoods))
