"""The YAML file: every key and its default, loading, and messages in a person's words."""
