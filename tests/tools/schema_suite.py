"""Answers to all schemas of `tests/tools/schemas.py`: `python -m tests.tools.schema_suite [MODEL ...]`.

Of each model: how many texts came to their end, how many of those are valid, how many were cut, and what a token took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import kvq
from kvq.runtime.session.model import Model
from tests.tools.schemas import SCHEMAS, problems

QUESTION = [{"role": "user", "content": "Fill in the form, as JSON."}]
MOST = 200  # tokens of a text


class Filled(NamedTuple):
    """What a model made of a schema.

    Attributes:
        name: of the schema.
        finished: whether the text came to its end.
        problems: what a validator has against it, if it did.
        tokens, seconds: of the text, without the schema's compilation and the question.
    """

    name: str
    finished: bool
    problems: list[str]
    tokens: int
    seconds: float


def filled(
    model: Model, schemas: Mapping[str, Any], *, most: int = MOST, temperature: float = 0.7, seed: int = 1
) -> Iterator[Filled]:
    """A text for each schema."""
    template, session = model.chat_template, model.session()
    session.append(template.encode(QUESTION))
    for name, schema in schemas.items():
        options: dict[str, Any] = {"max_tokens": most, "temperature": temperature, "seed": seed}
        fork, text, reason, tokens, begun = session.fork(), "", None, 0, 0.0
        for response in fork.generate(schema=schema, stop_tokens=template.stop_tokens, **options):
            begun = begun or time.perf_counter()  # at the first token
            text, reason, tokens = text + response.text, response.finish_reason, tokens + 1
        seconds = time.perf_counter() - begun
        yield Filled(name, reason == "stop", problems(schema, text) if reason == "stop" else [], tokens - 1, seconds)


def main(models: list[str]) -> int:
    """Print a line for each model; exit code 1 where a text that came to its end is not valid."""
    wrong = 0
    for name in models:
        rows = []
        for row in filled(kvq.load(name), SCHEMAS):
            rows.append(row)
            for problem in row.problems:
                print(f"  {row.name}: {problem}", flush=True)
        finished, invalid = [row for row in rows if row.finished], [row for row in rows if row.problems]
        tokens, seconds = sum(row.tokens for row in rows), sum(row.seconds for row in rows)
        cut, each = [row.name for row in rows if not row.finished], 1000 * seconds / max(1, tokens)
        print(
            f"{name}: {len(rows)} schemas, {len(finished)} finished, {len(finished) - len(invalid)} of them valid,"
            f" {len(cut)} cut at {MOST} tokens ({', '.join(cut) or 'none'}), {each:.1f} ms a token of {tokens}",
            flush=True,
        )
        wrong += len(invalid)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["kvq-books"]))
