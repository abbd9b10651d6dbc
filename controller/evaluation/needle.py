"""Retrieval through the cache: what a document says is asked for at its end, and every arm is held to the exact cache.

A document is read once per arm and forked for each of its questions, stepwise, so that every token sees what it would
see if it came alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kvq.controller.evaluation.filler import Filler
from kvq.controller.evaluation.haystack import KINDS, Haystack, haystack
from kvq.controller.evaluation.paired import interval
from kvq.controller.evaluation.scoring import score_answer
from kvq.runtime.chat.conversation import has_template
from kvq.runtime.chat.documents import BREAK
from kvq.runtime.chat.feeds import shared
from kvq.runtime.errors import ContextError
from kvq.runtime.session.model import Model

Arm = tuple[str, dict[str, Any]]
Progress = Callable[[int, int, str], None]
# A document's questions as ids: of the prompt up to what is looked for, and of that.
Prompts = list[tuple[list[int], list[int]]]
# What is said to them, as `score_answer`, and the bits per value that it takes.
Answers = tuple[list[tuple[float, bool]], float]


@dataclass
class Found:
    """What an arm has answered to the documents of one kind and length.

    Attributes:
        loglik: float64 [documents, questions], log-probability of the right answers in nats.
        hits: bool [documents, questions], whether greedy decoding gives them.
        bits: float64 [documents], bits per value of the cache, from the end of the last question.
    """

    loglik: np.ndarray
    hits: np.ndarray
    bits: np.ndarray


def prompts(model: Model, document: Haystack) -> Prompts:
    """Every question of a document as the model reads it.

    With a chat template the document is in the turn of the system, where the template has one, and the question in the
    user's; the reply has begun. Without, the document is followed by the beginning of the answer.
    """
    found = []
    for question in document.questions:
        if has_template(model):
            template = model.chat_template
            if template.takes_system:
                turns = [("system", document.text), ("user", question.asked)]
            else:
                turns = [("user", document.text + BREAK + question.asked)]
            text = template.render_guarded([{"role": role, "content": content} for role, content in turns])
            encode: Callable[[str], list[int]] = partial(template.encode_guarded, beginning=True)
        else:
            text, encode = document.text + BREAK, model.encode
        before, whole = encode(text + question.begun), encode(f"{text}{question.begun} {question.answer}")
        same = shared(before, whole)  # a token may not begin where the answer does
        found.append((whole[:same], whole[same:]))
    return found


def longest(model: Model, document: Haystack) -> int:
    """Tokens of a document with its longest question and answer."""
    return max(len(before) + len(answer) for before, answer in prompts(model, document))


def documents(
    model: Model, kind: str, tokens: int, items: int, depths: int, filler: Filler, seed: int
) -> Iterator[tuple[Haystack, Prompts]]:
    """Documents of a kind and a length, the same ones for the same arguments.

    Raises:
        ContextError: a length beyond the model's context.
        CalibrationError: as `haystack`.
    """
    if tokens > model.architecture.context:
        raise ContextError(
            f"{tokens} tokens do not fit into the model's context of {model.architecture.context}; give fewer --tokens"
        )
    for item in range(items):
        rng = np.random.default_rng([seed, KINDS.index(kind), tokens, item])
        document = haystack(kind, depths, tokens, filler, rng, partial(longest, model))
        yield document, prompts(model, document)


def answers(model: Model, arm: Arm, asked: Prompts) -> Answers:
    """What an arm says to the questions of one document."""
    policy, options = arm
    session = model.session(policy, prefill="stepwise", **options)
    prefix = min(shared(*(before for before, _ in asked)), min(len(before) for before, _ in asked) - 1)
    session.append(asked[0][0][:prefix])
    found = []
    for before, answer in asked:
        fork = session.fork()
        fork.append(before[prefix:])
        found.append(score_answer(fork, answer))
    return found, fork.stats().kv_used_bits or 0.0


def measure(
    model: Model,
    arms: Sequence[Arm],
    tokens: Sequence[int],
    kinds: Sequence[str] = KINDS,
    items: int = 4,
    depths: int = 5,
    filler: Filler | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """All arms on all documents.

    Args:
        model: the loaded model.
        arms: policy names with further arguments of `Model.session`; the first is the exact cache.
        tokens: lengths of documents with question and answer.
        kinds: of `KINDS`.
        items: documents of each kind and length.
        depths: questions of a document, as `haystack`.
        filler: of the documents; None is the built-in text.
        seed: of the documents.
        progress: called as work goes on.

    Returns:
        Rows as `_row`, by kind and length, and at their end by arm over all of them, "kind" "all" and "tokens" None.

    Raises:
        ContextError, CalibrationError: as `documents`.
    """
    cells = [(kind, length) for length in tokens for kind in kinds]
    # All of them first: one that cannot be had is told before the work begins.
    made = [[asked for _, asked in documents(model, *cell, items, depths, filler or Filler(), seed)] for cell in cells]
    done, total = 0, items * len(kinds) * len(arms) * sum(tokens)

    def read(arm: Arm, asked: Prompts, kind: str, length: int) -> Answers:
        nonlocal done
        if progress:
            progress(done, total, f"{kind} {length}")
        done += length
        return answers(model, arm, asked)

    found = [
        [_found([read(arm, asked, *cell) for asked in texts]) for arm in arms]
        for cell, texts in zip(cells, made, strict=True)
    ]
    if progress:
        progress(total, total, "done")
    rows = [
        {"kind": kind, "tokens": length} | _row(arm, results[at], results[0])
        for (kind, length), results in zip(cells, found, strict=True)
        for at, arm in enumerate(arms)
    ]
    if len(cells) > 1:
        pooled = [_pooled([results[at] for results in found]) for at in range(len(arms))]
        rows += [{"kind": "all", "tokens": None} | _row(arm, pooled[at], pooled[0]) for at, arm in enumerate(arms)]
    return rows


def _found(texts: list[Answers]) -> Found:
    pairs = np.array([pairs for pairs, _ in texts], float)
    return Found(pairs[..., 0], pairs[..., 1] > 0, np.array([bits for _, bits in texts]))


def _pooled(parts: list[Found]) -> Found:
    return Found(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("loglik", "hits", "bits")))


def _row(arm: Arm, found: Found, exact: Found) -> dict[str, Any]:
    """What an arm found, and beside the exact cache; intervals are paired, over documents.

    "loglik" in nats and "hits", a share, are means over questions, "hits_by_question" over documents, in the order of
    the questions, which is that of their depths but for "variables"; "kept" is the share of the exact cache's hits that
    are hits here too, None where it has none.
    """
    policy, options = arm
    row: dict[str, Any] = {
        "arm": policy, **options, "documents": len(found.hits), "questions": found.hits.size,
        "loglik": float(found.loglik.mean()), "hits": float(found.hits.mean()),
        "hits_by_question": found.hits.mean(0).tolist(), "bits": round(float(found.bits.mean()), 3),
    }  # fmt: skip
    if found is not exact:
        row["loglik_difference"] = interval((found.loglik - exact.loglik).mean(1))
        row["hits_difference"] = interval((found.hits.astype(float) - exact.hits).mean(1))
        both, hits = ((part & exact.hits).sum(1).astype(float) for part in (found.hits, exact.hits))
        row["kept"] = interval(both, hits) if hits.any() else None
    return row
