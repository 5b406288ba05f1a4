"""Training data: rows of any dataset become examples, and those become batches of unpadded token sequences."""
