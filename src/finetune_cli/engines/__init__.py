"""Where photos are processed: in threads of this process, or by the workers of a Ray cluster."""
