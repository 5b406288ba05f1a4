"""The language model itself: loaded, frozen, and what is read of it (widths, ids, embeddings, a fingerprint)."""
