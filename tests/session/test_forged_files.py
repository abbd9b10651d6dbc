"""Session files whose digests are right and whose content is made to do harm: refused, or a session that runs."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.errors import KvqError, SessionError
from kvq.runtime.precision.table import named
from tests.tools.bad_sessions import IDS, MOST_NBYTES, refused, saved
from tests.tools.kvdata import examples
from tests.tools.session_files import contents, continued, sealed, split


def edited(**changes):
    return lambda header: header | changes


def shaped(**changes):
    return lambda header: header | {"architecture": header["architecture"] | changes}


def without(name):
    return lambda header: {key: value for key, value in header.items() if key != name}


def recounted(*buckets, **changes):
    return edited(buckets=[list(row) for row in buckets], **changes)


# The header: name -> (header -> header, words). Digests are right, as an attacker would make them.
HEADERS = {
    "another model": (edited(model_digest="0" * 64), "belongs to the model"),
    "another model of a long name": (edited(model_digest="0" * 64, model="x" * 5000), "belongs to the model"),
    "a name with a line break": (edited(model_digest="0", model="a\nb\x1b[2J"), "belongs to the model"),
    "another tokenizer": (edited(tokenizer_digest="0" * 64), "another tokenizer"),
    "no tokenizer": (edited(tokenizer_digest=None), "another tokenizer"),
    "no field": (lambda h: {}, "makes no sense"),
    "a field missing": (without("window"), "makes no sense"),
    "a field too many": (edited(extra=1), "makes no sense"),
    "a field of the architecture missing": (lambda h: h | {"architecture": {"layers": 3}}, "makes no sense"),
    "architecture a list": (edited(architecture=[1]), "makes no sense"),
    "more layers": (shaped(layers=4), "is cut off"),
    "a billion layers": (shaped(layers=2**30), "is cut off"),
    "layers beyond 64 bits": (shaped(layers=2**80), "layers is"),
    "no layers": (shaped(layers=0), "layers is 0"),
    "head_dim that overflows": (shaped(head_dim=2**31, layers=2**31, kv_heads=2**31), "is cut off"),
    "another hidden size": (shaped(hidden=65), "belongs to the model"),
    "layers and heads exchanged": (shaped(layers=4, kv_heads=3), "belongs to the model"),
    "fewer tokens": (edited(tokens=59), "makes no sense"),
    "tokens negative": (edited(tokens=-1), "tokens is -1"),
    "tokens a boolean": (edited(tokens=True), "tokens is True"),
    "tokens a fraction": (edited(tokens=60.0), "tokens is 60.0"),
    "tokens as text": (edited(tokens="60"), "tokens is '60'"),
    "tokens beyond the context": (recounted((4, 4, 1000), tokens=1005), "tokens is 1005"),
    "2^62 tokens": (recounted((4, 4, 2**62 - 5), tokens=2**62), "tokens is"),
    "2^62 tokens of a context as long": (
        lambda h: recounted((4, 4, 2**62 - 5), tokens=2**62)(shaped(context=2**62)(h)), "context is"),
    "a bucket of 2^60 tokens": (recounted((4, 4, 2**60)), "tokens of a bucket"),
    "a bucket of negative tokens": (recounted((4, 4, -5), (8, 8, 60)), "tokens of a bucket"),
    "buckets that do not add up": (recounted((4, 4, 10)), "15 tokens in window and buckets, 60 in the text"),
    "a bucket twice": (recounted((4, 4, 20), (4, 4, 35)), "a bucket of 4 and 4 bits"),
    "a precision that no codec has": (recounted((7, 4, 55)), "a bucket of 7 and 4 bits"),
    "4.0 bits": (recounted((4.0, 4, 55)), "a bucket of 4.0 and 4 bits"),
    "bits as text": (recounted(("4", 4, 55)), "a bucket of '4'"),
    "bits a list": (recounted(([4], 4, 55)), "makes no sense"),
    "no buckets": (edited(buckets=[]), "5 tokens in window and buckets"),
    "a short row": (recounted((4, 4)), "buckets are not rows"),
    "buckets a dictionary": (edited(buckets={"4": 4}), "not a list"),
    "another precision": (recounted((16, 16, 55)), "is cut off"),
    "window above recent": (edited(recent=4), "window is 5"),
    "window negative": (edited(window=-1), "window is -1"),
    "window larger than the text": (lambda h: recounted(window=61, recent=61)(h), "window is 61"),
    "recent beyond the context": (edited(recent=2**40), "recent is"),
    "recent negative": (edited(recent=-1), "recent is -1"),
    "sink negative": (edited(sink=-1), "sink is -1"),
    "sink huge": (edited(sink=2**70), "sink is"),
    "prefill_chunk 0": (edited(prefill_chunk=0), "prefill_chunk is 0"),
    "prefill_chunk null": (edited(prefill_chunk=None), "prefill_chunk is None"),
    "kv_bits negative": (edited(kv_bits=-1), "kv_bits is -1"),
    "kv_bits as text": (edited(kv_bits="3"), "kv_bits is '3'"),
    "kv_bits infinite": (edited(kv_bits=float("inf")), "makes no sense"),
    "kv_bits beyond floats": (edited(kv_bits=10**400), "makes no sense"),
    "kv_bits of a policy without scores": (edited(kv_bits=9), "cannot follow a budget"),
    "kv_bits that nothing can keep": (edited(policy="random", kv_bits=0.1), "below what is possible"),
    "two budgets": (edited(policy="random", kv_bits=9, kv_memory=1e6), "not both"),
    "an unknown policy": (edited(policy="int5"), "unknown policy 'int5'"),
    "a policy that the bundle lacks": (edited(policy="adaptive"), "has no 'adaptive' controller"),
    "policy a list": (edited(policy=["int4"]), "makes no sense"),
    "policy an attribute": (edited(policy="__class__"), "unknown policy"),
    "an option that the policy lacks": (edited(policy_options={"seed": 1}), "does not take the options"),
    "an option of another type": (edited(policy="random", policy_options={"seed": "1"}), "seed must be an integer"),
    "weights nested": (edited(policy="random", policy_options={"weights": [[1], [2, 3]]}), "weights must be"),
    "weights of text": (edited(policy="random", policy_options={"weights": "abcd"}), "weights must be"),
    "a bundle of the file's": (edited(policy="adaptive", policy_options={"bundle": "/etc"}), "policy_options"),
    "the policy's name as an option": (edited(policy="adaptive", policy_options={"name": "x"}), "policy"),
    "the policy's bits as an option": (edited(policy="int4", policy_options={"k_bits": 3}), "policy"),
    "options a list": (edited(policy_options=[]), "policy_options"),
    "an object without a name": (edited(policy_options=None), "pass a policy"),
    "a pending id outside the vocabulary": (edited(pending=[512], logits=False), "a pending id is 512"),
    "a pending id below it": (edited(pending=[-1], logits=False), "a pending id is -1"),
    "pending beyond the context": (edited(pending=[1] * 200, logits=False), "pending tokens"),
    "pending a number": (edited(pending=7), "not a list"),
    "pending beside logits": (edited(pending=[7]), "logits beside pending"),
    "logits that are not there": (edited(logits=False), "has bytes behind its end"),
    "logits a number": (edited(logits=1), "another type"),
    "metadata a list": (edited(metadata=[]), "another type"),
    "metadata with NaN": (edited(metadata={"a": float("nan")}), "makes no sense"),
    "the digest a number": (edited(payload_sha256=5), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tiny_model, good, tmp_path, name):
    change, words = HEADERS[name]
    header, payload = split(good)
    path = tmp_path / "bad.kvq"
    path.write_bytes(sealed(change(header), payload))
    if name == "the digest a number":
        text = json.dumps(header | {"payload_sha256": 5}).encode()
        path.write_bytes(sealed(text, payload))
    refused(tiny_model, path, words, str(path))


def page(session, precision):
    return session.store.buckets[named(precision)].pages[0]


def set_page(precision, side, value):
    def change(session):
        getattr(page(session, precision), side).slots[0].scales[1, 2, 3] = value

    return change


def set_positions(*values):
    def change(session):
        page(session, "8").positions[: len(values)] = values

    return change


def set_half(side, value):
    def change(session):
        getattr(page(session, "16"), side).slots[0].codes.view("<f2")[0, 0, 0, 0, 0] = value

    return change


def set_token(value):
    def change(session):
        session.tokens[5] = value

    return change


def set_logit(value):
    def change(session):
        session.last_logits[9] = value

    return change


def set_window(value):
    def change(session):
        session.store.window.values.scales[0, 0] = value

    return change


def set_bits(value):
    def change(session):
        session.store.window.chosen[2] = value

    return change


# The arrays: name -> (change to the session before it is saved, words). Positions 1, 5, 9, ... are stored at 8 bits.
ARRAYS = {
    "a token outside the vocabulary": (set_token(512), "token ids outside the vocabulary"),
    "a token of 32 bits": (set_token(2**32 - 1), "token ids outside the vocabulary"),
    "a logit that is NaN": (set_logit(np.nan), "logits that are not finite"),
    "a logit that is infinite": (set_logit(-np.inf), "logits that are not finite"),
    "a logit that is huge": (set_logit(3e38), "logits that are not finite"),
    "a position twice in a bucket": (set_positions(1, 1), "positions out of order"),
    "a position of another bucket": (set_positions(2), "positions that occur twice"),
    "positions in another order": (set_positions(5, 1), "positions out of order"),
    "a position of the window": (set_positions(1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 55), "positions"),
    "a position beyond the text": (set_positions(1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 10**9), "positions"),
    "a negative position": (set_positions(-1), "positions out of order"),
    "the least position": (set_positions(-(2**31)), "positions out of order"),
    "a key scale that is NaN": (set_page("4", "keys", np.nan), "scales or halves that are not finite"),
    "a value scale that is infinite": (set_page("2", "values", np.inf), "scales or halves that are not finite"),
    "a negative scale": (set_page("8", "values", -1), "scales or halves that are not finite"),
    "a half that is NaN": (set_half("keys", np.nan), "scales or halves that are not finite"),
    "a half that is infinite": (set_half("values", -np.inf), "scales or halves that are not finite"),
    "a window scale that is NaN": (set_window(np.nan), "scales out of range in the recent window"),
    "a window scale that no half can follow": (set_window(60000), "scales out of range in the recent window"),
    "a negative window scale": (set_window(-0.5), "scales out of range in the recent window"),
    "a token to be stored at a precision that no codec has": (set_bits(7), "precisions that do not exist"),
    "a token to be stored at none": (set_bits(0), "precisions that do not exist"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_no_session_writes_are_refused(tiny_model, tmp_path, name):
    change, words = ARRAYS[name]
    path = tmp_path / "bad.kvq"
    saved(tiny_model, path, change)
    refused(tiny_model, path, words, str(path))


@pytest.mark.slow
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    numbers=st.lists(
        st.tuples(st.sampled_from(["tokens", "window", "recent", "sink", "prefill_chunk", "kv_bits", "kv_memory"]),
                  st.one_of(st.integers(-2, 300), st.sampled_from([2**31, 2**63, None, 1.5]))),
        max_size=2,
    ),
)  # fmt: skip
@examples(150)
def test_with_right_digests_any_content_is_refused_or_a_session_that_runs(
    tiny_model, good, tmp_path_factory, flips, numbers
):
    header, payload = split(good)
    payload = bytearray(payload)
    for place, mask in flips:
        payload[int(place * len(payload))] ^= mask
    path = tmp_path_factory.getbasetemp() / "forged.kvq"
    path.write_bytes(sealed(header | dict(numbers), bytes(payload)))
    tracemalloc.start()
    try:
        session = tiny_model.load_session(path)
    except SessionError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_NBYTES
    try:
        continued(session, 3)
        session.append(IDS[:20])
        session.trim(30)
    except KvqError:
        return
    assert contents(session.fork()) == contents(session)
