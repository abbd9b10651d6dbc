"""Layers that see the last tokens alone, against transformers, over texts of many windows: folders and GGUF files, both
backends, any chunks; what their caches hold, and sessions that are saved, forked and trimmed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvq
from kvq.composition import open_bundle
from kvq.controller.training.parallel import ParallelModel
from kvq.exporter.calibration import calibration_text
from kvq.exporter.export import export
from kvq.runtime.bundle.manifest import Manifest
from kvq.runtime.errors import BundleError, CheckpointError
from kvq.runtime.kv.pages import PAGE_TOKENS
from kvq.runtime.kv.store import LAG
from kvq.runtime.policy.base import Policy, TokenFeatures
from kvq.runtime.session.model import Model
from kvq.runtime.session.session import Session
from tests.tools.checkpoints import edit_config
from tests.tools.families import SMALL, Exported, family_logits, save_family
from tests.tools.gguf_files import write_gguf
from tests.tools.packages import needs
from tests.tools.references import effective_model, logits_of

TOLERANCE = 1e-3
TEXT = calibration_text()[:2000]
PREFILL, DECODE = 76, 64
IDS = np.random.default_rng(5).integers(0, 512, PREFILL + DECODE)
LONG = np.random.default_rng(6).integers(0, 512, 700)
# Of each family that may have windows: fields, and the window that each layer then has.
WINDOWED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "mistral": (SMALL["mistral"] | {"sliding_window": 8}, [8] * 3),
    "phi3": (SMALL["phi3"] | {"sliding_window": 17, "rope_scaling": None}, [17] * 3),
    "qwen2": (
        SMALL["qwen2"] | {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        [0, 32, 32],
    ),
    "qwen3": (
        SMALL["qwen3"]
        | {
            "use_sliding_window": True, "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        [12, 0, 12],
    ),
    "gemma3": (SMALL["gemma3"] | {"sliding_window": 16}, [16] * 5 + [0, 16]),
    "smollm3": (
        SMALL["smollm3"] | {"use_sliding_window": True, "sliding_window": 20, "no_rope_layers": [1, 0, 1, 0, 1]},
        [0, 20, 0, 20, 0],
    ),
    "one": (SMALL["mistral"] | {"sliding_window": 1}, [1] * 3),
}  # fmt: skip


@functools.cache
def windowed(name: str, place: Path) -> Exported:
    folder = save_family(place / name, WINDOWED[name][0], tokenizer=False)
    bundle = export(folder, place / f"{name}-bundle", weights="fp32").path
    return Exported(name, folder, bundle, open_bundle(bundle), family_logits(folder, IDS))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


def fed(session: Session, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Logits of ids that are appended so many at a time."""
    parts = [session.append(ids[at : at + chunk], all_logits=True) for at in range(0, len(ids), chunk)]
    return np.concatenate(parts)


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max())


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_those_of_transformers(name: str, place: Path) -> None:
    of = windowed(name, place)
    assert of.model.architecture.windows == tuple(WINDOWED[name][1])
    assert of.model.architecture.context == of.model.bundle.manifest.architecture.context > len(IDS)
    for backend in ("native", "numpy"):
        for settings in ({}, {"prefill_chunk": 7}, {"prefill": "stepwise"}, {"recent": 3}):
            session = of.model.session("fp16", **{"recent": 256, "backend": backend} | settings)
            tolerance = TOLERANCE if settings.get("recent", 256) == 256 else 0.05
            prefill = session.append(IDS[:PREFILL], all_logits=True)
            decode = fed(session, IDS[PREFILL:], 1)
            assert off(prefill, of.logits[:PREFILL]) <= tolerance, (backend, settings)
            assert off(decode, of.logits[PREFILL:]) <= tolerance, (backend, settings)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_pages_outside_are_freed_and_nothing_changes(name: str, place: Path) -> None:
    """A text of many pages: what the layers with windows keep is bounded, and logits stay transformers'."""
    fields = WINDOWED[name][0] | {"max_position_embeddings": 1024}
    folder = save_family(place / f"{name}-long", fields, tokenizer=False)
    wanted = family_logits(folder, LONG)
    model = open_bundle(export(folder, place / f"{name}-long-bundle", weights="fp32").path)
    window, geometry = model.architecture.window, model.architecture.geometry
    for backend, prefill in (("native", "chunked"), ("native", "stepwise"), ("numpy", "chunked")):
        session = model.session("fp16", recent=5, backend=backend, prefill=prefill, prefill_chunk=100)
        logits = session.append(LONG[:600], all_logits=True)
        logits = np.concatenate([logits, fed(session, LONG[600:], 1)])
        assert off(logits, wanted) <= 0.05, (backend, prefill)
        stats, store = session.stats(), session.store
        narrow = sum(page.count for bucket in store.buckets.values() for page in bucket.pages if page.narrow)
        # All but what is seen, what may be trimmed, and pages that are not wholly outside, of each bucket.
        assert len(LONG) - narrow <= window + LAG + 3 * PAGE_TOKENS
        held = geometry.values * (len(LONG) - narrow) + geometry.narrow.values * narrow
        assert store.values == held
        assert stats.kv_bits == pytest.approx(8 * stats.kv_nbytes / held)
        assert sum(row["nbytes"] for row in stats.precisions.values()) == stats.kv_nbytes == store.nbytes
        whole = len(LONG) * geometry.values * 2
        assert stats.kv_nbytes < whole * (0.7 if name == "mistral" else 0.75)


