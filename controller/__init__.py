"""Token features and precision policies."""
