"""What a person asks for: one module per command, plain functions that know nothing of argv or the terminal."""
