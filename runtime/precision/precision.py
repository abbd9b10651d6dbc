"""What a precision is: one way to store the vectors of a token, known by its id everywhere."""

from __future__ import annotations

from typing import NamedTuple


class Precision(NamedTuple):
    """One way to store a vector.

    Attributes:
        id: 1 to 31, in the tags of tokens, in session files and in native code; it never changes its meaning. That it
            is the number of bits is a custom of the first four, not a rule: two codecs may take as many bits.
        name: in the names of pairs and policies, "4" in k4v4; letters, digits and underscores.
        bits: of a code, without the scale.
        stored: pages hold it and policies choose it. The recent window's own precision is not stored: what leaves the
            window takes another one.

    Which of them attention reads as they lie is a matter of the backend: numpy decodes with the codec, native code has
    kernels for some (`kvq.runtime.native.library.known_precisions`) and leaves the others to numpy.
    """

    id: int
    name: str
    bits: int
    stored: bool = True


OPEN = 0  # id of what has not been chosen yet
MOST_ID = 31
