"""Every short way of computing the losses gives what the plain way gives, and does what it is for."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import grounded
from tests.training.runs import ROWS
from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.data.sequences import IGNORE_INDEX, TokenSequence
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.captioning import CaptioningLoss, ComputePlan
from visual_ground.training.losses.compute_plan import choose_compute_plan, choose_prefix_cache
from visual_ground.training.losses.objective import FromageLoss, GroundingLoss, GroundingObjective
from visual_ground.training.losses.retrieval import plain_retrieval
from visual_ground.training.speedups import cross_entropy as cross_entropy_module
from visual_ground.training.speedups.checkpointing import LayerCheckpoints
from visual_ground.training.speedups.cross_entropy import sum_of_parts
from visual_ground.training.speedups.packing import lay_out, read

# Which families take which ways: packing needs position ids, a prefix that runs once needs keys and values, and so on.
TAKEN = {
    "llama_untied": {"packed", "direct_head", "shared_prefix", "prefixes"},
    "opt_projected": {"packed", "direct_head", "shared_prefix", "prefixes"},
    "gpt2": {"packed", "direct_head", "shared_prefix", "prefixes"},
    "gemma2_scaled_capped": {"packed", "shared_prefix"},
    "mamba": {"direct_head"},
    "bloom": {"direct_head", "shared_prefix", "prefixes"},
}


def batch_of(model, count=8, concatenated=0.0):
    rows = [dict(row, caption=row["caption"] + " w30 w31 w32 w33" * (i % 3)) for i, row in enumerate(ROWS)]
    dataset = ExampleDataset(rows, sample=False)
    return ExampleCollator(model, concat_captions_prob=concatenated)([dataset[i] for i in range(count)])


def loss_and_gradients(model, batch, checkpoints=False, **options):
    objective = GroundingObjective(model, **options)
    if checkpoints:
        objective.activation_checkpointing_enable()
    model.adapter.zero_grad()
    losses = objective(**batch)
    losses.loss.backward()
    return losses, {name: value.grad.clone() for name, value in model.adapter.named_parameters()}


def check_same(plain, other, room=2e-5):
    for name, value in plain[0].items():
        assert torch.allclose(value, other[0][name], rtol=room, atol=room), name
    for name, gradient in plain[1].items():
        assert float((gradient - other[1][name]).abs().max()) <= room * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("family", ["llama_untied", "gpt2", "bloom"])
def test_states_behind_a_retrieval_prompt_are_kept_and_every_way_gives_the_same(family):
    model = grounded(family, text_layers=(-1, 1), retrieval_prompt="w40 w41 w42")
    batch = batch_of(model)
    plain = loss_and_gradients(model, batch)
    kept = choose_prefix_cache(model, batch["retrieval"], 2**20, packed=family != "bloom")
    for changes in ({}, {"plan": ComputePlan(mini_batch_size=3)}, {}):
        check_same(plain, loss_and_gradients(model, batch, prefixes=kept, **changes))
    texts = [sequence.ids[1:-1] for sequence in batch["retrieval"]]
    said = [" ".join(f"w{i}" for i in ids) for ids in texts]
    with torch.no_grad():
        vectors = model.active.embed_states(kept.states(batch["retrieval"]))
        assert torch.allclose(vectors, model.embed_text([[text] for text in said]), atol=1e-5)
    # Not `[RET]` but the prompt is read; where `[RET]` is said stays a loss of the caption's end.
    wordless = loss_and_gradients(grounded(family, text_layers=(-1, 1)), batch)
    assert torch.allclose(plain[0].text_retrieval, wordless[0].text_retrieval, atol=1e-5)
    assert not torch.allclose(plain[0].text_to_image, wordless[0].text_to_image, atol=1e-5)


@pytest.mark.parametrize("family", TAKEN)
def test_every_way_gives_what_the_plain_way_gives(family):
    model = grounded(family, text_layers=(-1, 1), num_visual_tokens=2)
    batch = batch_of(model, concatenated=0.5)
    plain = loss_and_gradients(model, batch)
    found = choose_compute_plan(model, batch["captioning"])
    prefixes = choose_prefix_cache(model, batch["retrieval"], 2**20, found.packed)
    ways = {name for name in ("packed", "direct_head", "shared_prefix") if getattr(found, name)}
    assert ways | ({"prefixes"} if prefixes else set()) == TAKEN[family]
    for way in ways:
        check_same(plain, loss_and_gradients(model, batch, plan=ComputePlan(**{way: True})))
    for changes in ({}, {"mini_batch_size": 3}, {"gradients_in_forward": False}):
        check_same(plain, loss_and_gradients(model, batch, plan=replace(found, **changes), prefixes=prefixes))
    check_same(plain, loss_and_gradients(model, batch, plan=ComputePlan(mini_batch_size=3)))
    assert all(parameter.grad is None for parameter in model.lm.parameters())


@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize("family", ["llama_untied", "opt_projected", "mamba"])
def test_checkpointed_layers_give_the_same_and_are_given_back(family, mini_batch_size):
    model = grounded(family)
    model.lm.config.dropout = 0.5
    batch = batch_of(model)
    plain = loss_and_gradients(model, batch)
    prefixes = None if family == "mamba" else PrefixCache(model)
    ways = ComputePlan(shared_prefix=family != "mamba", mini_batch_size=mini_batch_size)
    check_same(plain, loss_and_gradients(model, batch, True, plan=ways, prefixes=prefixes))
    check_same(plain, loss_and_gradients(model, batch, True, plan=ComputePlan(mini_batch_size=mini_batch_size)))
    assert all("forward" not in module.__dict__ for module in model.lm.modules())


def test_a_checkpointed_layer_runs_again_in_the_backward_pass():
    model, runs = grounded(), []
    model.lm.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    batch = batch_of(model)
    loss_and_gradients(model, batch)
    once = len(runs)
    loss_and_gradients(model, batch, True)
    assert len(runs) == 3 * once
    with pytest.raises(GroundingStateError, match="no layers"):
        LayerCheckpoints(torch.nn.Linear(1, 1)).enable()


def test_logits_of_a_whole_batch_never_exist(monkeypatch):
    model, seen = grounded(), []
    batch = batch_of(model)
    plain = loss_and_gradients(model, batch)
    monkeypatch.setattr(cross_entropy_module, "LOGIT_BYTES", 0)
    handle = model.lm.get_output_embeddings().register_forward_hook(lambda m, a, output: seen.append(output.shape[1]))
    ways = ComputePlan(direct_head=True, packed=True)
    check_same(plain, loss_and_gradients(model, batch, plan=ways, prefixes=PrefixCache(model)))
    handle.remove()
    assert max(seen) == 16 < sum(sequence.num_labels for sequence in batch["captioning"])


def test_packed_rows_have_no_padding_and_are_blind_to_each_other():
    model = grounded("gpt2")
    sequences = batch_of(model, 12)["retrieval"]
    (batch,) = lay_out(model, sequences, packed=True)
    assert batch.ids.numel() == sum(len(sequence.ids) for sequence in sequences)
    other = list(sequences)
    other[3] = replace(other[3], ids=(50,) * len(other[3].ids))
    states, changed = (read(model, lay_out(model, some, True)[0]).head_input for some in (sequences, other))
    same = (states - changed).abs().amax(-1) < 1e-5
    touched = sequences[3].num_labels
    assert int((~same).sum()) in (touched - 1, touched)


def test_the_shared_prefix_runs_once():
    model, runs = grounded(), []
    model.lm.register_forward_pre_hook(lambda m, a, kwargs: runs.append(kwargs["input_ids"].shape), with_kwargs=True)
    captions = CaptioningLoss(model, ComputePlan(shared_prefix=True))
    batch = batch_of(model)["captioning"]
    features = torch.randn(8, 12)
    captions.loss(batch, features)
    assert runs[0] == (1, 2)  # <s> w7, before the image
    runs.clear()
    captions.loss(batch, features)
    assert (1, 2) not in runs and sum(n * s for n, s in runs) < len(batch) * max(
        len(sequence.ids) for sequence in batch
    )


def test_turns_that_begin_alike_run_their_beginning_once():
    model, runs = grounded(), []
    ids = [(1, 50, 51, 52, 53, 10 + i, 20, model.ret_token_id) for i in range(5)]
    turns = [TokenSequence(row, (*[IGNORE_INDEX] * 7, model.ret_token_id)) for row in ids]
    plain = plain_retrieval(model, turns)
    model.lm.register_forward_pre_hook(lambda m, a, kwargs: runs.append(kwargs["input_ids"].shape), with_kwargs=True)
    quick = PrefixCache(model, packed=True, shared_prefix=True).run(turns)
    assert torch.allclose(plain.vectors, quick.vectors, atol=1e-5) and torch.allclose(plain.loss, quick.loss, atol=1e-5)
    # The beginning, two ids of each turn after it, and each `[RET]`.
    assert sorted(n * s for n, s in runs) == [5, 5, 10]


def test_only_rows_at_once_run_with_gradient():
    model, rows = grounded("mamba"), []
    model.lm.register_forward_pre_hook(lambda m, a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    loss_and_gradients(model, batch_of(model), plan=ComputePlan(mini_batch_size=3))
    assert max(rows) == 3


def test_sums_are_taken_part_by_part():
    x, w = torch.randn(6, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    loss_of = lambda part, read: (read[part] @ w).square().sum()  # noqa: E731
    whole = loss_of(slice(None), 2 * x)
    wanted = torch.autograd.grad(3 * whole, [x, w])
    total = sum_of_parts(loss_of, [slice(0, 4), slice(4, 6)], 2 * x, [w, unused])
    (3 * total).backward()
    assert torch.allclose(total, whole)
    assert torch.allclose(x.grad, wanted[0]) and torch.allclose(w.grad, wanted[1]) and not unused.grad.any()
    with torch.no_grad():
        assert torch.allclose(sum_of_parts(loss_of, [slice(None)], 2 * x, [w]), whole)


def test_autocast_leaves_the_adapter_in_float32():
    model = grounded("llama_untied")
    batch = batch_of(model)
    plain = loss_and_gradients(model, batch)
    features = torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        rows, vectors = model.adapter.image_tokens(features), model.adapter.embed_images(features)
        quick = loss_and_gradients(
            model, batch, plan=ComputePlan(packed=True, direct_head=True), prefixes=PrefixCache(model)
        )
    assert torch.equal(rows, model.adapter.image_tokens(features))
    assert torch.equal(vectors, model.adapter.embed_images(features))
    assert all(gradient.dtype == torch.float32 for gradient in quick[1].values())
    check_same(plain, quick, room=0.1)


def test_captions_that_say_ret_are_refused():
    model = grounded()
    dataset = ExampleDataset([dict(row, caption="w4 [RET] w5") for row in ROWS], sample=False)
    batch = ExampleCollator(model)([dataset[i] for i in range(4)])
    with pytest.raises(GroundingValueError, match=r"Examples \[0, 1, 2, 3\] .* \[RET\] once"):
        GroundingObjective(model)(**batch)


class CaptioningTimes(torch.nn.Module):
    """A loss of one's own, with a parameter."""

    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, objective, batch):
        captioning = objective.captioning(batch)
        return GroundingLoss(loss=captioning * self.log_scale.exp(), captioning=captioning.detach())


