import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tests.tiny import FAMILIES, build
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.lm.base.loading import check_causal_lm, load_lm
from visual_ground.lm.base.spec import read_spec, reserved_ids
from visual_ground.lm.base.weights import embedding_vectors, head_vectors


class Tokenizer:
    all_special_ids = [0, 1, 2]

    def get_vocab(self):
        return {str(i): i for i in range(90)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_facts(family):
    lm = build(family)
    spec = read_spec(lm, Tokenizer(), (-1, 1))
    assert spec.embedding_dim == (16 if family == "opt_projected" else 32)
    assert spec.text_dims == (spec.head_dim, 32)
    assert spec.vocabulary.ret_token_id == 90 and spec.vocabulary.first_image_id == 100
    # Gemma scales and Bloom normalises inside or after the embedding; what is tied must be the same row both ways.
    if spec.tied:
        ins, outs = (torch.cat(list(r)) for r in (embedding_vectors(lm, 90), head_vectors(lm, 90, spec.head_dim)))
        assert torch.equal(ins, outs)
    assert spec.tied == (family in {"gpt2", "opt_projected", "qwen2_tied", "mamba", "bloom"})


def test_a_head_without_weight_is_read_through_the_module():
    lm = build("llama_untied")
    plain = torch.cat(list(head_vectors(lm, 90, 32)))
    head = lm.lm_head

    class Quantised(nn.Module):
        def forward(self, hidden):
            return head(hidden)

    lm.lm_head = Quantised()
    assert torch.allclose(torch.cat(list(head_vectors(lm, 90, 32))), plain, atol=1e-6)


def test_what_is_no_causal_lm_is_refused():
    from transformers import AutoModel

    with pytest.raises(GroundingTypeError, match="generate"):
        check_causal_lm(nn.Linear(2, 2))
    base = AutoModel.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(GroundingTypeError, match="causal"):
        check_causal_lm(base)
    with pytest.raises(GroundingValueError, match="tokenizer"):
        load_lm(build("gpt2"))
    with pytest.raises(GroundingValueError, match="text layer 9"):
        read_spec(build("gpt2"), Tokenizer(), (9,))


def test_one_error_names_why_a_model_is_no_language_model():
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    t5 = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=10)
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **t5))
    with pytest.raises(GroundingTypeError, match="encoder-decoder"):
        check_causal_lm(encoder_decoder)
    gpt2 = dict(n_embd=8, n_layer=1, n_head=1, vocab_size=10)
    reward = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("gpt2", num_labels=1, **gpt2))
    with pytest.raises(GroundingTypeError, match="GPT2ForSequenceClassification"):
        check_causal_lm(reward)


def test_ids_with_a_meaning_are_found_in_every_part_of_a_config():
    config = build("llama_untied").config
    config.image_token_index, config.eos_token_id = 50, [2, 60]
    config.text_config = AutoConfig.for_model("gpt2", bos_token_id=70)
    assert {0, 1, 2, 50, 60, 70} <= reserved_ids(config)
