"""Start values that are computed from the training pairs."""
