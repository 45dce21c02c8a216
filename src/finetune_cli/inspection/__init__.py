"""A model as a graph, and its first filters."""
