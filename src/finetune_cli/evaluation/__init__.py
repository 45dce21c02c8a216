"""A finished run judged on labelled photos."""
