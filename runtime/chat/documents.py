"""A document in a turn that stays open, and what may follow it there."""

from __future__ import annotations

# Between a document and what is asked about it: a paragraph of its own.
BREAK = "\n\n"
# What a question may begin with. The tokens of a document that all of them leave as they are can be cached before
# the question is known; "" closes the turn at once.
BEGINNINGS = ("", "What", "what", " what", "1", ".", '"', "\n", "\n\n\nWhat", "\t", "é", "日", "😀")


def joined(document: str, text: str) -> str:
    """A document and what follows it in the same turn."""
    return BREAK.join(part for part in (document, text) if part)
