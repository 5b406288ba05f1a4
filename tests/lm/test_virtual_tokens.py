import pytest
import torch

from tests.tiny import FAMILIES, build
from visual_ground.errors import GroundingIndexError
from visual_ground.lm.virtual_tokens import VirtualTokens, VirtualVocabulary


def attach(lm, num_tokens=100):
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    vocabulary = VirtualVocabulary(embedding.weight.shape[0], head.weight.shape[0], num_tokens, frozenset({0, 1, 2}))
    ret_in = torch.randn(embedding.weight.shape[1])
    ret_out = torch.randn(head.weight.shape[1])
    tokens = VirtualTokens(lm, vocabulary, lambda: (ret_in, ret_out))
    tokens.attach()
    return tokens


def image_tokens(lm, count):
    return torch.randn(count, lm.get_input_embeddings().weight.shape[1])


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(params=[100, 95], ids=["appended", "spare"])
def num_tokens(request):
    return request.param


@torch.no_grad()
def test_text_logits_are_the_base_s_and_detach_restores_them(family, num_tokens):
    lm, ids = build(family), torch.randint(3, 95, (2, 7))
    base = lm(input_ids=ids).logits
    tokens = attach(lm, num_tokens)
    ret = tokens.vocabulary.ret_token_id
    grounded = lm(input_ids=ids).logits
    keep = [i for i in range(100) if i != ret]
    assert torch.equal(grounded[..., keep], base[..., keep])
    assert grounded.shape[-1] == (101 if num_tokens == 100 else 100)
    with tokens.bind(enabled=False):
        assert torch.equal(lm(input_ids=ids).logits, base)
    tokens.detach()
    assert torch.equal(lm(input_ids=ids).logits, base)


@torch.no_grad()
def test_rows_enter_where_their_ids_stand_and_stay_causal(family, num_tokens):
    lm = build(family)
    tokens = attach(lm, num_tokens)
    first, ret = tokens.vocabulary.first_image_id, tokens.vocabulary.ret_token_id
    ids = torch.tensor([[5, first, 6, ret, 7], [first + 1, 5, 6, 7, 8]])
    table = image_tokens(lm, 2)
    with tokens.bind(image_tokens=table):
        logits = lm(input_ids=ids).logits
    other = table.clone()
    other[0] += torch.randn(table.shape[1])
    with tokens.bind(image_tokens=other):
        changed = lm(input_ids=ids).logits
    finite = torch.isfinite(logits)
    assert torch.equal(finite, torch.isfinite(changed)) and not finite[..., first:].any()
    same = torch.where(finite, (logits - changed).abs(), 0).amax(-1) < 1e-5
    assert same[1].all() and same[0, 0] and not same[0, 1:].any()


def test_gradients_reach_the_rows_and_nothing_else(family, num_tokens):
    lm = build(family)
    tokens = attach(lm, num_tokens)
    table = image_tokens(lm, 1).requires_grad_()
    ids = torch.tensor([[5, tokens.vocabulary.first_image_id, 6, 7]])
    with tokens.bind(image_tokens=table):
        logits = lm(input_ids=ids).logits[..., :90]
    logits.logsumexp(-1).sum().backward()
    assert table.grad.abs().sum() > 0
    assert all(p.grad is None for p in lm.parameters())


@torch.no_grad()
def test_head_runs_only_where_asked(family):
    lm = build(family)
    tokens = attach(lm)
    ids, positions = torch.randint(3, 95, (2, 6)), torch.rand(2, 6) > 0.5
    whole = lm(input_ids=ids).logits
    with tokens.bind(positions=positions.flatten().nonzero()[:, 0]) as context:
        some = lm(input_ids=ids).logits
    assert torch.allclose(some[0], whole[positions], atol=1e-5)
    assert context.head_input.shape[:2] == (1, int(positions.sum()))


@torch.no_grad()
def test_ids_past_the_table_raise_and_leave_the_lm_whole(family):
    lm, ids = build(family), torch.tensor([[5, 6, 7]])
    tokens = attach(lm)
    before = lm(input_ids=ids).logits
    with tokens.bind(image_tokens=image_tokens(lm, 1)), pytest.raises(GroundingIndexError, match="1 image tokens"):
        lm(input_ids=ids + tokens.vocabulary.first_image_id)
    assert torch.equal(lm(input_ids=ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached_with_ret_fed_back(family, beams):
    lm = build(family)
    tokens = attach(lm)
    ret = tokens.vocabulary.ret_token_id
    ids = torch.tensor([[5, tokens.vocabulary.first_image_id, 6, 7, ret]])
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    with tokens.bind(image_tokens=image_tokens(lm, 1)):
        cached = lm.generate(input_ids=ids, **options)
        plain = lm.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(cached, plain)
