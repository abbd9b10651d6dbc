"""Connections that ask for nothing, ask slowly, or are too many: cut within stated bounds, and others are answered."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from kvq.runtime.server.connections import HEAD_S, most_connections
from kvq.runtime.server.leftovers import LOCK, PREFIX, OwnFolder, remove_leftovers
from tests.tools.serving import served
from tests.tools.work import SOME, bounded_work


def connected(server) -> socket.socket:
    """A connection that has sent nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def cut_after(connection: socket.socket, drip: bytes = b"") -> float:
    """Seconds until the server closes a connection on which a byte comes now and then."""
    begun, sent = time.monotonic(), 0
    connection.settimeout(0.5)
    while time.monotonic() - begun < 60:
        with contextlib.suppress(TimeoutError):
            try:
                if not connection.recv(1000):
                    break
            except ConnectionError:
                break
        if drip:
            with contextlib.suppress(OSError):
                connection.send(drip[sent % len(drip) :][:1])
            sent += 1
    return time.monotonic() - begun


HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
# What a client sends at once, and then byte by byte.
WAITING = {
    "nothing": (b"", b""),
    "half of the headers": (HEALTH, b""),
    "headers byte by byte": (b"", HEALTH + b"x: " + b"y" * 500),
    "nothing more": (HEALTH + b"\r\n", b""),
    "a second request byte by byte": (HEALTH + b"\r\n", HEALTH + b"x: " + b"y" * 500),
}


@pytest.mark.slow
def test_a_connection_that_asks_for_nothing_is_cut(server):
    def waits(start: bytes, drip: bytes) -> float:
        with connected(server) as connection:
            connection.sendall(start)
            return cut_after(connection, drip)

    with concurrent.futures.ThreadPoolExecutor(len(WAITING)) as pool:
        found = pool.map(lambda sent: waits(*sent), WAITING.values())
        assert {name: taken < HEAD_S + 8 for name, taken in zip(WAITING, found, strict=True)} == dict.fromkeys(
            WAITING, True
        )


@pytest.mark.slow
def test_a_connection_is_used_again(server):
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(server.url + "/health").status_code == 200
            time.sleep(1)


@pytest.mark.slow
def test_many_silent_connections_do_not_keep_others_out(server):
    """More than there may be: the oldest silent one makes room each time."""
    silent = []
    try:
        for _ in range(400):
            silent.append(connected(server))
        with bounded_work(SOME, time.monotonic):
            assert server.get("/health").status_code == 200
    finally:
        for connection in silent:
            connection.close()


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))


@pytest.mark.slow
def test_with_few_file_descriptors_the_server_keeps_answering(monkeypatch):
    """Those of one process: `most_connections` leaves some to everything else."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: start(*given, **named, preexec_fn=few_descriptors))
    with served() as server:
        silent = []
        try:
            for _ in range(250):
                silent.append(connected(server))
            for _ in range(5):
                answer = httpx.post(server.url + "/v1/completions", json={"prompt": "A", "max_tokens": 2}, timeout=30)
                assert answer.status_code == 200
        finally:
            for connection in silent:
                connection.close()
        assert not [line for line in server.lines if "Traceback" in line or "Error" in line]


@pytest.mark.slow
def test_clients_that_go_away_end_no_server():
    """At any moment, also while an answer is being written: a server is no filter that ends with its reader."""
    body = json.dumps({"prompt": "The ship", "max_tokens": 30, "stream": True, "ignore_eos": True}).encode()
    asked = {
        "/v1/completions": body,
        "/v1/embeddings": json.dumps({"input": ["word " * 500] * 20}).encode(),
        "/tokenize": json.dumps({"content": "word " * 50_000}).encode(),
        "/v1/chat/completions": b"{",
    }
    with served("--concurrency", "2", "--queue", "4") as server:
        for turn in range(60):
            path, body = list(asked.items())[turn % len(asked)]
            head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            with connected(server) as connection:
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                if turn % 3:  # reset at once, or a moment later, as soon as something is written
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    time.sleep(0.01 * (turn % 5))
        assert server.get("/health").status_code == 200
        assert server.post("/v1/completions", {"prompt": "The ship", "max_tokens": 2}).status_code == 200


def test_how_many_connections_there_may_be():
    assert 16 <= most_connections() <= 256


# -- what a killed server leaves --------------------------------------------------------------------


@pytest.mark.slow
def test_the_files_of_a_killed_server_are_removed_by_the_next(tmp_path):
    with served("--session-dir", tmp_path) as server:
        (folder,) = tmp_path.iterdir()
        (folder / "1.kvq").write_bytes(b"what somebody said")
        server.process.kill()
        server.process.wait()
    assert folder.exists()
    with served("--session-dir", tmp_path) as server:
        assert not folder.exists()
        assert any("removed the files of 1 server" in line for line in server.lines)
        (living,) = tmp_path.iterdir()
        assert remove_leftovers(tmp_path) == 0  # of one that lives
        assert living.exists()
        assert server.end() == 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_killed_servers_is_left_alone(tmp_path):
    other, file = tmp_path / f"{PREFIX}other", tmp_path / f"{PREFIX}file"
    other.mkdir()
    (other / "kept").write_text("no lock: who knows whose it is")
    file.write_text("a file")
    target = tmp_path / "target"
    target.mkdir()
    (target / LOCK).write_text("")
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    linked = tmp_path / f"{PREFIX}linked-lock"
    linked.mkdir()
    (linked / LOCK).symlink_to(target / LOCK)
    assert remove_leftovers(tmp_path) == 0
    dead = tmp_path / f"{PREFIX}dead"
    dead.mkdir()
    (dead / LOCK).write_text("")
    (dead / "link").symlink_to(target)
    own = OwnFolder(tmp_path)
    assert own.removed == 1
    assert not dead.exists()
    assert (target / LOCK).exists()
    assert own.path.stat().st_mode & 0o077 == 0
    own.close()
    assert not own.path.exists()
    assert remove_leftovers(Path("/no/such/place")) == 0
    assert sys.platform != "linux" or sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["target", *(f"{PREFIX}{name}" for name in ("other", "file", "link", "linked-lock"))]
    )
