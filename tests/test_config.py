import pytest

from visual_ground import GroundingConfig, GroundingError


def test_dict_round_trip():
    config = GroundingConfig(num_visual_tokens=4, text_layers=[-1, 1])
    assert GroundingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "bad",
    [
        {"num_visual_tokens": 0},
        {"retrieval_dim": 1.5},
        {"text_layers": ()},
        {"text_layers": (1, 1)},
        {"scaling": "x"},
        {"retrieval_prompt": " "},
        {"retrieval_prompt": "looks like [RET]"},
        {"retrieval_prompt": None},
        {"visual_tokens_from": "x"},
        {"visual_tokens_from": ["pooled"]},
        {"train_lm_adapter": 1},
    ],
)
def test_values_out_of_range_name_the_field(bad):
    with pytest.raises(GroundingError, match=next(iter(bad))):
        GroundingConfig(**bad)


def test_settings_saved_before_there_were_retrieval_prompts_have_none():
    values = GroundingConfig(retrieval_prompt="It is a").to_dict()
    assert GroundingConfig.from_dict(values).retrieval_prompt == "It is a"
    del values["retrieval_prompt"]
    assert (
        GroundingConfig.from_dict(values).retrieval_prompt == GroundingConfig.preset("fromage").retrieval_prompt == ""
    )


def test_unknown_keys_and_presets_raise():
    with pytest.raises(GroundingError, match="nonsense"):
        GroundingConfig.from_dict({"nonsense": 1})
    with pytest.raises(GroundingError, match="fromage"):
        GroundingConfig.preset("other")
