"""A whole adapter from image-caption pairs without a training step."""
