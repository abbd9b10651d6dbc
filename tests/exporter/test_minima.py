"""Blocks of 4 bits with minima (Q4_1, Q4_K) are carried over: the form of their nodes, and logits of transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from kvq.composition import open_bundle
from kvq.exporter.architectures.description import Adapted
from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.export import Summary, export
from kvq.exporter.profile_probe import probe
from kvq.exporter.sources.base import BlockForm, Blocks
from kvq.exporter.weights.quantize import packed
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.precision.table import named
from tests.tools.checkpoints import save_checkpoint
from tests.tools.gguf_files import GGUF_TINY, write_dequantized, write_gguf
from tests.tools.references import effective_model, in_transformers, logits_of, reference_logits

IDS = np.random.default_rng(5).integers(0, 512, 48)
PREFILL = 40
BACKENDS = ["native", "numpy"]
TABLES = ("token_embd", "output")


def of_parts(default: str, **others: str) -> Callable[[str], str]:
    """Types of a file by the parts of a layer; tables in Q8_0, of which float activations take the blocks."""

    def kind(name: str) -> str:
        part = name.split(".")[-2]
        return "Q8_0" if part in TABLES else others.get(part, default)

    return kind


KINDS: dict[str, Callable[[str], str]] = {
    "Q4_1": of_parts("Q4_1"),
    "Q4_K": of_parts("Q4_K"),
    # Stacks of blocks with minima and without, and of both types that have them.
    "four bits": of_parts("Q4_0", attn_q="Q4_1", attn_k="Q4_K", ffn_gate="Q4_K", ffn_down="Q4_1"),
    # Stacks of 4 bits with minima and of 8 bits, which nothing holds; the other two matrices of a layer stay.
    "four and eight bits": of_parts("Q4_1", attn_v="Q8_0", ffn_up="Q5_0"),
}
STACKS_LOST = {"four and eight bits": 2}


class Pair:
    """A GGUF file with biases, the folder of the weights in it, and transformers' logits for that folder."""

    def __init__(self, folder: Path, kind: Callable[[str], str], tied: bool = True) -> None:
        fields = GGUF_TINY | {"head_dim": 32, "attention_bias": not tied, "tie_word_embeddings": tied}
        checkpoint = save_checkpoint(folder / "checkpoint", fields, tokenizer=False)
        self.file = write_gguf(folder / "model.gguf", checkpoint, kind, tokenizer="gpt2")
        self.folder = write_dequantized(self.file, checkpoint, folder / "dequantized")
        self.logits = reference_logits(self.folder, IDS.tolist()).numpy()

    def off(self, logits: np.ndarray) -> float:
        return float(np.abs(logits - self.logits).max())


def through_the_cache(summary: Summary, backend: str, chunk: int) -> np.ndarray:
    session = open_bundle(summary.path).session("fp16", recent=256, prefill_chunk=chunk, backend=backend)
    logits = [session.append(IDS[:PREFILL], all_logits=True)]
    return np.concatenate(logits + [session.append([token])[None] for token in IDS[PREFILL:]])


