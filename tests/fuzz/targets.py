"""What a fuzzer may be given bytes for: each target takes any bytes and raises nothing but a KvqError of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvq.runtime.errors import BundleError, KvqError
from kvq.runtime.precision.key_turns import packed, parsed
from kvq.runtime.server.fields import parse_json
from kvq.runtime.server.ollama import parse_chat, parse_generate
from kvq.runtime.server.protocol import Settings, parse_generation
from kvq.runtime.session.header import _parse
from kvq.runtime.text.template import ChatTemplate
from kvq.runtime.text.tokenizer import decoded, encoded, load_tokenizer
from tests.tools.chats import TEMPLATES, USER
from tests.tools.templates import PUBLISHED

Target = Callable[[bytes], None]
HEADER: dict[str, Any] = {
    "kvq": "0.3.0", "model": "tiny", "model_digest": "0" * 64, "tokenizer_digest": None,
    "architecture": {"layers": 3, "hidden": 64, "ffn": 172, "heads": 8, "kv_heads": 4, "head_dim": 8, "vocab": 512,
                     "context": 256},
    "policy": "random", "policy_options": {"seed": 1, "weights": [1, 2.5]}, "recent": 5, "sink": 4,
    "prefill_chunk": 128, "kv_bits": 3.5, "kv_memory": None, "tokens": 60, "pending": [], "window": 5,
    "buckets": [[4, 4, 30], [16, 8, 25]], "logits": True, "metadata": {"chat": {"messages": [], "turns": []}},
    "payload_sha256": "0" * 64, "prefill": "auto",
}  # fmt: skip
LAYERED = HEADER | {
    "architecture": HEADER["architecture"] | {"profiles": {"k3v3": [[2, 3], [3, 3], [3, 2]]}, "windows": [0, 64, 64]},
    "buckets": [[3, 3, 30], [16, 8, 25]], "narrow": [0, 0], "protect_bits": 8,
}  # fmt: skip
TURNS_OF = (3, 4, 8)  # layers, KV heads, channels of a head
REQUESTS = [
    {"prompt": "Hello", "max_tokens": 5, "temperature": 0.5, "top_k": 3, "seed": 7, "stop": ["a"], "logprobs": 2},
    {"prompt": [1, 2, 3], "kv_bits": 3.5, "policy": "rule", "stream": True, "stream_options": {"include_usage": True}},
    {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}],
     "logprobs": True, "top_logprobs": 3, "n": 1, "tools": [], "response_format": {"type": "text"}},
]  # fmt: skip
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": 2, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True}],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": " ?a+|b"}, "behavior": "Isolated", "invert": False},
    "post_processor": None, "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
              "vocab": {"a": 0, "b": 1, "<s>": 2, "ab": 3}, "merges": [["a", "b"]]},
}  # fmt: skip


def session_header(data: bytes) -> None:
    """The JSON at the beginning of a session file."""
    header = _parse(data, "file")
    assert 0 <= header.payload_nbytes < 1 << 200
    header.encode()


def turns(data: bytes) -> None:
    """What turns of keys, and what is stored less for it."""
    try:
        found = parsed(data, *TURNS_OF)
    except ValueError as error:
        raise BundleError(str(error)) from None
    assert np.isfinite(found.of(np.array([0, 17, 1000]))).all()


def template(data: bytes) -> None:
    """A chat template, compiled and run."""
    text = ChatTemplate(data.decode(errors="replace")).render([USER])
    assert len(text) < 1 << 23


def request(data: bytes) -> None:
    """A request's body, at every endpoint that generates."""
    parsers = [parse_generate, parse_chat, partial(parse_generation, chat=False), partial(parse_generation, chat=True)]
    for number, parse in enumerate(parsers, 1):
        try:
            parse(parse_json(data), defaults=Settings())
        except KvqError:
            if number == len(parsers):
                raise


def tokenizer(data: bytes) -> None:
    """A tokenizer.json, and a text there and back."""
    found = load_tokenizer(data.decode(errors="replace"))
    ids = encoded(found, "ab a  b <s> \u00e9" * 20, special=True)
    decoded(found, ids)
    decoded(found, [0, 1, 1 << 30])


TARGETS: dict[str, Target] = {
    "session_header": session_header, "template": template, "request": request, "tokenizer": tokenizer,
    "turns": turns,
}  # fmt: skip
SEEDS: dict[str, list[bytes]] = {
    "session_header": [json.dumps(header).encode() for header in (HEADER, LAYERED)],
    "template": [text.encode() for text in (*TEMPLATES.values(), *PUBLISHED.values())],
    "request": [json.dumps(body).encode() for body in REQUESTS],
    "tokenizer": [json.dumps(TOKENIZER).encode()],
    "turns": [packed(np.ones((3, pairs), np.float32), np.ones((3, 4, pairs, 2, 8))) for pairs in (1, 2, 4)],
}


PIECES = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"true", b"1e999", b"-1", b"9" * 400, b"\\ud800", b"\x00",
          b"\xff", b"{{", b"}}", b"{%", b"%}", b"|", b"~", b"*", b"range(999999)", b"(a+)+", b"loop"]  # fmt: skip


def changed(data: bytes, changes: list[tuple[float, int, bytes]], cut: float | None) -> bytes:
    """Bytes with pieces put at places (parts of the length) instead of so many bytes, and cut off at a place."""
    for place, length, piece in changes:
        at = int(place * len(data))
        data = data[:at] + piece + data[at + length :]
    return data if cut is None else data[: int(cut * len(data))]


def held(name: str, data: bytes) -> bool:
    """Run a target; whether it took the bytes. What it refuses has to be one line of a length to be read."""
    said = ""
    try:
        TARGETS[name](data)
    except KvqError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000, said
    return not said
