"""Start values of a new adapter that are computed from the training pairs."""
