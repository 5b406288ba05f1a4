"""A shorter answer in a batch is what it is alone: nothing that fills it up is read as words."""

import pytest

from tests.tiny import grounded, picture

ENDS, WORDS = 2, [5, 6, 7]


def script(answers):
    """Return generation options under which row i says answers[i] and ends."""

    def allowed(row, ids):
        said = len(ids) - script.start
        return [answers[row][said]] if said < len(answers[row]) else [ENDS]

    return dict(prefix_allowed_tokens_fn=allowed, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("named", [(), ("eos_token",), ("pad_token", "eos_token")])
@pytest.mark.parametrize("pictures", [0, 1])
def test_nothing_fills_up_shorter_answers(named, pictures):
    model = grounded(bos=False)
    for name in {"pad_token", "eos_token"} - set(named):
        setattr(model.tokenizer, name, None)
    if "pad_token" in named:
        model.tokenizer.pad_token = "<pad>"
    ret = model.ret_token_id
    answers = [[5], [6, ret, 7, 8], [7, 8]]
    prompts = [[picture(i) for i in range(pictures)] + ["w4 w5"] for _ in answers]
    script.start = model.prepare(prompts)["input_ids"].shape[1]
    outputs = model.generate(prompts, **script(answers))
    assert [str(output).split() for output in outputs] == [["w5"], ["w6", "[image]", "w7", "w8"], ["w7", "w8"]]
    beams = model.generate(prompts, num_beams=2, **script(answers))
    assert [str(output) for output in beams] == [str(output) for output in outputs]


def test_a_pad_token_that_the_caller_names_holds():
    model = grounded(bos=False)
    model.tokenizer.eos_token = None
    script.start = 2
    output = model.generate(["w4 w5", "w4 w5"], pad_token_id=9, **script([[5], [6, 7]]))[0]
    assert str(output).split()[:2] == ["w5", "w9"]
