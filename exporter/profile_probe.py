"""What precisions of keys and values do to a model's predictions, side by side and layer by layer, measured.

Segment by segment, the exact model and all changed ones go on together, so that weights are there once, as floats:
with activations in 8 bits any change at all would diverge more than what is to be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from kvq.exporter.key_statistics import RECENT, SINK
from kvq.exporter.weights.quantize import QuantizedMatrix, unpacked_zeros
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.forms import ANGLES
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.compute.backends import make_backend
from kvq.runtime.machine.threads import session_options
from kvq.runtime.precision.codecs import CodecSet
from kvq.runtime.precision.table import named

TOKENS, APART = 256, 3  # that are read together, and how many apart those are whose predictions are compared
PROBE = "3"  # name of the precision that is carried to the end
TOGETHER = 8  # states that go through a segment at once
ROWS = 2048  # of the head's matrix that are multiplied with at a time

# Of every layer, of its keys and of its values: divergence in nats by precision.
Damages = list[tuple[dict[int, float], dict[int, float]]]
Arrays = dict[str, np.ndarray]


def probe(
    bundle: Bundle, ids: np.ndarray, precisions: list[int], progress: Callable[[int, int], None] | None = None
) -> Damages:
    """Divergence of the predictions from the exact model's by what one side of one layer is stored at.

    Args:
        bundle: the model.
        ids: int64 [tokens] of a text; its first ones are read.
        precisions: ids.
        progress: called with the layers done and all there are.
    """
    manifest, shape = bundle.manifest, bundle.manifest.architecture
    ids = ids[: min(TOKENS, shape.context)]
    reader, tried = _Reader(shape, len(ids)), named(PROBE).k
    codecs = make_backend().codecs._replace(feedback=bundle.key_feedback, turns=bundle.key_turns)
    ratios: list[list[dict[int, float]]] = []
    states = _run(bundle.path, manifest.segments[0], [{"ids": ids, "positions": np.arange(len(ids))}])
    angles = {name: states[0][name] for pair in ANGLES for name in pair if name in states[0]}
    for layer, name in enumerate(manifest.segments[1:]):
        attended = [reader.attention(layer, state) for state in states]
        changed = reader.changed(layer, states[0], codecs, precisions)
        ratios.append([_ratios(side, attended[0], tried) for side in changed])
        attended += [side[tried] for side in changed]
        residuals = [state["residual_out"] for state in (*states, states[0], states[0])]
        taken = [
            angles | {"residual": residual, "attention": one.reshape(len(one), -1)}
            for residual, one in zip(residuals, attended, strict=True)
        ]
        states = _run(bundle.path, name, taken)
        if progress is not None:
            progress(layer + 1, shape.layers)
    found = _divergences(bundle.path, manifest.head, [state["residual_out"][::APART] for state in states])
    return [
        tuple({id_: ratio * found[2 * layer + side] for id_, ratio in ratios[layer][side].items()} for side in (0, 1))  # type: ignore[misc]
        for layer in range(shape.layers)
    ]


def _ratios(changed: dict[int, np.ndarray], exact: np.ndarray, tried: int) -> dict[int, float]:
    """Squares of errors of a layer's attention by precision, beside that of one of them."""
    errors = {id_: float(np.square(x - exact, dtype=np.float64).sum()) for id_, x in changed.items()}
    return {id_: error / max(errors[tried], 1e-300) for id_, error in errors.items()}


