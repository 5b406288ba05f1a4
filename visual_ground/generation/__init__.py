"""Answers: an LM's text, with retrieved images where it generated `[RET]`."""
