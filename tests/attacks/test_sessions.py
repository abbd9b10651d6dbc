"""Session files from a stranger: each is refused by a named error, at once, without memory, and nothing is written.

Digests are right wherever the attack is not of them. More of them stand in tests/session: files cut and changed
(`test_damaged_files`), headers that lie and arrays that no session writes (`test_forged_files`).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

import kvq
from kvq.runtime.chat.conversation import KEY, Conversation
from kvq.runtime.errors import SessionError
from kvq.runtime.session.header import HEADER_MAX_BYTES
from tests.tools.bad_sessions import MOST_NBYTES, refused, saved
from tests.tools.session_files import START, contents, sealed, split
from tests.tools.signals import interruptible
from tests.tools.tree import ROOT
from tests.tools.work import bounded_work


@pytest.fixture(scope="module")
def good(tiny_model, tmp_path_factory):
    """Path of a session file with every precision, a window and logits."""
    path = tmp_path_factory.mktemp("attacked") / "good.kvq"
    saved(tiny_model, path)
    return path


def resealed(**changes):
    """Fields of the header changed."""
    return lambda header, payload: sealed(header | changes, payload)


def shaped(**changes):
    """Fields of the architecture changed."""
    return lambda header, payload: sealed(header | {"architecture": header["architecture"] | changes}, payload)


def written(old: str, new: str):
    """The header's text changed, as no JSON library would write it."""

    def attack(header, payload):
        digest = hashlib.sha256(payload).hexdigest()
        text = json.dumps(header | {"payload_sha256": digest})
        assert old in text
        return sealed(text.replace(old, new, 1).encode(), payload)

    return attack


def optioned(policy: str, options):
    return resealed(policy=policy, policy_options=options)


def started(magic: bytes = b"KVQSESS\n", version: int = 1, length: int | None = None, digest: bytes | None = None):
    """The preamble changed."""

    def attack(header, payload):
        text = json.dumps(header).encode()
        found = hashlib.sha256(text).digest() if digest is None else digest
        return START.pack(magic, version, len(text) if length is None else length, found) + text + payload

    return attack


