"""A finished run in the forms that other programs run, each proven against the run before it is in place."""
