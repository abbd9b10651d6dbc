"""What a bundle really computes, in torch.

Quantization changes the weights and rotation moves them around. The twin undoes the second but not the first, and
runs the graphs of the bundle node by node: so it needs no checkpoint, and knows nothing of layers that the graphs
do not say. It is what the bundle must agree with up to the rounding of activations and of the cache: the reference
for tests and for training a controller on the weights that will run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

from kvq.exporter.rotation import hadamard, head_rotation, rotate_inputs, rotate_outputs
from kvq.exporter.weights.quantize import QuantizedMatrix, unpacked_zeros
from kvq.runtime.bundle.bundle import Bundle

# attend(layer, queries, keys, values) -> what attention makes of the values; float32 [batch, heads, tokens, head_dim]
# each, of keys and values kv_heads; queries and keys after the rotary embedding, nothing rotated or centred.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
PRODUCTS = ("Gemm", "MatMulNBits")


class Node(NamedTuple):
    """A node of a graph.

    kind: of operator.
    inputs, outputs: names.
    attributes: by name.
    done: names that no later node takes.
    """

    kind: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    done: list[str]


class Scores(NamedTuple):
    """What the twin says of texts: logits float32 [batch, tokens, vocab]."""

    logits: Tensor


class Twin:
    """A bundle's weights and graphs in torch, float32, differentiable.

    Attributes:
        shape: of the model.
        rotation: float32 [head_dim, head_dim] of every head in the cache; the identity if there is none.
        key_basis: scale, axes and stretch of every layer, float32 [kv_heads, ...] each, see
            `kvq.exporter.key_basis.KeyBasis`; empty where the bundle leaves keys in their own.
        mean_keys: float32 [layers, kv_heads, head_dim] that the cache leaves out of rotated keys.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.shape = manifest.architecture
        arrays: dict[str, np.ndarray] = {}
        self._decoder, self._head = (_read(bundle, name, arrays) for name in (manifest.decoder, manifest.head))
        rotation = head_rotation(self.shape.head_dim, manifest.kv["rotation"] != "none")[1]
        attentions = [node for node in self._decoder if node.kind == "Attention"]
        self.rotation = torch.from_numpy(rotation)
        self.mean_keys = torch.from_numpy(np.stack([arrays[node.inputs[3]] for node in attentions]))
        products = (node for node in (*self._decoder, *self._head) if node.kind in PRODUCTS)
        matrices = {node.inputs[1]: _matrix(node, arrays) for node in products}
        self._decoder = _take_back_rotations(self._decoder, matrices, arrays)
        self._head = _take_back_rotations(self._head, matrices, arrays)
        bases = [[torch.from_numpy(arrays[name]) for name in node.inputs[4:]] for node in attentions]
        self.key_basis = [basis for basis in bases if basis]
        for node in attentions:
            turns = node.attributes["rotate"]
            if turns == 1:  # queries and keys only: the rotation of the values is in the weights
                self._unrotate_values(node, rotation, matrices, arrays)
            if turns in (1, 7):  # what attention makes of values stays rotated: the weights of o turn it back
                after = next(other for other in self._decoder if node.outputs[0] in other.inputs)
                matrices[after.inputs[1]] = rotate_inputs(matrices[after.inputs[1]], rotation.T)
        self._matrices = {name: torch.from_numpy(matrix) for name, matrix in matrices.items()}
        taken = {name for node in (*self._decoder, *self._head) for name in _without_matrix(node)}
        # Sizes and places, which are of 64 bits, are taken as numbers.
        self._constants = {
            name: array.tolist() if array.dtype == np.int64 else torch.from_numpy(array)
            for name, array in arrays.items()
            if name in taken
        }

    def __call__(self, ids: Tensor) -> Scores:
        """Logits of int64 ids [batch, tokens], without a cache between layers."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            window = self.shape.windows[layer] if self.shape.windows else 0
            if not window:
                return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            place = torch.arange(ids.shape[1], device=ids.device)
            behind = place[:, None] - place
            sees = (behind >= 0) & (behind < window)
            return scaled_dot_product_attention(query, key, value, attn_mask=sees, enable_gqa=True)

        return Scores(self.logits(self.residual(ids, attend)))

    def residual(self, ids: Tensor, attend: Attend) -> Tensor:
        """Residual stream behind the last layer, float32 [batch, tokens, hidden], of int64 ids [batch, tokens]."""
        (batch, tokens), shape = ids.shape, self.shape
        positions = torch.arange(tokens, device=ids.device).repeat(batch)
        values: dict[str, Any] = {"ids": ids.flatten(), "positions": positions}

        def attention(node: Node, qkv: Tensor, cosine: Tensor, sine: Tensor, *_: Tensor) -> Tensor:
            heads = qkv.view(batch, tokens, -1, shape.head_dim).transpose(1, 2)
            query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
            cosine, sine = (x.view(batch, 1, tokens, -1).repeat(1, 1, 1, 2) for x in (cosine, sine))
            query, key = (_rotary(x, cosine, sine) for x in (query, key))
            mixed = attend(node.attributes["layer"], query, key, value)
            return mixed.transpose(1, 2).reshape(batch * tokens, -1)

        self._run(self._decoder, values, attention)
        return values["residual_out"].view(batch, tokens, -1)

    def to_cache(self, layer: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [batch, heads, tokens, head_dim] as the cache knows them: in its basis, rotated, centred."""
        if self.key_basis:
            scale, axes, stretch = self.key_basis[layer]
            query = _grown(query, 1 / scale, axes, 1 / stretch)
            key = _grown(key, scale, axes, stretch)
        return query @ self.rotation, key @ self.rotation - self.mean_keys[layer][:, None]

    def logits(self, residual: Tensor) -> Tensor:
        """The head: residual [..., hidden] -> logits [..., vocab].

        Of its graph, norm and matrix count: what may stand between them rounds activations, as others do unseen.
        """
        norm = next(node for node in self._head if node.kind == "SimplifiedLayerNormalization")
        product = next(node for node in self._head if node.kind in PRODUCTS)
        normed = _norm(residual, self._constants[norm.inputs[1]], norm.attributes["epsilon"])
        return linear(normed, self._matrices[product.inputs[1]])

    def to(self, device: str) -> Twin:
        """Move everything there."""
        self.rotation, self.mean_keys = self.rotation.to(device), self.mean_keys.to(device)
        self.key_basis = [[x.to(device) for x in basis] for basis in self.key_basis]
        for held in (self._matrices, self._constants):
            held.update({name: x.to(device) for name, x in held.items() if isinstance(x, Tensor)})
        return self

    def _unrotate_values(
        self, attention: Node, rotation: np.ndarray, matrices: dict[str, np.ndarray], arrays: dict[str, np.ndarray]
    ) -> None:
        """Take a layer's rotation of values out of the weights in front of its attention."""
        start = (self.shape.heads + self.shape.kv_heads) * self.shape.head_dim
        before = self._maker(attention.inputs[0])
        if before.kind == "Concat":  # of queries and keys with norms of their own; values come as they were cut off
            before = self._maker(self._maker(before.inputs[-1]).inputs[0])
        if before.kind == "Add":
            bias = arrays[before.inputs[1]]
            bias[start:] = rotate_outputs(bias[start:], rotation.T)
            before = self._maker(before.inputs[0])
        weights = matrices[before.inputs[1]]
        weights[start:] = rotate_outputs(weights[start:], rotation.T)

    def _maker(self, name: str) -> Node:
        """The node of the decoder that yields a value."""
        return next(node for node in self._decoder if name in node.outputs)

    def _input(self, name: str, values: dict[str, Any]) -> Any:
        """What a node takes under a name."""
        return values[name] if name in values else self._constants[name]

    def _run(self, nodes: list[Node], values: dict[str, Any], attention: Callable[..., Tensor]) -> None:
        """Run nodes on `values`, which takes what they yield and loses what none takes any more."""
        for node in nodes:
            if node.kind in PRODUCTS:
                found: Any = linear(values[node.inputs[0]], self._matrices[node.inputs[1]])
                if node.kind == "Gemm" and len(node.inputs) > 2:
                    found = found + self._input(node.inputs[2], values)
            else:
                inputs = [self._input(name, values) for name in node.inputs]
                operator = attention if node.kind == "Attention" else OPERATORS[node.kind]
                found = operator(node, *inputs)
            values.update(zip(node.outputs, found if len(node.outputs) > 1 else (found,), strict=True))
            for name in node.done:
                values.pop(name, None)


