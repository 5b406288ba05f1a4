"""Indexes of many images: built from folders, shards and datasets, continued after a stop, or read from other tools."""
