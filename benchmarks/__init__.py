"""Measurements against peers and limits; never tests. See docs/results.md for the numbers."""
