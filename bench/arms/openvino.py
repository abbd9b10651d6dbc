"""OpenVINO: the checkpoint converted by optimum-intel, weights compressed by nncf."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvq.bench.arms.base import Arm, ArmSpec, Setup, package_version
from kvq.bench.shapes import made_folder

if TYPE_CHECKING:
    from kvq.bench.weights import BundleWeights

# Bytes per cached value; quantized caches have a scale and a zero point (float32) per token and head.
CACHE_BYTES = {"u8": 1.0, "f16": 2.0, "f32": 4.0}


class OpenvinoArm(Arm):
    """A stateful model, called through its infer request: the cache never leaves the plugin.

    nncf lays the weights out as the plugin likes them: int4 in groups of 64, embedding and head int8.
    The int4 codes and scales are then replaced by the bundle's; the int8 ones keep nncf's per row.
    Precision of the computation is the plugin's choice, bfloat16 where the processor has it: prefill is
    faster so, 284 against 173 tokens/s.

    Args:
        cache: precision of the plugin's cache, u8, or f16 as is its default.
    """

    packages = ("openvino", "optimum.intel", "nncf", "torch")
    weight_bytes_each = 2.0

    def __init__(self, setup: Setup, cache: str) -> None:
        super().__init__(setup)
        self.cache = cache
        self.folder = setup.assets.folder / "openvino"

    def prepare(self) -> None:
        if self.folder.is_dir():
            return
        import nncf
        import openvino
        from optimum.intel import OVModelForCausalLM

        from kvq.bench.weights import BundleWeights

        model = OVModelForCausalLM.from_pretrained(
            str(self.setup.assets.checkpoint), export=True, compile=False, load_in_8bit=False
        )
        keep_last_row(model.model)
        with made_folder(self.folder) as folder:
            compressed = nncf.compress_weights(model.model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64)
            take_weights(compressed, BundleWeights(self.setup.assets))
            openvino.save_model(compressed, folder / "model.xml", compress_to_fp16=False)

    def load(self) -> None:
        import openvino

        self.api = openvino
        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": self.setup.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "KV_CACHE_PRECISION": self.cache,
        }
        self.model = core.compile_model(str(self.folder / "model.xml"), "CPU", options)
        self.request = self.model.create_infer_request()
        self._names = {name for port in self.model.inputs for name in port.names}

    def open(self, capacity: int) -> None:
        self.request.reset_state()
        self.length = 0
        self._mask = np.ones((1, capacity), np.int64)
        self._beam = np.zeros(1, np.int32)

    def _feed(self, ids: np.ndarray) -> float:
        begun = time.perf_counter()
        end = self.length + len(ids)
        inputs = {
            "input_ids": ids[None],
            "attention_mask": self._mask[:, :end],
            "position_ids": np.arange(self.length, end, dtype=np.int64)[None],
            "beam_idx": self._beam,
        }
        # Inputs are read where they lie; results are views of the plugin's memory.
        self.request.infer({k: v for k, v in inputs.items() if k in self._names}, share_inputs=True, share_outputs=True)
        self._output = self.request.get_output_tensor(0).data
        self.length = end
        return time.perf_counter() - begun

    def prefill(self, ids: np.ndarray) -> float:
        return self._feed(np.ascontiguousarray(ids, np.int64))

    def step(self, token: int) -> float:
        return self._feed(np.array([token], np.int64))

    def logits(self) -> np.ndarray:
        return np.asarray(self._output, np.float32)[0, -1]

    def kv_bytes(self) -> int:
        values = self.setup.assets.values_per_token * self.length
        head_dim = self.setup.assets.fields["hidden_size"] // self.setup.assets.fields["num_attention_heads"]
        return int(values * CACHE_BYTES[self.cache] + (8 * values / head_dim if self.cache == "u8" else 0))

    def cache_read_bytes(self) -> int:
        return self.kv_bytes()

    def weight_bytes(self) -> int:
        return (self.folder / "model.bin").stat().st_size

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "OpenVINO CPU plugin",
            "versions": package_version("openvino", "nncf", "optimum-intel"),
            "settings": f"int4 weights in groups of 64, int8 embedding and head, {self.cache} cache, stateful,"
            f" computing in {self.model.get_property('INFERENCE_PRECISION_HINT').get_type_name()}",
        }


def take_weights(model: Any, weights: BundleWeights) -> None:
    """Replace the int4 weights of a compressed model by those of the bundle, scales rounded to half precision."""
    import openvino
    from openvino import opset13 as ops

    matrices = dict(weights.parts())
    replaced = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        name = node.get_friendly_name().removeprefix("self.")
        matrix = matrices.get(name.removesuffix("/scale"))
        if matrix is None or matrix.bits != 4:
            continue
        shape = list(node.output(0).get_shape())
        if name.endswith("/scale"):
            new = ops.constant(matrix.scales.reshape(shape).astype(np.float16))
        else:  # from an offset of 8 to two's complement
            packed = openvino.Tensor(openvino.Type.i4, shape)  # owns its memory, unlike one made of an array
            packed.data.reshape(-1)[:] = matrix.codes.reshape(-1) ^ 0x88
            new = ops.constant(packed)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(new.output(0))
        replaced += 1
    if replaced != 2 * sum(matrix.bits == 4 for matrix in matrices.values()):
        raise RuntimeError(f"{replaced} tensors replaced: this nncf lays weights out in another way")


def keep_last_row(model: Any) -> None:
    """Let the head of a converted model compute the last token's logits alone, as the other arms do."""
    from openvino import opset13 as ops

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = ops.slice(node.input_value(0), np.array([-1]), np.array([2**31 - 1]), np.array([1]), np.array([1]))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


ARMS = {
    "openvino": ArmSpec(OpenvinoArm, {"cache": "u8"}),
    "openvino-f16": ArmSpec(OpenvinoArm, {"cache": "f16"}),
}