@pytest.mark.parametrize("window", [100, 256])
def test_a_window_that_no_text_comes_to_is_none(window: int, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "c", SMALL["mistral"] | {"sliding_window": window}, tokenizer=False)
    shape = export(folder, tmp_path / "bundle").manifest.architecture
    assert (shape.context, shape.windows) == (256, (100,) * 3 if window == 100 else ())
    shorter = export(folder, tmp_path / "shorter", context=100).manifest.architecture
    assert (shorter.context, shorter.windows) == (100, ())


def test_a_window_in_no_layer_is_none(tmp_path: Path) -> None:
    fields = SMALL["qwen2"] | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
    folder = save_family(tmp_path / "c", fields, tokenizer=False)
    assert export(folder, tmp_path / "none").manifest.architecture.windows == ()
    edit_config(folder, layer_types=["full_attention", "full_attention", "sliding_attention"])
    assert export(folder, tmp_path / "one").manifest.architecture.windows == (0, 0, 64)
    edit_config(folder, sliding_window="wide")
    with pytest.raises(CheckpointError, match="sliding_window"):
        export(folder, tmp_path / "wrong")


def test_gguf_files_have_the_windows_of_folders(place: Path, tmp_path: Path) -> None:
    for name in ("gemma3", "phi3"):
        of = windowed(name, place)
        file = write_gguf(tmp_path / f"{name}.gguf", of.folder)
        again = Manifest.of_file(export(file, tmp_path / name, weights="fp32").path / "kvq.json")
        assert again.architecture == of.model.architecture
        assert again.model_digest == of.model.bundle.manifest.model_digest


def test_who_knows_no_windows_refuses_the_bundle(place: Path) -> None:
    of = windowed("mistral", place)
    text = (of.bundle / "kvq.json").read_text()
    assert '"format_version": 3' in text
    for wrong in (text.replace('"format_version": 3', '"format_version": 2'), text.replace("8,\n   8", "8")):
        with pytest.raises(BundleError, match="export the bundle again"):
            Manifest.from_json(wrong)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
@pytest.mark.parametrize("policy", ["int8", "int4", "sawtooth"])
def test_caches_of_few_bits_are_numpy_s(name: str, policy: str, place: Path) -> None:
    """Pages of several precisions, which the window cuts at different places, and the recent window in it."""
    of = windowed(name, place)
    for settings in ({"recent": 5}, {"recent": 40, "prefill": "stepwise"}):
        sessions = []
        for backend in ("native", "numpy"):
            session = of.model.session(SAWTOOTH if policy == "sawtooth" else policy, backend=backend, **settings)
            logits = [session.append(IDS[:PREFILL], all_logits=True), fed(session, IDS[PREFILL:], 1)]
            sessions.append(np.concatenate(logits))
        # A value that rounds the other way changes all that follows, so the two are near, not equal.
        near, far = np.abs(sessions[0] - sessions[1]).mean(), np.abs(sessions[0] - of.logits).mean()
        assert near <= 0.4 * far + 1e-5
        assert 0 < far < (0.05 if policy == "int8" else 0.6) * np.abs(of.logits).mean()


