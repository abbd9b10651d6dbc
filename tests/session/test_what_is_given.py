"""What a caller gives in the form of other software, or by mistake: taken as it is meant, or refused by name."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

import kvq

SAID = [{"role": "user", "content": "Tell me the word."}]


@pytest.mark.parametrize("name", ["stop", "stop_tokens"])
def test_none_is_no_stop(embedded, name):
    options = {"max_tokens": 3, "temperature": 0, name: None}
    expected = [each.token for each in embedded.session().generate("The sea", max_tokens=3, temperature=0)]
    assert [each.token for each in embedded.session().generate("The sea", **options)] == expected
    for said in (embedded.generate(SAID, **options), embedded.chat().reply("Who?", **options)):
        assert len(list(said)) <= 3


@pytest.mark.parametrize("wrong", [2, 1.5, object()], ids=["2", "1.5", "object"])
def test_stop_tokens_that_are_no_list_are_refused(embedded, wrong):
    with pytest.raises(kvq.SamplingError, match="give a list of them"):
        embedded.session().generate("The sea", stop_tokens=wrong)


def test_a_message_that_is_no_mapping_is_refused_by_its_number(embedded):
    """A client's own object would otherwise be left out of what the model reads."""
    message = SimpleNamespace(role="assistant", content="Banana.")
    for wrong in (message, "Banana.", None):
        with pytest.raises(kvq.PromptError, match="message 1 must be a mapping"):
            embedded.generate([*SAID, wrong, *SAID])


def test_arrays_of_ids_are_several_prompts(embedded):
    found = list(embedded.generate([np.array([5, 6]), np.array([7])], max_tokens=2, temperature=0))
    assert [each.index for each in found] == [0, 1]


@pytest.mark.parametrize("wrong", [None, [1], "title", 5], ids=str)
def test_metadata_that_could_not_be_loaded_is_not_saved(embedded, wrong, tmp_path):
    session = embedded.session()
    session.append([1, 2])
    session.metadata = wrong
    with pytest.raises(kvq.SessionError, match="metadata must be a dictionary"):
        session.save(tmp_path / "text.kvq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 300, b"bytes"], ids=repr)
def test_what_is_no_name_of_a_file_is_refused(embedded, name):
    session = embedded.session()
    session.append([1, 2])
    for use in (session.save, embedded.load_session):
        with pytest.raises(kvq.SessionError):
            use(name)


def test_ids_of_a_bias_may_be_numpys(embedded):
    with pytest.raises(kvq.SamplingError, match="logit_bias must be of ids"):
        embedded.session().generate("The sea", logit_bias={np.int64(10**6): 1.0})
    said = embedded.session().generate("The sea", logit_bias={np.int64(5): 100.0}, max_tokens=1, temperature=0)
    assert next(said).token == 5


def test_an_application_in_which_numpy_raises_can_draw(embedded):
    with np.errstate(all="raise"):
        assert len(list(embedded.session().generate("The sea", temperature=0.01, max_tokens=3, ignore_eos=True))) == 3


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "presence_penalty"])
def test_numbers_of_other_kinds_are_numbers(embedded, name):
    found = list(embedded.session().generate("The sea", max_tokens=3, ignore_eos=True, **{name: Fraction(1, 2)}))
    assert len(found) == 3
