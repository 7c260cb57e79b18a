"""Thin Prefect tasks, one a stage, and the process that a stage on a leased device runs in."""
