"""onnxruntime-genai, on the one graph with onnxruntime's attention and a configuration of ours."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import numpy as np

from kvq.bench.arms.base import Arm, ArmSpec, package_version
from kvq.bench.shapes import made_folder
from kvq.runtime.bundle.manifest import MANIFEST, WEIGHTS, Manifest


class GenaiArm(Arm):
    """`Generator.append_tokens`, with past and present sharing one buffer.

    The graph is that of ort-gqa-fp32 under genai's names. `append_tokens` runs the model; sampling is
    left out, as in every arm.
    """

    packages = ("onnxruntime_genai", "onnx")
    exact = True
    tolerance = 0.01
    value_bytes_each = 4.2

    def prepare(self) -> None:
        from kvq.bench.onegraph import OneGraph

        if self._folder.is_dir():
            return
        with made_folder(self._folder) as folder:
            OneGraph(self.setup.assets, 32, None, genai=True).build(folder)
            # The graph names its weights file, and it has to stand beside it.
            shutil.copy(self.setup.assets.bundle / WEIGHTS, folder / WEIGHTS)
            (folder / "genai_config.json").write_text(json.dumps(self._config(), indent=1))

    @property
    def _folder(self) -> Any:
        return self.setup.assets.folder / ("genai-exact" if self.setup.assets.exact else "genai")

    def _config(self) -> dict[str, Any]:
        """genai_config.json: where the graph is, what its inputs are called, the model's shape."""
        fields = self.setup.assets.fields
        context = fields["max_position_embeddings"]
        decoder = {
            "session_options": {"log_id": "kvq", "intra_op_num_threads": self.setup.threads, "provider_options": []},
            "filename": "model.onnx",
            "head_size": fields["hidden_size"] // fields["num_attention_heads"],
            "hidden_size": fields["hidden_size"],
            "num_attention_heads": fields["num_attention_heads"],
            "num_key_value_heads": fields["num_key_value_heads"],
            "num_hidden_layers": fields["num_hidden_layers"],
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        }
        return {
            "model": {
                "type": "llama",
                "context_length": context,
                "vocab_size": fields["vocab_size"],
                "bos_token_id": fields["bos_token_id"],
                "eos_token_id": fields["eos_token_id"],
                "pad_token_id": fields["eos_token_id"],
                "decoder": decoder,
            },
            "search": {"max_length": context, "past_present_share_buffer": True, "do_sample": False},
        }

    def load(self) -> None:
        import onnxruntime_genai

        self.api = onnxruntime_genai
        config = onnxruntime_genai.Config(str(self._folder))
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": self.setup.threads}}}})
        )
        self.model = onnxruntime_genai.Model(config)

    def open(self, capacity: int) -> None:
        self.generator: Any = None  # frees the old cache first
        parameters = self.api.GeneratorParams(self.model)
        parameters.set_search_options(max_length=capacity, batch_size=1)
        self.generator = self.api.Generator(self.model, parameters)
        self.capacity, self.length = capacity, 0

    def _feed(self, ids: np.ndarray) -> float:
        begun = time.perf_counter()
        self.generator.append_tokens(ids)
        self._logits = self.generator.get_output("logits")
        self.length += len(ids)
        return time.perf_counter() - begun

    def prefill(self, ids: np.ndarray) -> float:
        return self._feed(ids.astype(np.int32))

    def step(self, token: int) -> float:
        return self._feed(np.array([token], np.int32))

    def logits(self) -> np.ndarray:
        return np.asarray(self._logits, np.float32).reshape(-1, self.setup.assets.fields["vocab_size"])[-1]

    def kv_bytes(self) -> int:
        return 4 * self.setup.assets.values_per_token * self.capacity

    def cache_read_bytes(self) -> int:
        return 4 * self.setup.assets.values_per_token * self.length

    def weight_bytes(self) -> int:
        text = (self.setup.assets.bundle / MANIFEST).read_text(encoding="utf-8")
        return Manifest.from_json(text).decode_weight_nbytes

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "onnxruntime-genai",
            "versions": package_version("onnxruntime-genai", "onnxruntime"),
            "settings": "graph of ort-gqa-fp32, float32 cache, shared past and present",
        }


ARMS = {"genai": ArmSpec(GenaiArm)}
