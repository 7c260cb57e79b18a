"""A run as one folder that others open: hashed, without pickles, without the run's store."""
