"""Answers: `[RET]` becomes retrieved images between the text."""
