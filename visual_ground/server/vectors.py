"""Vectors of texts and images, and searches with them, without generating."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visual_ground.generation.output import RetrievedImage
from visual_ground.index.remote_images import LinkRules
from visual_ground.model import GroundedModel
from visual_ground.server.failures import RequestFailure
from visual_ground.server.pictures import Given, Pictures
from visual_ground.server.requests import refuse_unread

MAX_INPUTS = 256


def embeddings(model: GroundedModel, body: Mapping[str, Any], rules: LinkRules, name: str) -> dict[str, Any]:
    """Return OpenAI's `list` of embeddings, of texts and `image_url` parts."""
    given = body.get("input")
    inputs = given if isinstance(given, list) else [given]
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise RequestFailure(400, f"input must have 1 to {MAX_INPUTS} entries, got {len(inputs)}.")
    refuse_unread(body, {"dimensions": (model.config.retrieval_dim,)})
    if (form := body.get("encoding_format") or "float") not in ("float", "base64"):
        raise RequestFailure(400, f"encoding_format must be float or base64, got {str(form)[:40]!r}.")
    vectors = [_vector(model, one, rules) for one in inputs]
    as_base64 = form == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(vector) if as_base64 else vector.tolist()}
        for i, vector in enumerate(vectors)
    ]
    read = sum(_tokens(model, one) for one in inputs)
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "model": name, "data": data, "usage": usage}


def _tokens(model: GroundedModel, given: Any) -> int:
    """Return how many tokens the LM read for an input; an image passes through the vision encoder alone."""
    return len(model.processor.encode_queries([given])[0].ids) if isinstance(given, str) else 0


def _base64(vector: Tensor) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector.tolist())).decode("ascii")


@torch.no_grad()
def _vector(model: GroundedModel, given: Any, rules: LinkRules) -> Tensor:
    """Return the vector (q,) of a text or an image."""
    if isinstance(given, str) and given.strip():
        return model.embed_text([given])[0].float().cpu()
    if isinstance(given, Mapping) and given.get("type") == "image_url":
        return model.embed_images([Given(rules).read(given.get("image_url"))])[0].float().cpu()
    raise RequestFailure(400, 'An input must be a text that is not empty, or {"type": "image_url", "image_url": ...}.')


def search(
    model: GroundedModel, body: Mapping[str, Any], pictures: Pictures, rules: LinkRules, count: int
) -> dict[str, Any]:
    """Return the pictures that are nearest to a text or an image, best first."""
    if pictures.index is None:
        raise RequestFailure(404, "This server has no index to search. Start it with --index.", code="no_index")
    found = pictures.index.search(_vector(model, body.get("query"), rules)[None], count)
    data = []
    for position, score in zip(found.positions[0].tolist(), found.scores[0].tolist(), strict=True):
        name, image, metadata = pictures.index.entry(position)
        data.append(pictures.described(RetrievedImage(name, score, image, metadata)))
    return {"object": "list", "data": data}
