"""A chat whose process is told to end, or whose terminal is closed, keeps what was said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import kvq
from tests.tools.tree import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no such signals there")
SIGNALS = [signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def chat(tmp_path):
    """Begins a chat that keeps its session; what it says can be read, and it can be asked."""
    command = [sys.executable, "-m", "kvq", "chat", "-m", "kvq-books", "-q", "--session", str(tmp_path / "talk.kvq")]
    running = []

    def begin(*options):
        process = subprocess.Popen(
            [*command, *options], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS],
        )  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def ask(process, question):
    process.stdin.write(question + b"\n")
    process.stdin.flush()


def conversation(path):
    return kvq.Conversation(kvq.load("kvq-books").load_session(path))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_between_two_questions(chat, tmp_path, number):
    process = chat("-n", "5")
    ask(process, b"Who are you?")
    assert process.stdout.readline()
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert b"Traceback" not in process.stderr.read()
    said = conversation(tmp_path / "talk.kvq").messages
    assert [message["role"] for message in said[-2:]] == ["user", "assistant"]
    assert said[-2]["content"] == "Who are you?"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_in_the_middle_of_an_answer(chat, tmp_path, number):
    process = chat("-n", "1500", "-t", "0.9", "--seed", "3")
    ask(process, b"Tell a long story.")
    begun = process.stdout.read(1)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    shown = (begun + process.stdout.read()).decode()
    assert shown.strip()
    assert conversation(tmp_path / "talk.kvq").messages[-1]["content"].strip() == shown.strip()
