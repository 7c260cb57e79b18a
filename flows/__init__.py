"""Prefect flows: the pipeline, its phases, the nightly run, the human review, the local UI."""
