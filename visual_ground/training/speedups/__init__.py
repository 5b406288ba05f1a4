"""The same numbers for less time and memory."""
