"""A draft of a bundle, quantized to 8 bits, that is run to measure what a better one needs to know of its products.

Its segments are run one by one over a calibration text, in any order and with any change: see `Moments` and
`kvq.exporter.damage`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from kvq.exporter.calibration import windows
from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.graphs.options import GraphOptions
from kvq.exporter.graphs.writer import GraphWriter
from kvq.exporter.key_statistics import TEXT, causal_attention
from kvq.exporter.weights.file import WeightFile
from kvq.runtime.bundle.forms import ANGLES
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.machine.threads import session_options

# What a segment may take, by the names of its inputs.
State = dict[str, np.ndarray]
FLOAT = onnx.TensorProto.FLOAT


class Draft:
    """The graphs of a draft, and a text in parts that are read on their own.

    Args:
        folder: of the draft.
        segments, head: its graphs.
        shape: of the model.
        ids: int64 [tokens] of the text.
    """

    def __init__(self, folder: Path, segments: list[str], head: str, shape: Architecture, ids: np.ndarray) -> None:
        self.folder, self.segments, self.head, self.shape = folder, segments, head, shape
        self._parts = [part for _, part in windows(ids, min(TEXT, shape.context))]

    def states(self) -> list[State]:
        """What the first segment takes of every part."""
        return [{"ids": part, "positions": np.arange(len(part))} for part in self._parts]

    def graph(self, name: str) -> onnx.ModelProto:
        """A graph, its weights left in their file."""
        return onnx.load(self.folder / name, load_external_data=False)

    def session(self, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
        """onnxruntime's session of a graph, which may have been changed."""
        options = session_options()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def run(self, session: onnxruntime.InferenceSession, state: State) -> State:
        """All that a segment yields, by name."""
        names = [output.name for output in session.get_outputs()]
        feed = {taken.name: state[taken.name] for taken in session.get_inputs()}
        return dict(zip(names, session.run(names, feed), strict=True))

    def after(self, state: State, found: State) -> State:
        """What the next segment takes, or the head, of what a segment has yielded of a state."""
        following = {"residual": found["residual_out"]}
        if "query_key" not in found:
            return following
        heads, query_key = self.shape.heads, found["query_key"]
        attention = np.empty((len(query_key), heads, self.shape.head_dim), np.float32)
        layer, windows = int(state.get("layer", 0)), self.shape.windows
        window = windows[layer] if windows else 0
        causal_attention(query_key[:, :heads], query_key[:, heads:], found["value"], attention, window=window)
        angles = {name for pair in ANGLES for name in pair}
        following |= {name: value for name, value in (state | found).items() if name in angles}
        return following | {"attention": attention.reshape(len(attention), -1), "layer": np.array(layer + 1)}


def products(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The products of a graph with quantized matrices, by the matrices' names."""
    return {n.input[1].removesuffix(".codes"): n for n in model.graph.node if n.op_type == "MatMulNBits"}


class Moments:
    """Second moments of what the products of a draft take, in the order of its segments.

    Of one segment they are in memory at a time: those of all take 8 GB for a model of 1.7 billion weights.
    """

    def __init__(self, draft: Draft) -> None:
        self._draft, self._segments, self._states = draft, list(draft.segments), draft.states()
        self._found: dict[str, np.ndarray] = {}

    def __call__(self, name: str) -> np.ndarray:
        """Of the products with a matrix, float64 [k, k]; asked for in the order of the segments.

        Raises:
            KeyError: no later segment has such a product.
        """
        while name not in self._found:
            if not self._segments:
                raise KeyError(name)
            self._found = self._run(self._draft.graph(self._segments.pop(0)))
        return self._found[name]

    @np.errstate(over="ignore", invalid="ignore")  # whoever takes the moments refuses what is no number
    def _run(self, model: onnx.ModelProto) -> dict[str, np.ndarray]:
        """Run a segment over all texts: moments by name."""
        taken = {name: node.input[0] for name, node in products(model).items()}
        model.graph.output.extend(onnx.helper.make_tensor_value_info(x, FLOAT, None) for x in taken.values())
        session = self._draft.session(model)
        moments: dict[str, np.ndarray] = {}
        for at, state in enumerate(self._states):
            found = self._draft.run(session, state)
            for name, x in taken.items():
                product = (found[x].T @ found[x]).astype(np.float64)
                moments[name] = moments[name] + product if name in moments else product
            self._states[at] = self._draft.after(state, found)
        return moments


@contextmanager
def draft_of(checkpoint: Checkpoint, options: GraphOptions, folder: Path, ids: np.ndarray) -> Iterator[Draft]:
    """A draft of a checkpoint, which is there as long as the block runs.

    Args:
        checkpoint: the model.
        options: of the bundle that is wanted.
        folder: a new one beside it takes the draft.
        ids: int64 [tokens] of the text.
    """
    with tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as place, WeightFile(Path(place)) as file:
        of_8_bits = replace(options, weights="int8", activations="int8")
        writer = GraphWriter(checkpoint, of_8_bits, Path(place), file)
        segments, head = list(writer.segments()), writer.head()
        file.flush()
        yield Draft(Path(place), segments, head, checkpoint.architecture, ids)
