"""Multiple-choice tasks through the cache: an lm-evaluation-harness model over the runtime.

A choice is scored through the cache: its context is read once, and each choice goes on in a fork of that
session, stepwise, so that every token sees what it would see if it came alone. Tasks come from local JSON files,
one object a line with ``query``, ``choices`` and ``gold``; where the hub can be reached, the harness's own tasks of the
same names are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from kvq.controller.evaluation.divergence import log_softmax
from kvq.runtime.errors import CalibrationError
from kvq.runtime.session.model import Model
from kvq.runtime.session.session import Session

RESAMPLES = 10_000


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
        # Choices of an item share its context, and follow each other once they are put in order.
        order = sorted(range(len(requests)), key=lambda i: requests[i].args[0])
        found: dict[int, tuple[float, bool]] = {}
        read: tuple[list[int], Session] | None = None
        for i in order:
            context, continuation = requests[i].args
            kept, answer = self._encoded(context, continuation)
            if read is None or read[0] != kept:
                session = self.kvq.session(self.policy, **self.options)
                session.append(kept)
                read = (kept, session)
            found[i] = self._score(read[1].fork(), answer)
        return [found[i] for i in range(len(requests))]

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
        """Log-probability of an answer in nats, and whether it is what greedy decoding gives."""
        rows = np.asarray(session.last_logits)[None]  # of the last token of the context
        if len(answer) > 1:
            rows = np.concatenate([rows, session.append(answer[:-1], all_logits=True)])
        logp = log_softmax(rows)
        self.bits.append(session.stats().kv_used_bits or 0.0)
        return float(logp[np.arange(len(answer)), answer].sum()), logp.argmax(1).tolist() == list(answer)

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


def local_task(name: str, file: Path) -> ConfigurableTask:
    """A multiple-choice task from a file of JSON lines.

    Raises:
        CalibrationError: no such file.
    """
    if not file.is_file():
        raise CalibrationError(f"no task file {file}; give the folder that holds {name}.jsonl with --data")
    return ConfigurableTask(
        config={
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file.absolute())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{choices}}",
            "num_fewshot": 0,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        }
    )


def run_tasks(
    model: Model,
    arms: Sequence[tuple[str, dict[str, Any]]],
    tasks: Sequence[str],
    data: Path | None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Accuracy of every arm on every task.

    Args:
        model: the loaded model.
        arms: policy names with further arguments of `Model.session`; the first is the reference.
        tasks: names.
        data: folder of local files; None takes the harness's own tasks from the hub.
        limit: items per task; None is all.

    Returns:
        Rows with task, arm, items, acc, acc_norm (fractions), bits (measured, mean), and for all arms
        but the first "acc_difference" to it with a paired 95 % bootstrap interval.
    """
    rows: list[dict[str, Any]] = []
    for task in tasks:
        right: dict[str, np.ndarray] = {}
        for policy, options in arms:
            lm = CacheLM(model, policy, **options)
            chosen = local_task(task, data / f"{task}.jsonl") if data is not None else task
            found = simple_evaluate(lm, tasks=[chosen], limit=limit, log_samples=True, bootstrap_iters=0)
            samples = found["samples"][task]
            right[policy] = np.array([sample["acc"] for sample in samples], float)
            row: dict[str, Any] = {
                "task": task, "arm": policy, **options, "items": len(samples), "acc": float(right[policy].mean()),
                "acc_norm": float(np.mean([sample["acc_norm"] for sample in samples])),
                "bits": round(float(np.mean(lm.bits)), 3),
            }  # fmt: skip
            if policy != arms[0][0]:
                row["acc_difference"] = _paired(right[policy] - right[arms[0][0]])
            rows.append(row)
    return rows


def _paired(difference: np.ndarray) -> dict[str, float]:
    """Mean of paired differences with a 95 % bootstrap interval over items."""
    rng = np.random.default_rng(0)
    drawn = difference[rng.integers(0, len(difference), (RESAMPLES, len(difference)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}
