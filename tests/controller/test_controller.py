"""Training a controller: features as the runtime sees them, ONNX choices equal to torch's, bundles left whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import kvq
from kvq.controller.cli import train_controller
from kvq.controller.evaluation.scoring import Scorer
from kvq.controller.policies import Policy, make_policy
from kvq.controller.training.texts import windows
from kvq.exporter.calibration import calibration_text
from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.manifest import MANIFEST
from kvq.runtime.errors import BundleError, CalibrationError, PolicyError
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.policy.budget import Budget
from tests.tools.checkpoints import TINY
from tests.tools.packages import needs

torch = needs("torch")
from kvq.controller.training import train
from kvq.controller.training.network import features_of
from kvq.controller.training.parallel import ParallelModel
from kvq.controller.training.samples import collect
from kvq.controller.training.train import Recipe, fit, store, train_controllers

TEXT = calibration_text()
QUICK = {"tokens": 1500, "epochs": 2}
RECIPES = [Recipe(**QUICK), Recipe(feature_set="paper", objective="paper", **QUICK)]


class Watcher(Policy):
    """Stores everything at 16 bits and keeps all it was shown."""

    name = "watcher"
    needs = frozenset({"entropy", "rarity", "attention_variance", "confidence"})

    def __init__(self):
        self.shown = []

    def choose(self, features):
        self.shown.append([np.array(x) for x in features])
        return np.full((len(features.positions), 2), 16, np.uint8)


@pytest.fixture(scope="module")
def trained(tiny_bundle, tmp_path_factory):
    """A copy of the tiny bundle with both controllers."""
    path = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("trained") / "tiny")
    reports = train_controllers(path, TEXT, RECIPES)
    assert [len(report.curve) for report in reports] == [2, 2]
    return path


@pytest.fixture(scope="module")
def samples(tiny_bundle):
    bundle = Bundle(tiny_bundle)
    model = ParallelModel.load(bundle)
    return collect(model, kvq.load(tiny_bundle).encode, TEXT, 600, seed=0)


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_streaming_features_agree_with_the_batched_ones(chunk, samples, tiny_model):
    first = samples.text == 0
    ids = samples.ids[first]
    policy = Watcher()
    session = tiny_model.session(policy, recent=len(ids), prefill_chunk=chunk, protect_bits=8)
    if chunk == 1:
        for i in ids:
            session.append([i])
    else:
        session.append(ids)
    positions, entropy, rarity, variance, confidence, seen_ids, residual = (
        np.concatenate(part) for part in list(zip(*policy.shown, strict=True))[:7]
    )
    np.testing.assert_array_equal(positions, samples.positions[first])
    np.testing.assert_array_equal(seen_ids, ids)
    streamed = np.stack([entropy, rarity, variance, confidence], 1)
    # In units of each feature's own spread.
    spread = samples.paper.std(0)
    assert (np.abs(streamed - samples.paper[first]) / spread).max() <= 0.02  # a code on a border falls either way
    np.testing.assert_allclose(rarity, samples.paper[first][:, 1], atol=1e-5)
    np.testing.assert_allclose(variance, samples.paper[first][:, 2], atol=1e-5)
    # Logits differ between torch and onnxruntime in the fourth digit, more where a code falls either way.
    np.testing.assert_allclose(confidence, samples.paper[first][:, 3], atol=1e-3)
    np.testing.assert_allclose(residual, samples.residual[first], atol=2e-2)  # kept in half precision


@pytest.mark.parametrize(("name", "table"), [("adaptive", 0), ("adaptive", 8), ("paper", 0)])
def test_the_runtime_s_choices_equal_torch_s(name, table, samples, tiny_bundle, tmp_path):
    """Scores of the exported graph on what a session really hands over, against the torch network."""
    path = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    recipe = replace(RECIPES[["adaptive", "paper"].index(name)], table=table)
    net, curve = fit(samples, recipe, TINY["vocab_size"])
    store(Bundle(path), samples, recipe, net, curve, 0.0)
    model = kvq.load(path)
    policy = make_policy(name, model.bundle)
    watcher = Watcher()
    watcher.needs = policy.needs
    first = samples.text == 0
    seen = []

    class Both(type(policy)):
        def score(self, features):
            scores = super().score(features)
            seen.append(scores)
            return scores

    policy.__class__ = Both
    model.session(policy, recent=256, protect_bits=8).append(samples.ids[first])
    found = np.concatenate(seen)
    with torch.inference_mode():
        outputs = net(
            torch.from_numpy(features_of(samples, recipe.feature_set)[first]), torch.from_numpy(samples.ids[first])
        )
    expected = outputs.log_softmax(1).numpy() if name == "paper" else -outputs.exp().numpy()
    shift = np.median(found - expected, axis=0) if name == "adaptive" else 0  # the prices of the classes
    close = np.abs(found - expected - shift) <= 1e-2 * np.abs(expected) + 1e-4
    assert close.mean() > 0.98, "the residual is kept in half precision for training"
    chosen = np.take_along_axis(expected, (found - shift).argmax(1)[:, None], 1)[:, 0]
    same = chosen >= expected.max(1) - 1e-6  # what went through a window of 8 bits is as good at 8 as at 16
    assert same.mean() > 0.98


def test_features_of_single_tokens_and_of_chunks_agree(tiny_model):
    ids = np.random.default_rng(5).integers(0, TINY["vocab_size"], 90)
    runs = []
    for chunk in (1, 90):
        policy = Watcher()
        tiny_model.session(policy, recent=90, prefill_chunk=chunk).append(ids)
        runs.append([np.concatenate(part) for part in list(zip(*policy.shown, strict=True))[:5]])
    for name, one, many in zip(("positions", "entropy", "rarity", "variance", "confidence"), *runs, strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_features_follow_from_logits_and_attention_to_1e_5(chunk, tiny_model):
    """Streaming features against their formulas over whole arrays, in float64, of the same logits and the same text."""
    ids = np.random.default_rng(6).integers(0, TINY["vocab_size"], 90)
    policy = Watcher()
    session = tiny_model.session(policy, recent=90, prefill_chunk=chunk)
    logits = session.append(ids, all_logits=True).astype(np.float64)
    _, entropy, rarity, variance, confidence = (
        np.concatenate(part) for part in list(zip(*policy.shown, strict=True))[:5]
    )
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(1), atol=1e-5)
    np.testing.assert_allclose(confidence, p.max(1), atol=1e-5)
    earlier = np.array([(ids[:i] == ids[i]).sum() for i in range(90)])
    distinct = np.array([len(set(ids[:i].tolist())) for i in range(90)])
    np.testing.assert_allclose(rarity, np.log((np.arange(90) + distinct + 1) / (earlier + 1)), atol=1e-5)
    whole = Watcher()
    tiny_model.session(whole, recent=90, prefill_chunk=90).append(ids)
    np.testing.assert_allclose(variance, whole.shown[0][3], atol=1e-5)


@pytest.mark.parametrize("name", ["adaptive", "paper"])
def test_chunks_do_not_change_the_choices(name, trained):
    """With everything in the window no choice reaches what later tokens see, so choices must be equal."""
    model = kvq.load(trained)
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], 100)
    bits = []
    for chunk in (1, 9, 100):
        session = model.session(name, recent=128, prefill_chunk=chunk)
        session.append(ids)
        session.store.settle()
        bits.append(session.store.window.chosen[:100].copy())
    assert (bits[0] == bits[1]).all()
    assert (bits[0] == bits[2]).all()


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["adaptive", "paper"]),
    seed=st.integers(0, 2**32 - 1),
    recent=st.sampled_from([0, 4, 16]),
    kv_bits=st.sampled_from([None, 8.0, 12.0]),
)
def test_evaluations_choose_as_token_by_token(name, seed, recent, kv_bits, trained):
    model = kvq.load(trained)
    ids = np.random.default_rng(seed).integers(0, TINY["vocab_size"], 120)
    session = model.session(name, recent=recent, kv_bits=kv_bits, prefill_chunk=1, protect_bits=8)
    if kv_bits is not None:  # as an evaluation has it, which compares at equal bytes
        held = session.store
        session.chooser.budget = Budget(
            session.policy, held.geometry, model.architecture.context, held.recent, held.sink,
            kv_bits=kv_bits, short_text=0, protect_bits=held.protect_bits,
        )  # fmt: skip
    session.append(ids)
    found = Scorer(model, recent).score(ids, make_policy(name, model.bundle), kv_bits)
    # Sums in another order: a token in a hundred may stand on the border of two classes.
    assert (found.bits == stored_tokens(session.store).chosen).all(1).mean() >= 0.98


@pytest.mark.parametrize("name", ["adaptive", "paper"])
def test_a_trained_bundle_generates_under_a_budget(name, trained):
    model = kvq.load(trained)
    session = model.session(name, recent=4, kv_bits=9)
    list(session.generate("once upon a time", max_tokens=100, ignore_eos=True, seed=0))
    assert session.store.used_nbytes <= session.chooser.budget.allowed(session.store.length)
    assert session.stats().policy == name


@pytest.mark.slow
def test_training_twice_gives_the_same_controller(trained, tiny_bundle, tmp_path):
    path = shutil.copytree(tiny_bundle, tmp_path / "again")
    train_controllers(path, TEXT, RECIPES[:1])
    assert digest(path / "controller.onnx") == digest(trained / "controller.onnx")


def test_the_manifest_describes_the_controllers(trained, tiny_bundle):
    manifest = Bundle(trained).manifest
    assert manifest.controllers.keys() == {"adaptive", "paper"}
    assert manifest.controllers["adaptive"]["file"] == "controller.onnx"
    assert {f.name for f in trained.iterdir()} == {*manifest.files, MANIFEST}
    assert manifest.model_digest == Bundle(tiny_bundle).manifest.model_digest
    assert Bundle(trained).digest != Bundle(tiny_bundle).digest


def refusal(path, name="adaptive"):
    with pytest.raises((PolicyError, BundleError)) as caught:
        kvq.load(path).session(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edited(trained, tmp_path, change):
    path = shutil.copytree(trained, tmp_path / "edited")
    data = json.loads((path / MANIFEST).read_text())
    change(data)
    (path / MANIFEST).write_text(json.dumps(data))
    return path


def test_a_bundle_without_a_controller_says_how_to_get_one(tiny_bundle):
    assert "kvq train-controller" in refusal(tiny_bundle)


def test_a_controller_of_another_model_is_refused(trained, tmp_path):
    path = edited(trained, tmp_path, lambda data: data["controllers"]["adaptive"].update(model="0" * 64))
    assert "another model" in refusal(path)


DAMAGES = {
    "no curve": lambda entry: entry.pop("curve"),
    "a falling curve": lambda entry: entry["curve"].update(bytes=entry["curve"]["bytes"][::-1]),
    "an empty curve": lambda entry: entry["curve"].update(bytes=[], mu=[]),
    "classes of no codec": lambda entry: entry["classes"].__setitem__(0, [7, 7]),
    "too few classes": lambda entry: entry["classes"].pop(),
    "the other controller's file": lambda entry: entry.update(file="controller-paper.onnx"),
    "a list": lambda entry: entry.update(curve=[1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_refused_in_one_line(damage, trained, tmp_path):
    refusal(edited(trained, tmp_path, lambda data: damage(data["controllers"]["adaptive"])))


def test_a_controller_of_an_unknown_feature_set_is_refused(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "edited")
    graph = onnx.load(path / "controller.onnx")
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            if name == "residual":
                node.input[i] = "mood"
    next(i for i in graph.graph.input if i.name == "residual").name = "mood"
    onnx.save(graph, path / "controller.onnx")
    data = json.loads((path / MANIFEST).read_text())
    file = path / "controller.onnx"
    data["files"]["controller.onnx"] = {"nbytes": file.stat().st_size, "sha256": digest(file)}
    (path / MANIFEST).write_text(json.dumps(data))
    assert "feature set" in refusal(path)


@pytest.mark.parametrize("name", ["adaptive", "paper"])
def test_a_learned_policy_needs_a_model(name):
    with pytest.raises(PolicyError, match=r"model\.session"):
        make_policy(name)


@pytest.mark.parametrize("repeats", [2, 400])
def test_a_text_is_trained_on_in_windows_from_all_of_it(repeats):
    """Long texts are not encoded as a whole: of what is asked for, at most a few times as much is read."""
    text = "".join(f"{i:06d} " for i in range(1000 * repeats))
    read = []

    def encode(part):
        read.append(len(part))
        return [int(word) for word in part.split() if len(word) == 6]

    found = windows(encode, text, [50, 100, 50, 100], "the text")
    assert [len(ids) for ids in found] == [50, 100, 50, 100]
    assert found[0][0] == 0
    assert found[-1][-1] >= 0.8 * 1000 * repeats
    assert all((np.diff(ids) == 1).all() for ids in found)
    assert sum(read) < 50_000


def test_windows_of_a_short_text_overlap():
    found = windows(lambda part: list(part.encode()), "abcdefghij", [8, 8, 10], "the text")
    assert [bytes(ids.tolist()).decode() for ids in found] == ["abcdefgh", "abcdefgh", "abcdefghij"]
    with pytest.raises(CalibrationError, match="the text has 10 tokens, a window needs 11"):
        windows(lambda part: list(part.encode()), "abcdefghij", [11], "the text")


TEXTS = {
    "not English": "Съешь же ещё этих мягких французских булок, да выпей чаю. 床前明月光，疑是地上霜。\n" * 300,
    "one word": "a" * 20_000,
    "nothing but spaces after a word": "a" + " " * 20_000,
    "a window and a half": "the sea and the ship " * 80,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_text_that_is_long_enough_trains_a_controller(text, tiny_bundle, tmp_path):
    path = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    train_controllers(path, text, [Recipe(tokens=600, epochs=1)])
    model = kvq.load(path)
    session = model.session("adaptive", recent=2, kv_bits=8)
    session.append(model.encode(text[:400])[:100])
    assert session.store.used_nbytes <= session.chooser.budget.allowed(session.store.length)


def test_without_questions_no_chat_template_is_looked_at(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "template_of", pytest.fail)
    path = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    (report,) = train_controllers(path, TEXT, [Recipe(tokens=600, epochs=1, asked=0)])
    assert report.recipe["asked"] == 0


def test_too_short_a_text_is_refused(tiny_bundle):
    with pytest.raises(CalibrationError, match="calibration text has") as caught:
        train_controllers(tiny_bundle, "Too short.", RECIPES[:1])
    assert "\n" not in str(caught.value)


def test_the_command_trains_and_reports(tiny_bundle, tmp_path):
    path = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--text", str(text), "--tokens", "800"]
    report = tmp_path / "report.json"
    result = CliRunner().invoke(train_controller, [str(path), *options, "--report", str(report)])
    assert result.exit_code == 0, result.output
    assert "adaptive" in Bundle(path).manifest.controllers
    assert json.loads(report.read_text())[0]["curve"][0]["epoch"] == 1
