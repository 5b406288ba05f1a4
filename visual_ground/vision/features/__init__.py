"""Features of images, computed once and kept: in a cache on disk, and in memory for those that were seen lately."""
