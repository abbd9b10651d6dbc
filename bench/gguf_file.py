"""The model as a GGUF file for llama.cpp, with the numbers of the bundle.

A bundle's int4 block of 64 is two Q4_0 blocks of 32 with the same scale, its int8 block two of
Q8_0; all that changes is that scales are rounded to half precision.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from kvq.bench.shapes import Assets
from kvq.bench.weights import EMBEDDING, BundleWeights
from kvq.exporter.weights.quantize import QuantizedMatrix

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
QK = 32  # weights per block of Q4_0 and Q8_0


def write_gguf(made: Assets, file: Path) -> None:
    """Write the bundle's model; it has no vocabulary: token ids only."""
    weights = BundleWeights(made)
    shape = weights.manifest.architecture
    writer = GGUFWriter(file, "llama")
    writer.add_name(made.folder.name)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(made.fields["rope_theta"])
    writer.add_layer_norm_rms_eps(made.fields["rms_norm_eps"])
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    for name, vector in weights.vectors().items():
        writer.add_tensor(_name(name), vector)
    for name, matrix in weights.parts():
        heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
        if heads:
            matrix = _interleaved(matrix, heads)
        kind, blocks = _blocks(matrix)
        writer.add_tensor(_name(name), blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    """The GGUF name of a checkpoint's tensor."""
    if name == EMBEDDING:
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _interleaved(matrix: QuantizedMatrix, heads: int) -> QuantizedMatrix:
    """Rows reordered for llama.cpp's rotary embedding, which pairs neighbouring channels instead of halves."""
    rows = np.arange(len(matrix.codes)).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return matrix._replace(codes=matrix.codes[rows], scales=matrix.scales[rows])


def _blocks(matrix: QuantizedMatrix) -> tuple[GGMLQuantizationType, np.ndarray]:
    """A matrix as bytes, uint8 [n, bytes per row]: each block a half-precision scale and its codes."""
    n, codes = len(matrix.codes), matrix.codes
    if matrix.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)  # the even element is in the low half
    codes = codes.reshape(n, -1, QK)
    if codes.shape[1] * QK != matrix.k:
        raise ValueError(f"rows of {matrix.k} weights are not whole blocks of {matrix.block}")
    scales = np.repeat(matrix.scales, matrix.block // QK, axis=1).astype(np.float16)
    if matrix.bits == 4:  # element i and i + 16 share a byte
        codes, kind = codes[..., :16] | (codes[..., 16:] << 4), GGMLQuantizationType.Q4_0
    else:
        codes, kind = codes ^ 128, GGMLQuantizationType.Q8_0  # from an offset of 128 to two's complement
    return kind, np.concatenate([scales[..., None].view(np.uint8), codes], axis=-1).reshape(n, -1)
