"""Training of the controllers."""
