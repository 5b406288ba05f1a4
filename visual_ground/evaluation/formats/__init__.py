"""Readers of the benchmarks' official files; each checks every entry and says which key is missing where."""
