"""What the entries of an index stand for: their columns, filters on them, and the parquet file they are saved in."""
