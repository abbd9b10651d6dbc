"""Counts since the start in Prometheus' text format: requests, tokens, times, bytes and bits of caches."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

# Seconds, the edges of the histograms.
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
REQUEST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 16.0)


class Histogram:
    """Values by size. Any thread may add.

    Args:
        edges: upper ones of the classes, ascending; above the last there is one more.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        with self._lock:
            self._counts[bisect.bisect_left(self._edges, value)] += times
            self._sum += value * times

    def lines(self, name: str) -> Iterable[str]:
        """As Prometheus reads it."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for edge, count in zip((*map(str, self._edges), "+Inf"), counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{edge}"}} {below}'
        yield f"{name}_sum {total:.9g}"
        yield f"{name}_count {below}"


class Metrics:
    """What requests were and took.

    Attributes:
        paths: of the routes.
    """

    def __init__(self) -> None:
        self.paths: frozenset[str] = frozenset()
        self.first_token, self.between = Histogram(FIRST_TOKEN), Histogram(BETWEEN_TOKENS)
        self.request, self.bits = Histogram(REQUEST), Histogram(BITS)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self._answers: Counter[tuple[str, int]] = Counter()

    def answered(self, path: str, status: int) -> None:
        """Count an answer; paths that are no route's are one."""
        self._answers[path if path in self.paths else "other", status] += 1

    def text(self, gauges: dict[str, tuple[str, float]]) -> str:
        """All of it; gauges: name -> what it is, and its value now."""
        lines = ["# HELP kvq_requests_total Answers by path and status.", "# TYPE kvq_requests_total counter"]
        for (path, status), count in sorted(self._answers.items()):
            lines.append(f'kvq_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, what, value in (
            ("kvq_prompt_tokens_total", "Tokens of prompts.", self.prompt_tokens),
            ("kvq_cached_tokens_total", "Those of them that were not processed again.", self.cached_tokens),
            ("kvq_generated_tokens_total", "Tokens generated.", self.generated_tokens),
            ("kvq_drafted_tokens_total", "Tokens computed as drafts.", self.drafted_tokens),
            ("kvq_accepted_tokens_total", "Those of them that were said.", self.accepted_tokens),
        ):
            lines += [f"# HELP {name} {what}", f"# TYPE {name} counter", f"{name} {value}"]
        for name, what, histogram in (
            ("kvq_first_token_seconds", "From a request to its first token.", self.first_token),
            ("kvq_token_seconds", "From one token of a text to the next.", self.between),
            ("kvq_request_seconds", "From a request for text to the end of its answer.", self.request),
            ("kvq_bits", "Bits a cached value of a finished text, all told.", self.bits),
        ):
            lines += [f"# HELP {name} {what}", f"# TYPE {name} histogram", *histogram.lines(name)]
        for name, (what, now) in gauges.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} gauge", f"{name} {now:.12g}"]
        return "\n".join(lines) + "\n"
