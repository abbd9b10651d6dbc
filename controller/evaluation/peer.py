"""The caches of another runtime on the same token ids: llama.cpp's types of keys and values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from kvq.controller.evaluation.divergence import Divergence, diverged, log_probabilities
from kvq.controller.evaluation.llama import LlamaModel
from kvq.runtime.errors import BackendError, CheckpointError, KvqError
from kvq.runtime.extras import missing

BUILD = "pip install --no-binary llama-cpp-python llama-cpp-python"


class LlamaCaches:
    """The caches of llama.cpp, each against its own exact one, computed in processes of their own: a crash ends those.

    Args:
        file: the GGUF file that the model under test was made from.
        kinds: of `CACHE_BITS`.
        vocab: of the model under test.
        threads: to compute with.

    Raises:
        BackendError: llama-cpp-python is not installed.
        CheckpointError: no such file.
    """

    def __init__(self, file: Path, kinds: Sequence[str], vocab: int, threads: int) -> None:
        if missing("llama_cpp"):
            raise BackendError(f"llama.cpp as a peer needs llama-cpp-python, which is not installed: {BUILD}")
        if not file.is_file():
            raise CheckpointError(f"no GGUF file {file}; give the one that the model was made from with --gguf")
        self.kinds = list(kinds)
        self._arguments = (file, self.kinds, vocab, threads)

    def divergences(self, ids: np.ndarray) -> list[Divergence]:
        """Of a text int64 [tokens], one for each of `kinds`.

        Raises:
            CheckpointError: llama.cpp cannot load the file, or it is of another vocabulary.
            BackendError: llama.cpp crashed, or it cannot use such a cache.
        """
        context = get_context("spawn")  # a fork would have the locks of our threads without the threads
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, ids, *self._arguments), daemon=True)
        with _safe_path():
            process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            raise BackendError(
                "llama.cpp crashed; build it without the instructions that this machine lacks, for example"
                f" CMAKE_ARGS='-DGGML_NATIVE=OFF' {BUILD}"
            ) from None
        finally:
            process.join()
            receiver.close()
        if isinstance(found, KvqError):
            raise found
        return found


@contextmanager
def _safe_path() -> Iterator[None]:
    """Pythons that are started meanwhile look for no modules in the current folder, as with -P."""
    name = "PYTHONSAFEPATH"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _send(sender: Connection, ids: np.ndarray, file: Path, kinds: list[str], vocab: int, threads: int) -> None:
    """In the other process: what `LlamaCaches.divergences` gives, or raises."""
    try:
        sender.send(_divergences(ids, file, kinds, vocab, threads))
    except KvqError as error:
        sender.send(error)


def _divergences(ids: np.ndarray, file: Path, kinds: list[str], vocab: int, threads: int) -> list[Divergence]:
    model = LlamaModel(file)
    if model.vocab != vocab:
        raise CheckpointError(
            f"{file} has a vocabulary of {model.vocab} tokens, the model one of {vocab}; give the file that the model"
            " was made from"
        )
    expected = log_probabilities(model.score(ids, "f16", threads))
    return [diverged(model.score(ids, kind, threads), expected, ids) for kind in kinds]
