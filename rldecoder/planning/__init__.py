"""What a run will take, before anything runs: arithmetic over its settings, no weights."""
