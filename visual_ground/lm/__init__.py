"""The frozen language model: loading it, reading its properties, and giving it virtual tokens through hooks."""
