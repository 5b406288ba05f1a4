"""Measures of how well text and images find each other."""
