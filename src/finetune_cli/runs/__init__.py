"""The run directory: the format on disk and nothing else."""
