"""Controllers of several networks: the mean of what they give, as one network of the same form."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvq
from kvq.controller.policies import make_policy
from kvq.exporter.calibration import calibration_text
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.errors import CalibrationError
from tests.tools.checkpoints import TINY
from tests.tools.command_line import assert_one_line_error
from tests.tools.command_line import kvq as command
from tests.tools.packages import needs

torch = needs("torch")
from kvq.controller.training.members import mean_of, read_onnx
from kvq.controller.training.network import Controller, write_onnx
from kvq.controller.training.train import Recipe, train_controllers

TEXT = calibration_text()
QUICK = {"tokens": 700, "epochs": 1}


def network(features, hidden, classes, seed):
    """A network of drawn weights, normalised by drawn features."""
    torch.manual_seed(seed)
    net = Controller(features, hidden, classes)
    net.normalise(np.random.default_rng(seed).normal(seed, 1 + seed, (50, features)).astype(np.float32))
    return net.eval()


def outputs(net, features):
    with torch.inference_mode():
        return net(torch.from_numpy(features), torch.zeros(len(features), dtype=torch.int64)).numpy()


@given(
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)), features=st.integers(1, 9), classes=st.integers(1, 5),
    members=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_one_network_gives_the_mean_of_two(widths, features, classes, members, seed):
    share = members / (members + 1)
    first, second = (network(features, width, classes, seed + i) for i, width in enumerate(widths))
    x = np.random.default_rng(seed).normal(0, 3, (30, features)).astype(np.float32)
    wanted = share * outputs(first, x) + (1 - share) * outputs(second, x)
    np.testing.assert_allclose(outputs(mean_of(first, second, share), x), wanted, atol=1e-4)


@pytest.mark.parametrize("feature_set", ["extended", "paper"])
def test_a_network_is_read_as_it_was_written(feature_set, tiny_bundle, tmp_path):
    shape = Bundle(tiny_bundle).manifest.architecture
    features = 4 if feature_set == "paper" else 1 + 2 * shape.layers * shape.kv_heads + shape.hidden
    net = network(features, 12, 3, 1)
    write_onnx(net, feature_set, shape, np.ones(3), tmp_path, "net")
    x = np.random.default_rng(2).normal(0, 3, (30, features)).astype(np.float32)
    read = read_onnx(tmp_path / "net.onnx", shape, feature_set)
    np.testing.assert_allclose(outputs(read, x), outputs(net, x), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def thrice(tiny_bundle, tmp_path_factory):
    """Bundles with the networks of three seeds alone, and one with all of them."""
    folder = tmp_path_factory.mktemp("members")
    for seed in range(3):
        alone = shutil.copytree(tiny_bundle, folder / str(seed))
        train_controllers(alone, TEXT, [Recipe(**QUICK, seed=seed)])
    path = shutil.copytree(tiny_bundle, folder / "all")
    for seed in range(3):
        train_controllers(path, TEXT, [Recipe(**QUICK, seed=seed, add=seed > 0)])
    return folder


@pytest.mark.slow
def test_three_members_count_alike_in_the_runtime(thrice):
    def damages(path):
        """Of the classes for some tokens, whatever their prices."""
        model = kvq.load(path)
        policy = make_policy("adaptive", model.bundle)
        seen = []

        class Noted(type(policy)):
            def score(self, features):
                seen.append(super().score(features))
                return seen[-1]

        policy.__class__ = Noted
        model.session(policy, recent=8).append(np.random.default_rng(3).integers(0, TINY["vocab_size"], 60))
        prices = {tensor.name: tensor for tensor in graph_of(path).initializer}["minus_prices"]
        return numpy_of(prices) - np.concatenate(seen)

    alone = np.array([damages(thrice / str(seed)) for seed in range(3)])
    together = damages(thrice / "all")
    told = (alone > 1e-3).all(axis=(0, 1))  # the others drown in the prices that were taken from them
    assert told.sum() >= 3
    # Choices drive what later tokens read: their features, and so their damages, are compared up to that.
    wanted = np.exp(np.mean(np.log(alone[..., told]), axis=0))
    assert np.median(np.abs(together[:, told] / wanted - 1)) < 0.02
    entry = Bundle(thrice / "all").manifest.controllers["adaptive"]
    others = [Bundle(thrice / str(seed)).manifest.controllers["adaptive"] for seed in range(3)]
    assert entry["members"] == 3
    assert entry["samples"] == sum(other["samples"] for other in others)


def graph_of(path):
    import onnx

    return onnx.load(str(path / "controller.onnx")).graph


def numpy_of(tensor):
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def test_what_cannot_be_added_to_is_refused_before_the_text_is_read(tiny_bundle, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Too short.")  # which would be refused as well
    done = command("train-controller", tiny_bundle, "--text", text, "--add")
    assert_one_line_error(done, "no adaptive controller to add to", "--add")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "words"), [({"feature_set": "paper"}, "other features"), ({}, "can be added to")])
def test_a_network_of_another_form_is_not_added_to(recipe, words, tiny_bundle, tmp_path):
    path = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    table = {} if recipe else {"table": 4}
    train_controllers(path, TEXT, [Recipe(**QUICK, **table)])
    before = (path / "controller.onnx").read_bytes()
    with pytest.raises(CalibrationError, match=words) as caught:
        train_controllers(path, TEXT, [Recipe(**QUICK, **recipe, add=True)])
    assert "\n" not in str(caught.value)
    assert (path / "controller.onnx").read_bytes() == before
