"""Conversations in a terminal: what was said and shown, and pictures between the lines."""
