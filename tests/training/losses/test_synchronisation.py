"""A training step asks no tensor for a number: on a GPU each such question waits until all earlier work is done."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import grounded
from tests.training.losses.test_objective import batch_of
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.captioning import ComputePlan
from visual_ground.training.losses.objective import GroundingObjective

ASKING = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal"}
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "equal",
    "unique_dim",
    "_unique2",
    "bincount",
    "repeat_interleave.Tensor",
}


class AskedError(Exception):
    """Something asked a tensor for a number."""


class NoQuestions(TorchFunctionMode):
    """Refuses the Python methods that copy a tensor's numbers to the host, which reach no operator on a CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ASKING:
            raise AskedError(func.__name__)
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses the operators whose result, or its shape, the host has to know before it goes on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or str(func).removeprefix("aten.") in WAITING or by_mask:
            raise AskedError(str(func))
        return func(*args, **(kwargs or {}))


def step(objective, batch):
    """Run one step up to its gradients, in which nothing may be asked."""
    with NoQuestions(), NoWaiting():
        objective(**batch).loss.backward()


@pytest.mark.parametrize("keeps", [None, 0, 2**20], ids=["whole", "run", "kept"])
@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["llama_untied", "opt_projected", "gpt2"])
def test_a_training_step_asks_nothing(family, packed, mini_batch_size, keeps):
    model = grounded(family, text_layers=(-1, 1))
    if not packed or keeps is None:
        # With a mask (b, s) and scaled_dot_product_attention, transformers asks by itself whether there is padding.
        model.lm.set_attn_implementation("eager")
    batch = batch_of(model, concatenated=1.0)
    prefixes = None if keeps is None else PrefixCache(model, keeps, packed, shared_prefix=True)
    plan = ComputePlan(packed, True, True, mini_batch_size)
    objective = GroundingObjective(model, prefixes=prefixes, plan=plan).train()
    objective(**batch)  # The first step runs the shared prefixes, and finds out what the LM does to -inf.
    step(objective, batch)
    assert bool(torch.isfinite(model.adapter.image_projection.weight.grad).all())


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: t.tolist(),
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: float(t.sum()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.cpu(),
        lambda t: torch.equal(t, t),
    ],
)
def test_questions_are_noticed(ask):
    with pytest.raises(AskedError), NoQuestions(), NoWaiting():
        ask(torch.arange(3))
