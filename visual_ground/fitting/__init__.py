"""A whole adapter from image-caption pairs in minutes: the start values of training, and no more."""
