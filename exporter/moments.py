"""What the products of a model are multiplied with: second moments, measured on a calibration text.

The layers of a draft, quantized to 8 bits, are run one after the other over the whole text, and only one of them is in
memory at a time, with the moments of its products: for a model of 1.7 billion weights those of all would take 8 GB.
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
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.machine.threads import session_options

CODES = ".codes"


class DraftMoments:
    """Second moments of the inputs of a draft's products, in the order of its segments.

    Args:
        folder: of the draft.
        segments: its graphs, in order.
        shape: of the model.
        ids: int64 [tokens] of the text.
    """

    def __init__(self, folder: Path, segments: list[str], shape: Architecture, ids: np.ndarray) -> None:
        self._folder, self._segments, self._shape = folder, list(segments), shape
        parts = [part for _, part in windows(ids, min(TEXT, shape.context))]
        # What a segment takes, text by text.
        self._feeds = [{"ids": part, "positions": np.arange(len(part))} for part in parts]
        self._angles: list[dict[str, np.ndarray]] = []
        self._found: dict[str, np.ndarray] = {}

    def __call__(self, name: str) -> np.ndarray:
        """Of the products with a matrix, float64 [k, k]; asked for in the order of the segments.

        Raises:
            KeyError: no later segment has such a product.
        """
        while name not in self._found:
            if not self._segments:
                raise KeyError(name)
            self._found = self._run(self._segments.pop(0))
        return self._found[name]

    def _run(self, segment: str) -> dict[str, np.ndarray]:
        """Run a segment over all texts: moments by name, and what the next one takes."""
        model = onnx.load(self._folder / segment, load_external_data=False)
        taken = {
            node.input[1].removesuffix(CODES): node.input[0]
            for node in model.graph.node
            if node.op_type == "MatMulNBits"
        }
        outputs = [output.name for output in model.graph.output]
        float_type = onnx.TensorProto.FLOAT
        model.graph.output.extend(onnx.helper.make_tensor_value_info(x, float_type, None) for x in taken.values())
        options = session_options()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        wanted = [*outputs, *taken.values()]
        moments: dict[str, np.ndarray] = {}
        for at, feed in enumerate(self._feeds):
            found = dict(zip(wanted, session.run(wanted, feed), strict=True))
            for name, x in taken.items():
                rows = found[x]
                product = (rows.T @ rows).astype(np.float64)
                moments[name] = moments[name] + product if name in moments else product
            if self._segments:
                self._feeds[at] = self._next(at, found)
        return moments

    def _next(self, at: int, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the next segment takes of a text."""
        heads, query_key = self._shape.heads, found["query_key"]
        attention = np.empty((len(query_key), heads, self._shape.head_dim), np.float32)
        causal_attention(query_key[:, :heads], query_key[:, heads:], found["value"], attention)
        feed = {"residual": found["residual_out"], "attention": attention.reshape(len(attention), -1)}
        if len(self._angles) == at:
            self._angles.append({name: found[name] for name in ("cosine", "sine")})
        return feed | (self._angles[at] if len(self._segments) > 1 else {})


@contextmanager
def draft_moments(
    checkpoint: Checkpoint, options: GraphOptions, folder: Path, ids: np.ndarray
) -> Iterator[DraftMoments]:
    """Second moments of a checkpoint's products, of a draft that is there as long as the block runs.

    Args:
        checkpoint: the model.
        options: of the bundle that is wanted.
        folder: a new one beside it takes the draft.
        ids: int64 [tokens] of the text.
    """
    with tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as place, WeightFile(Path(place)) as file:
        of_8_bits = replace(options, weights="int8", activations="int8")
        segments = list(GraphWriter(checkpoint, of_8_bits, Path(place), file).segments())
        file.flush()
        yield DraftMoments(Path(place), segments, checkpoint.architecture, ids)
