"""The page of an adapter on the Hub, rendered from what its `adapter_config.json` says and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from visual_ground.adapter.metadata import AdapterMetadata
from visual_ground.adapter.report import Evaluation, Report
from visual_ground.storage.hub_names import is_hub_name
from visual_ground.storage.readme import render_page

PICTURE_FILE = "samples.jpg"
TAGS = ["visual_ground", "fromage", "image-retrieval", "multimodal", "adapter"]
PIPELINE = "image-text-to-text"
DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}


def render_card(
    metadata: AdapterMetadata, num_parameters: int, repo_id: str | None = None, earlier: str | None = None
) -> str:
    """Return the text of an adapter's README.md.

    Args:
        metadata: the content of its `adapter_config.json`.
        num_parameters: numbers in its tensors.
        repo_id: where it is published, if it is.
        earlier: the README.md as it stands, whose edits by people are kept; see `storage.readme`.
    """
    sections = {
        "Use": _use(metadata, repo_id),
        "Results": _results(metadata.report.evaluations),
        "Samples": _samples(metadata.report),
        "Training": _training(metadata),
        "Limits": _limits(metadata),
    }
    parts = [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    body = "\n\n".join([_opening(metadata, num_parameters, repo_id), *parts])
    return render_page(_hub_metadata(metadata, repo_id), body, earlier)


def _title(repo_id: str | None) -> str:
    return repo_id.split("/")[-1] if repo_id else "visual_ground adapter"


def _hub_metadata(metadata: AdapterMetadata, repo_id: str | None) -> dict[str, Any]:
    from huggingface_hub import EvalResult, ModelCardData

    base = metadata.provenance.get("base_model_name_or_path")
    is_named = base is not None and is_hub_name(base)
    results = [
        EvalResult(
            task_type=PIPELINE,
            task_name="Retrieval and captioning",
            dataset_type=one.dataset,
            dataset_name=one.dataset,
            dataset_split=one.split,
            dataset_revision=one.revision,
            metric_type=_metric_type(name),
            metric_name=_metric_name(name),
            metric_value=value,
        )
        for one in metadata.report.evaluations
        for name, value in one.metrics.items()
    ]
    data = ModelCardData(
        library_name="visual_ground",
        license=metadata.report.license,
        pipeline_tag=PIPELINE,
        tags=list(TAGS),
        datasets=list(metadata.report.datasets) or None,
        model_name=_title(repo_id) if results else None,
        eval_results=results or None,
        base_model=base if is_named else None,
        base_model_relation="adapter" if is_named else None,
    )
    as_dict: dict[str, Any] = data.to_dict()
    return as_dict


def _metric_type(metric: str) -> str:
    return "recall" if re.search(r"_r\d+$", metric) else "accuracy" if metric.endswith("accuracy") else metric


def _metric_name(metric: str) -> str:
    ranked = re.fullmatch(r"(\w+)_r(\d+)", metric)
    if ranked:
        return f"Recall at {ranked[2]}, {DIRECTIONS.get(ranked[1], ranked[1].replace('_', ' '))} (percent)"
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:] + (" (percent)" if metric.endswith("accuracy") else "")


def _opening(metadata: AdapterMetadata, num_parameters: int, repo_id: str | None) -> str:
    provenance, config = metadata.provenance, metadata.config
    lm = _code(provenance.get("base_model_name_or_path"), "a language model without a name", provenance.get("revision"))
    vision = _code(
        provenance.get("vision_encoder"), "a vision encoder without a name", provenance.get("vision_revision")
    )
    tokens = "one vector" if config.num_visual_tokens == 1 else f"{config.num_visual_tokens} vectors"
    return (
        f"# {_title(repo_id)}\n\n"
        f"This adapter lets {lm}, which stays frozen, read images through {vision}, which stays frozen too, and answer "
        f"with text and with images that it finds in an index. An image is {tokens} of the language model's input; "
        f"text and images meet in a space of {config.retrieval_dim} dimensions. The adapter has "
        f"{num_parameters:,} parameters; nothing of either model is among them.\n\n"
        "It was made with visual_ground (the method of [FROMAGe](https://arxiv.org/abs/2301.13823))."
    )


def _code(name: str | None, otherwise: str, revision: str | None) -> str:
    if not name:
        return otherwise
    return f"`{name}`" + (f" (revision `{revision[:12]}`)" if revision else "")


def _use(metadata: AdapterMetadata, repo_id: str | None) -> str:
    provenance = metadata.provenance
    lm, vision = provenance.get("base_model_name_or_path"), provenance.get("vision_encoder")
    if lm and vision and repo_id:
        loading = f"model = GroundedModel.from_pretrained({_quoted(repo_id)})"
    else:
        first = _quoted(lm) if lm else "lm"
        more = "" if vision else ", vision_encoder=encoder, image_processor=processor"
        loading = f"model = GroundedModel.from_pretrained({first}, {_quoted(repo_id) if repo_id else 'folder'}{more})"
    return (
        "```python\n"
        "from visual_ground import GroundedModel, ImageIndex\n\n"
        f"{loading}\n"
        'print(model.generate([["photo.jpg", "What is this?"]])[0])\n\n'
        'index = ImageIndex.build(model, ["photo.jpg"])  # the images that it may answer with\n'
        'answer = model.generate("Show me a photo.", index)[0]\n'
        'answer.save("answer.html")\n'
        "```\n\n" + _what_to_pass(lm, vision)
    )


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _what_to_pass(lm: str | None, vision: str | None) -> str:
    if lm and vision:
        return (
            "Any copy of the same language model works as well, loaded by you in any dtype or quantised: pass it as "
            "the first argument, before the adapter's name. `visual_ground` installs with pip."
        )
    missing = [*([] if lm else ["the language model"]), *([] if vision else ["the vision encoder"])]
    return f"{' and '.join(missing).capitalize()} that it was trained with can be loaded by no name: pass yours."


def _results(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "Nothing has been measured yet."
    rows = ["| dataset | split | pairs | measured | value |", "|---|---|---|---|---|"]
    for one in evaluations:
        dataset = _cell(one.dataset) + (f" at `{one.revision[:12]}`" if one.revision else "")
        where = f"| {dataset} | {_cell(one.split or '')} | {'' if one.pairs is None else one.pairs} "
        rows += [f"{where}| {_cell(_metric_name(name))} | {value:.4g} |" for name, value in one.metrics.items()]
    return "\n".join(rows)


def _samples(report: Report) -> str:
    shown = [
        f"Asked:\n\n{_literal(sample.prompt)}\n\nAnswered:\n\n{_literal(sample.answer)}" for sample in report.samples
    ]
    picture = [f"![The images in the answers, in order]({PICTURE_FILE})"] if report.picture else []
    return "\n\n".join([*shown, *picture])


def _training(metadata: AdapterMetadata) -> str:
    report = metadata.report
    settings = {**metadata.config.to_dict(), **report.training}
    rows = [f"| {_cell(name)} | {_cell(_shown(value))} |" for name, value in settings.items()]
    on = f"Trained on {', '.join(f'`{name}`' for name in report.datasets)}.\n\n" if report.datasets else ""
    return on + "\n".join(["| setting | value |", "|---|---|", *rows])


def _limits(metadata: AdapterMetadata) -> str:
    lines = [
        "- The language model is frozen: what it knows and how it talks are its own, and what it says about an image "
        "may be wrong.",
        "- It answers with images that are in the index it is given; it makes none.",
        "- The numbers above hold for the language model that it was trained on. On another one it loads where the "
        "widths fit, and says so; measure it there.",
    ]
    if not metadata.report.evaluations:
        lines.append("- How good it is was not measured.")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else '""' if value == "" else str(value)


def _cell(text: str) -> str:
    """Return text for a cell of a table."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat.replace("<", "&lt;")


def _literal(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
