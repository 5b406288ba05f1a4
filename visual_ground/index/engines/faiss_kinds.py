"""The kinds of faiss indexes that are used, and which one is for how many vectors."""

from __future__ import annotations

from typing import Any

from visual_ground.errors import GroundingValueError, needing

# Below so many vectors, comparing all is as fast as a graph; above so many, the graph and the vectors in it need more
# memory than most machines have: 6.4 GB at width 256, where IVF-PQ needs 0.4 GB.
FLAT_BELOW, GRAPH_BELOW = 20_000, 5_000_000
LINKS = 32  # Of each vector in the graph.
# How many vectors a graph's search looks at, or how many lists, tried one after another until the recall is reached.
EFFORTS = {"flat": (1,), "hnsw": (32, 64, 128, 256, 512), "ivfpq": (8, 16, 32, 64, 128, 256, 512)}
KINDS = {"IndexFlat": "flat", "IndexFlatIP": "flat", "IndexHNSWFlat": "hnsw", "IndexIVFPQ": "ivfpq"}
# IVF-PQ: vectors by their nearest of 4 sqrt(n) centroids, each kept as one byte for 4 numbers. faiss wants 39 vectors
# for each centroid that it learns, and a byte has 256.
NUMBERS_A_BYTE, LEARNT_FROM, FEWEST_TO_LEARN = 4, 40, 39 * 256
CODE_ROUNDS = 10  # Of learning the codes; faiss does 25, of which the last ones change next to nothing.
CANDIDATES = 10  # That are compared exactly, for each entry that is wanted, where their codes are not exact.


def kind_for(count: int) -> str:
    """Return the kind for a number of vectors."""
    return "flat" if count < FLAT_BELOW else "hnsw" if count < GRAPH_BELOW else "ivfpq"


def factory_of(kind: str, count: int, dim: int) -> str:
    """Return faiss's name for an index of a kind; GroundingValueError for another, or too few vectors for IVF-PQ."""
    if kind not in EFFORTS:
        raise GroundingValueError(f"kind must be one of {sorted(EFFORTS)}, got {kind!r}.")
    if kind != "ivfpq":
        return "Flat" if kind == "flat" else f"HNSW{LINKS}"
    if count < FEWEST_TO_LEARN:
        raise GroundingValueError(
            f'"ivfpq" is learnt from at least {FEWEST_TO_LEARN} vectors, got {count}; use "hnsw" or "flat".'
        )
    lists = min(int(4 * count**0.5), count // 39)
    codes = next(size for size in range(max(1, dim // NUMBERS_A_BYTE), 0, -1) if dim % size == 0)
    return f"IVF{lists},PQ{codes}"


def load_faiss() -> Any:
    """Return the module `faiss`, or say what to install."""
    with needing('This index needs faiss, which is not installed: pip install "visual-ground[faiss]".'):
        import faiss
    return faiss
