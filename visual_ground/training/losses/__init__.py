"""The losses: captioning, text retrieval and contrastive."""