def test_precise_tokens_outside_are_not_seen(place: Path) -> None:
    """Sinks are a matter of precision: what is done to them does not show where the window does not reach."""
    of = windowed("mistral", place)
    other = IDS.copy()
    other[:20] = (other[:20] + 7) % 512
    for backend in ("native", "numpy"):
        for settings in ({"prefill_chunk": 16}, {"prefill": "stepwise"}):
            ends = []
            for ids in (IDS, other):
                session = of.model.session("int8", sink=8, recent=16, backend=backend, **settings)
                ends.append(session.append(ids, all_logits=True)[-60:])  # three layers of eight see 22 back
            assert np.array_equal(*ends), (backend, settings)


def test_the_twin_sees_through_windows(place: Path) -> None:
    of = windowed("gemma3", place)
    assert off(logits_of(effective_model(of.model.bundle), IDS), of.logits) <= TOLERANCE


def test_sessions_go_on_as_the_text_itself(place: Path, tmp_path: Path) -> None:
    """Saved, loaded, forked and trimmed: within what is kept and beyond it, where the text is run again."""
    fields = WINDOWED["qwen2"][0] | {"max_position_embeddings": 1024}
    folder = save_family(place / "qwen2-long", fields, tokenizer=False)
    model = open_bundle(export(folder, place / "qwen2-long-bundle", weights="fp32").path)
    settings = {"prefill": "stepwise", "recent": 16}
    session = model.session("int4", **settings)
    wanted = session.append(LONG, all_logits=True)
    assert session.store.forgotten > PAGE_TOKENS
    session.save(tmp_path / "s.kvq")
    loaded, fork = model.load_session(tmp_path / "s.kvq"), session.fork()
    assert loaded.store.nbytes == session.store.nbytes == fork.store.nbytes
    more = np.random.default_rng(8).integers(0, 512, 40)
    ends = [each.append(more) for each in (session, loaded, fork)]
    assert np.array_equal(ends[0], ends[1])
    assert np.array_equal(ends[0], ends[2])
    for length in (len(LONG) - LAG // 2, 100, 1):
        trimmed = loaded.fork()
        trimmed.trim(length)
        assert len(trimmed.tokens) == trimmed.store.length == length
        fresh = model.session("int4", **settings)
        fresh.append(LONG[:length])
        assert off(trimmed.append(more), fresh.append(more)) <= (1e-5 if length < LAG else 1), length
    with pytest.raises(ValueError, match="have lost what the next token sees"):
        session.store.trim(100)
    assert off(fed(model.session("int4", **settings), LONG[:300], 11), wanted[:300]) <= 1e-4


class Sawtooth(Policy):
    """Every precision in turn."""

    name = "sawtooth"

    def choose(self, features: TokenFeatures) -> np.ndarray:
        turn = np.array([(16, 16), (8, 8), (4, 4), (8, 4), (4, 2)], np.uint8)
        return turn[features.positions % len(turn)]


SAWTOOTH = Sawtooth()


@pytest.mark.parametrize("older", [False, True])
def test_the_text_part_of_a_model_of_images(older: bool, place: Path, tmp_path: Path) -> None:
    """A folder of Gemma3ForConditionalGeneration, its parameters named as transformers names them now or as it did."""
    torch, transformers = needs("torch"), needs("transformers")
    fields = WINDOWED["gemma3"][0] | {"vocab_size": 512}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=fields, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(3)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=[1, 2])
    folder = tmp_path / "whole"
    model.save_pretrained(folder)
    arrays = load_file(folder / "model.safetensors")
    if older != any(name.startswith("language_model.model.") for name in arrays):
        new = {name: name.replace("model.language_model.", "language_model.model.") for name in arrays}
        old = {name: name.replace("language_model.model.", "model.language_model.") for name in arrays}
        save_file({(new if older else old)[name]: x for name, x in arrays.items()}, folder / "model.safetensors")
    with torch.inference_mode():
        wanted = model(torch.as_tensor(IDS)[None]).logits[0].numpy()
    summary = export(folder, tmp_path / "bundle", weights="fp32")
    assert any("reads images is left out" in note for note in summary.notes)
    assert summary.manifest.eos_token_ids == [1, 2]
    assert summary.manifest.architecture.windows == (16,) * 5 + (0, 16)
    session = open_bundle(summary.path).session("fp16", recent=256)
    assert off(session.append(IDS, all_logits=True), wanted) <= TOLERANCE
    edit_config(folder, text_config=None)
    with pytest.raises(CheckpointError, match="no text_config"):
        export(folder, tmp_path / "none")


