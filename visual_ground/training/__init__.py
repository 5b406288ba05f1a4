"""Training an adapter: data, losses and their fast paths, start values, and the trainer that runs them.

`trainer` is the door; `setup` and `fast_paths` prepare a run, `validation` and `contact_sheet` look at it.
"""
