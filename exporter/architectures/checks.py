"""What a configuration says, checked, and whether the parameters that it asks for are there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kvq.exporter.architectures.description import Model
from kvq.exporter.limits import OTHER_BYTES, PARAMETER_BYTES
from kvq.exporter.sources.base import Source, positive
from kvq.runtime.bundle import limits
from kvq.runtime.bundle.manifest import Architecture, check_shape
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError

# What configurations leave out when it is the usual (transformers' LlamaConfig).
EPSILON, CONTEXT = 1e-6, 2048
# What config.json calls the parts of an `Architecture`.
FIELDS = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "vocab": "vocab_size",
    "context": "max_position_embeddings",
}  # fmt: skip


def refuse_variants(config: Mapping[str, Any], name: str, only: Mapping[str, Any]) -> None:
    """Compare fields of a config.json, where they are there, with the one value of each that is implemented.

    Raises:
        UnsupportedArchitectureError: another value.
    """
    for field, supported in only.items():
        value = config.get(field, supported)
        if value != supported:
            raise UnsupportedArchitectureError(f"{name} has {field}={value!r:.80}; kvq supports {supported!r} only")


def shape_of(config: Mapping[str, Any], name: str, fields: Mapping[str, str] = FIELDS) -> Architecture:
    """Shape of the model that a config.json describes.

    Args:
        config: of config.json.
        name: of the checkpoint, for messages.
        fields: as `FIELDS`, for a family that calls them otherwise.

    Raises:
        CheckpointError: a size is missing or is none.
        UnsupportedArchitectureError: a shape that no bundle may have.
    """

    def integer(part: str, default: int | None = None) -> int:
        value = config.get(fields[part])
        return positive(default if value is None else value, f"config.json of {name} has {fields[part]}")

    hidden, heads = integer("hidden"), integer("heads")
    kv_heads, head_dim = integer("kv_heads", heads), integer("head_dim", hidden // heads)
    if head_dim % 8 or heads % kv_heads:
        raise UnsupportedArchitectureError(
            f"{name} has head_dim {head_dim}, {heads} heads and {kv_heads} KV heads; head_dim must be a multiple of 8,"
            " heads of KV heads"
        )
    shape = Architecture(
        layers=integer("layers"),
        hidden=hidden,
        ffn=integer("ffn"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=integer("vocab"),
        context=integer("context", CONTEXT),
    )
    for part, field in fields.items():  # a manifest of more would be refused by whoever reads it
        value, most = getattr(shape, part), limits.SHAPE.get(part, limits.FEATURES)
        if value > most:
            raise UnsupportedArchitectureError(f"{name} has {field}={value}; kvq supports at most {most}")
    try:
        check_shape(shape)
    except ValueError as error:
        raise UnsupportedArchitectureError(f"{name} has {error}; kvq supports fewer") from None
    return shape


def epsilon_of(config: Mapping[str, Any], name: str, field: str = "rms_norm_eps") -> float:
    """Epsilon of the RMS norms.

    Raises:
        CheckpointError: it is none.
    """
    epsilon = config.get(field, EPSILON)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise CheckpointError(f"config.json of {name} has {field}={epsilon!r:.60}; fix it: it must be small, above 0")
    return float(epsilon)


def check_parameters(model: Model, source: Source) -> None:
    """Compare the parameters that there are with those that there must be.

    Raises:
        CheckpointError: some are missing or have another shape.
        UnsupportedArchitectureError: a bias that the description does not know.
    """
    there = source.shapes
    if model.shape.layers > len(there):
        raise CheckpointError(
            f"{source.name} has num_hidden_layers={model.shape.layers} and only {len(there)} weights; check that"
            " configuration and weights belong together"
        )
    wanted = model.parameters()
    bad = sorted(name for name, shape in wanted.items() if there.get(name) != shape)
    if bad:
        has = f"has the shape {there[bad[0]]}, not {wanted[bad[0]]}" if bad[0] in there else "is missing"
        raise CheckpointError(
            f"{source.name} lacks {len(bad)} weights or has them in other shapes than its configuration says, first"
            f" {bad[0]}, which {has}; check that configuration and weights belong together"
        )
    parameters = sum(map(math.prod, wanted.values()))
    if source.nbytes > PARAMETER_BYTES * parameters + OTHER_BYTES:  # of holes, which take as long to digest
        raise CheckpointError(
            f"{source.name} has {source.nbytes} bytes of weights for {parameters} parameters; check that configuration"
            " and weights belong together"
        )
    # A bias that the configuration does not speak of would be left out, and the text be another one.
    roots = {name.partition(".")[0] for name in wanted} | {"lm_head"}
    ours = (name for name in there if name.partition(".")[0] in roots)
    foreign = sorted(name for name in ours if name.endswith(".bias") and name not in wanted)
    if foreign:
        raise UnsupportedArchitectureError(
            f"{source.name} has {foreign[0]}, of which its configuration says nothing; kvq supports biases of"
            " projections where the configuration says so"
        )
