"""What a session really did: tokens, bytes and times, measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq.runtime.session.session import Session


@dataclass
class Clock:
    """Accumulated work of one kind: prefill or decode."""

    tokens: int = 0
    seconds: float = 0.0
    bytes_read: int = 0  # weights and caches that the passes had to read
    sessions: int = 0  # that shared the pass of each token, added up

    def add(self, tokens: int, seconds: float, bytes_read: int, sessions: int = 1) -> None:
        """Count one more piece of work."""
        self.sessions += sessions * tokens
        self.tokens += tokens
        self.seconds += seconds
        self.bytes_read += bytes_read


@dataclass(frozen=True)
class Stats:
    """A snapshot of a session; bytes are measured from its arrays.

    Attributes:
        backend, policy, threads: what ran.
        policy_reason: why it is that policy though nobody named it, where a user should know; else empty.
        backend_detail: the instruction set of native attention, and what numpy has done for it; of a fallback, why it
            is one; else empty.
        recent, sink: protected tokens, at
        protect_bits: bits.
        prefill: "stepwise" or "chunked", see `kvq.Session`.
        tokens: in the cache.
        context_shifts, shifted_tokens: how often a full context made room, and the tokens that went.
        precisions: per precision {"tokens", "nbytes", "slack_nbytes"}; nbytes add up to kv_nbytes.
        kv_nbytes, kv_peak_nbytes: bytes of the KV store now and at its largest.
        kv_bits: total bits per stored value (codes, scales, tags and slack), None while empty.
        kv_used_bits: the same of the stored tokens alone, without slack: what a budget of bits limits.
        prefill_tokens, prefill_tokens_per_s: tokens appended several at a time.
        decode_tokens, ms_per_token: tokens appended one at a time, and those that a generation has said.
        decode_sessions: sessions that shared a pass of these, itself included, on average; see `Model.step`.
        drafted_tokens, accepted_tokens: tokens that passes have computed as drafts, and those of them that were said.
        draft_reason: why there are no drafts; empty where there can be.
        gb_per_s: weights and caches read by decode steps over their time, 1e9 bytes a second.
        huge_weight_nbytes: bytes of the loaded graphs that stand on huge pages, see `kvq.runtime.machine.hugepages`.
    """

    backend: str
    backend_detail: str
    policy: str
    policy_reason: str
    threads: int
    recent: int
    sink: int
    protect_bits: int
    prefill: str
    tokens: int
    context_shifts: int
    shifted_tokens: int
    precisions: dict[str, dict[str, Any]]
    kv_nbytes: int
    kv_peak_nbytes: int
    kv_bits: float | None
    kv_used_bits: float | None
    prefill_tokens: int
    prefill_tokens_per_s: float | None
    decode_tokens: int
    decode_sessions: float | None
    ms_per_token: float | None
    gb_per_s: float | None
    drafted_tokens: int
    accepted_tokens: int
    draft_reason: str
    huge_weight_nbytes: int

    @property
    def policy_text(self) -> str:
        """Name of the policy for people, with the reason for it where there is one."""
        return f"policy {self.policy}" + (f" ({self.policy_reason})" if self.policy_reason else "")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.tokens} tokens cached in {size(self.kv_nbytes)}"]
        if self.kv_bits is not None:
            taken, used = f"{self.kv_bits:.2f}", f"{self.kv_used_bits:.2f}"
            parts[0] += f" ({taken} bits/value" + (")" if used == taken else f", {used} without free room)")
        if self.context_shifts:
            times = "once" if self.context_shifts == 1 else f"{self.context_shifts} times"
            parts.append(f"context full {times}, {self.shifted_tokens} tokens removed")
        held = [f"{name} {row['tokens']}" for name, row in self.precisions.items() if row["tokens"]]
        parts.append(f"{self.policy_text}: {', '.join(held)}" if held else self.policy_text)
        if self.prefill_tokens_per_s is not None:
            parts.append(
                f"{'stepwise ' * (self.prefill == 'stepwise')}prefill {self.prefill_tokens_per_s:.0f} tokens/s"
            )
        if self.ms_per_token is not None:
            shared = f", {self.decode_sessions:.1f} sessions a pass" if (self.decode_sessions or 1) > 1 else ""
            parts.append(f"decode {self.ms_per_token:.1f} ms/token{shared}, {self.gb_per_s:.1f} GB/s")
        if self.drafted_tokens:
            parts.append(f"{self.accepted_tokens} of {self.drafted_tokens} drafted tokens accepted")
        detail = f" ({self.backend_detail})" if self.backend_detail else ""
        parts.append(f"{self.backend} attention{detail}, {self.threads} threads")
        return " | ".join(parts)


def stats_of(session: Session) -> Stats:
    """What has run in a session, and what its clocks say that it took."""
    store, drafter = session.store, session.drafter
    values, prefill, decode = store.values, session.prefill_clock, session.decode_clock
    return Stats(
        backend=session.backend.name,
        backend_detail=session.backend.detail,
        policy=session.policy.name,
        policy_reason=session.policy.reason,
        threads=session.model.engine.threads,
        recent=store.window.capacity,
        sink=store.sink,
        protect_bits=store.protect_bits,
        prefill="stepwise" if session.stepwise else "chunked",
        tokens=store.length,
        context_shifts=session.shifts.times,
        shifted_tokens=session.shifts.tokens,
        precisions=store.account(),
        kv_nbytes=store.nbytes,
        kv_peak_nbytes=store.peak_nbytes,
        kv_bits=8 * store.nbytes / values if values else None,
        kv_used_bits=8 * store.used_nbytes / values if values else None,
        prefill_tokens=prefill.tokens,
        prefill_tokens_per_s=prefill.tokens / prefill.seconds if prefill.tokens else None,
        decode_tokens=decode.tokens,
        decode_sessions=decode.sessions / decode.tokens if decode.tokens else None,
        ms_per_token=1e3 * decode.seconds / decode.tokens if decode.tokens else None,
        gb_per_s=decode.bytes_read / decode.seconds / 1e9 if decode.tokens else None,
        drafted_tokens=drafter.drafted,
        accepted_tokens=drafter.accepted,
        draft_reason=drafter.reason,
        huge_weight_nbytes=session.model.engine.huge_nbytes,
    )


def size(nbytes: int) -> str:
    """Bytes for people, in decimal units as storage is sold: 1.5 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"