def effective_model(bundle: Bundle) -> Twin:
    """The torch twin of a bundle, with its dequantized, un-rotated weights.

    Raises:
        NotImplementedError: a graph has an operator that the twin does not know.
    """
    return Twin(bundle)


def _read(bundle: Bundle, name: str, arrays: dict[str, np.ndarray]) -> list[Node]:
    """Nodes of a graph; its constants go into `arrays`, which may be changed."""
    graph = onnx.load(bundle.path / name, load_external_data=True).graph
    arrays |= {t.name: np.array(numpy_helper.to_array(t)) for t in graph.initializer if t.name not in arrays}
    last = {taken: at for at, node in enumerate(graph.node) for taken in node.input}
    nodes = []
    for at, node in enumerate(graph.node):
        if node.op_type not in {*OPERATORS, *PRODUCTS, "Attention"} and name == bundle.manifest.decoder:
            raise NotImplementedError(f"{name} has the operator {node.op_type}; add it to OPERATORS of {__name__}")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        done = [taken for taken in dict.fromkeys(node.input) if last[taken] == at]
        nodes.append(Node(node.op_type, list(node.input), list(node.output), attributes, done))
    return nodes


def _without_matrix(node: Node) -> list[str]:
    """What a node takes, but for the matrix of a product and its parts."""
    if node.kind not in PRODUCTS:
        return node.inputs
    return [node.inputs[0], *(node.inputs[2:] if node.kind == "Gemm" else [])]


