"""Official FROMAGe checkpoints and image embeddings, read without running what is pickled."""
