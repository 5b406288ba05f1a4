"""`[RET]`'s row fitted to where captions end: the plain pass's own loss falls, and nothing else moves."""

import pytest
import torch

from tests.tiny import build, grounded, tokenizer
from visual_ground.training.data.examples import ExampleCollator
from visual_ground.training.initialization.ret_token import fit_ret
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.retrieval import CaptionLikelihoods, plain_retrieval

CAPTIONS = [f"w{10 + i} w{40 + i % 3} w7" for i in range(12)]


@pytest.mark.parametrize("family", ["llama_untied", "qwen2_tied", "opt_projected"])
def test_captions_that_end_with_ret_become_likelier_and_only_its_row_moves(family):
    model = grounded(family)
    batch = ExampleCollator(model).texts([{"caption": text} for text in CAPTIONS])
    before = {name: value.clone() for name, value in model.adapter.state_dict().items()}
    plain = plain_retrieval(model, batch).loss.detach()
    store = PrefixCache(model)
    parts = [store.likelihoods(batch[part]) for part in (slice(5), slice(5, 12))]
    likelihoods = CaptionLikelihoods.joined(parts)
    row = model.adapter.ret_embeddings()[1]
    norm = float(row.detach().norm())
    assert torch.allclose(likelihoods.loss(row).mean, plain, rtol=1e-5)
    fit_ret(model.adapter, likelihoods)
    found = likelihoods.loss(row).mean.detach()
    assert found < plain - 0.005
    assert torch.allclose(plain_retrieval(model, batch).loss, found, rtol=1e-5)
    assert float(row.detach().norm()) == pytest.approx(norm, rel=1e-5)
    moved = {name for name, value in model.adapter.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"ret_input" if model.adapter.tied else "ret_output"}
    assert row.grad is None


def test_a_transferred_adapter_says_ret_after_its_anchors():
    from tests.transferring.test_transfer import CAPTIONS as anchored
    from tests.transferring.test_transfer import source
    from visual_ground import transfer

    new = transfer(source(), build("qwen2_tied"), tokenizer())
    said = new.log_likelihood([f" {text}" for text in anchored], [new.config.ret_token] * len(anchored))
    other = new.log_likelihood([f" {text.split()[0]}" for text in anchored], [new.config.ret_token] * len(anchored))
    assert said.mean() > other.mean()
