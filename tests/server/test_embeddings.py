"""/v1/embeddings by the official client: the library's vectors."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest

TEXTS = ["The ship sailed over the sea.", "Nobody spoke."]


def test_vectors_are_those_of_the_library(client, model):
    answer = client.embeddings.create(model="kvq-books", input=TEXTS, encoding_format="float")
    assert [each.index for each in answer.data] == [0, 1]
    for each, text in zip(answer.data, TEXTS, strict=True):
        np.testing.assert_allclose(each.embedding, model.embed(text), atol=1e-6)
    assert answer.usage.total_tokens == sum(len(model.encode(text)) for text in TEXTS)
    ids = model.encode(TEXTS[0])
    for given in (TEXTS[0], ids, [ids]):  # the client asks for base64 by itself, and decodes it
        (one,) = client.embeddings.create(model="kvq-books", input=given).data
        np.testing.assert_allclose(one.embedding, answer.data[0].embedding, atol=1e-6)


def test_base64_is_of_little_endian_floats(server, model):
    asked = {"input": TEXTS[0], "encoding_format": "base64"}
    (found,) = server.post("/embeddings", asked).json()["data"]
    decoded = np.frombuffer(base64.b64decode(found["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, model.embed(TEXTS[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"dimensions": 8}, 400, "dimensions is not supported"),
        ({"input": ""}, 400, "non-empty"),
        ({"input": []}, 400, "non-empty"),
        ({"input": ["a", 5]}, 400, "non-empty"),
        ({"input": ["a"] * 257}, 400, "at most 256"),
        ({"input": [99999]}, 400, "token ids must be"),
        ({"input": "word " * 3000}, 400, "shorten"),
        ({"encoding_format": "int8"}, 400, "float or base64"),
        ({"model": "gpt"}, 404, "no model"),
        ({"zzz": 1}, 400, "unknown field"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, changes, status, words):
    answer = server.post("/v1/embeddings", {"input": "a", **changes})
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_who_has_gone_away_holds_up_nobody(server):
    """More long requests than any pool has threads, none of which anybody waits for."""
    body = json.dumps({"input": ["word " * 1500] * 40}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    for _ in range(12):
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port)) as gone:
            gone.sendall(head.encode() + body)
    for _ in range(3):
        answer = server.post("/v1/completions", {"prompt": "The ship", "max_tokens": 2})
        assert answer.status_code == 200
        assert server.post("/tokenize", {"content": "a"}).status_code == 200
    (found,) = server.post("/v1/embeddings", {"input": "a"}).json()["data"]
    assert len(found["embedding"]) > 1


def test_requests_at_once_take_turns_text_by_text(server):
    """A short one does not wait for all of a long one."""
    done = []

    def ask(name, texts):
        assert server.post("/v1/embeddings", {"input": texts}).status_code == 200
        done.append(name)

    long = threading.Thread(target=ask, args=("long", ["word " * 1500] * 8))
    long.start()
    time.sleep(0.2)
    ask("short", "a")
    long.join()
    assert done == ["short", "long"]
