"""Law h: under the preset "fromage", what the official implementation computes, at 1e-5."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, TrainerCallback

from tests.paths import GOLDEN
from visual_ground import GroundingConfig, GroundingTrainer, GroundingTrainingArguments, ImageIndex, ground
from visual_ground.training.data.sequences import TokenSequence
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.captioning import captioning_loss
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.losses.retrieval import plain_retrieval
from visual_ground.training.speedups.packing import pad_in_order

RET = 501
SETTINGS = {"a": dict(num_visual_tokens=1, text_layers=(-1,)), "b": dict(num_visual_tokens=4, text_layers=(-1, 1))}


@pytest.fixture(params="ab")
def golden(request):
    folder = GOLDEN / request.param
    words = AutoTokenizer.from_pretrained(GOLDEN / "lm")
    words.add_tokens(["<|image|>"])  # as the official code does, before it adds [RET]
    lm = AutoModelForCausalLM.from_pretrained(GOLDEN / "lm")
    config = GroundingConfig.preset("fromage", retrieval_dim=32, **SETTINGS[request.param])
    model = ground(lm, str(GOLDEN / "vision"), words, config=config)
    load_official(model, load_file(folder / "adapters.safetensors"))
    tensors, values = load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())
    images = np.load(folder / "images_uint8.npy")
    return SimpleNamespace(model=model, tensors=tensors, values=values, images=images)


def names(model):
    """Map our parameter names to theirs."""
    layers = range(len(model.config.text_layers))
    ours = {
        f"text_retrieval_projection.{i}.{p}": f"text_hidden_fcs.{i}.0.{p}" for i in layers for p in ("weight", "bias")
    }
    for here, there in (("image_projection", "visual_embeddings"), ("image_retrieval_projection", "visual_fc")):
        ours |= {f"{here}.{part}": f"{there}.{part}" for part in ("weight", "bias")}
    return {**ours, "logit_scale": "logit_scale"}


@torch.no_grad()
def load_official(model, tensors):
    own = dict(model.adapter.named_parameters())
    for here, there in names(model).items():
        own[here].copy_(tensors[f"model.{there}"])
    model.adapter.ret_input.copy_(tensors["ret_input_embeddings.weight"])


def batch_of(golden, concatenated=False):
    """Make the batch of the official dataset's token rows: [BOS, words, RET], padded."""
    model, tensors = golden.model, golden.tensors
    k = model.config.num_visual_tokens
    rows = [
        row[:n].tolist()
        for row, n in zip(tensors["inputs.tokens"], tensors["inputs.caption_len"].tolist(), strict=True)
    ]
    captioning = [TokenSequence.of([-1] * k, row[:-1]) for row in rows]
    if concatenated:
        captioning = [one + two for one, two in zip(captioning[::2], captioning[1::2], strict=True)]
    checked = golden_collator(model).checked
    return {
        "captioning": checked(captioning),
        "retrieval": checked([TokenSequence.of([], row) for row in rows]),
        "groups": torch.arange(len(rows)),
        "rows": torch.arange(len(rows)),
        "pixel_values": tensors["inputs.pixel_values"],
    }


def golden_collator(model):
    from visual_ground.training.data.examples import ExampleCollator

    return ExampleCollator(model)


def padded(model, sequences):
    """Return sequences as ids and mask (b, s), as the official implementation reads them."""
    batch = pad_in_order(model, sequences)
    return batch.ids, batch.attention_mask


def close(ours, theirs, room=1e-5):
    assert torch.allclose(torch.as_tensor(ours).detach(), torch.as_tensor(theirs), rtol=room, atol=room)


