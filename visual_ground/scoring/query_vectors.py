"""The retrieval vectors of sequences, each read at its last position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.reading import last_positions
from visual_ground.prompts.turns import last_turn

# How many contexts are read together; a bound on the memory that long answers take.
QUERIES_PER_RUN = 32


def query_vectors(
    frozen_lm: FrozenLM, attached: AttachedAdapter, queries: Sequence[Sequence[int]], image_tokens: Tensor | None
) -> Tensor:
    """Return the unit vectors (n, q) read at the last id of each query.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        queries: n queries as ids, each ending with `GroundingProcessor.retrieval_suffix`.
        image_tokens: (m * k, d), of the images in the ids.
    """
    length = max(map(len, queries))
    pad_id, device = attached.processor.pad_token_id, frozen_lm.device
    ids = torch.tensor([[*[pad_id] * (length - len(query)), *query] for query in queries], device=device)
    mask = torch.tensor([[0] * (length - len(query)) + [1] * len(query) for query in queries], device=device)
    return last_vectors(frozen_lm, attached, ids, mask, image_tokens)


def last_vectors(
    frozen_lm: FrozenLM, attached: AttachedAdapter, ids: Tensor, mask: Tensor, image_tokens: Tensor | None
) -> Tensor:
    """Return the unit vectors (b, q) read at the last position of ids (b, s), which are padded on the left."""
    states = frozen_lm.hidden_states(ids, mask, last_positions(ids), attached.config.text_layers, image_tokens)
    return attached.embed_states(states)


def ret_vectors(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    sequences: Tensor,
    mask: Tensor,
    start: int,
    image_tokens: Tensor | None,
) -> list[Tensor]:
    """Return, for each sequence, the retrieval vectors (r, q) of the `[RET]`s in its answer.

    The finished sequences are read once more up to each `[RET]`, so beams, sampling and caches make no difference.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        sequences: (b, s), prompts and answers.
        mask: (b, start), of the prompts.
        start: where the answers begin.
        image_tokens: (n * k, d), of the prompts' images.
    """
    processor = attached.processor
    prompts = [row[:start][kept.bool()].tolist() for row, kept in zip(sequences, mask, strict=True)]
    answers = sequences[:, start:].tolist()
    contexts: list[list[int]] = []
    counts: list[int] = []
    openings: list[tuple[int, Sequence[int]]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        places = [i for i, token in enumerate(answer) if token == processor.ret_token_id]
        if places:
            openings += [(len(contexts), ids) for ids in opening_contexts(attached, prompt, answer[: places[0]])]
        contexts += [[*prompt, *answer[:place]] for place in places]
        counts.append(len(places))
    if not contexts:
        return [torch.empty(0, attached.config.retrieval_dim) for _ in sequences]
    vectors = vectors_after(frozen_lm, attached, [*contexts, *(ids for _, ids in openings)], image_tokens)
    vectors, asked = vectors[: len(contexts)], vectors[len(contexts) :]
    for place in {place for place, _ in openings}:
        of_place = [vector for (other, _), vector in zip(openings, asked, strict=True) if other == place]
        vectors[place] = mean_vector([vectors[place], *of_place])
    return list(torch.split(vectors, counts))


def mean_vector(vectors: Sequence[Tensor]) -> Tensor:
    """Return the direction (q,) in the middle of unit vectors (q,)."""
    return normalize(torch.stack([*vectors]).sum(0), dim=-1)


def vectors_after(
    frozen_lm: FrozenLM, attached: AttachedAdapter, contexts: Sequence[Sequence[int]], image_tokens: Tensor | None
) -> Tensor:
    """Return the vectors (n, q), on the CPU, read after each context's ids."""
    processor = attached.processor
    # If the context and the suffix together are longer than the LM's limit, the oldest ids are dropped.
    limit = -(processor.max_length or 0)
    queries = [[*context, *processor.retrieval_suffix(context)][limit:] for context in contexts]
    parts = [queries[i : i + QUERIES_PER_RUN] for i in range(0, len(queries), QUERIES_PER_RUN)]
    return torch.cat([query_vectors(frozen_lm, attached, part, image_tokens).cpu() for part in parts])


def opening_contexts(attached: AttachedAdapter, prompt: Sequence[int], answer: Sequence[int]) -> list[Sequence[int]]:
    """Return the contexts whose vectors are averaged into that of an answer's first `[RET]`.

    These are the prompt, and in a longer chat its last turn as if it were the first. There are none if the prompt
    opens no turn of a chat, or if the answer has no words before its `[RET]`, which may have drifted from what was
    asked for. Later pictures are about what the answer has come to, and are read in their place only.

    Args:
        attached: the active adapter.
        prompt: the prompt's ids.
        answer: its ids before its first `[RET]`.
    """
    if not (attached.config.retrieval_prompt and answer and attached.processor.opens_turn(prompt)):
        return []
    turn = last_turn(attached.processor, prompt)
    return [prompt] if turn is None else [prompt, turn]
