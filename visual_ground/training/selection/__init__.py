"""Which state of a run is kept: the best on groups that are held out, and never one that is worse than the start."""
