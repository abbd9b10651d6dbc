"""The parallel form: one pass that reads a whole text through the cache agrees with decoding step by step."""

from __future__ import annotations

import numpy as np
import pytest

from kvq.controller.policies import Policy
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import named
from tests.tools.checkpoints import TINY
from tests.tools.packages import needs

torch = needs("torch")
from kvq.controller.training.damage import exact_damage, probe_damage
from kvq.controller.training.parallel import ParallelModel, roundtrip
from tests.tools.readers import hard_reader, mixture_reader

CLASSES = [named("2"), named("3", "2"), named("4"), named("8", "4")]


@pytest.fixture(scope="module")
def twin(tiny_bundle):
    return ParallelModel.load(Bundle(tiny_bundle))


def some_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, TINY["vocab_size"], count)


class Given(Policy):
    """Bits given in advance, by position."""

    name = "given"

    def __init__(self, bits):
        self.bits = bits

    def choose(self, features):
        return self.bits[features.positions]


@pytest.mark.parametrize("protect_bits", [8, 16])
@pytest.mark.parametrize("recent", [0, 1, 5, 16])
@pytest.mark.parametrize("widths", [*((id_,) for id_ in sorted(CODECS)), sorted(CODECS)], ids=str)
def test_one_pass_agrees_with_the_runtime_step_by_step(recent, widths, protect_bits, twin, tiny_model):
    twin.recent, twin.protect_bits = recent, protect_bits
    worst = []
    for seed in range(3):
        ids = some_ids(60, seed)
        bits = np.random.default_rng(seed).choice(np.array(widths, np.uint8), (len(ids), 2))
        session = tiny_model.session(Given(bits), recent=recent, sink=0, protect_bits=protect_bits)
        expected = np.stack([session.append([i]) for i in ids])
        with torch.inference_mode():
            found = twin.run(torch.tensor(ids)[None], hard_reader(bits[None], twin.stored)).logits[0].numpy()
        worst.append(np.median(np.abs(found - expected).max(axis=1)))
    # A value on the border of two codes falls either way with the last bit of a sum, and then the
    # rows after it differ: so the typical row of the typical text is compared.
    assert np.median(worst) <= (1e-2 if protect_bits == 16 or not recent else 0.02)  # apart it is 0.1 and more


def test_a_mixture_of_one_class_is_that_class(twin):
    twin.recent = 4
    ids = torch.tensor(some_ids(40))[None]
    chosen = np.random.default_rng(2).integers(0, len(CLASSES), 40)
    weights = torch.eye(len(CLASSES))[chosen][None]
    with torch.inference_mode():
        soft = twin.run(ids, mixture_reader(weights, CLASSES, twin.stored)).logits
        hard = twin.run(ids, hard_reader(np.array(CLASSES)[chosen][None], twin.stored)).logits
    torch.testing.assert_close(soft, hard, atol=1e-4, rtol=1e-4)


def test_gradients_flow_into_the_weights_of_a_mixture(twin):
    twin.recent = 4
    ids = torch.tensor(some_ids(40))[None]
    weights = torch.full((1, 40, len(CLASSES)), 0.25, requires_grad=True)
    twin.run(ids, mixture_reader(weights, CLASSES)).logits.square().sum().backward()
    assert weights.grad is not None
    assert (weights.grad[0, :35].abs().sum(1) > 0).all()
    assert (weights.grad[0, 35:] == 0).all(), "tokens that never leave the window are read by nobody"


@pytest.mark.parametrize("bits", sorted(CODECS))
def test_the_roundtrip_is_the_codec_s_with_the_gradient_of_the_identity(bits):
    x = torch.randn(3, 2, 8, requires_grad=True)
    y = roundtrip(x, bits)
    np.testing.assert_allclose(y.detach().numpy(), CODECS[bits].roundtrip(x.detach().numpy()), atol=1e-6)
    y.sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.slow
def test_probes_rank_tokens_as_exact_damage_does(twin):
    twin.recent = 2
    ids = torch.tensor(some_ids(48))
    generator = torch.Generator().manual_seed(0)
    classes = [named("4")]
    samples = np.concatenate([probe_damage(twin, ids.expand(16, -1), generator, classes) for _ in range(8)])
    tokens = np.arange(40)
    exact = exact_damage(twin, ids, tokens, classes)[:, 0]
    estimate = np.square(samples[:, :, 0]).mean(0)[:40] / 2

    def ranks(x):
        return np.argsort(np.argsort(x))

    assert np.corrcoef(ranks(estimate), ranks(exact))[0, 1] > 0.9
    assert 0.7 < estimate.sum() / exact.sum() < 1.4


def test_damage_of_16_bits_and_of_tokens_nobody_reads_is_zero(twin):
    twin.recent = 8
    ids = torch.tensor(some_ids(30))
    damage = exact_damage(twin, ids, np.array([3, 25]), [(16, 16), (2, 2)])
    assert abs(damage[0, 0]) < 1e-3 * damage[0, 1]
    assert (np.abs(damage[1]) < 1e-3 * damage[0, 1]).all()


def test_mean_keys_are_read_back_as_the_segments_subtract_them(twin, tiny_model):
    shape = tiny_model.bundle.manifest.architecture
    assert twin.twin.mean_keys.shape == (shape.layers, shape.kv_heads, shape.head_dim)
    assert twin.twin.mean_keys.abs().max() > 0
    ids = some_ids(20)
    session = tiny_model.session("fp16", recent=32, prefill_chunk=len(ids), backend="numpy")
    session.append(ids)
    stored = session.store.window.read(np.arange(len(ids)))[0]
    with torch.inference_mode():
        keys = twin.run(torch.tensor(ids)[None]).keys[0].numpy()
    np.testing.assert_allclose(stored, keys, atol=2e-2)  # 16 bits
