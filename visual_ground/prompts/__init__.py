"""Prompts: interleaved text and images, or chat messages, become token ids and pixels."""
