"""Who may ask: hosts that a request is addressed to, and pages of other sites that a browser says it comes from."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.responses import PlainTextResponse

from kvq.runtime.server import guard, serve
from kvq.runtime.server.models import Options

CROSS = {"sec-fetch-site": "cross-site"}
FOLLOWED = CROSS | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
FRIEND = "http://app.example"


def asked(options: Options, loopback: bool, method: str = "GET", **headers: str) -> httpx.Response:
    """The answer to a request, of an application behind what stands before it."""
    app = serve._guarded(PlainTextResponse("in"), options, loopback, None)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, "/", headers={k.replace("_", "-"): v for k, v in headers.items()})

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {}, 200),  # no browser
        ("GET", {"sec-fetch-site": "same-origin"}, 200),  # the page of the server itself
        ("POST", {"sec-fetch-site": "same-origin", "origin": "http://localhost"}, 200),
        ("GET", {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, 200),  # typed
        ("GET", FOLLOWED, 200),  # a link
        ("POST", FOLLOWED, 403),  # a form
        ("GET", FOLLOWED | {"sec-fetch-dest": "iframe"}, 403),
        ("GET", CROSS, 403),  # an image
        ("GET", CROSS | {"sec-fetch-mode": "cors", "origin": "http://evil.example"}, 403),
        ("POST", CROSS | {"origin": "null"}, 403),
    ],
    ids=str,
)
def test_pages_of_other_sites_are_refused(method, headers, status):
    answer = asked(Options(access_log=False), True, method, **headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "origin_not_allowed"


@pytest.mark.parametrize("origins", [[FRIEND], ["*"]], ids=str)
def test_pages_that_were_let_in_stay_so(origins):
    options = Options(cors_origins=origins, access_log=False)
    assert asked(options, True, "POST", origin=FRIEND, **CROSS).headers["access-control-allow-origin"]
    preflight = {"origin": FRIEND, "access-control-request-method": "POST"}
    assert asked(options, True, "OPTIONS", **preflight, **CROSS).status_code == 200
    stranger = asked(options, True, "POST", origin="http://evil.example", **CROSS)
    assert stranger.status_code == (200 if "*" in origins else 403)


@pytest.mark.parametrize(
    ("host", "loopback", "open_", "keyed"),
    [
        ("localhost:8080", 200, 200, 200),
        ("127.0.0.1", 200, 200, 200),
        ("[::1]:8080", 200, 200, 200),
        ("192.168.1.7:8080", 403, 200, 200),
        ("[fe80::1]", 403, 200, 200),
        ("Thinker:8080", 403, 200, 200),
        ("thinker.local", 403, 200, 200),
        ("thinker.home.example", 403, 200, 200),
        ("evil.example:8080", 403, 403, 200),
        ("127.0.0.1.evil.example", 403, 403, 200),
        ("1.2.3", 403, 403, 200),
    ],
)
def test_hosts_of_loopback_of_an_open_server_and_of_one_with_a_key(monkeypatch, host, loopback, open_, keyed):
    monkeypatch.setattr(guard.socket, "gethostname", lambda: "Thinker.local")
    monkeypatch.setattr(guard.socket, "getfqdn", lambda: "thinker.home.example")
    here, there = Options(access_log=False), Options(host="0.0.0.0", access_log=False)
    key = Options(host="0.0.0.0", api_key="k", access_log=False)
    assert asked(here, True, host=host).status_code == loopback
    assert asked(there, False, host=host).status_code == open_
    assert asked(key, False, host=host, authorization="Bearer k").status_code == keyed


IDENTITY = "resp_" + "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (f"/v1/responses/{IDENTITY}", "/v1/responses/resp_0123..."),
        (f"/responses/{IDENTITY}?x=1", "/responses/resp_0123..."),
        (f"/v1/%72esponses%2F{IDENTITY}", "/v1/responses/resp_0123..."),
        ("/v1/responses/%72" + IDENTITY[1:], "/v1/responses/resp_0123..."),
        ("/v1/responses/a%0Ab" + IDENTITY, "/v1/responses/a%0Abresp_0..."),
        ("/v1/responses/short", "/v1/responses/short"),
        ("/v1/responses", "/v1/responses"),
        ("/x%0Ay", "/x%0Ay"),
    ],
)
def test_the_log_has_no_whole_id_of_a_response(path, shown):
    lines = []
    app = guard.Guard(PlainTextResponse("in"), None, lines.append, lines.append)

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            await client.get(path)

    asyncio.run(ask())
    (line,) = lines
    assert line.split()[2] == shown
