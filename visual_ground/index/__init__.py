"""Image indexes: vectors with the images that they stand for."""