@pytest.mark.parametrize("quick", [False, True], ids=["plain", "prefixes"])
@pytest.mark.parametrize("concatenated", [False, True], ids=["nc", "cc"])
def test_losses_and_gradients(golden, concatenated, quick):
    model, run = golden.model, "train_cc" if concatenated else "train_nc"
    objective = GroundingObjective(model, prefixes=PrefixCache(model, 2**20) if quick else None)
    losses = objective(**batch_of(golden, concatenated))
    losses.loss.backward()
    log = golden.values[f"{run}.log"][0]
    theirs = dict(loss="loss", captioning="ce_captioning", text_retrieval="ce_retrieval")
    theirs |= dict(text_to_image="caption_loss", image_to_text="image_loss")
    for ours, name in theirs.items():
        close(losses[ours], log[name])
    parameters = dict(model.adapter.named_parameters())
    for here, there in names(model).items():
        close(parameters[here].grad, golden.tensors[f"{run}.grad_masked.{there}"])
    close(model.adapter.ret_input.grad, golden.tensors[f"{run}.grad_masked.input_embeddings.weight[RET]"])
    norm = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
    close(norm, log["grad_norm"])


@torch.no_grad()
def test_logits_and_embeddings(golden):
    model, tensors, batch = golden.model, golden.tensors, batch_of(golden)
    for name, part, pixels in (("cap_concat0", "captioning", batch["pixel_values"]), ("ret", "retrieval", None)):
        ids, mask = padded(model, batch[part])
        logits = model(ids, mask, pixels).logits[:2]
        theirs = tensors[f"{name}.logits"]
        for ours, wanted, kept in zip(logits, theirs, mask[:2].bool(), strict=True):
            length = int(kept.sum())
            close(ours[:length, : RET + 1], wanted[:length])
    ids, mask = padded(model, batch["retrieval"])
    positions = (ids == RET).flatten().nonzero()[:, 0]
    states = model.frozen_lm.hidden_states(ids, mask, positions, model.config.text_layers)
    vectors = model.active.embed_states(states)
    theirs = tensors["ret.last_embedding"]
    close(vectors, theirs / theirs.norm(dim=-1, keepdim=True), 1e-6)
    images = model.adapter.embed_images(model.vision(batch["pixel_values"]))
    theirs = tensors["ret.visual_embs"]
    close(images, theirs / theirs.norm(dim=-1, keepdim=True), 1e-6)


@torch.no_grad()
def test_concatenated_logits_and_prompted_losses(golden):
    """Two captions in one row; and a prompt between the image and its caption."""
    model, tensors = golden.model, golden.tensors
    ids, mask = padded(model, batch_of(golden, concatenated=True)["captioning"])
    features = model.vision(tensors["inputs.pixel_values"])
    close(features, tensors["pooler_output"])
    logits = model(ids, mask, image_features=features).logits[:2]
    for ours, wanted, kept in zip(logits, tensors["cap_concat1.logits"], mask.bool(), strict=False):
        length = int(kept.sum())
        close(ours[:length, : RET + 1], wanted[:length])
    prompt = model.tokenizer("A picture of", add_special_tokens=False)["input_ids"]
    lengths = tensors["inputs.caption_len"].tolist()
    rows = [row[:n].tolist() for row, n in zip(tensors["inputs.tokens"], lengths, strict=True)]
    checked, marks = golden_collator(model).checked, [-1] * model.config.num_visual_tokens
    captioning = checked([TokenSequence.of([*marks, *prompt], row[:-1]) for row in rows])
    close(captioning_loss(model, captioning, features), tensors["cap_prefix.loss"])
    close(
        plain_retrieval(model, checked([TokenSequence.of(prompt, row) for row in rows])).loss,
        tensors["ret_prefix.loss"],
    )


def test_captions_become_the_official_token_rows(golden):
    collator = golden_collator(golden.model)
    tokens, lengths = golden.tensors["inputs.tokens"], golden.tensors["inputs.caption_len"].tolist()
    for caption, row, length in zip(golden.values["captions"], tokens, lengths, strict=True):
        example = {"caption": caption}
        assert list(collator.retrieval(example).ids) == row[:length].tolist()
        k = golden.model.config.num_visual_tokens
        collator.end_captions = False
        assert list(collator.captioning(example).labels[k:]) == row[: length - 1].tolist()


RUNS = {
    "train_nc": dict(max_steps=5),
    "train_cc": dict(max_steps=5),
    "train_scale": dict(max_steps=3, caption_loss_scale=0.5, retrieval_loss_scale=2.0),
    "train_noclip": dict(max_steps=1, max_grad_norm=0.0),
    "train_accum2": dict(max_steps=2, gradient_accumulation_steps=2),
}


