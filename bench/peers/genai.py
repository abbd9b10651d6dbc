"""onnxruntime-genai, on the one graph with onnxruntime's attention and a configuration of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from kvq.bench.arm import Arm
from kvq.runtime.bundle.manifest import WEIGHTS


class GenaiArm(Arm):
    """`Generator.append_tokens`, with past and present sharing one buffer.

    The graph is that of ort-gqa-fp32 under genai's names. `append_tokens` runs the model; sampling is left out, as in
    every arm.
    """

    runtime = "onnxruntime-genai"
    settings = "graph of ort-gqa-fp32, float32 cache, shared past and present"
    files = "genai"
    packages = ("onnxruntime_genai", "onnx")
    distributions = ("onnxruntime-genai", "onnxruntime")
    exact = True
    tolerance = 0.01
    value_bytes_each = 4.2

    def make(self, folder: Path) -> None:
        from kvq.bench.onegraph import OneGraph

        file = OneGraph(self.assets, 32, None).build(folder)
        # The graph names its weights file, and it has to stand beside it.
        shutil.copy(self.assets.bundle / WEIGHTS, folder / WEIGHTS)
        (folder / "genai_config.json").write_text(json.dumps(self._config(file.name), indent=1))

    def _config(self, file: str) -> dict[str, Any]:
        """genai_config.json: the graph's file, what its inputs are called, the model's shape."""
        fields = self.assets.fields
        shape = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
        inputs = {"input_ids": "ids", "past_sequence_length": "seqlens_k", "current_sequence_length": "total"}
        sides = ("key", "value")
        past, present = ({f"{when}_{x}_names": f"{when}_{x[0]}_%d" for x in sides} for when in ("past", "present"))
        decoder = {
            "session_options": {"log_id": "kvq", "intra_op_num_threads": self.threads, "provider_options": []},
            "filename": file,
            "head_size": self.assets.head_dim,
            **{name: fields[name] for name in shape},
            "inputs": inputs | past,
            "outputs": {"logits": "logits"} | present,
        }
        context, tokens = fields["max_position_embeddings"], ("vocab_size", "bos_token_id", "eos_token_id")
        model = {"type": "llama", "context_length": context, "pad_token_id": fields["eos_token_id"], "decoder": decoder}
        return {
            "model": model | {name: fields[name] for name in tokens},
            "search": {"max_length": context, "past_present_share_buffer": True, "do_sample": False},
        }

    def load(self) -> None:
        import onnxruntime_genai

        self.api = onnxruntime_genai
        config = onnxruntime_genai.Config(str(self.folder))
        options = {"intra_op_num_threads": self.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)

    def open(self) -> None:
        self.generator: Any = None  # frees the old cache first
        parameters = self.api.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.capacity, batch_size=1)
        self.generator = self.api.Generator(self.model, parameters)

    def feed(self, ids: np.ndarray) -> None:
        self.generator.append_tokens(ids.astype(np.int32))
        self._logits = self.generator.get_output("logits")

    def logits(self) -> np.ndarray:
        return np.asarray(self._logits, np.float32).reshape(-1, self.assets.fields["vocab_size"])[-1]

    def kv_bytes(self) -> int:
        return 4 * self.assets.values_per_token * self.capacity


ARMS = {"genai": GenaiArm()}
