"""The bits of each cached token in answers: those that the library's own inspection finds."""

from __future__ import annotations

import pytest

from kvq.runtime.inspect.inspection import inspect_session
from kvq.runtime.server.cached import merged
from tests.tools.serving import LONG, QUESTION

ASKED = {"kv_token_bits": True, "policy": "adaptive"}


def cells_of(inspection) -> list[list]:
    """The cells of an inspection in the server's form."""
    return [
        [cell[0].text, len(cell), str(min((t.chosen for t in cell), key=lambda p: sum(p.bits))), cell[-1].in_window]
        for cell in inspection.cells()
    ]


@pytest.fixture(scope="module")
def expected(model):
    """What a session of the library holds after the same question and answer, a token short of its end."""
    session = model.session("adaptive", prefill_chunk=128)
    said = list(session.generate(model.chat_template.encode(QUESTION), max_tokens=40, temperature=0))
    assert said[-1].finish_reason == "length"
    return cells_of(inspect_session(session, features=False)), session.stats()


def test_a_whole_answer_says_the_bits_of_every_cached_token(client, model, expected):
    cells, stats = expected
    done = client.chat.completions.create(
        model="kvq-books", messages=QUESTION, max_tokens=40, temperature=0, extra_body=ASKED
    )
    cache = done.kvq["cache"]
    assert cache["cells"] == cells
    assert len({pair for _, _, pair, _ in cells}) > 1
    assert (cache["from"], cache["prompt_tokens"]) == (0, done.usage.prompt_tokens)
    assert (cache["tokens"], cache["nbytes"], cache["kv_bits"]) == (stats.tokens, stats.kv_nbytes, stats.kv_used_bits)


def test_a_stream_says_what_has_changed(client, expected):
    known, sizes = [], []
    for chunk in client.chat.completions.create(
        model="kvq-books", messages=QUESTION, max_tokens=40, temperature=0, stream=True, extra_body=ASKED
    ):
        if (cache := (getattr(chunk, "kvq", None) or {}).get("cache")) is not None:
            known = merged(known, cache)
            sizes.append(len(cache["cells"]))
            assert sum(cell[1] for cell in known) == cache["tokens"]
    assert known == expected[0]
    assert max(sizes[1:]) <= 18 < len(known)  # never more than the window and what has left it


def test_nobody_else_is_told(client):
    for chunk in client.chat.completions.create(model="kvq-books", messages=QUESTION, max_tokens=5, stream=True):
        assert "cache" not in (getattr(chunk, "kvq", None) or {})


def test_each_of_several_texts_has_its_own_cache(client, model):
    done = client.completions.create(
        model="kvq-books", prompt=LONG, max_tokens=6, n=2, extra_body={**ASKED, "echo": True}
    )
    length = len(model.encode(LONG))
    for choice in done.choices:
        said = "".join(text for text, *_ in choice.kvq["cache"]["cells"])
        assert LONG in said
        assert choice.text.startswith(said[said.index(LONG) :])  # all but the last token, which is not cached
        assert choice.kvq["cache"]["prompt_tokens"] == length


def test_another_value_is_refused(server):
    answer = server.post("/v1/chat/completions", {"messages": QUESTION, "kv_token_bits": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kv_token_bits")
