"""Requests to a server of several models, before any model sees them: told which is meant, at once, and none stays."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from tests.tools.packages import needs

needs("starlette")

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from kvq.runtime.server.fleet import Fleet, Member
from kvq.runtime.server.guard import Guard
from tests.tools.work import bounded_work


class Worker:
    """Stands for a scheduler."""

    def stop(self):
        pass

    def join(self):
        pass


def member(name, fails=None):
    """A model that answers with its name and the bytes of the body; or fails: "told" or "raised"."""

    async def app(scope, receive, send):
        nbytes, more = 0, True
        while more:
            message = await receive()
            nbytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": f"{name} {nbytes}".encode()})

    def make(settle):
        if fails == "raised":
            raise OSError("no threads")
        settle(RuntimeError("no\nmodel") if fails else None)
        return Worker(), app

    async def asleep(request):
        return PlainTextResponse(f"{name} is not loaded", 503)

    routes = [Route("/x", asleep, methods=["POST"]), Route("/props", asleep), Route("/v1/models/{name:path}", asleep)]
    return Member(name, 100, 10, Starlette(routes=routes), make)


@pytest.fixture
def fleet():
    return Fleet(
        [member("one"), member("two"), member("bad", "told"), member("worse", "raised")], 150, lambda line: None
    )


def answered(fleet, method, path, body=b"", query=b"", pieces=1, headers=()):
    """Status and text of the answer to a request whose body comes in pieces; the client is gone behind it."""
    cut = [len(body) * i // pieces for i in range(pieces + 1)]
    messages = [
        {"type": "http.request", "body": body[cut[i] : cut[i + 1]], "more_body": i < pieces - 1} for i in range(pieces)
    ]
    messages.append({"type": "http.disconnect"})
    left, sent = iter(messages), []

    async def receive():
        return next(left)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query,
             "headers": [(b"host", b"localhost"), *headers], "client": ("127.0.0.1", 1)}  # fmt: skip
    asyncio.run(Guard(fleet, ["localhost"], lambda line: None, None)(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


def asked(model):
    return json.dumps({"model": model}).encode()


POST, GET = "POST", "GET"
REQUESTS = {
    "a name of 4 MB": ((POST, "/x", asked("x" * 3_900_000)), 404, "no model 'xxx"),
    "a name of 4 MB that comes close": ((POST, "/x", asked("on" * 1_900_000)), 404, "no model 'onon"),
    "half a surrogate": ((POST, "/x", asked("\ud800")), 404, "no model '"),
    "a name that moves the cursor": ((POST, "/x", asked("\x1b[2J\n")), 404, "no model '"),
    "a name with the tag twice": ((POST, "/x", asked("one:latest:latest")), 404, "no model '"),
    "a path in a name": ((POST, "/x", asked("../../etc/passwd")), 404, "no model '"),
    "a name in a path that moves the cursor": ((GET, "/v1/models/%1b[2J"), 404, "no model '"),
    "a name of 60,000 characters in a path": ((GET, "/v1/models/" + "x" * 60_000), 404, "no model '"),
    "an empty name in a path": ((GET, "/v1/models/"), 404, "no model '"),
    "another model behind dots": ((GET, "/v1/models/one/../two"), 404, "no model '"),
    "a query that is no UTF-8": ((GET, "/props", b"", b"model=%ff%fe"), 404, "no model '"),
    "a query of 20,000 names": ((GET, "/props", b"", b"&".join(b"a%d=1" % i for i in range(20_000))), 503, "one is"),
    "a model that cannot be loaded": ((POST, "/x", asked("bad")), 500, "bad cannot be loaded"),
    "a model that cannot be begun": ((POST, "/x", asked("worse")), 500, "internal error"),
    "a list for a name": ((POST, "/x", b'{"model": ["two"]}'), 200, "one 18"),
    "an object for a name": ((POST, "/x", b'{"model": 0, "name": {"a": 1}}'), 200, "one 30"),
    "three million brackets": ((POST, "/x", b"[" * 3_000_000), 200, "one 3000000"),
    "a number of a million digits": ((POST, "/x", b'{"model":' + b"9" * 1_000_000 + b"}"), 200, "one 1000010"),
    "a body that is too large": ((POST, "/x", b"x" * 9_000_000), 200, "one 9000000"),
    "a body in 60,000 pieces": ((POST, "/x", asked("two")[:-1] + b"," * 3_000_000, b"", 60_000), 200, "one 3000015"),
    "no body": ((POST, "/x"), 200, "one 0"),
    "another method": (("FOO", "/x", asked("two")), 405, "Method Not Allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_to_many_models_is_told_at_once_which_it_means(fleet, name):
    request, status, words = REQUESTS[name]
    with bounded_work(clock=time.process_time):
        found, text = answered(fleet, *request)
    assert (found, words in text) == (status, True), text
    assert len(text) < 1000
    assert text.isprintable()
    assert not any(each.users for each in fleet.members)
    assert answered(fleet, POST, "/x", asked("two")) == (200, "two 16")  # whoever comes next is answered


def test_a_model_that_failed_is_tried_again(fleet):
    for _ in range(2):
        assert answered(fleet, POST, "/x", asked("bad"))[0] == 500
        assert fleet.members[2].running is None


EVIL = [(b"origin", b"http://evil.example"), (b"sec-fetch-site", b"cross-site")]
UNASKED = {
    "an image of another model's": ((GET, "/props", b"", b"model=two"), EVIL, 503),
    "a form's text": ((POST, "/x", asked("two")), [*EVIL, (b"content-type", b"text/plain")], 415),
    "a page's body of no type": ((POST, "/x", asked("two")), EVIL, 415),
    "a path that there is not": ((POST, "/nosuchpath", asked("two")), [], 404),
    "a path that takes another method": ((POST, "/props", asked("two")), [], 405),
    "the card of a model": ((GET, "/v1/models/two"), [], 200),
    "a removal": (("DELETE", "/props", b"", b"model=two"), [], 405),
}


@pytest.mark.parametrize("name", UNASKED)
def test_what_a_web_page_can_send_unasked_loads_and_closes_nothing(fleet, name):
    request, headers, status = UNASKED[name]
    assert answered(fleet, POST, "/x", asked("one"))[0] == 200
    assert answered(fleet, *request, headers=headers)[0] == status
    assert [each.name for each in fleet.members if each.running is not None] == ["one"]
    assert answered(fleet, GET, "/props", headers=EVIL) == (200, "one 0")  # of the loaded one, as ever
