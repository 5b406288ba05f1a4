"""Engines that know nothing of this package, for tests: as small as the protocols allow."""

import torch

from visual_ground.index.engines.base import SearchResult


class ListEngine:
    """A `VectorIndex` that keeps its vectors in a Python list, and compares one by one."""

    def __init__(self, vectors, dim):
        self.dim, self.rows = dim, dict(enumerate(row.tolist() for row in vectors))
        self.end = len(self.rows)

    def __len__(self):
        return len(self.rows)

    def add(self, vectors):
        self.rows.update(enumerate((row.tolist() for row in vectors), self.end))
        self.end += len(vectors)

    def remove(self, positions):
        for position in positions:
            del self.rows[position]

    def search(self, vectors, k, filter=None):
        allowed = [i for i in self.rows if filter is None or bool(filter[i])]
        positions, scores = [], []
        for query in vectors.tolist():
            score = {i: sum(a * b for a, b in zip(query, self.rows[i], strict=True)) for i in allowed}
            positions.append(sorted(allowed, key=lambda i: -score[i])[:k])
            scores.append([score[i] for i in positions[-1]])
        return SearchResult(torch.tensor(positions), torch.tensor(scores))

    def save(self, path):
        torch.save(list(self.rows.values()), path)

    @classmethod
    def load(cls, path):
        rows = torch.tensor(torch.load(path))
        return cls(rows, rows.shape[1])


class ForeignIndex:
    """What `generate` needs of an index, and no more."""

    def __init__(self, engine):
        self.engine, self.dim = engine, engine.dim

    def search(self, vectors, k):
        return self.engine.search(vectors, k)

    def entry(self, position):
        return f"foreign {position}", None, {"row": position}
