"""Several models in one server: by their names, loaded when asked for, closed when there is no room."""

from __future__ import annotations

import openai
import pytest

from tests.tools.command_line import kvq
from tests.tools.serving import HTML_PAGE, JSON, QUESTION, library, served

pytestmark = pytest.mark.slow
ASKED = {"max_tokens": 8, "temperature": 0}
PROMPT = "The sea was"


def said(client, name: str) -> str:
    """What a model goes on with."""
    return client.completions.create(model=name, prompt=PROMPT, **ASKED).choices[0].text


@pytest.fixture(scope="module")
def both(tiny_bundle):
    """A server of two models with room for the larger one alone."""
    with served("-m", "kvq-books", "-m", str(tiny_bundle), "--models-memory", "1MB") as server:
        yield server


@pytest.fixture(scope="module")
def tiny_name(tiny_model):
    """The small one's name."""
    return tiny_model.bundle.manifest.name


def test_each_answers_by_its_name_however_often_they_change_places(both, model, tiny_model, tiny_name):
    client = both.client()
    assert [card.id for card in client.models.list().data] == ["kvq-books", tiny_name]
    expected = {"kvq-books": library(model, PROMPT, **ASKED), tiny_name: library(tiny_model, PROMPT, **ASKED)}
    for name in ("kvq-books", tiny_name, tiny_name, "kvq-books", tiny_name):
        assert said(client, name) == expected[name]
    assert sum("closed kvq-books" in line for line in both.lines) == 2
    assert [tag["name"] for tag in both.get("/api/ps").json()["models"]] == [tiny_name]
    assert len(both.get("/api/tags").json()["models"]) == 2
    assert client.models.retrieve(tiny_name).context_length == tiny_model.architecture.context
    unnamed = both.post("/v1/completions", {"prompt": PROMPT, **ASKED}).json()  # goes to the first
    assert (unnamed["model"], unnamed["choices"][0]["text"]) == ("kvq-books", expected["kvq-books"])
    assert both.get("/props?model=kvq-books").json()["model"] == "kvq-books"
    refused = both.get(f"/props?model={tiny_name}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_loaded")
    assert client.models.retrieve(tiny_name).context_length == tiny_model.architecture.context
    assert [tag["name"] for tag in both.get("/api/ps").json()["models"]] == ["kvq-books"]


def test_an_unknown_name_is_told_what_comes_close(both):
    with pytest.raises(openai.NotFoundError, match="did you mean 'kvq-books'"):
        said(both.client(), "kvq-book")
    assert "this server has 'kvq-books'" in both.get("/v1/models/zzz").json()["error"]["message"]


def test_one_at_work_is_never_closed(both, tiny_name):
    client = both.client()
    stream = client.chat.completions.create(
        model="kvq-books", messages=QUESTION, max_tokens=300, temperature=0, stream=True
    )
    pieces = [next(stream), next(stream)]
    with pytest.raises(openai.APIStatusError, match="at work leave no room") as refused:
        said(client, tiny_name)
    assert (refused.value.status_code, refused.value.code) == (503, "models_busy")
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert said(client, tiny_name)


def test_bodies_that_are_none_are_refused_as_by_one_model(both):
    assert both.post("/v1/completions", content=b"{", headers=JSON).status_code == 400
    assert both.post("/v1/completions", content=b"x" * 4_000_001, headers=JSON).status_code == 413
    assert both.get("/health").status_code == 200
    assert "Model" in both.get("/", headers=HTML_PAGE).text


def test_a_name_for_all_and_one_name_twice_are_refused(tiny_bundle):
    for arguments, words in (
        (["-m", "kvq-books", "-m", str(tiny_bundle), "--name", "x"], "--name is of one model"),
        (["-m", "kvq-books", "-m", "kvq-books"], "two models are named 'kvq-books'"),
    ):
        done = kvq("serve", "--port", "0", *arguments)
        assert done.returncode == 1
        assert words in done.stderr
