"""Vectors of texts: against transformers' own residual."""

from __future__ import annotations

import numpy as np
import pytest

import kvq
from tests.tools.packages import needs
from tests.tools.references import reference_model


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5, 200])  # one of more than a chunk
def test_it_is_the_mean_of_what_the_final_norm_takes(tiny_checkpoint, tiny_model, tokens):
    torch = needs("torch")
    ids = np.random.default_rng(tokens).integers(0, tiny_model.architecture.vocab, tokens).tolist()
    reference, seen = reference_model(tiny_checkpoint), []
    reference.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        reference(torch.as_tensor([ids]))
    mean = seen[0].numpy().astype(np.float64).mean(axis=0)
    found = tiny_model.embed(ids)
    assert found.dtype == np.float32
    # What a second chunk reads of the first has gone through a cache of 16 bits.
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5 if tokens <= 128 else 1e-3)


def test_texts_of_like_words_are_near_each_other(embedded):
    sea, ship, house = map(
        embedded.embed,
        ("The ship sailed over the sea.", "The ships sailed over the seas.", "She knits a stocking by the fire."),
    )
    assert sea @ sea == pytest.approx(1, abs=1e-5)
    assert sea @ ship > sea @ house


@pytest.mark.parametrize("text", ["", []])
def test_an_empty_text_is_refused(embedded, text):
    with pytest.raises(kvq.PromptError, match="empty"):
        embedded.embed(text)


@pytest.mark.parametrize("wrong", [None, 5, {"a": 1}, object()], ids=lambda value: type(value).__name__)
def test_what_is_no_text_is_refused_by_name(embedded, wrong):
    for call in (
        embedded.embed,
        embedded.generate,
        embedded.generate_all,
        lambda prompt: embedded.generate_all([prompt]),
    ):
        with pytest.raises(kvq.PromptError, match=r"got|empty"):
            call(wrong)
    for option in ("logits_processor", "stopping_criteria"):
        with pytest.raises(kvq.SamplingError, match="must be functions"):
            list(embedded.generate("Hi", max_tokens=1, **{option: 5}))


def test_a_text_longer_than_the_context_is_refused(embedded):
    with pytest.raises(kvq.ContextError):
        embedded.embed([1] * (embedded.architecture.context + 1))
