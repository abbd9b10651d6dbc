"""Caches of llama.cpp beside kvq's own: the same ids, each against its own exact cache; what is missing is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kvq.controller.evaluation.llama import CACHE_BITS
from kvq.exporter.calibration import calibration_text
from kvq.exporter.export import export
from tests.tools.command_line import assert_one_line_error, kvq
from tests.tools.packages import needs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(calibration_text())
    return file


def kld(text, *options, env=None):
    return kvq("eval", "kld", "-m", "kvq-books", "--threads", "1", "--text", text, "--context", "40", "--chunks", "1",
               *options, env=env)  # fmt: skip


def beside(folder: Path) -> dict[str, str]:
    """Variables with which Python looks for modules in a folder too."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}


@pytest.fixture
def crashing(tmp_path):
    """A stand-in for a llama.cpp that was built for another machine."""
    (tmp_path / "llama_cpp.py").write_text("import os\nos.abort()\n")
    return beside(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peer", "llama.cpp"], ["--peer llama.cpp needs --gguf"]),
        (["--gguf", "model.gguf"], ["--gguf is for --peer"]),
        (["--peer", "llama.cpp", "--gguf", "model.gguf", "--cache-type", "q8_0,q3_k"], ["--cache-type", "q3_k"]),
        (["--peer", "other"], ["--peer", "llama.cpp"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_usage_is_one_line(options, words, text):
    assert_one_line_error(kld(text, *options), *words, code=2, who="Error")


@pytest.mark.slow
def test_a_missing_file_is_told(text, crashing):
    done = kld(text, "--peer", "llama.cpp", "--gguf", "model.gguf", env=crashing)
    assert_one_line_error(done, "no GGUF file model.gguf", "--gguf")


def test_a_missing_package_is_told(text, monkeypatch):
    from kvq.controller.evaluation import peer
    from kvq.runtime.errors import BackendError

    monkeypatch.setattr(peer, "missing", lambda *names: names[0])
    with pytest.raises(BackendError, match="llama-cpp-python, which is not installed: pip install") as caught:
        peer.LlamaCaches(text, ["q8_0"], 512, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_crash_of_the_peer_is_one_line(text, crashing):
    done = kld(text, "-p", "int8", "--peer", "llama.cpp", "--gguf", text, env=crashing)
    assert_one_line_error(done, "llama.cpp crashed", "pip install", code=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A GGUF file that llama.cpp reads, with heads of 32, and the bundle made from it."""
    # What brings it is compiled for minutes: no set of packages for tests has it.
    pytest.importorskip("llama_cpp")
    needs("gguf")
    from tests.tools.checkpoints import save_checkpoint
    from tests.tools.gguf_files import GGUF_TINY, write_gguf

    folder = tmp_path_factory.mktemp("peer")
    checkpoint = save_checkpoint(folder / "checkpoint", GGUF_TINY, tokenizer=False)
    file = write_gguf(folder / "tiny.gguf", checkpoint, tokenizer="gpt2")
    return file, export(str(file), folder / "bundle", weights="fp32").path


def test_caches_of_fewer_bits_diverge_more_from_their_own_exact_cache(pair, text, tmp_path):
    file, bundle = pair
    out = tmp_path / "rows.json"
    kinds = ["f16", "q8_0", "q5_1", "q4_0"]
    done = kvq("eval", "kld", "-m", bundle, "--text", text, "--context", "100", "--chunks", "2", "-p", "int4",
               "--peer", "llama.cpp", "--gguf", file, "--cache-type", ",".join(kinds), "--json", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["policy"]: row for row in json.loads(out.read_text()) if row["positions"] == [0, 100]}
    assert list(rows) == ["int4", *(f"llama.cpp {kind}" for kind in kinds)]
    theirs = [rows[f"llama.cpp {kind}"] for kind in kinds]
    assert [row["bits"] for row in theirs] == [CACHE_BITS[kind] for kind in kinds]
    assert theirs[0]["kld_mean"] == 0
    means = [row["kld_mean"] for row in theirs]
    assert means == sorted(means)
    assert all(row["tokens"] == 200 for row in rows.values())


def test_logits_do_not_depend_on_how_ids_are_cut(pair):
    from kvq.controller.evaluation.llama import LlamaModel

    model, ids = LlamaModel(pair[0]), np.random.default_rng(0).integers(0, 512, 60)
    whole = model.score(ids, "q8_0", 1)
    begun = model.score(ids[:25], "q8_0", 1)
    assert np.abs(whole[:25] - begun).max() < 1e-2
    assert model.vocab == 512


def test_a_file_of_another_vocabulary_is_refused(pair, text):
    done = kld(text, "-p", "int8", "--peer", "llama.cpp", "--gguf", pair[0])
    assert_one_line_error(done, "has a vocabulary of 512 tokens", "made from")
