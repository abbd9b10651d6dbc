"""llama.cpp through llama-cpp-python's binding of its C interface, and the bundle's model as a GGUF file.

A bundle's int8 block of 64 is two Q8_0 blocks of 32 with the same scale; all that changes is that scales are rounded to
half precision. Its 4-bit blocks have zero points: they become Q4_0, which llama.cpp multiplies fastest, other numbers
of as many bits.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvq.bench.arm import Arm
from kvq.controller.evaluation.llama import CACHE_BITS, LlamaModel

if TYPE_CHECKING:
    from kvq.exporter.weights.quantize import QuantizedMatrix

# Prints nothing: that it comes to its end is the answer.
PROBE = """
import sys, numpy
from pathlib import Path
from kvq.controller.evaluation.llama import LlamaModel
LlamaModel(Path(sys.argv[1]), repack=True).score(numpy.arange(64), "f16", int(sys.argv[2]))
"""
QK = 32  # values per block of Q8_0
CACHES = ("f16", "q8_0", "q4_0")


@dataclass
class LlamaArm(Arm):
    """`llama_decode` called directly, without the binding's Python layers; flash attention on.

    Weights are Q8_0, with the bundle's numbers, or Q4_0 where it has 4 bits; of a GGUF file as it has them.

    Attributes:
        cache: type of keys and values: f16, q8_0 or q4_0.
    """

    cache: str
    context = None
    kept = "not loaded"

    runtime = "llama.cpp"
    settings = "{cache} cache, flash attention, weights {kept}"
    any_model = True
    files = "gguf"
    packages = ("llama_cpp", "gguf", "onnx")
    distributions = ("llama-cpp-python",)
    value_bytes_each = 2.2

    def make(self, folder: Path) -> None:
        """Write the model; it has no vocabulary: token ids only."""
        if self.assets.source:
            (folder / "model.gguf").symlink_to(self.assets.source)
            return
        from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

        from kvq.bench.weights import BundleWeights

        weights, fields = BundleWeights(self.assets), self.assets.fields
        shape = weights.shape
        names: Any = get_tensor_name_map(MODEL_ARCH.LLAMA, shape.layers)
        writer = GGUFWriter(folder / "model.gguf", "llama")
        writer.add_name(self.assets.folder.name)
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(fields["rope_theta"])
        writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
        writer.add_vocab_size(shape.vocab)
        writer.add_tokenizer_model("no_vocab")
        for name, vector in weights.vectors().items():
            writer.add_tensor(names.get_name(name, (".weight",)), vector)
        for name, matrix in weights.parts():
            if heads := {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2]):
                # For llama.cpp's rotary embedding, which pairs neighbouring channels instead of halves.
                rows = np.arange(len(matrix.codes)).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
                zeros = None if matrix.zeros is None else matrix.zeros[rows]
                matrix = matrix._replace(codes=matrix.codes[rows], scales=matrix.scales[rows], zeros=zeros)
            kind, blocks = gguf_blocks(matrix)
            writer.add_tensor(names.get_name(name, (".weight",)), blocks, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def load(self) -> None:
        file = self.folder / "model.gguf"
        repacked = _runs_repacked(file, self.threads)
        self.kept = "repacked" if repacked else "as the file has them: repacked ones end the process here"
        self.loaded = LlamaModel(file, repack=repacked)
        self.api, self.model = self.loaded.api, self.loaded.model

    def open(self) -> None:
        api = self.api
        if self.context:
            api.llama_free(self.context)
        self.context = self.loaded.context(self.cache, self.capacity, self.threads)
        self._token = (api.llama_token * 1)()

    def _decode(self, tokens: Any, count: int) -> None:
        if status := self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, count)):
            raise RuntimeError(f"llama_decode answered {status}")

    def feed(self, ids: np.ndarray) -> None:
        batch = self.api.llama_n_batch(self.context)
        for at in range(0, len(ids), batch):
            part = ids[at : at + batch].tolist()
            self._decode((self.api.llama_token * len(part))(*part), len(part))
        self.api.llama_synchronize(self.context)

    def step(self, token: int) -> None:
        self._token[0] = token
        self._decode(self._token, 1)
        self.api.llama_get_logits_ith(self.context, -1)  # waits for the computation

    def logits(self) -> np.ndarray:
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.assets.fields["vocab_size"],)).copy()

    def kv_bytes(self) -> int:
        return self._cached(self.api.llama_n_ctx(self.context))

    def cache_read_bytes(self) -> int:
        return self._cached(self.length)

    def _cached(self, tokens: int) -> int:
        return int(self.assets.values_per_token * tokens * CACHE_BITS[self.cache] / 8)

    def weight_bytes(self) -> int:
        return int(self.api.llama_model_size(self.model))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"system": " ".join(self.api.llama_print_system_info().decode().split())}


def gguf_blocks(matrix: QuantizedMatrix) -> tuple[Any, np.ndarray]:
    """A matrix's GGML type and bytes, uint8 [n, bytes per row]: each block a half-precision scale and its codes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if matrix.bits == 4:
        return GGMLQuantizationType.Q4_0, quantize(matrix.dequantize(), GGMLQuantizationType.Q4_0)
    n = len(matrix.codes)
    codes = matrix.codes.reshape(n, -1, QK)
    if codes.shape[1] * QK != matrix.k:
        raise ValueError(f"rows of {matrix.k} weights are not whole blocks of {matrix.block}")
    scales = np.repeat(matrix.scales, matrix.block // QK, axis=1).astype(np.float16)
    codes = codes ^ 128  # from an offset of 128 to two's complement
    stored = np.concatenate([scales[..., None].view(np.uint8), codes], axis=-1).reshape(n, -1)
    return GGMLQuantizationType.Q8_0, stored


ARMS = {f"llama-{cache}": LlamaArm(cache) for cache in CACHES}


def _runs_repacked(file: Path, threads: int) -> bool:
    """Whether llama.cpp computes with weights in this machine's own layouts; with AMX some versions crash.

    A weight file that cannot be loaded at all says so when it is loaded.
    """
    return not subprocess.run([sys.executable, "-c", PROBE, str(file), str(threads)], capture_output=True).returncode
