"""Conversations in turns."""
