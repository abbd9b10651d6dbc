"""`kvq serve` as a process: it answers while it loads, ends with a signal, keeps keys out of its log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

import kvq as kvq_package
from tests.tools.command_line import kvq
from tests.tools.serving import LONG, served

ENDED_S = 5.0  # on a busy machine


@pytest.mark.slow
def test_the_port_answers_while_the_model_loads(tmp_path):
    with served("--session-dir", tmp_path, ready=False) as server:
        codes = []
        while not codes or codes[-1] != 200:
            health = server.get("/health")
            codes.append(health.status_code)
            if health.status_code == 503:
                assert health.json()["status"] == "loading"
                answer = server.post("/v1/completions", {"prompt": "x"})
                if answer.status_code != 200:
                    assert answer.json()["error"]["code"] == "loading"
                    assert answer.headers["retry-after"]
        assert codes[0] == 503
        assert server.get("/health").json() == {"status": "ok"}


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_streams_with_an_error_event_and_the_process_with_0(by, tmp_path):
    with served("--session-dir", tmp_path) as server:
        body = {"prompt": LONG, "max_tokens": 1000, "stream": True, "temperature": 1.5}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert next(lines).startswith("data: {")
            server.process.send_signal(by)
            last = list(lines)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.end(by) == 0
        assert not any("Traceback" in line for line in server.lines)
        assert server.process.stdout.read() == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_start_says_the_name_that_requests_use(embedded, tmp_path):
    """Of a folder the bundle's own, and an unknown one gets told it."""
    folder = tmp_path / "another-name"
    shutil.copytree(embedded.bundle.path, folder)
    own = embedded.bundle.manifest.name
    for arguments, name in (("-m", folder), own), (("-m", folder, "--name", "mine"), "mine"):
        with served(*arguments) as server:
            assert f"kvq: ready; served as {name}" in server.lines
            answer = server.post("/v1/completions", {"prompt": "a", "model": folder.name, "max_tokens": 1})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
            assert repr(name) in answer.json()["error"]["message"]
            assert server.post("/v1/completions", {"prompt": "a", "model": name, "max_tokens": 1}).status_code == 200


@pytest.mark.slow
def test_key_origin_and_log():
    secret = "a secret the log must not have"
    with served("--cors-origin", "http://app.example", "--max-body", "10kB", env={"KVQ_API_KEY": "k-1"}) as server:
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client("k-2").models.list()
        assert refused.value.code == "invalid_api_key"
        assert server.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert server.get("/health").status_code == 200
        assert server.client("k-1").models.list().data
        assert server.client("k-1").completions.create(model="kvq-books", prompt=secret, max_tokens=2)
        preflight = {"origin": "http://app.example", "access-control-request-method": "POST"}
        answer = httpx.options(server.url + "/v1/completions", headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://app.example")
        assert server.get("/%0Akvq: forged?x=" + secret.replace(" ", "+")).status_code == 401
        assert server.end() == 0
        log = "\n".join(server.lines)
        assert "POST /v1/completions 200" in log
        for hidden in (secret, "k-1", "k-2", "forged"):
            assert hidden not in log.replace("%0Akvq:%20forged", "")


@pytest.mark.slow
def test_what_keeps_a_server_from_starting_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = kvq("serve", "--port", str(taken.getsockname()[1]))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kvq: cannot listen on 127.0.0.1")
    assert done.stderr.count("\n") == 1
    for arguments, words, code in (
        (["-m", "nothing-here"], "no model 'nothing-here'", 1),
        (["-p", "nonsense"], "unknown policy", 2),
        (["--kv-memory-total", "1kB"], "may take", 1),
        (["--kv-memory-total", "lots"], "is not a size", 2),
        (["--queue", "-1"], "Invalid value", 2),
        (["--api-key", ""], "not empty", 2),
    ):
        done = kvq("serve", "--port", "0", *arguments)
        assert done.returncode == code, done.stderr
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_warning_where_others_can_reach_it_without_a_key():
    with served("--host", "0.0.0.0", ready=False) as server:
        assert any("without a key" in line for line in server.lines)
        server.process.kill()


@pytest.mark.slow
def test_a_request_has_its_time():
    with served("--timeout", "0.5", "--max-tokens", "2000") as server:
        begun = time.monotonic()
        answer = server.post("/v1/completions", {"prompt": LONG, "max_tokens": 1500, "temperature": 1.5})
        if answer.status_code != 200:  # a fast machine is done in time
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
        assert time.monotonic() - begun < 120


@pytest.mark.slow
def test_a_model_is_served_by_the_name_that_kvq_list_has(tiny_bundle, tmp_path):
    """Which need not be the bundle's own."""
    home = {"KVQ_HOME": str(tmp_path)}
    assert kvq("name", tiny_bundle, "other", env=home).returncode == 0
    with served("-m", "other", env=home) as server:
        assert [card.id for card in server.client().models.list().data] == ["other"]
        done = server.client().completions.create(model="other", prompt="A", max_tokens=2)
        assert done.model == "other"


# An export that takes long.
STUCK = """
import time
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
@pytest.mark.parametrize("others", [(), ("kvq-books",)], ids=["alone", "first of two"])
def test_a_signal_ends_a_server_that_exports_and_its_child(by, others, tiny_checkpoint, tmp_path):
    (tmp_path / "safetensors.py").write_text(STUCK)  # found before the package of that name
    path = os.pathsep.join([str(tmp_path), str(Path(kvq_package.__file__).parents[1])])
    models = [word for name in (tiny_checkpoint, *others) for word in ("-m", name)]
    with served(*models, ready=False, env={"PYTHONPATH": path, "KVQ_HOME": str(tmp_path / "home")}) as server:
        server.wait_for("exporting")
        begun = time.monotonic()
        assert server.end(by) == 0  # all of stderr is read: nobody has it any more, the child included
        assert time.monotonic() - begun < ENDED_S
        assert not any("Traceback" in line for line in server.lines)


@pytest.mark.slow
def test_a_signal_does_not_wait_for_a_model_that_is_being_loaded(tmp_path):
    (tmp_path / "stuck.py").write_text(
        "import kvq, time\nkvq.load = lambda *_, **__: time.sleep(60)\n"
        "from kvq.runtime.cli.main import main\nmain()\n"
    )  # fmt: skip
    for by in (signal.SIGINT, signal.SIGTERM):
        command = [sys.executable, str(tmp_path / "stuck.py"), "serve", "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert "listening" in process.stderr.readline()
            begun = time.monotonic()
            process.send_signal(by)
            assert process.stderr.read() == ""
            assert process.wait() == 0
            assert time.monotonic() - begun < ENDED_S