class Watched(GroundingTrainer):
    """The trainer as it is, which notes what it computes on the way."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.losses, self.raw, self.clipped, self.stepped, self.renormalised = [], [], [], [], []
        watched = self

        class Notes(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                watched.clipped.append(watched.gradients())

            def on_optimizer_step(self, args, state, control, **kwargs):
                watched.stepped.append(watched.weights())

            def on_step_end(self, args, state, control, **kwargs):
                watched.renormalised.append(watched.weights())

        self.add_callback(Notes())  # after the trainer's own, so that its on_step_end is done

    def weights(self):
        return {name: value.detach().clone() for name, value in self.grounded.adapter.named_parameters()}

    def gradients(self):
        return {name: value.grad.clone() for name, value in self.grounded.adapter.named_parameters()}

    def compute_loss(self, *args, **options):
        loss, losses = super().compute_loss(*args, **{**options, "return_outputs": True})
        self.losses.append(losses)
        return (loss, losses) if options.get("return_outputs") else loss

    def training_step(self, *args, **options):
        loss = super().training_step(*args, **options)
        self.raw.append(self.gradients())
        return loss


def relatively_close(ours, theirs, room=1e-5):
    """Compare two tensors in parts of the larger one's largest entry."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= room * max(1e-3, float(theirs.abs().max()))


def check_weights(golden, ours, theirs, ret_name):
    for here, there in names(golden.model).items():
        relatively_close(ours[here], golden.tensors[f"{theirs}.{there}"])
    relatively_close(ours["ret_input"], golden.tensors[f"{theirs}.{ret_name}"])


def watched_run(golden, run, tmp_path, **changes):
    """Train through `GroundingTrainer`; their scheduler gives every step the full rate here."""
    args = GroundingTrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=6,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        cache_features=False,
        **RUNS[run],
        **changes,
    )
    batch = batch_of(golden, run in ("train_cc", "train_accum2"))
    rows = [{"image": Image.new("RGB", (32, 32)), "caption": "a"}] * 6 * args.gradient_accumulation_steps
    trainer = Watched(golden.model, args, rows)
    trainer.data_collator = lambda examples: batch
    trainer.train()
    return trainer


@pytest.mark.parametrize("run", RUNS)
def test_training_steps(golden, run, tmp_path):
    """All losses, gradients before and after clipping, weights before and after [RET] is renormalised, to the end."""
    trainer = watched_run(golden, run, tmp_path)
    assert trainer.model.plan.packed and trainer.model.plan.direct_head and trainer.model.prefixes
    check_run(golden, run, trainer)


def test_training_steps_in_parts_with_prefixes_on_disk_and_layers_computed_again(golden, tmp_path):
    names = {field.name for field in dataclasses.fields(GroundingTrainingArguments)}
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    options = {"mini_batch_size": 2, "prefix_cache": str(tmp_path / "prefixes"), checkpointing: True}
    check_run(golden, "train_cc", watched_run(golden, "train_cc", tmp_path, **options))
    assert len(list(tmp_path.glob("prefixes/*/*.jsonl"))) == 1


def check_run(golden, run, trainer):
    log, accumulate = golden.values[f"{run}.log"], trainer.args.gradient_accumulation_steps
    scales = trainer.args.caption_loss_scale, trainer.args.retrieval_loss_scale
    assert len(trainer.losses) == len(log)
    for ours, theirs in zip(trainer.losses, log, strict=True):
        close(ours.captioning * scales[0], theirs["ce_captioning"])
        close(ours.text_retrieval * scales[1], theirs["ce_retrieval"])
        close(ours.text_to_image, theirs["caption_loss"])
        close(ours.image_to_text, theirs["image_loss"])
        close(ours.loss / accumulate, theirs["loss"])
        close(ours.text_to_image_accuracy * 100, theirs["acc_caption"][0])
        close(ours.image_to_text_accuracy * 100, theirs["acc_image"][0])
    raw = trainer.raw[accumulate - 1]
    check_weights(golden, raw, f"{run}.grad_masked", "input_embeddings.weight[RET]")
    check_weights(golden, trainer.clipped[0], f"{run}.grad_clipped", "input_embeddings.weight[RET]")
    micro_steps = slice(accumulate - 1, None, accumulate)
    for gradients, theirs in zip(trainer.raw[micro_steps], log[micro_steps], strict=True):
        if theirs["grad_norm"] is not None:
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            assert float(norm) == pytest.approx(theirs["grad_norm"], rel=1e-5)
    check_weights(golden, trainer.stepped[0], f"{run}.step1", "ret_row_before_renorm")
    check_weights(golden, trainer.renormalised[0], f"{run}.step1", "ret_row_after_renorm")
    check_weights(golden, trainer.renormalised[-1], f"{run}.final", "ret_row")


