"""What most families share: Hugging Face's names of parameters, and the layer between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvq.exporter.architectures.checks import FIELDS, epsilon_of, refuse_variants, shape_of
from kvq.exporter.architectures.description import (
    Adapted,
    Add,
    Attend,
    Gguf,
    Layer,
    Model,
    Norm,
    Project,
    Rotary,
    Step,
    SwiGLU,
)
from kvq.exporter.architectures.rope import rotary
from kvq.exporter.sources.base import Source, positive_number
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.errors import CheckpointError

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SWIGLU = SwiGLU()
# Fields whose other values would be another computation.
ONLY: Mapping[str, Any] = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0}


@dataclass(frozen=True)
class Parts:
    """The parts that a family's layers are made of.

    Attributes:
        config: of config.json, with the family's defaults for what it leaves out.
        name: of the checkpoint, for messages.
        shape: of the model.
        epsilon: of its norms.
    """

    config: Mapping[str, Any]
    name: str
    shape: Architecture
    epsilon: float

    @classmethod
    def of(cls, source: Source, only: Mapping[str, Any] = ONLY, **defaults: Any) -> Parts:
        """Those of a source's model.

        Args:
            source: the model's files.
            only: see `refuse_variants`.
            defaults: what a config.json leaves out when it is the family's usual, where transformers' configuration of
                the family has other defaults than Llama's.

        Raises:
            CheckpointError, UnsupportedArchitectureError: as `Family.describe`.
        """
        config, name = {**defaults, **source.config}, source.name
        refuse_variants(config, name, only)
        return cls(config, name, shape_of(config, name, FIELDS), epsilon_of(config, name))

    def says(self, field: str) -> bool:
        """Whether a field is true."""
        return self.config.get(field) is True

    def number(self, field: str, default: float) -> float:
        """A positive number, as GGUF files hold it: of 32 bits.

        Raises:
            CheckpointError: it is none.
        """
        value = self.config.get(field)
        found = positive_number(default if value is None else value, f"config.json of {self.name} has {field}")
        if not (rounded := float(np.float32(found))):
            raise CheckpointError(
                f"config.json of {self.name} has {field}={value!r:.60}; fix it: it must be a number of 32 bits"
            )
        return rounded

    def norm(self, layer: int, part: str, features: int | None = None) -> Norm:
        """A norm of a layer, of the residual stream unless it says how many features."""
        return Norm(f"model.layers.{layer}.{part}.weight", features or self.shape.hidden, self.epsilon)

    def attend(
        self,
        layer: int,
        *,
        bias: bool = False,
        output_bias: bool = False,
        norms: tuple[Norm, Norm] | None = None,
        rotary: int | None = 0,
        window: int = 0,
    ) -> Attend:
        """Attention with a matrix each for queries, keys, values and output."""
        shape = self.shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        q, k, v, o = (f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkvo")
        inputs = Project((q, k, v), (queries, keys, keys), shape.hidden, bias)
        return Attend(inputs, Project((o,), (shape.hidden,), queries, output_bias), norms, rotary, window)

    def mlp(self, layer: int, bias: bool = False, activation: Step = SWIGLU) -> tuple[Step, ...]:
        """The gated network behind attention."""
        hidden, ffn = self.shape.hidden, self.shape.ffn
        gate, up, down = (f"model.layers.{layer}.mlp.{part}_proj" for part in ("gate", "up", "down"))
        return Project((gate, up), (ffn, ffn), hidden, bias), activation, Project((down,), (hidden,), ffn, bias)

    def pre_norm(self, layer: int, attend: Attend, mlp: Sequence[Step]) -> Layer:
        """A layer with a norm before attention and one before the network."""
        before, between = self.norm(layer, "input_layernorm"), self.norm(layer, "post_attention_layernorm")
        return Layer.of(before, attend, Add(), between, *mlp, Add())

    def rotary(self, *read: str) -> Rotary:
        """The rotary embedding that the configuration says; `read`: fields of it that the family reads itself."""
        config = {field: value for field, value in self.config.items() if field not in read}
        return rotary(config, self.shape.head_dim, self.shape.context, self.name)

    def model(self, layers: Sequence[Layer], rotaries: tuple[Rotary, ...] | None = None, **more: Any) -> Model:
        """The description of the whole model.

        Args:
            layers: of it.
            rotaries: of the layers; None is the one that the configuration says.
            more: of its attributes.
        """
        windows = tuple(layer.attend.window for layer in layers)
        return Model(
            shape=replace(self.shape, windows=windows if any(windows) else ()),
            embedding=EMBEDDING,
            layers=tuple(layers),
            norm=Norm(FINAL_NORM, self.shape.hidden, self.epsilon),
            head=EMBEDDING if self.says("tie_word_embeddings") else HEAD,
            rotaries=(self.rotary(),) if rotaries is None else rotaries,
            **more,
        )


def scaled(factor: float, *parts: str) -> dict[str, Adapted]:
    """`Model.adapted` where matrices, and their biases, take a factor."""
    return {f"{part}.{kind}": Adapted(factor) for part in parts for kind in ("weight", "bias")}


# What GGUF files call the parameters of a layer with the parts above.
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Of the families that llama.cpp converts as it does Llama.
INTERLEAVED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def gguf(architecture: str, interleaved: bool = False, **more: Any) -> Gguf:
    """How a file holds a family of these parts; `more`: of its attributes."""
    settings: dict[str, Any] = {"layer": LAYER, "whole": WHOLE, "config": {"hidden_act": "silu"}} | more
    return Gguf(architecture=architecture, interleaved=INTERLEAVED if interleaved else {}, **settings)
