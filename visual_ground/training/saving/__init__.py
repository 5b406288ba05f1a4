"""What a run writes: sealed checkpoints on the disk, and the adapter, and nothing else, on the Hub."""
