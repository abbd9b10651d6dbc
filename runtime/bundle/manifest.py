"""kvq.json, the manifest of a bundle: what the model is, and size and digest of every file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvq.runtime.bundle import limits
from kvq.runtime.bundle.fields import (
    SAFE_NAME,
    SHA256,
    file_names,
    integer,
    mapping,
    named,
    number,
    parse,
    scalars,
    sequence,
    text,
)
from kvq.runtime.bundle.profiles import Profiles, check_profiles, json_of, profiles_of
from kvq.runtime.bundle.sampling import NAMES, recommended
from kvq.runtime.errors import BundleError
from kvq.runtime.precision.table import Geometry

MANIFEST = "kvq.json"


FORMAT = "kvq-bundle"


FORMAT_VERSION = 2
WINDOWED_VERSION = 3  # of bundles with windows: who reads version 2 alone would let their layers see all tokens


WEIGHTS = "weights.bin"


TOKENIZER = "tokenizer.json"


CHAT_TEMPLATE = "chat_template.jinja"


KEY_FEEDBACK = "key_feedback.bin"  # halves [layers, kv_heads, head_dim, head_dim], see `Bundle.key_feedback`
KEY_TURNS = "key_turns.bin"  # see `Bundle.key_turns`


@dataclass(frozen=True)
class Architecture:
    """Shape of the model; all in elements, tokens or layers.

    windows: of each layer how many of the newest tokens a token sees, itself included; 0: all. Empty: all see all.
    profiles: classes of tokens that are stored at other precisions in every layer, see `Geometry.profiles`.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    windows: tuple[int, ...] = ()
    profiles: Profiles = ()

    @property
    def geometry(self) -> Geometry:
        """Of the keys and values of a token."""
        return Geometry(self.layers, self.kv_heads, self.head_dim, self.windows, self.profiles)

    @property
    def window(self) -> int:
        """Tokens that layers with a window see at most; 0 without such."""
        return max(self.windows, default=0)

    @property
    def last_window(self) -> int:
        """Tokens that one sees in the last layer; 0: all."""
        return self.windows[-1] if self.windows else 0

    def fields(self) -> dict[str, Any]:
        """As JSON has it, without windows and profiles where there are none; `of` gives it back."""
        later = {"windows": list(self.windows), "profiles": json_of(self.profiles)}
        found = {name: value for name, value in asdict(self).items() if name not in later}
        return found | {name: value for name, value in later.items() if value}

    @classmethod
    def of(cls, found: dict[str, Any]) -> Architecture:
        """Of `fields`.

        Raises:
            KeyError, TypeError, ValueError: fields that are missing, or profiles that are none.
        """
        names = [f.name for f in fields(cls) if f.name not in ("windows", "profiles")]
        windows, profiles = tuple(found.get("windows", ())), profiles_of(found.get("profiles", {}))
        return cls(**{name: found[name] for name in names}, windows=windows, profiles=profiles)


