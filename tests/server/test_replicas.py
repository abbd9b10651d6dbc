"""Two servers behind a balancer with one session folder: a conversation goes on where the other was killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import socket
import threading

import httpx
import numpy as np
import pytest

from kvq.runtime.server.protocol import Settings
from kvq.runtime.server.shared import SUFFIX, SharedSessions
from tests.tools.command_line import assert_one_line_error, kvq
from tests.tools.serving import START_S, served

CHUNK = 16
CHAT = "/v1/chat/completions"
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
QUESTIONS = ["Where does the ship go?", "And the captain?", "Who is at the helm?", "Is it late?"]


class Balancer:
    """Passes connections on to servers in turn, and to the next one where one is gone."""

    def __init__(self, urls: list[str]) -> None:
        self._servers = [tuple(url.removeprefix("http://").split(":")) for url in urls]
        self._turns = itertools.count()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            first = next(self._turns)
            for host, port in (self._servers[(first + n) % len(self._servers)] for n in range(len(self._servers))):
                try:
                    server = socket.create_connection((host, int(port)))
                    break
                except ConnectionRefusedError:
                    continue
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def ask(url: str, messages: list[dict], **fields) -> dict:
    answer = httpx.post(url + CHAT, json={"messages": messages, **GREEDY, **fields}, timeout=START_S)
    assert answer.status_code == 200, answer.text
    return answer.json()


def talked(url: str) -> list[dict]:
    """The messages of a conversation with one server."""
    messages: list[dict] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": ask(url, messages)["choices"][0]["message"]["content"]})
    return messages


@pytest.mark.slow
def test_a_conversation_goes_on_where_the_other_server_was_killed(tiny_bundle, tmp_path):
    folder, alone = tmp_path / "shared", tmp_path / "alone"
    folder.mkdir(), alone.mkdir()
    options = ["-m", tiny_bundle, "--chunk", CHUNK, "--session-dir", folder, "--session-shared"]
    with served(*options) as first, served(*options) as second:
        expected = talked(first.url)  # of a server that nobody killed; what it keeps is what both would keep
        for file in folder.glob("*" + SUFFIX):
            file.unlink()
        first.end()
        with served(*options) as other:
            balancer = Balancer([other.url, second.url])
            messages: list[dict] = []
            for number, question in enumerate(QUESTIONS):
                messages.append({"role": "user", "content": question})
                if number == 2:  # the turn is the other's, which is killed while it answers
                    body = {"messages": messages, **GREEDY, "max_tokens": 150, "stream": True}
                    with (
                        contextlib.suppress(httpx.HTTPError),
                        httpx.stream("POST", balancer.url + CHAT, json=body, timeout=START_S) as answer,
                    ):
                        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
                        assert json.loads(next(lines).removeprefix("data: "))["choices"]
                        assert other.end(signal.SIGKILL) == -signal.SIGKILL
                        list(lines)
                found = ask(balancer.url, messages)
                cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached == 0 if number == 0 else cached >= CHUNK, (number, found["usage"])
                messages.append({"role": "assistant", "content": found["choices"][0]["message"]["content"]})
            balancer.close()
        assert messages == expected
        stats = second.stats()
        assert stats["shared_reads"] >= 1  # what the killed one had read is not read again
        assert stats["shared_writes"] >= 1
        assert second.end() == 0
    assert [path for path in folder.iterdir() if path.name.endswith(SUFFIX)]  # they outlive their servers


@pytest.fixture
def shared(tiny_model, tmp_path):
    """Makes the shared sessions of a server, with lines of its log."""
    lines: list[str] = []

    def make(limit: int = 10**9, chunk: int = CHUNK) -> SharedSessions:
        return SharedSessions(tmp_path, tiny_model, None, chunk, limit, lines.append)

    return make, lines


def read(model, ids, settings: Settings):
    session = model.session(settings.policy, prefill_chunk=CHUNK)
    for at in range(0, len(ids), CHUNK):
        session.append(ids[at : at + CHUNK])
    return session


def test_only_what_would_be_read_alike_is_found(tiny_model, shared):
    make, lines = shared
    settings, ids = Settings(policy="int8"), np.arange(1, 1 + 4 * CHUNK)
    writer, reader = make(), make()
    for length in (CHUNK, 3 * CHUNK):
        writer.put(settings, read(tiny_model, ids[:length], settings))
    found = reader.longest(settings, ids, 0, 4 * CHUNK - 1)
    assert found.tokens == ids[: 3 * CHUNK].tolist()
    assert reader.longest(settings, ids, CHUNK, 2 * CHUNK) is None
    assert len(reader.longest(settings, ids, 0, 2 * CHUNK).tokens) == CHUNK
    other = ids.copy()
    other[CHUNK - 1] = 7
    for case in ((settings._replace(policy="int4"), ids), (settings._replace(kv_bits=8.0), ids), (settings, other)):
        assert reader.longest(*case, 0, 4 * CHUNK) is None
    assert make(chunk=CHUNK // 2).longest(settings, ids, 0, 4 * CHUNK) is None
    assert (writer.writes, reader.reads, lines) == (2, 2, [])


def test_a_damaged_file_is_told_of_and_passed_over(tiny_model, shared, tmp_path):
    make, lines = shared
    settings, ids = Settings(policy="int8"), np.arange(1, 1 + 2 * CHUNK)
    sessions = make()
    for length in (CHUNK, 2 * CHUNK):
        sessions.put(settings, read(tiny_model, ids[:length], settings))
    largest = max(tmp_path.glob("*" + SUFFIX), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(data)
    assert len(sessions.longest(settings, ids, 0, 2 * CHUNK).tokens) == CHUNK
    assert len(lines) == 1
    assert "a shared session cannot be read" in lines[0]


@pytest.mark.parametrize(
    "others",
    [
        {"policy": "int2"}, {"policy": "rule", "kv_bits": 7.0}, {"policy": "rule", "kv_memory": 1e17}, {"recent": 3},
        {"sink": 0}, {"protect_bits": 8}, {"prefill": "stepwise"}, {"policy": "mixed"},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_in_the_place_of_another_one_is_told_of_and_passed_over(others, tiny_model, shared, tmp_path):
    make, lines = shared
    settings, ids = Settings(policy="int8"), np.arange(1, 1 + 2 * CHUNK)
    sessions = make()
    sessions.put(settings, read(tiny_model, ids, settings))
    (file,) = tmp_path.glob("*" + SUFFIX)
    session = tiny_model.session(**({"policy": "int8"} | others))
    session.append(ids)
    session.save(file, overwrite=True)
    assert sessions.longest(settings, ids, 0, 2 * CHUNK) is None
    assert (sessions.reads, len(lines)) == (0, 1)
    assert "of other settings than its name says" in lines[0]


def test_the_bytes_of_the_folder_are_bounded(tiny_model, shared, tmp_path):
    make, _ = shared
    settings, ids = Settings(policy="int8"), np.arange(1, 1 + CHUNK)
    sizes = []
    for first in range(1, 5):
        session = read(tiny_model, [first, *ids[1:].tolist()], settings)
        make(limit=2 * max(sizes, default=10**9) + 1).put(settings, session)
        sizes.append(max(path.stat().st_size for path in tmp_path.glob("*" + SUFFIX)))
    assert len(list(tmp_path.glob("*" + SUFFIX))) == 2
    assert make().longest(settings, np.array([4, *ids[1:], 9]), 0, CHUNK) is not None
    assert make().longest(settings, np.array([1, *ids[1:], 9]), 0, CHUNK) is None


def test_a_folder_that_is_shared_has_to_be_named():
    assert_one_line_error(kvq("serve", "--session-shared"), "--session-dir", code=2, who="Error")
