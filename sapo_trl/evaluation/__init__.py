"""Pass@1 with its interval, and pass@k."""
