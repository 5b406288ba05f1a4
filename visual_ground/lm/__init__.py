"""The frozen language model, run with virtual tokens that hooks put in at its two ends."""
