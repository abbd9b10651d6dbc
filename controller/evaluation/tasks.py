"""Multiple-choice tasks through the cache: an lm-evaluation-harness model over the runtime.

A choice is scored through the cache: its context is read once, and each choice goes on in a fork of that
session, stepwise, so that every token sees what it would see if it came alone; what all contexts begin with, examples
above all, is read once for all of them. Tasks come from local JSON files, one object a line with ``query``, ``choices``
and ``gold``; where the hub can be reached, the harness's own tasks of the same names are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from kvq.controller.evaluation.items import items_of
from kvq.controller.evaluation.paired import interval
from kvq.controller.evaluation.scoring import score_answer
from kvq.runtime.chat.feeds import shared
from kvq.runtime.errors import CalibrationError
from kvq.runtime.session.model import Model
from kvq.runtime.session.session import Session

STEM = 32  # tokens that contexts share: below, a fork costs more than it saves


class CacheLM(LM):
    """The runtime as a model of the harness.

    Args:
        model: the loaded model.
        policy: precision policy by name.
        options: further arguments of `Model.session`, such as kv_bits.
    """

    def __init__(self, model: Model, policy: str, **options: Any) -> None:
        super().__init__()
        self.kvq, self.policy = model, policy
        self.options = {"prefill": "stepwise"} | options
        self.bits: list[float] = []  # per context, measured after its last choice

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether greedy decoding gives it) of each request."""
        encoded = [self._encoded(*request.args) for request in requests]
        stem = self._stem([kept for kept, _ in encoded])
        # Choices of an item share its context, and follow each other once they are put in order.
        order = sorted(range(len(requests)), key=lambda i: requests[i].args[0])
        found: dict[int, tuple[float, bool]] = {}
        read: tuple[list[int], Session] | None = None
        for i in order:
            kept, answer = encoded[i]
            if read is None or read[0] != kept:
                read = (kept, self._read(kept, stem))
            found[i] = self._score(read[1].fork(), answer)
        return [found[i] for i in range(len(requests))]

    def _stem(self, contexts: list[list[int]]) -> Session | None:
        """What all contexts begin with, read; None where that is not worth a session."""
        same = min(shared(*contexts), min(map(len, contexts)) - 1) if contexts else 0
        if same < STEM:
            return None
        session = self.kvq.session(self.policy, **self.options)
        session.append(contexts[0][:same])
        return session

    def _read(self, kept: list[int], stem: Session | None) -> Session:
        """A session that has read a context."""
        if stem is None:
            session, rest = self.kvq.session(self.policy, **self.options), kept
        else:
            session, rest = stem.fork(), kept[len(stem.tokens) :]
        session.append(rest)
        return session

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what is scored after it."""
        model = self.kvq
        # Encoded together, as the harness does: a token may not begin where the continuation does.
        whole = model.encode(context + continuation)
        kept = model.encode(context) or [model.bundle.manifest.eos_token_ids[0]]
        answer = whole[len(kept) :] or whole[-1:]
        kept = kept[-(model.architecture.context - len(answer)) :]
        return kept, answer

    def _score(self, session: Session, answer: list[int]) -> tuple[float, bool]:
        """As `score_answer`; what the text has taken is noted."""
        found = score_answer(session, answer)
        self.bits.append(session.stats().kv_used_bits or 0.0)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of whole texts, each token after the first given those before it."""
        found = []
        for request in requests:
            ids = self.kvq.encode(request.args[0])[: self.kvq.architecture.context]
            session = self.kvq.session(self.policy, **self.options)
            session.append(ids[:1])
            found.append(self._score(session, ids[1:])[0] if ids[1:] else 0.0)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each context, up to the stop strings of the request."""
        found = []
        for request in requests:
            context, arguments = request.args
            stops = [stop for stop in arguments.get("until", []) if stop]
            session = self.kvq.session(self.policy, **self.options)
            steps = session.generate(context, max_tokens=arguments.get("max_gen_toks", 64), stop=stops, temperature=0.0)
            found.append("".join(step.text for step in steps))
        return found


class Items(list[dict[str, Any]]):
    """Items of a task, as much of a data set as the harness asks of one."""

    features = dict.fromkeys(("query", "choices", "gold"))


class LocalTask(ConfigurableTask):
    """A task whose items are given: the harness would read their file anew, and keep a copy of it in its cache.

    Args:
        items: that are asked.
        config: of the task.
    """

    def __init__(self, items: list[dict[str, Any]], config: dict[str, Any]) -> None:
        self._items = Items(items)
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Have the items where the harness looks for what it has fetched."""
        self.dataset = {"test": self._items}


