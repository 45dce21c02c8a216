"""What is computed once: features and photo digests, in SQLite files."""
