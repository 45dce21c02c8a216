"""Pictures: curves, confusion matrices, heat maps."""
