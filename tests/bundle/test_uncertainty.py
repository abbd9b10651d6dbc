"""What a bundle's graph says of logits is refused where no distribution has such an entropy or probability."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import helper, numpy_helper

import kvq
from kvq.composition import open_bundle
from kvq.runtime.compute import head
from kvq.runtime.errors import BundleError
from tests.attacks.graphs import UNCERTAINTY, Model, model
from tests.attacks.graphs import node as made

# Infinity and NaN, and what is finite: views and policies could bear neither.
FACTORS = {"nan": np.nan, "infinity": np.inf, "huge": 3e38, "large": 1e20, "a little too large": 3.0, "negative": -1.0}


# What is no number is seen without asking.
REFUSED = r"uncertainty\.onnx (gives an entropy or a probability that there is not|is refused: 'factor' holds NaN)"


def times(output: str, factor: float) -> Callable[[Model], None]:
    """Give a number for an output that is so many times what it was."""

    def change(found: Model) -> None:
        last = next(each for each in found.graph.node if each.output[0] == output)
        last.output[0] = "before"
        found.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        found.graph.node.extend(
            [made("Mul", "before factor", "after"), helper.make_node("Identity", ["after"], [output])]
        )

    return change


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_an_entropy_that_there_is_not_is_refused_at_load(backend, factor, bundle, monkeypatch):
    monkeypatch.setenv("KVQ_BACKEND", backend)
    model(UNCERTAINTY, times("entropy", FACTORS[factor]))(bundle)
    with pytest.raises(BundleError, match=REFUSED):
        open_bundle(bundle)


@pytest.mark.parametrize("factor", [each for each in FACTORS if each not in ("infinity", "a little too large")])
def test_a_probability_that_there_is_not_is_refused_at_load(factor, bundle):
    much = min(FACTORS[factor] * 1e3, 3e38)  # of some hundred ids one has little of it
    model(UNCERTAINTY, times("confidence", much))(bundle)
    with pytest.raises(BundleError, match=REFUSED):
        open_bundle(bundle)


def test_one_that_shows_in_use_is_refused_then(bundle, monkeypatch):
    """A graph may say of the one token that loading tries what is true, and of others what is not."""
    found = open_bundle(bundle)
    monkeypatch.setattr(head, "SLACK", -10.0)  # as if the graph had said more
    with pytest.raises(BundleError, match="an entropy or a probability"):
        kvq.inspect_text(found, [1, 2, 3])
    found.session("int4").append([1, 2, 3])  # who does not ask is not told


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_logits_that_are_no_numbers_are_said_as_such(backend, bundle, monkeypatch):
    """The graph cannot know better then, and a model of NaN loads: it is refused for its logits when it is used."""
    monkeypatch.setenv("KVQ_BACKEND", backend)
    found = open_bundle(bundle)
    shape = found.architecture
    head = found.session().backend.head(found.engine, 1)
    head.logits(np.full((1, shape.hidden), np.nan, np.float32))
    assert np.isnan(head.uncertainty(1)[0]).all()
