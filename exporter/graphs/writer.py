"""All graphs of a checkpoint, written into the folder of a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.graphs.builder import Graph
from kvq.exporter.graphs.head import head_graph, uncertainty_graph
from kvq.exporter.graphs.layers import Decoder, Segment
from kvq.exporter.graphs.options import GraphOptions
from kvq.exporter.graphs.products import Products
from kvq.exporter.key_basis import KeyBasis
from kvq.exporter.weights.file import WeightFile
from kvq.exporter.weights.matrices import Knowledge, Matrices

NOTHING = Knowledge()


class GraphWriter:
    """Writes the graphs of a checkpoint and the weights that they need.

    Args:
        checkpoint: what to write.
        options: how.
        folder: of the graphs.
        file: of the weights.
        knowledge: of the matrices.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: GraphOptions,
        folder: Path,
        file: WeightFile,
        knowledge: Knowledge = NOTHING,
    ) -> None:
        self._checkpoint, self._options, self._folder, self._file = checkpoint, options, folder, file
        self._products = Products(checkpoint, file, options, knowledge)

    @property
    def matrices(self) -> Matrices:
        """What has been written of the weights."""
        return self._products.matrices

    def center(self, mean_keys: np.ndarray, key_basis: KeyBasis | None = None) -> None:
        """Graphs written from now on take keys to this basis, if there is one, and subtract these means; see
        `GraphOptions`.
        """
        self._options = replace(self._options, mean_keys=mean_keys, key_basis=key_basis)

    def segments(self) -> Iterator[str]:
        """Write the layers + 1 segments one by one, yielding file names."""
        shape, layers = self._checkpoint.architecture, self._checkpoint.model.layers
        for i in range(len(layers) + 1):
            graph = Graph(f"segment_{i:03d}", self._file)
            segment = Segment(graph, self._checkpoint, self._products, self._options)
            if i == 0:
                segment.embed()
                segment.give_angles()
            else:
                segment.begin(layers[i - 1].attend)
                segment.run(layers[i - 1].after)
                if i < len(layers) and (rotary := layers[i].attend.rotary) is not None:
                    segment.take_angles(rotary)
            graph.output(segment.residual, "residual_out", "tokens", shape.hidden)
            if i < len(layers):
                segment.run(layers[i].before)
                segment.attend(layers[i].attend, i)
            yield graph.save(self._folder)

    def decoder(self) -> str:
        """Write all layers as one graph: ids, positions [tokens] -> residual_out [tokens, hidden]."""
        graph, layers = Graph("decoder", self._file), self._checkpoint.model.layers
        decoder = Decoder(graph, self._checkpoint, self._products, self._options)
        decoder.embed()
        decoder.run(layers[0].before)
        for i, layer in enumerate(layers):
            decoder.attend(layer.attend, i)
            decoder.run((*layer.after, *(layers[i + 1].before if i + 1 < len(layers) else ())))
        graph.output(decoder.residual, "residual_out", "tokens", self._checkpoint.architecture.hidden)
        return graph.save(self._folder)

    def head(self) -> str:
        """Write the head."""
        return head_graph(self._checkpoint, self._products, self._file).save(self._folder)

    def uncertainty(self) -> str:
        """Write what a policy may ask of logits."""
        return uncertainty_graph(self._checkpoint.architecture.vocab, self._file).save(self._folder)
