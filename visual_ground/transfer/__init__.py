"""An adapter moves to another language model."""