def offset_products(graph: onnx.GraphProto) -> list[str]:
    """Names of the matrices with offsets in a graph, whose nodes are checked to be of the one form that there is."""
    makers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    takers = [name for node in graph.node for name in node.input]
    found = []
    for gemm in (node for node in graph.node if node.op_type == "Gemm"):
        assert {a.name: a.i for a in gemm.attribute} == {"transB": 1}
        sums, offsets, product = gemm.input
        reduced, multiplied = makers[sums], makers[product]
        reshaped = makers[reduced.input[0]]
        kinds = [node.op_type for node in (reshaped, reduced, multiplied, gemm)]
        assert kinds == ["Reshape", "ReduceSum", "MatMulNBits", "Gemm"]
        assert reshaped.input[0] == multiplied.input[0]
        of = {a.name: a.i for a in multiplied.attribute}
        name = offsets.removesuffix(".offsets")
        assert list(multiplied.input[1:]) == [f"{name}.codes", f"{name}.scales"]
        assert (of["bits"], of["block_size"]) == (4, 32)
        blocks = of["K"] // 32
        assert numpy_helper.to_array(stored[reshaped.input[1]]).tolist() == [-1, blocks, 32]
        assert numpy_helper.to_array(stored[reduced.input[1]]).tolist() == [-1]
        assert {a.name: a.i for a in reduced.attribute} == {"keepdims": 0}
        assert list(stored[offsets].dims) == [of["N"], blocks]
        assert all(takers.count(x) == 1 for x in (reshaped.output[0], sums, product)), name
        at = [list(graph.node).index(node) for node in (reshaped, reduced, multiplied, gemm)]
        assert at == list(range(at[0], at[0] + 4))
        found.append(name)
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied with biases"])
@pytest.mark.parametrize("kind", KINDS)
def test_minima_are_carried_over_exactly(kind: str, tied: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path, KINDS[kind], tied)
    summary = export(pair.file, tmp_path / "bundle", activations="fp32", center=False)
    manifest, shape = summary.manifest, summary.manifest.architecture
    lost, matrices = STACKS_LOST.get(kind, 0) * shape.layers, 4 * shape.layers + (1 if tied else 2)
    assert manifest.kv["values"] == "online"
    assert manifest.weights == manifest.weights | {
        "layers": "mixed" if lost else "int4", "exact": matrices - lost, "matrices": matrices,
    }  # fmt: skip
    graphs = {
        name: onnx.load(summary.path / name, load_external_data=False).graph
        for name in (manifest.decoder, *manifest.segments)
    }
    with_offsets = offset_products(graphs[manifest.decoder])
    # Of the mixture o_proj is of blocks without minima.
    assert len(with_offsets) == 4 * shape.layers - lost - shape.layers * (kind == "four bits")
    assert with_offsets == [name for part in manifest.segments for name in offset_products(graphs[part])]
    offsets = {tensor.name: tensor for tensor in graphs[manifest.decoder].initializer if ".offsets" in tensor.name}
    assert sorted(offsets) == sorted(f"{name}.offsets" for name in with_offsets)
    if lost:  # these stacks take 8 bits
        twin = logits_of(effective_model(Bundle(summary.path)), IDS).numpy()
        assert 1e-3 < pair.off(twin) < 0.1 * np.abs(pair.logits).max()
    else:
        assert pair.off(logits_of(effective_model(Bundle(summary.path)), IDS).numpy()) <= 1e-4
        assert pair.off(logits_of(in_transformers(Bundle(summary.path), pair.folder), IDS).numpy()) <= 1e-4
        twin = pair.logits
    for backend, chunk in itertools.product(BACKENDS, [PREFILL, 7]):
        assert np.abs(through_the_cache(summary, backend, chunk) - twin).max() <= 1e-3


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_bytes_of_a_step_count_offsets(kind: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, KINDS[kind])
    manifest = export(pair.file, tmp_path / "bundle", activations="fp32", center=False).manifest
    weights = sum(node_of["N"] * node_of["K"] for node_of in products(tmp_path / "bundle" / manifest.decoder))
    head = manifest.architecture.vocab * manifest.architecture.hidden
    assert manifest.decode_weight_nbytes == weights // 2 + 2 * 4 * weights // 32 + head + 4 * head // 32


