"""The frozen language model: loading it, reading what it is, and the virtual tokens that it is given."""
