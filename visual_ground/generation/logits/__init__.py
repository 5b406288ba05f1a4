"""Logits processors that know only the LM and the adapter: which ids may come, and in which answers `[RET]` may."""