class Multiply(LogitsProcessor):
    """Their way to make [RET] likelier."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, ids, scores):
        scores = scores.clone()
        scores[:, RET] *= self.factor
        return scores


def prompt_of(golden):
    images = golden.images
    return [Image.fromarray(images[0]) if part.startswith("<images") else part for part in golden.values["prompt"]]


@torch.no_grad()
@pytest.mark.parametrize("least", [0, 3])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_generation(golden, factor, least):
    model, key = golden.model, f"gen.rs{factor}_mw{least}"
    batch = model.prepare([prompt_of(golden)])
    text = batch["input_ids"][batch["input_ids"] < RET]
    assert text.tolist() == golden.tensors["gen.prompt_text_ids"][0].tolist()
    from visual_ground.generation.retrieval_token import RetLogitsProcessor, RetrievalSettings

    official = RetrievalSettings(max_images=None, min_new_tokens_before_ret=least, min_new_tokens_between_rets=0)
    steer = RetLogitsProcessor(RET, batch["input_ids"].shape[1], official)
    with model.frozen_lm.bind(model.active.image_tokens(batch["pixel_values"])):
        ids = model.lm.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_processor=[steer, Multiply(factor)],
            max_new_tokens=12,
            eos_token_id=None,
            do_sample=False,
        )
    assert ids[0, batch["input_ids"].shape[1] :].tolist() == golden.tensors[f"{key}.ids"][0].tolist()


@torch.no_grad()
def test_interleaving(golden):
    """The same images at the same [RET]s, none twice; they cut the text at a newline or full stop, we keep it."""
    model, wanted = golden.model, golden.values["gfit.interleaved"]
    index = ImageIndex(golden.tensors["ret.emb_matrix"])
    options = dict(
        images_per_ret=2,
        max_images=6,
        min_new_tokens_between_rets=0,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
    )
    answer = model.generate([prompt_of(golden)], index, logits_processor=[Multiply(1.3)], **options)[0]
    shown = [part for part in wanted["outputs"] if isinstance(part, list)]
    assert [image.id for image in answer.images] == [i for pair in shown for i in pair][: len(answer.images)]
    assert len(answer.images) >= 2


@torch.no_grad()
def test_log_likelihood(golden):
    """Theirs is the mean over all text ids; they score BOS only after an image."""
    model, parts = golden.model, golden.values["loglik_prompts"]
    images = golden.images
    for name in ("text_image_text", "image_text", "text_text", "image_text_image_text", "text_ret"):
        prompt = []
        for part in parts[name]:
            image = part.startswith("img")
            prompt.append(Image.fromarray(images[int(part[3:])]) if image else parts["P1"] if part == "P1" else part)
            if part.startswith("P") and not image:
                prompt[-1] = parts[part[:2]] + part[2:]
        batch = model.prepare([prompt])
        logits = torch.log_softmax(model(**batch).logits[0], -1)
        ids = batch["input_ids"][0]
        scored = [i for i in range(1, len(ids)) if ids[i] <= RET]
        mean = torch.stack([logits[i - 1, ids[i]] for i in scored]).mean()
        close(mean, golden.values["loglik"][name])


@torch.no_grad()
def test_stop_strings_work_beside_virtual_ids(golden):
    model = golden.model
    model.adapter.ret_input.zero_()
    whole = model.generate([prompt_of(golden)], max_new_tokens=12, eos_token_id=None)[0].text
    stop = whole[3:5]
    cut = model.generate([prompt_of(golden)], max_new_tokens=12, eos_token_id=None, stop_strings=[stop])[0].text
    assert stop in cut and len(cut) <= len(whole)
