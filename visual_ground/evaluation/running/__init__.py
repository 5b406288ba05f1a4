"""Evaluations that are measured unit by unit: continued after a kill, shared by processes, reported with intervals."""
