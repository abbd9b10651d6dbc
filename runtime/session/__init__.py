"""A loaded model, and texts on their way through it."""