def local_task(name: str, file: Path, shots: int = 0, seed: int = 0) -> ConfigurableTask:
    """A multiple-choice task from a file of JSON lines.

    Args:
        name: of the task.
        file: its items.
        shots: items drawn as examples, which stand in front of every other one and are not asked themselves.
        seed: draws them.

    Raises:
        CalibrationError: no such file, a line that is no item, or no more items than examples.
    """
    items = items_of(name, file)
    if shots >= len(items):
        raise CalibrationError(f"{file} has {len(items)} items, not enough for {shots} examples; give fewer --shots")
    drawn, *rest = np.split(np.random.default_rng(seed).permutation(len(items)), [shots])
    asked = np.sort(np.concatenate(rest))
    task = LocalTask(
        [items[i] for i in asked],
        {
            "task": name,
            "dataset_path": "json",
            "test_split": "test",
            "output_type": "multiple_choice",
            # Fields by name: of templates it makes numbers where a text looks like one, and literals of lists.
            "doc_to_text": "query",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "num_fewshot": 0,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        },
    )
    return with_examples(task, [items[i] for i in drawn])


def hub_task(name: str, shots: int, seed: int) -> ConfigurableTask:
    """A task of the harness, from the hub, with examples from where it takes its own."""
    task = TaskManager().load([name])["tasks"][name]
    docs = list(task.fewshot_docs()) if shots else []
    return with_examples(task, [docs[i] for i in np.random.default_rng(seed).permutation(len(docs))[:shots]])


def with_examples(task: ConfigurableTask, examples: list[dict[str, Any]]) -> ConfigurableTask:
    """The task with the same examples in front of every item."""
    task.set_config(key="num_fewshot", value=len(examples))
    if examples:
        task.sampler = FirstNSampler(examples)
    return task


def run_tasks(
    model: Model,
    arms: Sequence[tuple[str, dict[str, Any]]],
    tasks: Sequence[str],
    data: Path | None,
    limit: int | None = None,
    shots: int = 0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy of every arm on every task.

    Args:
        model: the loaded model.
        arms: policy names with further arguments of `Model.session`; the first is the reference.
        tasks: names.
        data: folder of local files; None takes the harness's own tasks from the hub.
        limit: items per task; None is all.
        shots: examples in front of every item, the same ones for all.
        seed: draws them.

    Returns:
        Rows with task, arm, shots, items, acc, acc_norm (fractions), bits (measured, mean), and for all arms
        but the first "acc_difference" to it with a paired 95 % bootstrap interval.
    """
    rows: list[dict[str, Any]] = []
    for task in tasks:
        exact: np.ndarray | None = None
        for policy, options in arms:
            lm = CacheLM(model, policy, **options)
            if data is not None:
                chosen = local_task(task, data / f"{task}.jsonl", shots, seed)
            else:
                chosen = hub_task(task, shots, seed)
            # Not by `simple_evaluate`, which spends ten seconds on the machine's description.
            found = evaluate(lm, {task: chosen}, limit=limit, log_samples=True, bootstrap_iters=0)
            samples = found["samples"][task]
            right = np.array([sample["acc"] for sample in samples], float)
            row: dict[str, Any] = {
                "task": task, "arm": policy, **options, "shots": shots, "items": len(samples),
                "acc": float(right.mean()), "acc_norm": float(np.mean([sample["acc_norm"] for sample in samples])),
                "bits": round(float(np.mean(lm.bits)), 3),
            }  # fmt: skip
            if exact is None:
                exact = right
            else:
                row["acc_difference"] = interval(right - exact)
            rows.append(row)
    return rows
