"""The drawn practice set."""