def test_a_loss_of_ones_own_trains():
    def only_captioning(objective, batch):
        captioning = objective.captioning(batch)
        return GroundingLoss(loss=captioning, captioning=captioning.detach())

    model = grounded()
    batch = batch_of(model)
    published = GroundingObjective(model, FromageLoss(2.0, 0.5))(**batch)
    parts = published.text_retrieval + (published.text_to_image + published.image_to_text) / 2
    assert torch.allclose(published.loss, 2 * published.captioning + 0.5 * parts)
    objective = GroundingObjective(model, only_captioning, plan=ComputePlan(True, True, True))
    optimizer = torch.optim.Adam(model.adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        output = objective(**batch)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[0] == pytest.approx(float(published.captioning), rel=1e-5) and losses[-1] < losses[0]
    assert set(output) == {"loss", "captioning"}
    assert model.adapter.text_retrieval_projection[0].weight.grad is None
    trained = GroundingObjective(model, CaptioningTimes())
    trained(**batch).loss.backward()
    assert "loss.log_scale" in dict(trained.named_parameters()) and bool(trained.loss.log_scale.grad)


def test_a_loss_without_weight_is_not_computed_and_all_parameters_still_get_a_gradient():
    model = grounded("llama_untied")
    batch = batch_of(model)
    whole = GroundingObjective(model)(**batch)
    for kept, left_out in (("captioning", "text_retrieval"), ("text_retrieval", "captioning")):
        weights = {
            "caption_loss_scale": float(kept == "captioning"),
            "retrieval_loss_scale": float(kept != "captioning"),
        }
        objective = GroundingObjective(model, FromageLoss(**weights))

        setattr(objective, left_out, None)  # Calling it would raise.
        model.adapter.zero_grad()
        found = objective(**batch)
        assert left_out not in found and torch.equal(found[kept], whole[kept])
        found.loss.backward()
        assert all(parameter.grad is not None for parameter in model.adapter.parameters())
    with pytest.raises(GroundingValueError, match="both 0"):
        GroundingObjective(model, FromageLoss(0.0, 0.0))(**batch)


def test_the_second_of_joined_captions_has_no_examples():
    model = grounded(image_prompt="w80 w9. w81 {image} w82")
    rows = [dict(row, row=n, group=n) for n, row in enumerate(ROWS[:2])]
    collator = ExampleCollator(model, concat_captions_prob=1.0, end_captions=False)
    ids = collator([dict(row, image=row["image"]) for row in rows])["captioning"][0].ids
    unknown = model.tokenizer.unk_token_id  # What this tokenizer makes of "w9."
    assert ids.count(80) == ids.count(unknown) == 1 and ids.count(81) == ids.count(82) == 2