def products(graph: Path) -> list[dict[str, int]]:
    nodes = onnx.load(graph, load_external_data=False).graph.node
    return [{a.name: a.i for a in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize(
    ("weights", "activations", "layers", "exact"),
    [
        ("auto", "fp32", "int4", 9),
        ("auto", "int8", "int8", 0),  # 8 bits lose less in front of int8 activations
        ("source", "fp32", "int4", 9),
        ("source", "int8", "int4", 8),  # the table, of 8 bits, is rotated
        ("int4", "fp32", "int4", 9),
        ("int4", "int8", "int4", 0),
        ("int8", "fp32", "int8", 1),  # minima are not taken to 8 bits
        ("int8", "int8", "int8", 0),
    ],
)
def test_what_is_carried_over_at_which_bits(
    weights: str, activations: str, layers: str, exact: int, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, KINDS["Q4_1"])
    summary = export(pair.file, tmp_path / "b", weights=weights, activations=activations, center=False)
    found = summary.manifest.weights
    assert (found["layers"], found["exact"], found["matrices"]) == (layers, exact, 9)
    logits = {backend: through_the_cache(summary, backend, PREFILL) for backend in BACKENDS}
    spread = pair.logits.std()
    assert np.sqrt(np.square(logits["native"] - logits["numpy"]).mean()) <= 0.03 * spread
    if exact == 9:
        assert pair.off(logits["numpy"]) <= 1e-3
    elif layers == "int8" or exact:  # what the rounding of activations costs
        assert np.sqrt(np.square(logits["numpy"] - pair.logits).mean()) <= 0.05 * spread


@pytest.mark.parametrize("table", ["Q4_1", "Q4_K"])
def test_tables_with_minima_take_eight_bits(table: str, tmp_path: Path) -> None:
    """A row that is looked up has 8 bits, whatever its source has."""
    fields = GGUF_TINY | {"head_dim": 32, "num_hidden_layers": 1, "tie_word_embeddings": False}
    checkpoint = save_checkpoint(tmp_path / "checkpoint", fields, tokenizer=False)
    file = write_gguf(tmp_path / "model.gguf", checkpoint, table)
    for weights in ("auto", "int4"):
        found = export(file, tmp_path / weights, weights=weights, activations="fp32", center=False).manifest.weights
        assert (found["head"], found["exact"], found["matrices"]) == ("int8", 4, 6)


@pytest.mark.slow
def test_layers_are_measured_on_the_weights_with_their_offsets(tmp_path: Path) -> None:
    """Damage of precisions comes from graphs whose matrices are floats: as in a bundle of weights in float32."""
    pair = Pair(tmp_path, KINDS["Q4_1"])
    found = []
    for weights in ("auto", "fp32"):
        summary = export(pair.file, tmp_path / weights, weights=weights, activations="fp32", center=False)
        damages = probe(Bundle(summary.path), np.tile(IDS, 4), [named("3").k, named("4").k])
        found.append([[list(side.values()) for side in layer] for layer in damages])
    assert np.min(found) > 0
    np.testing.assert_allclose(*found, rtol=0.02)


def random_blocks(seed: int, bits: int, minima: bool, block: int = 32) -> Blocks:
    random = np.random.default_rng(seed)
    n, blocks = random.integers(1, 9), random.integers(1, 5)
    scales, lows = random.standard_normal((2, n, blocks)).astype(np.float16).astype(np.float32)
    codes = random.integers(0, 1 << bits, (n, blocks * block)).astype(np.uint8)
    return Blocks(codes, scales, bits, block, lows if minima else None)


@given(seed=st.integers(0, 2**32), minima=st.booleans())
def test_blocks_say_the_same_in_another_form(seed: int, minima: bool) -> None:
    blocks = random_blocks(seed, 4, minima)
    wanted = blocks.dequantize()
    for form in (BlockForm(4, 32, True), BlockForm(4, 16, True), *([] if minima else [BlockForm(8, 16)])):
        found = blocks.as_form(form)
        assert found.form == form
        assert np.array_equal(found.dequantize(), wanted)
        assert np.array_equal(packed(found).dequantize(), wanted)
    assert minima or not packed(blocks.as_form(BlockForm(4, 32, True))).offsets.any()


@pytest.mark.parametrize(
    ("bits", "minima", "form"),
    [(4, True, BlockForm(4, 32)), (4, True, BlockForm(8, 32, True)), (4, False, BlockForm(8, 32, True))],
)
def test_forms_that_lose_minima_are_no_forms(bits: int, minima: bool, form: BlockForm) -> None:
    with pytest.raises(ValueError, match="minima stay"):
        random_blocks(1, bits, minima).as_form(form)


@given(seed=st.integers(0, 2**32), minima=st.booleans())
def test_a_multiplier_and_an_order_of_rows_reach_minima(seed: int, minima: bool) -> None:
    blocks = random_blocks(seed, 4, minima)
    adapted = Adapted(factor=0.22, order=np.random.default_rng(seed).permutation(len(blocks.codes)))
    wanted, found = adapted.of(blocks.dequantize()), adapted.of_blocks(blocks).dequantize()
    largest = np.abs(blocks.scales).max() * 15 + (0 if blocks.minima is None else np.abs(blocks.minima).max())
    assert np.abs(found - wanted).max() <= 1e-6 * largest


def test_the_form_is_known_before_the_blocks_are_read(tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        source = load_checkpoint(Pair(tmp_path / kind, KINDS[kind]).file).source
        for name, shape in source.shapes.items():
            blocks = source.blocks(name)
            assert (None if blocks is None else blocks.form) == source.block_form(name), name
            assert (blocks is not None) == (len(shape) == 2)
