"""What happened to the tokens of a text."""
