"""How large what comes in a bundle may be, in one place: far above any model there is, far below what does harm."""

from __future__ import annotations

# kvq.json.
MANIFEST_BYTES = 1 << 20
NUMBER = 1 << 53  # of any integer in it: what a float64 holds
FILES = 4096
FILE_BYTES = 1 << 44
WEIGHT_BYTES = 16  # of weights.bin, for each parameter of the shape
OTHER_BYTES = 1 << 30  # of all other files together, and of weights.bin besides
TEXT = 4096  # characters of any text in it
NAME = 256  # characters of a name
END_IDS = 64
CONTROLLERS = 16
CLASSES = 64
CURVE_POINTS = 1 << 16
CURVE = 1e30  # magnitude of any number in a curve

# Shapes: buffers are made of these sizes.
FEATURES = 1 << 17
SHAPE = {"layers": 1024, "heads": 1024, "kv_heads": 1024, "head_dim": 1024, "vocab": 1 << 20, "context": 1 << 24}
TOKEN_VALUES = 1 << 20  # of keys, and of values, that a token has in all layers

# Graphs.
GRAPH_BYTES, LAYER_BYTES = 1 << 18, 1 << 16  # of a graph, and more for each layer of it: its weights are elsewhere
CONTROLLER_BYTES = 1 << 28  # it holds its weights itself
NAMES = 1 << 15  # characters of a name in a graph: a small constant is called by its values
RANK = 4
INPUTS, OUTPUTS = 64, 64  # of a node
ENTRIES = 1 << 17  # nodes or constants of a graph
NODES = 64  # of a graph, for each layer of it and once more
VALUE = 3  # features of any value of a graph, in those of the widest that goes in or out
VALUES = 24  # of all its values together, for each layer of it and once more
WORK = 4  # multiplications of a token, in elements of the weights that a graph names
FOLDED = 2  # elements of what is computed from constants alone, in those of the weights
LEAST_WIDTH, LEAST_WORK = 1 << 12, 1 << 21  # for models so small that these count for nothing
INLINE_NUMBERS = 64  # of a list of whole numbers: a shape, axes, sizes

# weights.bin.
ALIGNMENT = 64
PAGE = 4096  # a hole in front of a tensor that starts on a page is shorter