@pytest.fixture(scope="module")
def talker(place: Path) -> Model:
    """A model with a tokenizer, its weights in 8 bits, its keys rotated, centred and in a basis of their own."""
    folder = save_family(place / "talker", WINDOWED["qwen2"][0] | {"max_position_embeddings": 1024})
    return open_bundle(export(folder, place / "talker-bundle", activations="fp32", calibration=TEXT).path)


def test_keys_are_transformed_before_windows_are_looked_through(talker: Model) -> None:
    kv = talker.bundle.manifest.kv
    assert (kv["rotation"], kv["centered"], kv["keys"]) == ("hadamard", True, "balanced")
    wanted = logits_of(effective_model(talker.bundle), IDS).numpy()
    for backend in ("native", "numpy"):
        session = talker.session("fp16", recent=256, backend=backend, prefill_chunk=7)
        assert off(session.append(IDS, all_logits=True), wanted) <= 2 * TOLERANCE, backend


def test_a_budget_holds_for_what_is_held(talker: Model) -> None:
    session = talker.session("rule", kv_memory=200_000, recent=8)
    for at in range(0, 600, 50):
        session.append(LONG[at : at + 50])
        assert session.store.nbytes <= 200_000
    within = talker.session("rule", kv_bits=4, recent=8)
    within.append(LONG[:600])
    assert within.store.forgotten
    assert within.store.used_nbytes <= 4 * within.store.geometry.values * 600 / 8
    for each in (session, within):
        stats, seen = each.stats(), kvq.inspect_session(each, features=False)
        assert sum(token.nbytes for token in seen.tokens) == each.store.used_nbytes
        assert sum(total.nbytes + total.slack_nbytes for total in seen.totals) == stats.kv_nbytes
        assert stats.kv_used_bits == pytest.approx(8 * each.store.used_nbytes / each.store.values)


def test_texts_of_training_are_seen_through_windows(talker: Model) -> None:
    torch = needs("torch")
    twin = ParallelModel.load(talker.bundle)
    found = twin.run(torch.as_tensor(IDS)[None]).logits[0].numpy()
    assert off(found, logits_of(effective_model(talker.bundle), IDS).numpy()) <= TOLERANCE


def test_attention_variance_is_of_what_the_last_layer_sees(talker: Model) -> None:
    session, found = talker.session("fp16", recent=256), []
    session.chooser.observer = lambda features: found.append(features.attention_variance.copy())
    session.append(IDS)
    wanted = ParallelModel.load(talker.bundle).run(needs("torch").as_tensor(IDS)[None]).attention_variance[0].numpy()
    assert off(np.concatenate(found), wanted) <= 1e-5
    assert (wanted >= -1e-7).all()


def test_a_conversation_forgets_its_oldest_turns(talker: Model) -> None:
    conversation = talker.chat()
    for _ in range(8):
        list(conversation.reply("What do the birds do in winter, and where do they go? " * 2, max_tokens=40))
    before = len(conversation.session.tokens)
    assert conversation.session.store.forgotten
    assert conversation.forget(talker.architecture.context - before // 2)
    tokens = list(conversation.session.tokens)
    assert 0 < len(tokens) < before
    fresh = talker.session()
    fresh.append(tokens)
    ends = [session.append([5, 6, 7]) for session in (conversation.session, fresh)]
    assert off(*ends) <= 0.05 * np.abs(ends[1]).max()