class _Reader:
    """Attention of a whole text over itself, with what is beyond window and sinks as it was stored."""

    def __init__(self, shape: Architecture, tokens: int) -> None:
        self.shape = shape
        places = np.arange(tokens)
        self._back = places[:, None] - places
        self._far = (places >= SINK) & (self._back > RECENT)

    def _parts(self, state: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values, float32 [heads or kv_heads, tokens, head_dim]."""
        query, key = np.split(state["query_key"], [self.shape.heads], axis=1)
        return query.transpose(1, 0, 2), key.transpose(1, 0, 2), state["value"].transpose(1, 0, 2)

    def attention(
        self, layer: int, state: Arrays, keys: np.ndarray | None = None, values: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 [tokens, heads, head_dim]; keys, values: as stored, float32 [kv_heads, tokens, head_dim]."""
        query, key, value = self._parts(state)
        group, window = self.shape.heads // self.shape.kv_heads, (self.shape.windows or (0,) * (layer + 1))[layer]
        hidden = (self._back < 0) | (self._back >= (window or len(key[0])))
        out = np.empty((key.shape[1], *query.shape[:1], query.shape[2]), np.float32)
        for h, q in enumerate(query):
            k = h // group
            q = q * np.float32(q.shape[-1] ** -0.5)
            scores = q @ key[k].T
            if keys is not None:
                np.copyto(scores, q @ keys[k].T, where=self._far)
            np.copyto(scores, -np.inf, where=hidden)
            np.exp(scores - scores.max(-1, keepdims=True), out=scores)
            scores /= scores.sum(-1, keepdims=True)
            out[:, h] = scores @ value[k]
            if values is not None:
                out[:, h] += np.where(self._far, scores, 0) @ (values[k] - value[k])
        return out

    def changed(
        self, layer: int, state: Arrays, codecs: CodecSet, precisions: list[int]
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """The layer's attention with keys at each precision, and with values."""
        _, key, value = (np.ascontiguousarray(x) for x in self._parts(state))
        places = np.arange(key.shape[1])
        of_keys = {id_: codecs.reread(id_, key, layer, places) for id_ in precisions}
        of_values = {id_: codecs.reread(id_, value, None, places) for id_ in precisions}
        return (
            {id_: self.attention(layer, state, keys=seen) for id_, seen in of_keys.items()},
            {id_: self.attention(layer, state, values=seen) for id_, seen in of_values.items()},
        )


def _run(folder: Path, name: str, states: list[Arrays]) -> list[Arrays]:
    """What a segment yields of some states, all of as many tokens."""
    graph = onnx.load(folder / name, load_external_data=False)
    _as_floats(graph, folder)
    session = _session(graph, folder)
    outputs, found, tokens = [output.name for output in session.get_outputs()], [], len(next(iter(states[0].values())))
    for at in range(0, len(states), TOGETHER):
        part = states[at : at + TOGETHER]
        feed = {taken.name: np.concatenate([state[taken.name] for state in part]) for taken in session.get_inputs()}
        results = session.run(outputs, feed)
        for i in range(len(part)):
            rows = slice(i * tokens, (i + 1) * tokens)
            found.append({output: x[rows] for output, x in zip(outputs, results, strict=True)})
    return found


def _session(graph: onnx.ModelProto, folder: Path) -> onnxruntime.InferenceSession:
    options = session_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])


def _as_floats(graph: onnx.ModelProto, folder: Path) -> None:
    """Have products with quantized matrices take these as floats."""
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits":
            matrix = np.ascontiguousarray(_matrix(node, tensors, folder).T)
            name = f"{node.input[1]}.floats"
            graph.graph.initializer.append(numpy_helper.from_array(matrix, name))
            x, output = node.input[0], node.output[0]
            node.CopyFrom(onnx.helper.make_node("MatMul", [x, name], [output]))


def _matrix(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], folder: Path) -> np.ndarray:
    """The matrix of a product, float32 [n, k]."""
    parts = [numpy_helper.to_array(tensors[name], str(folder)) for name in node.input[1:] if name]
    if node.op_type != "MatMulNBits":
        return parts[0]
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    codes, scales = parts[0], parts[1].reshape(len(parts[0]), -1)
    zeros = None
    if len(parts) > 2:
        zeros = unpacked_zeros(parts[2].reshape(len(codes), -1), codes.shape[1], sizes["bits"])
    return QuantizedMatrix(codes, scales, sizes["bits"], sizes["block_size"], sizes["K"], zeros).dequantize()


def _divergences(folder: Path, name: str, residuals: list[np.ndarray]) -> list[float]:
    """Mean KL in nats of every residual stream's predictions but the first one's from the first one's."""
    graph = onnx.load(folder / name, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    last = next(node for node in graph.graph.node if node.op_type in ("MatMulNBits", "Gemm"))
    matrix, rows = _matrix(last, tensors, folder), len(residuals[0])
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None))
    hidden = _session(graph, folder).run(None, {"residual": np.concatenate(residuals)})[0]
    exact = hidden[:rows] @ matrix.T
    p = np.exp(exact - exact.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    # KL(p || q) = sum p (z_p - z_q) - lse(z_p) + lse(z_q), over the vocabulary part by part.
    difference, sums = np.zeros(len(hidden)), np.full(len(hidden), -np.inf)
    for at in range(0, len(matrix), ROWS):
        part = slice(at, at + ROWS)
        z = (hidden @ matrix[part].T).reshape(len(residuals), rows, -1)
        difference += ((z[:1] - z) * p[:, part]).sum(-1, dtype=np.float64).ravel()
        top = z.max(-1, keepdims=True)
        own = top[..., 0] + np.log(np.exp(z - top).sum(-1, dtype=np.float64))
        sums = np.logaddexp(sums, own.ravel())
    by_stream = sums.reshape(len(residuals), rows)
    found = difference.reshape(by_stream.shape) - by_stream[:1] + by_stream
    return [max(0.0, float(x)) for x in found[1:].mean(-1)]