NAN, HUGE = float("nan"), 10**400
ATTACKS = {
    "an option named policy": (optioned("random", {"policy": "int4"}), "policy_options"),
    "an option named bundle": (optioned("random", {"bundle": "/etc"}), "policy_options"),
    "an option named self": (optioned("random", {"self": 1}), "does not take the options"),
    "an option with a dunder": (optioned("random", {"__class__": "x"}), "does not take the options"),
    "an option with an empty name": (optioned("random", {"": 1}), "does not take the options"),
    "a seed of 10^400": (optioned("random", {"seed": HUGE}), ""),
    "a seed of a fraction": (optioned("random", {"seed": 0.5}), "seed"),
    "a seed of a list": (optioned("random", {"seed": [1]}), "seed"),
    "weights of nothing": (optioned("random", {"weights": []}), ""),
    "weights of 10^400": (optioned("random", {"weights": [HUGE, 1, 1, 1]}), ""),
    "weights of objects": (optioned("random", {"weights": {"a": 1}}), ""),
    "weights below zero": (optioned("random", {"weights": [-1, -1, -1, -1]}), ""),
    "weights deep in lists": (optioned("random", {"weights": json.loads("[" * 50 + "]" * 50)}), ""),
    "options of another policy": (optioned("int4", {"classes": [[2, 2]]}), "does not take the options"),
    "a policy of 100,000 characters": (resealed(policy="x" * 100_000), "unknown policy"),
    "a policy that moves the cursor": (resealed(policy="\x1b[2J\n\u202e"), "unknown policy"),
    "a policy without a name": (resealed(policy=""), "unknown policy"),
    "a policy of true": (resealed(policy=True), "policy is True"),
    "recent of true": (resealed(recent=True), "recent is True"),
    "sink of true": (resealed(sink=True), "sink is True"),
    "sink of null": (resealed(sink=None), "sink is None"),
    "sink of 2^31 and one": (resealed(sink=2**31 + 1), "sink is"),
    "a chunk of true": (resealed(prefill_chunk=True), "prefill_chunk is True"),
    "a chunk of a fraction": (resealed(prefill_chunk=1e3), "prefill_chunk is"),
    "a window of true": (resealed(window=True), "window is True"),
    "layers of true": (shaped(layers=True), "layers is True"),
    "heads of text": (shaped(heads="8"), "heads is"),
    "a context of 10^400": (shaped(context=HUGE), "context is"),
    "a context of null": (shaped(context=None), "context is None"),
    "a vocabulary of 2^31": (shaped(vocab=2**31), "follow the header"),
    "a head of 0": (shaped(head_dim=0), "head_dim is 0"),
    "a field of the architecture too many": (shaped(extra=1), "makes no sense"),
    "kv_bits of true": (resealed(kv_bits=True), "kv_bits is True"),
    "kv_bits of 1e308": (resealed(policy="random", kv_bits=1e308), "kv_bits must be a positive number"),
    "kv_memory of 10^400": (resealed(policy="random", kv_memory=HUGE), "makes no sense"),
    "kv_memory of 1e-300": (resealed(policy="random", kv_memory=1e-300), ""),
    "kv_memory of a list": (resealed(kv_memory=[1]), "kv_memory is"),
    "infinity as a power": (written('"kv_bits": null', '"kv_bits": 1e999'), "kv_bits is inf"),
    "NaN in an option": (written('"policy_options": {}', '"policy_options": {"seed": NaN}'), "makes no sense"),
    "a prefill that is none": (resealed(prefill="__init__"), "prefill is"),
    "a prefill of a list": (resealed(prefill=["auto"]), "prefill is"),
    "pending of true": (resealed(pending=[True], logits=False), "a pending id is True"),
    "pending of a fraction": (resealed(pending=[1.0], logits=False), "a pending id is 1.0"),
    "pending of a million": (resealed(pending=[1] * 1_000_000, logits=False), " values"),
    "a bucket of true tokens": (resealed(buckets=[[4, 4, True]]), "tokens of a bucket"),
    "a bucket of true bits": (resealed(buckets=[[True, 4, 55]]), "a bucket of True"),
    "a bucket of negative bits": (resealed(buckets=[[-4, 4, 55]]), "a bucket of -4"),
    "a bucket of 10^400 bits": (resealed(buckets=[[HUGE, 4, 55]]), "a bucket of"),
    "a bucket of a dictionary": (resealed(buckets=[{"k": 4}]), "buckets are not rows"),
    "a million buckets": (resealed(buckets=[[4, 4, 0]] * 500_000), " values"),
    "more buckets than pairs": (resealed(buckets=[[4, 4, 0]] * 9_000), "9000 buckets"),
    "metadata of many values": (resealed(metadata={"a": ["x"] * 300_000}), "values"),
    "a text without end": (lambda header, payload: sealed(b'"' + b'\\"' * 5_000_000, payload), "makes no sense"),
    "a name of a megabyte": (resealed(model="m" * 1_000_000, model_digest="0"), "belongs to the model"),
    "a name of a list": (resealed(model=["tiny"]), "model is"),
    "a digest of another length": (resealed(model_digest=""), "belongs to the model"),
    "a digest of null": (resealed(model_digest=None), "model_digest is None"),
    "a version of a number": (resealed(kvq=1), "kvq is 1"),
    "metadata of null": (resealed(metadata=None), "another type"),
    "logits of null": (resealed(logits=None), "another type"),
    "a field twice": (written('"tokens": 60', '"tokens": 60, "tokens": 61'), "tokens"),
    "a field of Python's": (resealed(__class__="x"), "makes no sense"),
    "a number of 5,000 digits": (written('"tokens": 60', '"tokens": ' + "6" * 5000), "makes no sense"),
    "a comment": (written('"tokens": 60', '/* */ "tokens": 60'), "makes no sense"),
    "nested too deep": (written('"metadata": {}', '"metadata": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
                        "makes no sense"),
    "a null byte in front": (lambda header, payload: b"\0" + sealed(header, payload), "not a session file"),
    "a later version": (started(version=2), "format version 2"),
    "the largest version": (started(version=2**32 - 1), "format version 4294967295"),
    "a header larger than the file": (started(length=HEADER_MAX_BYTES), "cut off in its header"),
    "a header larger than any": (started(length=HEADER_MAX_BYTES + 1), "a header of"),
    "a header of 4 GB": (started(length=2**32 - 1), "a header of"),
    "a digest of zeros": (started(digest=bytes(32)), "another sha256"),
    "a pickle": (lambda header, payload: b"\x80\x04cposix\nsystem\n(S'true'\ntR.", "not a session file"),
    "an archive": (lambda header, payload: b"PK\x03\x04" + payload, "not a session file"),
    "the magic with another line end": (started(magic=b"KVQSESS\r"), "not a session file"),
    "a hole of a gigabyte": (lambda header, payload: sealed(header, payload) + b"\0", "has bytes behind its end"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_session_file_is_refused_by_name(tiny_model, good, tmp_path, name):
    attack, words = ATTACKS[name]
    path = tmp_path / "bad.kvq"
    data = attack(*split(good))
    path.write_bytes(data)
    if name.startswith("a hole"):
        os.truncate(path, 1 << 30)
    before = path.stat()
    with bounded_work(), pytest.raises(SessionError):
        tiny_model.load_session(path)
    refused(tiny_model, path, words, str(path), most=MOST_NBYTES + 12 * len(data))  # a long header is read as JSON
    assert list(tmp_path.iterdir()) == [path]
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_there_are_enough_of_them():
    assert len(ATTACKS) >= 40


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CONVERSATIONS = {
    "true for a place": {"messages": [USER, ASSISTANT], "turns": [[True, [], 5]]},
    "a place of 10^400": {"messages": [USER, ASSISTANT], "turns": [[HUGE, [], HUGE]]},
    "a place as text": {"messages": [USER, ASSISTANT], "turns": [["0", [], 5]]},
    "a pending id of 10^400": {"messages": [USER, ASSISTANT], "turns": [[0, [HUGE], 5]]},
    "a pending id of true": {"messages": [USER, ASSISTANT], "turns": [[0, [True], 5]]},
    "too many places": {"messages": [USER, ASSISTANT], "turns": [[0, [], 5, 1, 2, 3, 4]]},
    "roles of nobody": {"messages": [{"role": "root", "content": ""}, ASSISTANT], "turns": [[0, [], 5]]},
    "a surrogate": {"messages": [{"role": "user", "content": "\ud800"}, ASSISTANT], "turns": [[0, [], 5]]},
    "content of a list": {"messages": [{"role": "user", "content": [1]}, ASSISTANT], "turns": [[0, [], 5]]},
    "messages of text": {"messages": "ab", "turns": []},
    "a document of nothing": {"messages": [], "turns": [], "document": {"text": " ", "start": 0, "pending": []}},
    "a document beyond the text": {"messages": [], "turns": [], "document": {"text": "a", "start": 99, "pending": []}},
    "another template": {"messages": [USER, ASSISTANT], "turns": [[0, [], 5]], "written_with": "0" * 64},
    "a template of a list": {"messages": [USER, ASSISTANT], "turns": [[0, [], 5]], "written_with": []},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_strangers_conversation_is_refused_by_name(tiny_model, good, tmp_path, name):
    header, payload = split(good)
    path = tmp_path / "talk.kvq"
    path.write_bytes(sealed(header | {"metadata": {KEY: CONVERSATIONS[name]}}, payload))
    session = tiny_model.load_session(path)
    with pytest.raises(kvq.PromptError) as caught:
        Conversation(session)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# -- faults -------------------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
DELAYS = (0.0, 0.003, 0.01, 0.03)  # seconds, of writers that do nothing but save
SAVING = """
import sys, kvq
model = kvq.load("kvq-books")
session = model.session("k8v4")
session.append(list(range(1, 400)))
session.save(sys.argv[1])  # imports what saving needs: Python loses an interrupt that comes at the end of an import
print("ready", flush=True)
while True:
    session.save(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", SIGNALS, ids=lambda number: number.name)
def test_a_writer_that_is_ended_leaves_a_whole_file(by, tmp_path, embedded):
    """At any moment of a save: the name holds a whole session, and the next save goes through."""
    path = tmp_path / "text.kvq"
    for delay in DELAYS:
        process = subprocess.Popen([sys.executable, "-c", SAVING, str(path)], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, cwd=ROOT, preexec_fn=interruptible)  # fmt: skip
        try:
            assert process.stdout.readline() == b"ready\n"
            while not path.exists():
                time.sleep(0.001)
            time.sleep(delay)
            process.send_signal(by)
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()
        assert len(embedded.load_session(path).tokens) == 399
        assert {file.name for file in tmp_path.iterdir()} <= {path.name, f".{path.name}.tmp"}
    embedded.load_session(path).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_two_writers_of_one_file_leave_one_of_their_sessions(tiny_model, tmp_path):
    sessions = []
    for ids in ([1, 2, 3], [4, 5, 6, 7]):
        sessions.append(tiny_model.session("int8"))
        sessions[-1].append(ids)
    expected = [contents(session) for session in sessions]
    path = tmp_path / "text.kvq"
    failed = []

    def write(session):
        try:
            for _ in range(20):
                session.save(path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert contents(tiny_model.load_session(path)) in expected
    for thread in threads:
        thread.join()
    assert not failed
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tiny_model, good, tmp_path):
    """As the system reports it: the file may not grow beyond a bound."""
    import resource

    path = tmp_path / "text.kvq"
    session = tiny_model.load_session(good)
    session.save(path)
    before = path.read_bytes()
    session.append([1] * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(SessionError, match="cannot be written"):
            session.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_file_says_of_itself_is_all_there_is():
    """The preamble is 48 bytes; whoever changes it changes the format's number."""
    assert struct.calcsize("<8sII32s") == START.size == 48
