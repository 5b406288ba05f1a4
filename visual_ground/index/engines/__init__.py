"""Search engines, one file each, which know vectors only; `saved` lists those that are saved with an index."""
