"""The embedded default model: what a new user gets straight after installing."""

import numpy as np
import pytest

import kvq
from kvq.runtime.catalog.references import DEFAULT_MODEL, embedded_models
from tests.tools.kvdata import arrays_in

PROMPT = "The captain looked at the sea"
GOLDEN = (
    '.\n\n"I\'m going to see you," he said. "I\'m going to see you."\n\n"I\'m going to see you," said '
    'the captain. "I\'m going to see you."\n\n"I'
)


@pytest.fixture(scope="module")
def model():
    return kvq.load()


def text(session, **options):
    return "".join(r.text for r in session.generate(PROMPT, **{"temperature": 0, "max_tokens": 48} | options))


def test_no_argument_and_the_name_load_the_same_bundle(model):
    assert model.path == embedded_models()[DEFAULT_MODEL]
    assert kvq.load(DEFAULT_MODEL).bundle.digest == model.bundle.digest


def test_it_has_the_shape_of_a_smollm(model):
    shape = model.architecture
    assert (shape.head_dim, shape.heads // shape.kv_heads, shape.context) == (64, 3, 2048)
    assert sum(f.stat().st_size for f in model.path.iterdir()) <= 15e6


def test_greedy_text_is_the_golden_one(model):
    assert text(model.session("fp16")) == GOLDEN


@pytest.mark.parametrize("policy", ["int8", "k8v4", "int4", "rule"])
def test_better_precisions_stay_close_to_16_bits(model, policy):
    """Log-probability of the golden text through the cache, token by token: at most 5 % worse."""
    ids = model.encode(PROMPT + GOLDEN)

    def score(name):
        session = model.session(name)
        logits = np.stack([session.append([i]) for i in ids[:-1]])
        peak = logits.max(axis=1, keepdims=True)
        logp = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
        return logp[np.arange(len(logp)), ids[1:]].mean()

    assert score(policy) >= 1.05 * score("fp16")


def test_mixed_precision_reports_bytes_that_add_up(model):
    session = model.session("mixed")
    assert text(session, max_tokens=100)
    stats = session.stats()
    store = session.store
    held = sum(array.nbytes for array in arrays_in(store))
    assert sum(row["nbytes"] for row in stats.precisions.values()) == held == stats.kv_nbytes
    assert {"k16v16", "k8v8", "k4v4", "k2v2"} <= stats.precisions.keys()
    assert sum(row["tokens"] for row in stats.precisions.values()) == stats.tokens == len(session.tokens)
