"""Training data: datasets of any kind become batches."""