def _matrix(node: Node, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The matrix of a product, float32 [n, k]."""
    if node.kind == "Gemm":
        return arrays[node.inputs[1]]
    (codes, scales, *zeros), a = (arrays[name] for name in node.inputs[1:]), node.attributes
    unpacked = unpacked_zeros(zeros[0], scales.shape[1], a["bits"]) if zeros else None
    return QuantizedMatrix(codes, scales, a["bits"], a["block_size"], a["K"], unpacked).dequantize()


def _grown(x: Tensor, scale: Tensor, axes: Tensor, stretch: Tensor) -> Tensor:
    """x [batch, heads, tokens, head_dim] scaled and stretched; the others [kv_heads, ...]."""
    group = x.shape[1] // len(scale)
    scale, axes, stretch = (part.repeat_interleave(group, 0) for part in (scale, axes, stretch))
    x = x * scale[:, None]
    return x + (x @ axes.mT * (stretch - 1)[:, None]) @ axes


def _norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """RMS norm of the last axis."""
    return gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))


def _add_norm(node: Node, x: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, _norm(total, gain, node.attributes["epsilon"])


def _swiglu(node: Node, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate.contiguous()) * up  # torch rounds the ends of rows that are not contiguous in another way


def _take_back_rotations(
    nodes: list[Node], matrices: dict[str, np.ndarray], arrays: dict[str, np.ndarray]
) -> list[Node]:
    """Rotate matrices back whose inputs the graph rotates, block by block; the nodes without these rotations."""
    makers, plain = {name: node for node in nodes for name in node.outputs}, set()
    for node in nodes:
        if node.kind not in PRODUCTS:
            continue
        maker = makers.get(node.inputs[0])
        if maker is not None and maker.attributes.get("block"):  # by the operator that makes them
            rotation = hadamard(maker.attributes["block"])
        elif maker is not None and maker.kind == "Reshape" and makers[maker.inputs[0]].kind == "MatMul":
            rotation = arrays[makers[maker.inputs[0]].inputs[1]]
            plain.add(maker.inputs[0])
        else:
            continue
        exactly = rotate_inputs(matrices[node.inputs[1]].astype(np.float64), rotation.astype(np.float64))
        matrices[node.inputs[1]] = exactly.astype(np.float32)
    return [
        node._replace(kind="Identity", inputs=node.inputs[:1]) if node.outputs[0] in plain else node for node in nodes
    ]


def _slice(node: Node, x: Tensor, start: list[int], stop: list[int], axis: list[int]) -> Tensor:
    return x.narrow(axis[0], start[0], stop[0] - start[0])


def _rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, tokens, head_dim], halves convention; the others [batch, 1, ...]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cosine + turned * sine


# Of the decoder, but for products and attention: node and its inputs -> what it yields.
OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": lambda node, x, y: x + y,
    "AddNorm": _add_norm,
    "Cast": lambda node, x: x.float(),
    "Concat": lambda node, *parts: torch.cat(parts, node.attributes["axis"]),
    "Cos": lambda node, x: x.cos(),
    "FastGelu": lambda node, x: gelu(x, approximate="tanh"),
    "Gather": lambda node, table, ids: table[ids],
    "Identity": lambda node, x: x,
    "MatMul": lambda node, x, y: (x.double() @ y.double()).float(),  # rotates rows: what they are is rounded once
    "Mul": lambda node, x, y: x * y,
    "ReduceSum": lambda node, x, axes: x.sum(axes, keepdim=bool(node.attributes["keepdims"])),
    "Reshape": lambda node, x, shape: x.reshape([n or x.shape[at] for at, n in enumerate(shape)]),
    "SimplifiedLayerNormalization": lambda node, x, gain: _norm(x, gain, node.attributes["epsilon"]),
    "Sin": lambda node, x: x.sin(),
    "Slice": _slice,
    "Split": lambda node, x, sizes: x.split(sizes, node.attributes["axis"]),
    "Sub": lambda node, x, y: x - y,
    "SwiGLU": _swiglu,
}
