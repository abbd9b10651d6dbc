"""Bytes that are no HTTP/1.1, in front of a body or in it: refused at once, in the form of the API, without an echo."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest

from tests.tools.serving import served
from tests.tools.work import SOME, bounded_work

GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
HEADS = {
    "garbage": b"SECRET\r\n\r\n",
    "a hello of TLS": bytes.fromhex("16030102000100") + b"\x01\xfc\x03\x03SECRET",
    "another version": b"GET /SECRET HTTP/9.9\r\nhost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /SECRET\r\n\r\n",
    "a method that is none": b"SEC@RET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "a line without a colon": GET + b"SECRET\r\n\r\n",
    "no host": b"GET /SECRET HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"host: SECRET\r\n\r\n",
    "headers without end": GET + b"x: " + b"SECRET" * 20_000,
    "a length that is no number": POST + b"content-length: SECRET\r\n\r\n{}",
    "a negative length": POST + b"content-length: -5\r\n\r\n{}",
    "two lengths": POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a length and chunks": POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
    "chunks of HTTP/1.0": POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "an unknown encoding": POST + b"transfer-encoding: SECRET\r\n\r\n{}",
}
BODIES = {
    "no size": b"SECRET\r\n{}\r\n0\r\n\r\n",
    "no size, no end of the line": b"SECRET",
    "JSON as it is": b'{"prompt": "SECRET"}',
    "lines that end in LF": b"2\n{}\n0\n\n",
    "a negative size": b"-2\r\n{}\r\n0\r\n\r\n",
    "a size with 0x": b"0x2\r\n{}\r\n0\r\n\r\n",
    "a size of 21 digits": b"1" * 21,
    "an empty line": b"\r\n{}\r\n",
    "an extension with LF in it": b"2;x\n{}",
    "a chunk that is longer than it says": b"2\r\n{}SECRET\r\n0\r\n\r\n",
    "a second chunk without a size": b'1\r\n{\r\n"a": "SECRET"}',
    "a trailer without a colon": b"2\r\n{}\r\n0\r\nSECRET\r\n\r\n",
}


def answered(server, data: bytes, later: bytes = b"") -> tuple[str, dict[str, str], bytes]:
    """Status line, headers and body of what comes back until the server closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        whole = b""
        with contextlib.suppress(ConnectionError):  # it is closed before all has been sent
            connection.sendall(data)
            if later:
                time.sleep(0.3)
                connection.sendall(later)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(4096):
                whole += part
    head, _, body = whole.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return status, dict(line.split(": ", 1) for line in lines), body


def check(answer: tuple[str, dict[str, str], bytes]) -> None:
    """It is the API's refusal, whole, and the last thing said."""
    status, headers, body = answer
    assert status == "HTTP/1.1 400 Bad Request"
    assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
    assert len(body) == int(headers["content-length"])
    error = json.loads(body)["error"]
    assert "no well-formed HTTP/1.1 request" in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    assert b"SECRET" not in body


@pytest.mark.parametrize("name", HEADS)
def test_what_is_no_http_is_refused_as_the_api_does(server, name):
    with bounded_work(SOME, time.monotonic):
        check(answered(server, HEADS[name]))


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_is_refused_at_once(server, name):
    with bounded_work(SOME, time.monotonic):
        check(answered(server, CHUNKED + BODIES[name]))
        check(answered(server, CHUNKED, BODIES[name]))


def test_ollamas_paths_have_ollamas_form(server):
    data = CHUNKED.replace(b"/v1/completions", b"/api/chat") + b"SECRET\r\n"
    status, _, body = answered(server, data)
    assert status == "HTTP/1.1 400 Bad Request"
    assert list(json.loads(body)) == ["error"]
    assert "no well-formed HTTP/1.1 request" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "sizes", [[b"2", b"%x"], [b"0002;name=value", b"%X;x "], [b"2 ", b"%x"]], ids=["plain", "extended", "blanks"]
)
def test_chunks_are_read_however_they_are_cut(server, sizes):
    """Byte by byte, so that every beginning of a size is waited with."""
    first, second = b'{"', b'content": "a"}'
    line = sizes[1] % len(second)
    chunks = sizes[0] + b"\r\n" + first + b"\r\n" + line + b"\r\n" + second + b"\r\n0\r\nx-trailer: 1\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(CHUNKED.replace(b"/v1/completions", b"/tokenize"))
        for position in range(len(chunks)):
            connection.sendall(chunks[position : position + 1])
            time.sleep(0.002)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_nothing_of_it_is_in_the_log():
    """Neither a word of it nor a traceback, also where the answer was given before the body broke."""
    with served() as server:
        for data in [*HEADS.values(), *(CHUNKED + body for body in BODIES.values())]:
            answered(server, data)
        broken = GET + b"transfer-encoding: chunked\r\n\r\n"
        assert answered(server, broken, b"SECRET\r\n")[0] == "HTTP/1.1 200 OK"
        check(answered(server, broken + b"SECRET\r\n"))
        answered(server, b"SECRET" * 5_000 + b" / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert server.get("/health").status_code == 200
        assert not [line for line in server.lines if "Traceback" in line or "Error" in line or len(line) > 300]
        assert not [line for line in server.lines if "SECRET" in line and "SECRETSECRETSECRETSE " not in line]
