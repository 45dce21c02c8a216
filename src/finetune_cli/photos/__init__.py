"""What comes in: image files, data sets of them, and their augmented views."""
