"""The commands of `visual-ground`, one file each: thin layers over the Python API."""
