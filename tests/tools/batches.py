"""Files of ``kvq batch`` in tests: many small requests, and what has to be there in the end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from kvq.runtime.server.batch import seed_of
from tests.tools.serving import library

BODY = {"max_tokens": 2, "temperature": 1.0, "ignore_eos": True}


def requests_file(path: Path, count: int) -> dict[str, str]:
    """Write so many requests; prompt of each custom_id."""
    prompts = {f"line {number}": f"The ship {number} went" for number in range(count)}
    lines = [
        {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **BODY}}
        for custom_id, prompt in prompts.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prompts


def lines_of(path: Path) -> int:
    """Whole lines so far."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes().count(b"\n")
    return 0


def assert_answered(path: Path, prompts: dict[str, str], model) -> None:
    """Every answer is there once, and is the library's."""
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(prompts)
    for answer in answers:
        custom_id = answer["custom_id"]
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        alone = library(model, prompts[custom_id], "int8", seed=seed_of(custom_id), **BODY)
        assert answer["response"]["body"]["choices"][0]["text"] == alone, custom_id
