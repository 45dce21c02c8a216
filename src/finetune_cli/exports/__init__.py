"""A run in other formats, one module a format, each proven before it is in place."""
