"""The adapter: all that is trained, and its folder on disk."""
