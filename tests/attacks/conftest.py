"""What every attack has to meet: a refusal of its own, at once, without memory, and nothing written."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kvq
from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.errors import BundleError, KvqError, PolicyError
from tests.tools.checkpoints import TINY, save_checkpoint
from tests.tools.gguf_files import write_gguf
from tests.tools.work import bounded_work

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MEMORY = 384 << 20
Attack = Callable[[Path], Any]


@contextmanager
def little_memory(most: int = MEMORY) -> Iterator[None]:
    """No more address space than there is now, and a little: an allocation beyond it fails."""
    status = Path("/proc/self/statm")
    if resource is None or not status.exists():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def state(*folders: Path) -> dict[str, tuple[int, int]]:
    """Path -> size and time of change of everything below the folders."""
    paths = [path for folder in folders for path in (folder, *sorted(folder.rglob("*")))]
    return {str(path): ((at := path.lstat()).st_size, at.st_mtime_ns) for path in paths}


def refused(folder: Path, words: str, use: Callable[[kvq.Model], Any] = id) -> None:
    """Load a bundle, or use it, expect the error that the words (a pattern) describe."""
    home = Path(os.environ["KVQ_HOME"])
    before = state(folder.parent, home)
    with bounded_work(clock=time.process_time), little_memory(), pytest.raises((BundleError, PolicyError)) as caught:
        use(open_bundle(folder))
    assert state(folder.parent, home) == before
    message = str(caught.value)
    assert isinstance(caught.value, KvqError)
    assert message.isprintable(), message  # so it is one line
    assert len(message) < 800
    assert re.search(words, message), message


def refused_of(request: pytest.FixtureRequest, weights: str, attack: Attack, words: str) -> None:
    """Attack a copy of a bundle, a fixture named after its weights, and load it; see `refused`."""
    folder: Path = request.getfixturevalue(weights)
    attack(folder)
    refused(folder, words)


@pytest.fixture(scope="session")
def int4_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with quantized weights and the head that takes two bytes a value. Read only."""
    out = tmp_path_factory.mktemp("int4") / "bundle"
    return export(str(tiny_checkpoint), out, weights="int4", activations="int16-head", block=32, compensate=False).path


@pytest.fixture(scope="session")
def minima_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a GGUF file whose blocks have minima, rows of 64 and 96. Read only."""
    folder, fields = tmp_path_factory.mktemp("minima"), {"num_hidden_layers": 2, "intermediate_size": 96}
    checkpoint = save_checkpoint(folder / "checkpoint", TINY | fields, tokenizer=False)
    return export(write_gguf(folder / "m.gguf", checkpoint, "Q4_1"), folder / "bundle", weights="source").path


@pytest.fixture
def minima(minima_bundle: Path, tmp_path: Path) -> Path:
    """A copy of that bundle."""
    return Path(shutil.copytree(minima_bundle, tmp_path / "bundle"))


@pytest.fixture
def fp32(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle in float32."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def int4(int4_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle in 4 bits."""
    return Path(shutil.copytree(int4_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session", autouse=True)
def loaded_before(tiny_bundle: Path) -> None:
    """One bundle has been loaded, so that no attack is charged with imports and threads."""
    open_bundle(tiny_bundle)
