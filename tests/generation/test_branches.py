"""What is read after a running answer is what a run over the same ids alone gives, and leaves the answer as it is."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from tests.tiny import FAMILIES, build, grounded, picture
from visual_ground.generation.branches import BranchReader
from visual_ground.generation.layout import branch_of
from visual_ground.scoring.query_vectors import vectors_after

PROMPTS = [["w4 w5", picture(0), "w6 w7"], ["w9"], ["w4 w5 w8 w10 w11 w12 w13"]]


class Reading(StoppingCriteria):
    """Reads, at one step of a `generate`, contexts that share more or less of each row."""

    def __init__(self, model, batch, image_tokens, step=3):
        self.model, self.batch, self.image_tokens, self.step = model, batch, image_tokens, step
        self.found, self.expected, self.contexts = [], [], []

    def __call__(self, ids, scores, **options):
        start = self.batch["input_ids"].shape[1]
        if ids.shape[1] == start + self.step:
            mask = torch.nn.functional.pad(self.batch["attention_mask"], (0, self.step - 1), value=1)
            sequences = [row[kept.bool()].tolist() for row, kept in zip(ids[:, :-1], mask, strict=True)]
            branches = []
            for row, sequence in enumerate(sequences):
                begun = sequence[: len(sequence) - self.step + 1]
                for context in (sequence, begun, [*sequence[:2], 30, 31, *sequence[2:3]], [32, 33]):
                    suffix = self.model.processor.retrieval_suffix(context)
                    self.contexts.append(context)
                    branches.append(branch_of(row, mask.shape[1] - len(sequence), sequence, [*context, *suffix]))
            reader = BranchReader(self.model.frozen_lm, self.model.active, mask)
            for _ in range(2):
                read = reader.read(branches)
                self.found.append([read.get(one) for one in branches])
        return torch.zeros(len(ids), dtype=torch.bool)


@torch.no_grad()
def read(model, prompts=PROMPTS):
    """Return what a `Reading` found the first and the second time, and what is read of the contexts alone."""
    batch = model.prepare(prompts)
    image_tokens = model.active.prompt_tokens(batch.get("pixel_values"))
    reading = Reading(model, batch, image_tokens)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, suppress_tokens=[2])
    ids = [
        model.frozen_lm.generate(
            batch["input_ids"], image_tokens, attention_mask=batch["attention_mask"], **options, **more
        )
        for more in ({}, {"stopping_criteria": StoppingCriteriaList([reading])})
    ]
    assert torch.equal(*ids), "the answer goes on as it would"
    expected = [vectors_after(model.frozen_lm, model.active, [one], image_tokens)[0] for one in reading.contexts]
    return reading.found, expected


JOINED = {"llama_untied", "gpt2", "qwen2_tied", "gpt_neox_parallel", "mixtral_moe"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers, prompt", [((-1,), "w40 w41"), ((1, -1), "")])
def test_branches_are_read_as_their_ids_are_alone(family, layers, prompt):
    model = grounded(family, text_layers=layers, retrieval_prompt=prompt)
    (first, again), expected = read(model)
    for found in (first, again):
        assert all(vector is None for vector in found) == (family == "mamba"), "it has no keys and values"
        for vector, wanted in zip(found, expected, strict=True):
            assert vector is None or torch.allclose(vector, wanted, atol=1e-4)
    agree = set(model.frozen_lm.reads_branches.values())
    assert agree <= {True, False} and (agree == {True} or family not in JOINED)


def test_one_pass_reads_all_branches_and_asks_for_no_logits():
    model = grounded(retrieval_prompt="w40 w41")
    read(model, ["w4 w5 w6 w7"])
    widths, logits = [], []
    hooks = [
        model.lm.get_input_embeddings().register_forward_hook(lambda module, given, out: widths.append(out.shape[:2])),
        model.lm.get_output_embeddings().register_forward_hook(lambda module, given, out: logits.append(out.shape[1])),
    ]
    read(model, ["w4 w5 w6 w7"])
    for hook in hooks:
        hook.remove()
    passes = [width for width in widths if width[1] == 2 + 2 + 5 + 4]
    assert len(passes) == 2 and logits.count(0) == 2, "each of the two readings is one pass"


@pytest.mark.parametrize("window", [4, 10**3])
def test_a_sliding_window_is_kept_to(window):
    model = grounded(lm=build("mixtral_moe", sliding_window=window), retrieval_prompt="w40 w41")
    (first, again), expected = read(model, ["w4 w5 w6 w7 w8 w9 w10"])
    assert first[0] is not None and (first[1] is not None) == (window > 4), "the window has dropped what it sees"
    for found in (first, again):
        for vector, wanted in zip(found, expected, strict=True):
            assert vector is None or torch.allclose(vector, wanted, atol=1e-4)


def test_an_lm_that_reads_them_differently_together_reads_them_one_by_one(monkeypatch):
    model = grounded(retrieval_prompt="w40 w41")

    def without_mask(module, given, options):  # As an LM that makes a mask of its own from the positions' count.
        mask = options.get("attention_mask")
        return given, {**options, "attention_mask": None if mask is None or mask.dim() == 4 else mask}

    model.lm.register_forward_pre_hook(without_mask, with_kwargs=True)
    (first, again), expected = read(model, ["w4 w5 w6 w7"])
    assert set(model.frozen_lm.reads_branches.values()) == {False}
    for vector, other, wanted in zip(first, again, expected, strict=True):
        assert torch.allclose(vector, wanted, atol=1e-4) and torch.allclose(other, wanted, atol=1e-4)


@torch.no_grad()
def test_an_lm_that_takes_one_id_at_a_time_behind_what_it_has_read_is_run_anew():
    options = dict(ret_bias=1e3, max_images=1, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    expected = grounded(retrieval_prompt="w40 w41").generate(PROMPTS[1], **options)[0]
    model = grounded(retrieval_prompt="w40 w41")
    refused = []

    def one_at_a_time(module, given, options):
        cache = options.get("cache", options.get("past_key_values"))
        if cache is not None and cache.get_seq_length() and options["input_ids"].shape[1] > 1:
            refused.append(options["input_ids"].shape)
            raise AssertionError("several ids behind a cache")

    model.lm.register_forward_pre_hook(one_at_a_time, with_kwargs=True)
    (first, again), wanted = read(model, ["w4 w5 w6 w7"])
    assert all(vector is None for vector in first) and refused
    assert model.generate(PROMPTS[1], **options)[0].parts == expected.parts and expected.images


def test_what_does_not_fit_into_the_context_is_left_out():
    model = grounded(lm=build("gpt2", n_positions=9), retrieval_prompt="w40 w41")
    (first, _), _ = read(model, ["w4 w5 w6 w7"])  # Six positions, and two more after them.
    assert [vector is None for vector in first] == [False, False, False, False]
    model = grounded(lm=build("gpt2", n_positions=9), retrieval_prompt="w40 w41 w42 w43")
    (first, _), _ = read(model, ["w4 w5 w6 w7"])
    assert [vector is None for vector in first] == [True, False, False, False]
