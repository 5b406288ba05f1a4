"""What makes training fast without changing its losses.

Packing, keys and values that are computed once, cross entropy in chunks, and gradient checkpointing.
"""
