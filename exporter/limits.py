"""How large what comes in a checkpoint may be, in one place: far above any model there is, far below what does harm.

What a bundle may be is in `kvq.runtime.bundle.limits`, and what a vocabulary in `kvq.runtime.text.tokenizer`: a
checkpoint that makes more is refused as well.
"""

from __future__ import annotations

from kvq.runtime.text.tokenizer import MOST_MERGES, MOST_PIECES

# JSON, a byte of which becomes a Python object of sixty: values are counted before it is read. Gemma 3's
# tokenizer_config.json has 60,000 in 1.2 MB, its tokenizer.json 2 million in 33 MB.
JSON_BYTES, JSON_VALUES = 1 << 23, 1 << 19  # of a configuration or an index
TOKENIZER_BYTES, TOKENIZER_VALUES = 1 << 26, 1 << 23  # of tokenizer.json, vocab.json and merges.txt
DEPTH = 64  # of values in values: what says which one is wrong goes down as deep
TEMPLATE_BYTES = 1 << 20  # what a chat needs of it is bounded again where it is used
TEXT = 512  # characters of a text that goes from a checkpoint into a manifest; a longer one stays outside

# Weights. A header of safetensors takes 120 bytes a tensor.
WEIGHT_FILES, TENSORS = 1 << 12, 1 << 16
HEADER_BYTES, HEADER_VALUES = 1 << 24, 1 << 19
# Of all files, for each parameter of the model and besides: holes take no room, and as long to digest as weights.
PARAMETER_BYTES, OTHER_BYTES = 16, 1 << 31
MAGNITUDE = 1e9  # of a weight: squares of it, and sums of them, are single precision's still

# GGUF. Tokenizers of 256,000 tokens have three arrays of that and some 600,000 merges, and take some 10 MB.
GGUF_HEADER_BYTES, GGUF_ELEMENTS, GGUF_ENTRIES = 1 << 26, 1 << 22, 1 << 16

SENTENCEPIECE_BYTES = 1 << 24  # of tokenizer.model; Gemma's takes 5 MB
PIECE_FIELDS, SETTING_FIELDS, SETTINGS = 16, 1 << 16, 64  # of a piece, of a message of settings, and such messages
# The time `tokenizers` takes for added tokens grows with their square: 0.9 s for 32,000, 41 s for 256,000. Gemma 3 has
# the most, 6,242.
ADDED = 1 << 15

# Arrays of a GGUF file -> elements; others have as many as layers, languages or characters of a normalizer.
ARRAYS = {
    "tokenizer.ggml.tokens": MOST_PIECES, "tokenizer.ggml.scores": MOST_PIECES,
    "tokenizer.ggml.token_type": MOST_PIECES, "tokenizer.ggml.merges": MOST_MERGES,
}  # fmt: skip
OTHER_NUMBERS, OTHER_TEXTS = 1 << 20, 1 << 16
