"""What other projects have published becomes adapters and indexes."""
