"""OpenVINO: the checkpoint converted by optimum-intel, weights compressed by nncf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvq.bench.arm import Arm

# Bytes per cached value; u8 has a scale and a zero point (float32) per token and head besides.
CACHE_BYTES = {"u8": 1, "f16": 2}


@dataclass
class OpenvinoArm(Arm):
    """A stateful model, called through its infer request: the cache never leaves the plugin.

    nncf lays the weights out as the plugin likes them: int8, a scale a row, of the bundle's decoded weights; where
    these have 4 bits int4, a scale for 64, embedding and head in int8. Precision of the computation is the plugin's
    choice, bfloat16 where the processor has it: prefill is faster so.

    Attributes:
        cache: precision of the plugin's cache, u8, or f16 as is its default.
    """

    cache: str

    runtime = "OpenVINO CPU plugin"
    settings = "{kept} weights, {cache} cache, stateful, computing in {computing}"
    kept = "int8"
    files = "openvino"
    packages = ("openvino", "optimum.intel", "nncf", "torch")
    distributions = ("openvino", "nncf", "optimum-intel")
    grows = True
    weight_bytes_each = 2.0

    def make(self, folder: Path) -> None:
        import nncf
        import openvino
        from optimum.intel import OVModelForCausalLM

        checkpoint = str(self.assets.checkpoint)
        model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, load_in_8bit=False).model
        keep_last_row(model)
        how: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_SYM}
        if self.assets.weights == "int4":
            how = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64, "ratio": 1.0}
        compressed = nncf.compress_weights(model, **how)
        openvino.save_model(compressed, folder / "model.xml", compress_to_fp16=False)

    def load(self) -> None:
        import openvino

        self.kept = self.assets.weights
        threads = {"INFERENCE_NUM_THREADS": self.threads}
        options = threads | {"PERFORMANCE_HINT": "LATENCY", "KV_CACHE_PRECISION": self.cache}
        self.model = openvino.Core().compile_model(str(self.folder / "model.xml"), "CPU", options)
        self.computing = self.model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.request = self.model.create_infer_request()
        self._names = {name for port in self.model.inputs for name in port.names}

    def open(self) -> None:
        self.request.reset_state()
        self._mask = np.ones((1, self.capacity), np.int64)
        self._beam = np.zeros(1, np.int32)

    def feed(self, ids: np.ndarray) -> None:
        end = self.length + len(ids)
        inputs = {
            "input_ids": np.ascontiguousarray(ids)[None],
            "attention_mask": self._mask[:, :end],
            "position_ids": np.arange(self.length, end, dtype=np.int64)[None],
            "beam_idx": self._beam,
        }
        # Inputs are read where they lie; results are views of the plugin's memory.
        self.request.infer({k: v for k, v in inputs.items() if k in self._names}, share_inputs=True, share_outputs=True)
        self._output = self.request.get_output_tensor(0).data

    def logits(self) -> np.ndarray:
        return np.asarray(self._output, np.float32)[0, -1]

    def kv_bytes(self) -> int:
        values = self.assets.values_per_token * self.length
        return CACHE_BYTES[self.cache] * values + (8 * values // self.assets.head_dim if self.cache == "u8" else 0)

    def weight_bytes(self) -> int:
        return (self.folder / "model.bin").stat().st_size


def keep_last_row(model: Any) -> None:
    """Let the head of a converted model compute the last token's logits alone, as the other arms do."""
    from openvino import opset13 as ops

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = ops.slice(node.input_value(0), np.array([-1]), np.array([2**31 - 1]), np.array([1]), np.array([1]))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


ARMS = {"openvino": OpenvinoArm("u8"), "openvino-f16": OpenvinoArm("f16")}
