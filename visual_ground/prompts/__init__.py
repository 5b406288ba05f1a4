"""Prompts: interleaved text, images and chat messages become ids."""
