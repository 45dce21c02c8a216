"""What lasts: run directories and checkpoints."""
