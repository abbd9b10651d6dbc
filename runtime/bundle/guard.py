"""Whether a graph is one of ours, before onnxruntime sees it.

A bundle comes from anywhere, and onnxruntime runs whatever operators a graph names. So this is no list of what is
forbidden: a graph has to be understood. Every operator has a rule (`operators`, `products`); types and shapes of all
values follow from what the runtime feeds, and have to arrive at what it reads (`forms`). Order, names, memory and work
are bounded on the way. How the operators are put together beyond that is free: an exporter may write other layers.
"""

from __future__ import annotations

from kvq.runtime.bundle import limits
from kvq.runtime.bundle.forms import Form
from kvq.runtime.bundle.onnx_file import FLOAT32, INT64, Declared, Graph, GraphReader, Node, Tensor
from kvq.runtime.bundle.operators import RULES
from kvq.runtime.bundle.products import PRODUCTS, gather, work
from kvq.runtime.bundle.shapes import TOKENS, Misfit, Value, elements, show
from kvq.runtime.bundle.wire import Refused, WireError
from kvq.runtime.errors import BundleError

ALL_RULES = RULES | PRODUCTS
GATHER = "Gather"
ATTENTION = "kvq::Attention"
OF_THE_DECODER = "kvq::"  # operators of the native library, which the other graphs run without


def check_graph(
    data: bytes, name: str, external_files: set[str], form: Form | None = None, reader: GraphReader | None = None
) -> Graph:
    """Refuse a serialized ONNX model that is not of the kind our exporter writes.

    Args:
        data: the file's bytes.
        name: file name, for the message.
        external_files: names a constant may keep its data in, relative to the bundle.
        form: what the runtime uses it as; None looks at the file and its operators alone.
        reader: that has read others of the same bundle.

    Returns:
        The graph as it was understood.

    Raises:
        BundleError: unreadable or ambiguous protobuf, a foreign operator, a subgraph, a function, external data outside
            `external_files`, or a graph that cannot be what the runtime would use it as.
    """
    try:
        graph = (reader or GraphReader()).read(data, frozenset(external_files))
        for node in graph.nodes:
            if node.operator not in ALL_RULES and node.operator != GATHER:
                raise Refused(f"operator {node.operator!s:.60} is not one the exporter writes")
        if form is not None:
            Checker(graph, form).check()
        return graph
    except WireError as error:
        raise BundleError(f"{name} is not a readable ONNX file ({error}); export the bundle again") from None
    except (Refused, Misfit) as error:
        raise BundleError(f"{name} is refused: {error}; export the bundle again with kvq export") from None


