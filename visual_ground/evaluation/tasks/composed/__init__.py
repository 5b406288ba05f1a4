"""Tasks of composed retrieval, one file each: an image and a text ask for another image."""
