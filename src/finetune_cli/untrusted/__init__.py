"""Model files from strangers, checked before another library parses them."""
