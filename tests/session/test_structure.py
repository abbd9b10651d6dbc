"""Generation within schemas, expressions and choices: what comes to its end is valid, and sessions go on as ever."""

from __future__ import annotations

import json
import re

import pytest

from kvq.runtime.errors import GrammarError, OptionError, SamplingError
from kvq.runtime.text.grammar import structure_of
from tests.tools.packages import needs
from tests.tools.schemas import SCHEMAS, problems, record

needs("llguidance"), needs("jsonschema")
PERSON = record(name={"type": "string", "maxLength": 12}, age={"type": "integer", "minimum": 0, "maximum": 120})


def text_of(responses) -> tuple[str, str]:
    found = list(responses)
    return "".join(r.text for r in found), found[-1].finish_reason


@pytest.mark.slow
def test_every_finished_output_of_a_hundred_schemas_is_valid(embedded):
    prompt = embedded.session()
    prompt.append(embedded.encode("The captain wrote it down: "))
    finished, wrong = 0, []
    for name, schema in SCHEMAS.items():
        text, reason = text_of(prompt.fork().generate(schema=schema, max_tokens=160, temperature=1.0, seed=len(name)))
        if reason == "stop":
            finished += 1
            wrong += problems(schema, text)
    assert wrong == []
    assert finished > 0.7 * len(SCHEMAS)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_an_expression_a_choice_and_a_grammar_are_kept_to(embedded, temperature):
    options = {"max_tokens": 60, "temperature": temperature, "seed": 3}
    text, _ = text_of(embedded.session().generate("Call me: ", regex="[0-9]{3}-[0-9]{4}", **options))
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", text)
    text, _ = text_of(embedded.session().generate("Is it so? ", choice=["yes", "no", "not yet"], **options))
    assert text in ("yes", "no", "not yet")
    text, _ = text_of(embedded.session().generate("Go: ", grammar='start: "go"+ "!"', **options))
    assert re.fullmatch("(go)+!|(go){1,30}", text)


def test_a_text_that_may_go_on_ends_where_the_model_ends_it(embedded):
    """An end-of-text id is one way to go on, where the text is complete, and not before."""
    bias = {embedded.bundle.manifest.eos_token_ids[0]: 100.0}
    text, reason = text_of(embedded.session().generate("x", regex="ab{2,}", logit_bias=bias, max_tokens=50))
    assert (text, reason) == ("abb", "stop")


def test_a_session_goes_on_behind_a_schema_and_a_second_one_begins_anew(embedded):
    session = embedded.session()
    first, _ = text_of(session.generate("He wrote ", schema=PERSON, seed=1, max_tokens=120))
    twin = session.fork()
    second, reason = text_of(session.generate(" and ", schema=PERSON, seed=2, max_tokens=120))
    assert problems(PERSON, first) == problems(PERSON, second) == []
    assert reason == "stop"
    assert text_of(twin.generate(" and ", schema=PERSON, seed=2, max_tokens=120))[0] == second
    assert embedded.tokenizer.decode(session.tokens + session.pending) == f"He wrote {first} and {second}"


def test_what_max_tokens_cuts_is_a_beginning(embedded):
    whole, _ = text_of(embedded.session().generate("He wrote ", schema=PERSON, seed=1, max_tokens=120))
    cut, reason = text_of(embedded.session().generate("He wrote ", schema=PERSON, seed=1, max_tokens=5))
    assert reason == "length"
    assert whole.startswith(cut)
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut)


def test_a_constraint_of_ones_own_is_for_one_text(embedded):
    grammar = embedded.grammar(structure_of(choice=["yes", "no"]))
    for _ in range(2):
        assert text_of(embedded.session().generate("x", constraint=grammar.begin()))[0] in ("yes", "no")
    with pytest.raises(GrammarError, match="exclude each other"):
        embedded.session().generate("x", constraint=grammar.begin(), regex="a")


def test_options_that_there_are_not_are_named_with_the_near_miss(embedded):
    session = embedded.session()
    with pytest.raises(OptionError, match="did you mean temperature"):
        session.generate("x", temprature=1)
    with pytest.raises(OptionError, match=r"it takes .*max_tokens"):
        session.generate("x", zzz=1)
    with pytest.raises(TypeError):  # as Python's own
        session.generate("x", zzz=1)
    with pytest.raises(SamplingError, match="ids in"):
        session.generate("x", logit_bias={99999: 1})
    assert session.tokens == []


def test_help_lists_every_option(embedded):
    import inspect

    names = set(inspect.signature(embedded.session().generate).parameters)
    assert {"prompt", "max_tokens", "schema", "temperature", "logits_processor", "seed"} <= names
