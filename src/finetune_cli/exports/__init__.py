"""A run in other formats, one module per format, each compared with the run before it is moved into place."""