class Checker:
    """Follows the values of a graph from what goes in to what comes out.

    Args:
        graph: the graph.
        form: what it has to be.
    """

    def __init__(self, graph: Graph, form: Form) -> None:
        self._graph, self._form = graph, form
        self._values: dict[str, Value] = {}
        self._used: set[str] = set()
        self._stored = sum(abs(elements(tensor.dims)) for tensor in graph.constants)
        self._features = self._folded = self._work = 0
        self._layers: list[int] = []

    def check(self) -> None:
        """Raise Refused or Misfit, with why, unless the graph is of the form."""
        graph, form = self._graph, self._form
        if len(graph.nodes) > limits.NODES * (form.layers + 1):
            raise Refused(f"it has {len(graph.nodes)} operators")
        free = self._take_inputs()
        for tensor in graph.constants:
            self._define(tensor.name, _constant(tensor))
        for node in graph.nodes:
            try:
                self._node(node)
            except Misfit as error:
                raise Refused(f"operator {node.operator} of {node.outputs[:1]!r:.60}: {error}") from None
            if self._features > limits.VALUES * (form.layers + 1) * form.widest:
                raise Refused("its values are larger than those of any model of this shape")
        if self._work > limits.WORK * self._stored + limits.LEAST_WORK:
            raise Refused("it computes more than its weights are worth")
        if form.attends and self._layers != list(range(form.layers)):
            raise Refused(f"it attends in layers {self._layers!r:.60} of {form.layers}")
        self._give_outputs(free)
        if unused := self._values.keys() - self._used:
            raise Refused(f"nothing uses {min(unused)!r:.60}")

    def _take_inputs(self) -> str:
        """Define what the runtime feeds; the name of the free dimension."""
        names = [declared.name for declared in self._graph.inputs]
        form, free = self._form, {dim for entry in self._graph.inputs for dim in entry.dims if isinstance(dim, str)}
        if not form.inputs.keys() <= set(names) <= form.inputs.keys() | form.optional.keys() or not names:
            told = ", ".join([*form.inputs, *form.optional])
            raise Refused(f"it is of a feature set this kvq does not know: it takes {names!r:.150} of {told}")
        if len(free) != 1:
            raise Refused(f"its inputs have the free dimensions {sorted(free)!r:.100}")
        known = {**form.inputs, **form.optional}
        for declared in self._graph.inputs:
            dtype, shape = known[declared.name]
            _fits(declared, dtype, shape, *free)
            self._define(declared.name, Value(dtype, shape, name=declared.name))
        return free.pop()

    def _give_outputs(self, free: str) -> None:
        """Compare what comes out with what the runtime reads."""
        names, form = [declared.name for declared in self._graph.outputs], self._form
        known = {**form.outputs, **form.optional_outputs}
        if len(set(names)) != len(names) or not form.outputs.keys() <= set(names) <= known.keys():
            raise Refused(f"it yields {names!r:.150}, not {list(known)!r:.150}")
        for declared in self._graph.outputs:
            dtype, shape = known[declared.name]
            _fits(declared, dtype, shape, free)
            value = self._value(declared.name)
            if value.stored or value.name or (value.dtype, value.shape) != (dtype, shape):
                raise Refused(f"output {declared.name} is computed as {show(value.shape)}, not {show(shape)}")

    def _define(self, name: str, value: Value) -> None:
        if not 0 < len(name) <= limits.NAMES:
            raise Refused("a value has no name, or a name that is too long")
        if name in self._values:
            raise Refused(f"{name!r:.60} is defined twice")
        self._values[name] = value

    def _value(self, name: str) -> Value:
        value = self._values.get(name)
        if value is None:
            raise Refused(f"{name!r:.60} is used before it is defined")
        self._used.add(name)
        return value

    def _node(self, node: Node) -> None:
        """Define what an operator yields."""
        inputs = [self._value(name) for name in node.inputs]
        if node.operator == GATHER:
            if len(inputs) != 2 or len(node.outputs) != 1 or node.attributes:
                raise Misfit("not a table and ids alone")
            self._define_output(node.outputs[0], Value(*gather(inputs, self._form.vocab)))
            return
        rule = ALL_RULES[node.operator]
        if len(inputs) not in rule.inputs:
            raise Misfit(f"{len(inputs)} inputs")
        if not 0 < len(node.outputs) <= limits.OUTPUTS or rule.outputs not in (None, len(node.outputs)):
            raise Misfit(f"{len(node.outputs)} outputs")
        types = {name: type(value) for name, value in node.attributes.items()}
        if types != rule.attributes and types != {**rule.attributes, **rule.optional}:
            raise Misfit(f"attributes {sorted(node.attributes)!r:.100}")
        if any(value.dtype != FLOAT32 for value in inputs[: rule.floats]):
            raise Misfit("an input is not float32")
        if node.operator.startswith(OF_THE_DECODER):
            self._of_the_decoder(node, inputs)
        shapes = rule.infer(inputs, node.attributes, len(node.outputs))
        for name, shape in zip(node.outputs, shapes, strict=True):
            self._define_output(name, Value(FLOAT32, shape))
        if node.operator in PRODUCTS:
            self._work += work(node.operator, inputs, shapes[0])

    def _define_output(self, name: str, value: Value) -> None:
        features = elements(value.shape)
        if features > 0:  # from constants alone, so onnxruntime computes it when it loads the graph
            self._folded += features
            if self._folded > limits.FOLDED * self._stored + limits.LEAST_WIDTH:
                raise Misfit(f"{show(value.shape)} is more than the constants that it comes from")
        elif -features > limits.VALUE * self._form.widest or len(value.shape) > limits.RANK:
            raise Misfit(f"{show(value.shape)} is larger than any value of a model of this shape")
        self._features += max(0, -features)
        self._define(name, value)

    def _of_the_decoder(self, node: Node, inputs: list[Value]) -> None:
        """The native library's operators: its attention knows the heads by the session, not by its inputs."""
        if not self._form.attends:
            raise Misfit("it is of the decoder alone")
        if node.operator != ATTENTION:
            return
        heads, kv_heads, head_dim = self._form.heads
        self._layers.append(node.attributes["layer"])
        expected = (TOKENS, (heads + 2 * kv_heads) * head_dim)
        if inputs[0].shape != expected or inputs[3].shape != (kv_heads, head_dim):
            raise Misfit(f"queries, keys and values are {show(inputs[0].shape)}, not {show(expected)}")


def _constant(tensor: Tensor) -> Value:
    """A constant as a value; of short lists of whole numbers the numbers are known."""
    numbers = None
    if tensor.dtype == INT64:
        if tensor.region is not None or len(tensor.raw) > 8 * limits.INLINE_NUMBERS:
            raise Refused(f"{tensor.name!r:.60} is a list of whole numbers that is too long")
        numbers = tensor.numbers()
    return Value(tensor.dtype, tensor.dims, True, numbers)


def _fits(declared: Declared, dtype: int, shape: tuple[int, ...], free: str) -> None:
    """Compare a declaration with what the runtime feeds or reads."""
    expected = tuple(free if size == TOKENS else size for size in shape)
    if declared.dtype != dtype or declared.dims != expected:
        raise Refused(f"{declared.name} is declared as {list(declared.dims)!r:.100}, not {list(expected)!r:.100}")
