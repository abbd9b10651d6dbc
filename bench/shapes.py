"""The models that are measured, made once and kept in a folder: random weights in SmolLM's shapes, or a GGUF file.

Of a shape every arm runs the same model: a bundle with the default's int8 weights, and a Hugging Face checkpoint of
exactly the values those weights stand for. Files of other formats are derived from the two by the arms that need them,
in the same folder. What products take is not rotated, which no other format has: in kvq that takes 2 % of a step, left
out here. Of a GGUF file an arm has what its users would get of it: llama.cpp the file, kvq what it exports by default.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kvq.models.family import config
from kvq.runtime.bundle.manifest import MANIFEST, Manifest

LONGEST = 8192  # tokens of context that can be measured
ROOM = 256  # tokens after it, for decode steps
RECIPE = 3  # raised when a file in the cache is made differently, so that old ones are not used

# As wide as a test needs: whole blocks of 64, grouped heads, two layers.
TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
GGUF = ".gguf"
FEW = "-int4"  # behind a shape's name: with weights of 4 bits
BENCH_SHAPES = tuple(f"{shape}{few}" for few in ("", FEW) for shape in ("smollm-135m", "smollm-360m", "smollm-1.7b"))


@dataclass(frozen=True)
class Assets:
    """Where the files of one shape are.

    Attributes:
        folder: of everything made from the shape.
        fields: its config.json.
        source: the GGUF file that it is made from; empty: random weights.
        weights: of a shape's layers, int8 or int4.
        exact: take the bundle whose products keep activations in float32. Its speed means nothing; it is for
            checks, as quantized activations turn differences of 1e-6 into differences of a few percent.
    """

    folder: Path
    fields: dict[str, Any]
    source: str = ""
    weights: str = "int8"
    exact: bool = False

    @property
    def bundle(self) -> Path:
        """kvq's bundle; that of a shape has the matrices of all layers in 8 bits, or in 4."""
        return self.folder / ("bundle-exact" if self.exact else "bundle")

    @property
    def checkpoint(self) -> Path:
        """Hugging Face folder with the float32 values of the bundle's weights, the rotation of values included.

        There is none of a GGUF file.
        """
        return self.folder / "checkpoint"

    @cached_property
    def manifest(self) -> Manifest:
        """The bundle's."""
        return Manifest.of_file(self.bundle / MANIFEST)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.fields.get("head_dim") or self.fields["hidden_size"] // self.fields["num_attention_heads"]

    @property
    def parameters(self) -> int:
        """Weights of all products; a tied embedding counts once."""
        hidden, ffn, vocab, layers = (
            self.fields[n] for n in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
        )
        heads = 2 * (self.fields["num_attention_heads"] + self.fields["num_key_value_heads"])
        embeddings = 1 + (not self.fields.get("tie_word_embeddings", True))
        return int(layers * (hidden * self.head_dim * heads + 3 * hidden * ffn) + embeddings * hidden * vocab)

    @property
    def values_per_token(self) -> int:
        """Cached numbers a token has, keys and values of all layers."""
        return 2 * self.fields["num_hidden_layers"] * self.fields["num_key_value_heads"] * self.head_dim


def default_cache() -> Path:
    """Folder of the made models: $XDG_CACHE_HOME/kvq/bench, by default ~/.cache/kvq/bench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvq" / "bench"


def assets(shape: str, root: Path) -> Assets:
    """The files of a shape of `kvq.models.family`, of "tiny" or of a GGUF file, which may not exist yet.

    Args:
        shape: its name, with `FEW` behind it for weights of 4 bits, or the file's path.
        root: has a folder for each.

    Raises:
        CheckpointError: the file is none, or damaged.
    """
    # Changes with every change of the exporter: a bundle of an older one is not measured by mistake.
    code = sorted(Path(str(importlib.resources.files("kvq.exporter"))).rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in code))
    if shape.endswith(GGUF):
        from kvq.exporter.sources import open_source

        source = Path(shape).absolute()
        fields = dict(open_source(str(source)).config)
        digest.update(f"{source} {source.stat()}".encode())
        return Assets(Path(root).absolute() / f"{source.stem}-{RECIPE}-{digest.hexdigest()[:8]}", fields, str(source))
    named, weights = shape.removesuffix(FEW), "int4" if shape.endswith(FEW) else "int8"
    fields = config("smollm-135m", **TINY) if named == "tiny" else config(named)
    # SmolLM's own initialisation: attention that tells tokens apart, activations of order one.
    fields |= {"max_position_embeddings": LONGEST + ROOM, "initializer_range": fields["hidden_size"] ** -0.5}
    return Assets(Path(root).absolute() / f"{shape}-{RECIPE}-{digest.hexdigest()[:8]}", fields, weights=weights)


def make_bundle(made: Assets) -> None:
    """Make bundle, checkpoint and exact bundle if they are not there; minutes, and 6 bytes a parameter of memory."""
    made, exact = replace(made, exact=False), replace(made, exact=True)
    if made.source:
        if not made.bundle.is_dir():
            from kvq.exporter.export import export

            made.folder.mkdir(parents=True, exist_ok=True)
            export(made.source, made.bundle)
    elif not (made.bundle.is_dir() and made.checkpoint.is_dir()):
        _make(made)
    if not exact.bundle.is_dir():
        from kvq.exporter.exact import exact_copy

        with made_folder(exact.bundle) as folder:
            exact_copy(made.bundle, folder)


def _make(made: Assets) -> None:
    """Bundle and checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvq.bench.weights import BundleWeights
    from kvq.exporter.calibration import calibration_text
    from kvq.exporter.export import export
    from kvq.models.corpus import train_tokenizer

    torch.manual_seed(0)
    fields = LlamaConfig(**{k: v for k, v in made.fields.items() if k not in ("model_type", "architectures")})
    model = LlamaForCausalLM(fields)
    with torch.no_grad():  # norms are initialised to one, which would hide a mistake in them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".original.", dir=made.folder) as temporary:
        model.save_pretrained(temporary)
        # A tokenizer is what keys are calibrated with: real bundles have centred keys, so these have too.
        tokenizer = train_tokenizer(iter([calibration_text()]), min(512, made.fields["vocab_size"]))
        tokenizer.save(str(Path(temporary) / "tokenizer.json"))
        # What random weights lose is no matter.
        export(temporary, made.bundle, weights=made.weights, rotate="heads", compensate=False, overwrite=True)
    weights = BundleWeights(made)
    with torch.no_grad():
        for name, vector in weights.vectors().items():
            model.get_parameter(name).copy_(torch.as_tensor(vector.copy()))
        for name, matrix in weights.parts():
            model.get_parameter(name).copy_(torch.as_tensor(matrix.dequantize()))
    with made_folder(made.checkpoint) as folder:
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))


@contextmanager
def made_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the block ends well; an old one is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
