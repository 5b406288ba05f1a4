import pytest
import torch
from torch import nn

from tests.tiny import FAMILIES, build
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.language import check_causal_lm, load_language_model, read_facts
from visual_ground.language_weights import embedding_rows, head_rows


class Tokenizer:
    all_special_ids = [0, 1, 2]

    def get_vocab(self):
        return {str(i): i for i in range(90)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_facts(family):
    lm = build(family)
    facts = read_facts(lm, Tokenizer(), (-1, 1))
    assert facts.embedding_dim == (16 if family == "opt_projected" else 32)
    assert facts.text_dims == (facts.head_dim, 32)
    assert facts.vocabulary.ret_token_id == 90 and facts.vocabulary.first_image_id == 100
    # Gemma scales and Bloom normalises inside or after the embedding; what is tied must be the same row both ways.
    if facts.tied:
        ins, outs = (torch.cat(list(r)) for r in (embedding_rows(lm, 90), head_rows(lm, 90, facts.head_dim)))
        assert torch.equal(ins, outs)
    assert facts.tied == (family in {"gpt2", "opt_projected", "qwen2_tied", "mamba", "bloom"})


def test_a_head_without_weight_is_read_through_the_module():
    lm = build("llama_untied")
    plain = torch.cat(list(head_rows(lm, 90, 32)))
    head = lm.lm_head

    class Quantised(nn.Module):
        def forward(self, hidden):
            return head(hidden)

    lm.lm_head = Quantised()
    assert torch.allclose(torch.cat(list(head_rows(lm, 90, 32))), plain, atol=1e-6)


def test_what_is_no_causal_lm_is_refused():
    from transformers import AutoConfig, AutoModel

    with pytest.raises(GroundingTypeError, match="generate"):
        check_causal_lm(nn.Linear(2, 2))
    base = AutoModel.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(GroundingTypeError, match="causal"):
        check_causal_lm(base)
    with pytest.raises(GroundingValueError, match="tokenizer"):
        load_language_model(build("gpt2"))
    with pytest.raises(GroundingValueError, match="text layer 9"):
        read_facts(build("gpt2"), Tokenizer(), (9,))
