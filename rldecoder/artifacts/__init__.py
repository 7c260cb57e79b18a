"""What stages publish: the store, its mirror, checkpoints, and the catalogue of all files."""