@dataclass(frozen=True)
class Manifest:
    """The content of kvq.json besides format and version.

    Attributes:
        name: of the checkpoint the bundle was made from.
        architecture: shapes.
        weights: how they are stored, e.g. {"layers": "int4", "head": "int8", "block": 64, "activations": "int8"};
            "exact" of "matrices" hold just what their source holds, "grid" of them rotated on the grids of its blocks.
        kv: what the segments do to keys and values, {"rotation": "hadamard" | "none", "centered": bool, "values":
            "folded" | "half" | "online"}: whether values are rotated, and turned back, inside the weights, the latter
            alone, or neither, older bundles: folded; and "keys": "balanced" where keys are in a basis of their own.
        decode_weight_nbytes: bytes of weights that one decode step reads.
        eos_token_ids: ids that end a text.
        segments: graph files in order: layers + 1 of them.
        decoder: graph file of the same layers with native operators.
        head, uncertainty: graph files.
        controllers: name of a learned policy -> {"file", "set", "objective", "classes", "curve", "model", "report"},
            see `kvq.controller.training.train`.
        special_tokens: name in the checkpoint's tokenizer -> text, for the chat template, e.g. {"bos_token": "<s>"}.
        source: what it was made from: {"name", "sha256", "licence", "format", ...}; empty in older bundles.
        sampling: options of drawing that its makers recommend, see `kvq.runtime.bundle.sampling`; empty: none known.
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
    sampling: dict[str, float] = field(default_factory=dict)

    @property
    def model_digest(self) -> str:
        """sha256 over the digests of graphs and weights, of what readers of stored keys need, and the windows of
        layers, which no graph says: the model itself, whatever controllers the bundle holds.
        """
        turns = {KEY_TURNS} & self.files.keys()
        names = sorted({*self.segments, self.decoder, self.head, self.uncertainty, WEIGHTS, *turns})
        windows = [self.architecture.windows] if self.architecture.windows else []
        listed = json.dumps([*((name, self.files[name]["sha256"]) for name in names), *windows])
        return hashlib.sha256(listed.encode()).hexdigest()

    def to_json(self) -> str:
        """Text of kvq.json."""
        version = WINDOWED_VERSION if self.architecture.windows else FORMAT_VERSION
        content = {**asdict(self), "architecture": self.architecture.fields()}
        return json.dumps({"format": FORMAT, "format_version": version, **content}, indent=1) + "\n"

    @staticmethod
    def of_file(file: Path) -> Manifest:
        """`from_json` of a file.

        Raises:
            BundleError: as there, or it is too large.
            OSError, UnicodeDecodeError: it cannot be read, or is no text.
        """
        return Manifest.from_json(text_of(file))

    @staticmethod
    def from_json(content: str) -> Manifest:
        """Parse kvq.json.

        Raises:
            BundleError: not JSON, another format or version, or a field missing or of a wrong type.
        """
        remedy = "export the bundle again with kvq export"
        try:
            data = parse(content)
            if data.get("format") != FORMAT:
                raise BundleError(
                    f"{MANIFEST} is not of format {FORMAT!r}; point --model at a folder made by kvq export"
                )
            version = (
                WINDOWED_VERSION if data["architecture"] and data["architecture"].get("windows") else FORMAT_VERSION
            )
            if data["format_version"] != version:
                raise BundleError(
                    f"bundle format version {data['format_version']!r:.40} is not {version}, the one this kvq"
                    f" reads; {remedy}"
                )
            architecture = Architecture.of(data["architecture"])
            later = ("controllers", "special_tokens", "source", "sampling")  # older bundles have none
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
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise BundleError(f"{MANIFEST} is damaged ({why}); {remedy}") from None


def text_of(file: Path) -> str:
    """The text of a manifest, which nobody has looked at yet.

    Raises:
        BundleError: it is too large.
        OSError, UnicodeDecodeError: it cannot be read, or is no text.
    """
    with open(file, "rb") as opened:
        data = opened.read(limits.MANIFEST_BYTES + 1)
    if len(data) > limits.MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} is larger than {limits.MANIFEST_BYTES} bytes; export the bundle again")
    return data.decode()


def _check_types(manifest: Manifest) -> None:
    """Raise ValueError for a field of another type, or beyond its bounds."""
    check_shape(manifest.architecture)
    shape, files = manifest.architecture, manifest.files
    text(manifest.name, "name")
    scalars(manifest.weights, "weights")
    scalars(manifest.kv, "kv")
    integer(manifest.decode_weight_nbytes, "decode_weight_nbytes", 0, limits.FILE_BYTES)
    for end in sequence(manifest.eos_token_ids, "eos_token_ids", limits.END_IDS):
        integer(end, f"eos_token_ids {manifest.eos_token_ids!r:.60}, one of which", 0, shape.vocab - 1)
    if len(sequence(manifest.segments, "segments", limits.FILES)) != shape.layers + 1:
        raise ValueError(f"{len(manifest.segments)} segments for {shape.layers} layers")
    for name, entry in mapping(files, "files", limits.FILES).items():
        _check_entry(name, entry)
    _check_sizes({name: entry["nbytes"] for name, entry in files.items()}, shape)
    for name, token in named(manifest.special_tokens, "special_tokens", limits.NAME).items():
        text(token, f"special token {name}", limits.TEXT, printable=False)
    source = dict(named(manifest.source, "source", 64))
    scalars(source.pop("types", {}), "types of source", limits.FILES)
    scalars(source, "source", printable=False)  # whoever shows a licence looks at what is in it
    if recommended(named(manifest.sampling, "sampling", len(NAMES))) != manifest.sampling:
        raise ValueError(f"sampling {manifest.sampling!r:.80}")
    controllers = named(manifest.controllers, "controllers", limits.CONTROLLERS)
    for name, entry in controllers.items():
        _check_controller(name, entry)
    graphs = (manifest.decoder, manifest.head, manifest.uncertainty)
    file_names((*manifest.segments, *graphs, WEIGHTS), files)
    for entry in controllers.values():
        file_names([entry["file"]], files)  # a controller may have two names


def check_shape(shape: Architecture) -> None:
    """Check a shape, of which buffers are made.

    Raises:
        ValueError: beyond its bounds, or of parts that do not fit.
    """
    sizes = {name: value for name, value in asdict(shape).items() if name != "profiles"}
    for window in (windows := sizes.pop("windows")):
        integer(window, "windows, one of which", 0, limits.SHAPE["context"])
    if windows and (len(windows) != shape.layers or not any(windows)):
        raise ValueError(f"windows {windows!r:.60}: none, or not one for each of {shape.layers} layers")
    for name, value in sizes.items():
        integer(value, name, 1, limits.SHAPE.get(name, limits.FEATURES))
    if shape.heads % shape.kv_heads or shape.head_dim % 8:
        raise ValueError(f"heads {shape.heads}, kv_heads {shape.kv_heads}, head_dim {shape.head_dim}")
    if (shape.heads + 2 * shape.kv_heads) * shape.head_dim > 2 * limits.FEATURES:
        raise ValueError(f"heads {shape.heads}, head_dim {shape.head_dim}: too many features together")
    if shape.layers * shape.kv_heads * shape.head_dim > limits.TOKEN_VALUES:
        raise ValueError(f"layers {shape.layers}, kv_heads {shape.kv_heads}, head_dim {shape.head_dim}: too many")
    check_profiles(shape.geometry)


def _check_entry(name: str, entry: Any) -> None:
    """Name, size and digest of a file."""
    if not SAFE_NAME.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"file name {name!r:.80}")
    nbytes, sha256 = entry["nbytes"], entry["sha256"]
    if type(nbytes) is not int or not 0 <= nbytes <= limits.FILE_BYTES:
        raise ValueError(f"entry of {name}")
    if type(sha256) is not str or not SHA256.fullmatch(sha256) or len(entry) > 2:
        raise ValueError(f"entry of {name}")


def _check_sizes(nbytes: dict[str, int], shape: Architecture) -> None:
    """Before anything is read: a file with holes in it is as long as it likes, and takes as long to digest."""
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    parameters = 2 * shape.vocab * shape.hidden + shape.layers * shape.hidden * (heads + 3 * shape.ffn)
    weights = nbytes.get(WEIGHTS, 0)
    if weights > limits.WEIGHT_BYTES * parameters + limits.OTHER_BYTES:
        raise ValueError(f"{WEIGHTS} has {weights} bytes, for a model of {parameters} parameters")
    if (others := sum(nbytes.values()) - weights) > limits.OTHER_BYTES:
        raise ValueError(f"files besides {WEIGHTS} have {others} bytes")


def _check_controller(name: str, entry: Any) -> None:
    """What stands in the manifest of a learned policy; whether it can be followed is for the policy to say."""
    what = f"controller {name}"
    named(entry, what, 32)
    text(entry["file"], f"file of {what}")
    for key in ("set", "objective", "model"):
        text(entry.get(key, ""), f"{key} of {what}")
    for value in sequence(entry.get("inputs", []), f"inputs of {what}", 16):
        text(value, f"an input of {what}")
    for pair in sequence(entry.get("classes", []), f"classes of {what}", limits.CLASSES):
        for precision in sequence(pair, f"a class of {what}", 2):
            integer(precision, f"a precision of {what}", 0, 255)
    for value in sequence(entry.get("bytes", []), f"bytes of {what}", limits.CLASSES):
        number(value, f"a size of {what}", limits.NUMBER)
    for part, values in mapping(entry.get("curve", {}), f"curve of {what}", 2).items():
        for value in sequence(values, f"{part} of {what}", limits.CURVE_POINTS):
            number(value, f"{part} of {what}", limits.CURVE)
