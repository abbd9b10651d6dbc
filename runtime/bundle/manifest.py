"""kvq.json, the manifest of a bundle: what the model is, and size and digest of every file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kvq.runtime.errors import BundleError

MANIFEST = "kvq.json"


FORMAT = "kvq-bundle"


FORMAT_VERSION = 2


WEIGHTS = "weights.bin"


TOKENIZER = "tokenizer.json"


CHAT_TEMPLATE = "chat_template.jinja"


# Far above any model of this kind: buffers are made after the manifest, before the graphs are compared with it.
MOST_FEATURES = 1 << 17


MOST = {"layers": 1024, "heads": 1024, "kv_heads": 1024, "head_dim": 1024, "vocab": 1 << 22, "context": 1 << 24}


# One path component: no separators, no leading dot, so neither ".." nor an absolute path.
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Architecture:
    """Shape of the model; all in elements, tokens or layers."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int


@dataclass(frozen=True)
class Manifest:
    """The content of kvq.json besides format and version.

    Attributes:
        name: of the checkpoint the bundle was made from.
        architecture: shapes.
        weights: how they are stored, e.g. {"layers": "int4", "head": "int8", "block": 64, "activations": "int8"};
            "exact" of "matrices" hold just what their source holds.
        kv: what the segments do to keys and values, {"rotation": "hadamard" | "none", "centered": bool, "values":
            "folded" | "online"}: whether values are rotated inside the weights or as they come, older bundles: folded;
            and "keys": "balanced" where keys are in a basis of their own.
        decode_weight_nbytes: bytes of weights that one decode step reads.
        eos_token_ids: ids that end a text.
        segments: graph files in order: layers + 1 of them.
        decoder: graph file of the same layers with native operators.
        head, uncertainty: graph files.
        controllers: name of a learned policy -> {"file", "set", "objective", "classes", "curve", "model", "report"},
            see `kvq.controller.training.train`.
        special_tokens: name in the checkpoint's tokenizer -> text, for the chat template, e.g. {"bos_token": "<s>"}.
        source: what it was made from: {"name", "sha256", "licence", "format", ...}; empty in older bundles.
        files: name -> {"nbytes", "sha256"} of every file but the manifest.
    """

    name: str
    architecture: Architecture
    weights: dict[str, Any]
    kv: dict[str, Any]
    decode_weight_nbytes: int
    eos_token_ids: list[int]
    segments: list[str]
    decoder: str
    head: str
    uncertainty: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    controllers: dict[str, dict[str, Any]] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def model_digest(self) -> str:
        """sha256 over the digests of graphs and weights: the model itself, whatever controllers the bundle holds."""
        names = sorted({*self.segments, self.decoder, self.head, self.uncertainty, WEIGHTS})
        listed = json.dumps([(name, self.files[name]["sha256"]) for name in names])
        return hashlib.sha256(listed.encode()).hexdigest()

    def to_json(self) -> str:
        """Text of kvq.json."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Parse kvq.json.

        Raises:
            BundleError: not JSON, another format or version, or a field missing or of a wrong type.
        """
        remedy = "export the bundle again with kvq export"
        try:
            data = json.loads(text)
            if data.get("format") != FORMAT:
                raise BundleError(
                    f"{MANIFEST} is not of format {FORMAT!r}; point --model at a folder made by kvq export"
                )
            if data["format_version"] != FORMAT_VERSION:
                raise BundleError(
                    f"bundle format version {data['format_version']!r} is not {FORMAT_VERSION}, the one this kvq reads;"
                    f" {remedy}"
                )
            architecture = Architecture(**{f.name: data["architecture"][f.name] for f in fields(Architecture)})
            later = ("controllers", "special_tokens", "source")  # older bundles have none
            names = [f.name for f in fields(Manifest) if f.name not in ("architecture", *later)]
            manifest = Manifest(
                architecture=architecture,
                **{name: data[name] for name in names},
                **{name: data.get(name, {}) for name in later},
            )
            _check_types(manifest)
            return manifest
        except BundleError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is damaged ({type(error).__name__}: {error}); {remedy}") from None


def _check_types(manifest: Manifest) -> None:
    """Raise ValueError for values that would only fail much later."""
    shape = manifest.architecture
    for name, value in asdict(shape).items():
        if not isinstance(value, int) or not 0 < value <= MOST.get(name, MOST_FEATURES):
            raise ValueError(f"{name} is {value!r}")
    if shape.heads % shape.kv_heads or shape.head_dim % 8:
        raise ValueError(f"heads {shape.heads}, kv_heads {shape.kv_heads}, head_dim {shape.head_dim}")
    if len(manifest.segments) != shape.layers + 1:
        raise ValueError(f"{len(manifest.segments)} segments for {shape.layers} layers")
    if not all(isinstance(i, int) and 0 <= i < shape.vocab for i in manifest.eos_token_ids):
        raise ValueError(f"eos_token_ids {manifest.eos_token_ids}")
    if not isinstance(manifest.decode_weight_nbytes, int) or manifest.decode_weight_nbytes < 0:
        raise ValueError(f"decode_weight_nbytes {manifest.decode_weight_nbytes!r}")
    for name, entry in manifest.files.items():
        if not SAFE_NAME.fullmatch(name):
            raise ValueError(f"file name {name!r}")
        if not isinstance(entry["nbytes"], int) or not isinstance(entry["sha256"], str):
            raise ValueError(f"entry of {name}")
    if not isinstance(manifest.source, dict):
        raise ValueError(f"source {manifest.source!r:.60}")
    if not all(isinstance(text, str) for item in manifest.special_tokens.items() for text in item):
        raise ValueError(f"special_tokens {manifest.special_tokens}")
    controllers = [entry["file"] for entry in manifest.controllers.values()]
    for name in (*manifest.segments, manifest.decoder, manifest.head, manifest.uncertainty, WEIGHTS, *controllers):
        if name not in manifest.files:
            raise ValueError(f"{name} is not in the file list")
