"""Models that answer: runtimes, a finished run as a predictor, its linear end."""
