"""Files: written whole or not at all, read strictly, shared on the Hub."""
