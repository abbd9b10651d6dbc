"""A session: one text on its way through the model, with its KV store and its policy."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from kvq.runtime.compute.backends import make_backend
from kvq.runtime.compute.runner import Runner, Timer
from kvq.runtime.errors import ContextError, PolicyError, PromptError, SessionError
from kvq.runtime.keywords import is_integer, named_keywords
from kvq.runtime.kv.store import KVStore, distinct_nbytes
from kvq.runtime.policy.base import DEFAULT_POLICY, Policy, protect_bits_for
from kvq.runtime.policy.budget import Budget
from kvq.runtime.policy.chooser import Chooser
from kvq.runtime.precision.table import PROTECTED
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.drafting import Drafter
from kvq.runtime.session.exclusive import Exclusive
from kvq.runtime.session.generation import GenerationOptions, Response, stream
from kvq.runtime.session.header import MOST_TOKENS, PREFILLS
from kvq.runtime.session.shifting import Shifts
from kvq.runtime.session.statistics import Clock, Stats, size, stats_of

if TYPE_CHECKING:
    from kvq.runtime.policy.features import Seen
    from kvq.runtime.session.model import Model

SINK = 4  # first tokens that are protected unless told otherwise


class Session:
    """Tokens, their cached keys and values, and the choice of their precision.

    Made by `Model.session`. One thread at a time may use a session, a second one gets a SessionError; different
    sessions of one model are independent and may run in different threads.

    Args:
        model: the loaded model.
        policy: a name (see `kvq.POLICIES`) or a `Policy`.
        recent: newest tokens, kept at `protect_bits`.
        sink: first tokens, kept likewise: attention rests on them, see docs/quality.md.
        prefill_chunk: most tokens per forward pass; bounds the memory of a long prompt.
        prefill: how tokens appended together are processed. "stepwise": each sees what it would see if it came alone,
            in passes of up to recent + 1 tokens, so that neither precisions nor text depend on how tokens are fed.
            "chunked": tokens of a chunk see each other unrounded, which is faster. "auto": stepwise where the policy
            looks at tokens, else chunked.
        backend: attention backend; None reads KVQ_BACKEND, "auto" takes the fastest.
        kv_bits: most bits per stored value, all told, or
        kv_memory: most bytes of the store; either is kept as `kvq.runtime.policy.budget` defines it.
        protect_bits: 8 or 16; None is 16 for a policy that stores all keys or all values at 8 or more, or under
            a budget of more than 8 bits a value, else 8.

    Attributes:
        exclusive: held by the thread that changes or copies it.
        changes: of its text so far.
        store: keys and values of the text.
        chooser: chooses the precisions of its tokens.
        tokens, pending: ids stored, and ids sampled after them but not fed to the model yet.
        stepwise: whether tokens appended together are processed so.
        most: tokens that it takes in one pass.
        prefill_clock, decode_clock: what passes over several of its tokens took, and over one.
        drafter: knows what has to be appended for what is generated, several tokens at a time where it can.
        shifts: what had to make room.
        metadata: the caller's own: JSON values, saved and loaded with the session.
    """

    _torn = False  # in the middle of a change of text and store

    def __init__(
        self,
        model: Model,
        policy: str | Policy = DEFAULT_POLICY,
        *,
        recent: int = 16,
        sink: int = SINK,
        prefill_chunk: int = 128,
        prefill: str = "auto",
        backend: str | None = None,
        kv_bits: float | None = None,
        kv_memory: float | None = None,
        protect_bits: int | None = None,
    ) -> None:
        if not isinstance(prefill, str) or prefill not in PREFILLS:
            raise PolicyError(f"no prefill {prefill!r:.60}; use one of: {', '.join(PREFILLS)}")
        for name, value, least in (("recent", recent, 0), ("sink", sink, 0), ("prefill_chunk", prefill_chunk, 1)):
            if not is_integer(value) or value < least:
                raise PolicyError(f"{name} must be an integer of at least {least}, got {value!r:.60}")
            if value > MOST_TOKENS:
                raise PolicyError(f"{name} must be at most {MOST_TOKENS}, got {value!r:.60}")
        recent, sink, prefill_chunk = int(recent), int(sink), int(prefill_chunk)
        if protect_bits is not None and (not is_integer(protect_bits) or protect_bits not in PROTECTED):
            raise PolicyError(f"protect_bits must be 8 or 16, got {protect_bits!r:.60}")
        shape = model.architecture
        self.model = model
        self.exclusive, self.changes = Exclusive(), 0
        self.metadata: dict[str, Any] = {}
        self._wanted_backend = backend
        self.backend = make_backend(backend)
        self.tokens: list[int] = []
        self.last_logits: np.ndarray | None = None  # after the last cached token, float32 [vocab]
        self.pending: list[int] = []  # sampled but not yet fed to the model: the next append begins with them
        geometry = shape.geometry
        chooses, window, budget = model.policy(policy), min(recent, shape.context), None
        bits = protect_bits_for(chooses, kv_bits) if protect_bits is None else int(protect_bits)
        codecs = self.backend.codecs._replace(feedback=model.bundle.key_feedback, turns=model.bundle.key_turns)
        self.store = KVStore(geometry, window, sink, codecs, bits)
        if kv_bits is not None or kv_memory is not None:
            budget = Budget(
                chooses, geometry, shape.context, window, sink, kv_bits=kv_bits, kv_memory=kv_memory, protect_bits=bits
            )
        self.chooser = Chooser(chooses, shape.vocab, window, budget, shape.last_window)
        self.store.choose_open = self.chooser.settle
        self.prefill_chunk, self.prefill = prefill_chunk, prefill
        looks = chooses.reads is None or chooses.reads - {"positions"}
        self.stepwise = prefill == "stepwise" or (prefill == "auto" and bool(looks))
        self.most = prefill_chunk
        if self.stepwise:
            self.most = min(prefill_chunk, max(1, window)) if self.backend.rows_alike else 1
        self.runner = Runner(self.backend, model.engine, self.most, self.stepwise)
        self.drafter = Drafter(self)
        self._timer: Timer | None = None
        self.prefill_clock, self.decode_clock, self.shifts = Clock(), Clock(), Shifts()
        model.tell(self.note)
        for name, value in (("recent", recent), ("sink", sink)):
            if value > shape.context:
                model.tell(
                    f"{name} {value} is more than the context of {shape.context} tokens: all stay at {bits} bits"
                )

    def __repr__(self) -> str:
        pending = f" and {len(self.pending)} to come" if self.pending else ""
        return (
            f"<kvq.Session of {self.model.bundle.manifest.name}: {len(self.tokens)} tokens{pending} of"
            f" {self.model.architecture.context}, policy {self.policy.name}, {size(self.store.nbytes)}>"
        )

    @property
    def policy(self) -> Policy:
        """Chooses the precisions."""
        return self.chooser.policy

    @property
    def budget(self) -> Budget | None:
        """What the policy is kept to."""
        return self.chooser.budget

    @property
    def kv_bits(self) -> float | None:
        """Most bits per stored value, all told, if that is the budget."""
        return self.budget.kv_bits if self.budget else None

    @property
    def kv_memory(self) -> float | None:
        """Most bytes of the store, if that is the budget."""
        return self.budget.kv_memory if self.budget else None

    @property
    def timer(self) -> Timer | None:
        """Told what each step is busy with besides the model: "choose", "count", "uncertainty"; None: nobody asks."""
        return self._timer

    @timer.setter
    def timer(self, timer: Timer | None) -> None:
        self._timer = self.runner.timer = timer

    @property
    def note(self) -> str:
        """What the user should know of the policy that was chosen for want of a name; empty if nothing."""
        return self.policy.note

    @property
    def room(self) -> int:
        """Tokens that still fit into the context."""
        return self.model.architecture.context - len(self.tokens) - len(self.pending)

    def append(
        self,
        ids: Sequence[int] | np.ndarray,
        all_logits: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Feed tokens to the model and store them.

        In a chunked prefill tokens of one chunk see each other unrounded and all earlier ones as the store keeps
        them, so at low precisions the logits, and one choice of a learned policy in a hundred, depend on how a text
        is chunked; a stepwise one gives what appending the tokens one by one gives.

        Args:
            ids: token ids, at least one.
            all_logits: return the logits after every appended token instead of the last alone.
            progress: called after each chunk with the tokens done and to do; raising there leaves those done appended.

        Returns:
            float32 [vocab], or float32 [len(ids), vocab] with all_logits.

        Raises:
            PromptError: no ids, or an id outside the vocabulary.
            ContextError: more tokens than the context has room for; nothing was appended.
            NonFiniteError: the model produced NaN or infinity; earlier chunks stay appended.
        """
        return Appending(self, ids, all_logits, progress).run()

    def checked(self, ids: Sequence[int] | np.ndarray, room: int | None = None) -> np.ndarray:
        """ids as int64 [tokens], or a named error; room: for so many, that of the context if not given."""
        shape = self.model.architecture
        try:
            new = np.asarray(ids)
        except ValueError:
            new = np.zeros((0, 0))
        if new.ndim != 1:
            raise PromptError("token ids must be a flat sequence of integers")
        if not new.size:
            raise PromptError("the prompt is empty: give at least one token")
        if new.dtype.kind not in "iu" or not 0 <= min(values := new.tolist()) <= max(values) < shape.vocab:
            raise PromptError(f"token ids must be integers in [0, {shape.vocab}); is this another model's tokenizer?")
        if len(new) > (self.room if room is None else room):
            raise ContextError(
                f"{len(new)} tokens do not fit into the context of {shape.context}, {shape.context - self.room} used;"
                " shorten the prompt or use a model with a longer context"
            )
        return new.astype(np.int64)

    def step(self, ids: np.ndarray, end: int, skip: int, logits: np.ndarray) -> None:
        """A pass of this session alone: run the model, choose precisions, store.

        end: length of the text when the call that feeds them is done; skip, logits: as in `Runner.run`.
        """
        self.take(self.runner.run(ids, self.store, self.chooser.needs, skip, logits), end)

    def take(self, seen: Seen, end: int) -> None:
        """Choose precisions for the tokens that a pass has seen, store them, and then count them as the session's.

        end: as in `step`.
        """
        chooser, timer, ids = self.chooser, self._timer, seen.ids
        self._torn, self.changes = True, self.changes + 1
        try:
            with nullcontext() if timer is None else timer("choose"):
                chosen = chooser.choose(self.store, seen, end)
            self.store.append(seen.keys, seen.values, chosen)
        except Exception:  # an interrupt is none: that may come between any two lines
            self._torn = self.store.length != len(self.tokens)
            raise
        self.last_logits = None  # those of an earlier token now, should a later chunk fail
        with nullcontext() if timer is None else timer("count"):
            chooser.count(ids)
        self.tokens += ids.tolist()
        del self.pending[: len(ids)]
        self._torn = False

    @named_keywords(GenerationOptions)
    def generate(
        self, prompt: str | Sequence[int] | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Response]:
        """Continue the text; yields a `Response` per token.

        Options are checked at once; tokens are computed as they are asked for.

        Args:
            prompt: text or token ids, appended first; None goes on with what is there.
            max_tokens: most tokens to generate, 256 if not given; None goes on until the context is full.
            stop: strings that end the text and are not part of it.
            stop_tokens: ids that end it, besides the model's end-of-text ids.
            ignore_eos: do not end at the model's end-of-text ids.
            temperature, top_k, top_p, min_p: of the draw, `Model.sampling` if not given; temperature 0 is greedy.
            repetition_penalty: divides what speaks for tokens anywhere in the text; 1 is off.
            presence_penalty, frequency_penalty: nats taken from tokens that this call has said, once or every time.
            logit_bias: token id -> nats added.
            seed: decides all draws; one is drawn if not given.
            schema: JSON schema that the text keeps to, as JSON text or as the value of one; True is any JSON.
            regex, grammar, choice: a regular expression that it matches, a grammar of Lark's form, texts that it is
                one of. These four need the extra `schema`; a text that max_tokens has cut is cut.
            constraint: one of these, compiled, for this call alone.
            draft: tokens drafted from the text itself and computed in one pass: "auto" for as many as pay, "off", or
                how many; the text is the same.
            logits_processor: a function of (ids before the token, logits float32 [vocab]) that gives logits; or
                several.
            progress: as in `append`, while the prompt is read.
            top_logprobs: how many of the most likely tokens `Response.top_logprobs` reports in the place of each.
            stopping_criteria: a function of the ids up to a token, that one included; true ends the text. Or several.
            context_shift: true goes on where the context is full: the sinks, or so many first tokens, and the newest
                half of the rest are read anew, see docs/sessions.md.

        Raises:
            PromptError, ContextError: the prompt is empty, not of this model's ids, or does not fit.
            SamplingError: an option is out of its range.
            GrammarError: a schema, regex, grammar or choice that is not valid or cannot be held to.
            OptionError: an option that there is not.
        """
        return stream(self, prompt, **options)

    def trim(self, length: int) -> None:
        """Forget every token at a position >= length; the next append continues there.

        The last remaining token is run through the model again for its logits, and with it those
        that should stand in the window but have left it. Afterwards every token is stored at
        the precision it would have without the rest; values of re-run tokens may differ a little at
        low precisions, because they now read quantized predecessors. Where layers with a window no longer have what
        the text then needs, the whole text is run again.

        Raises:
            ContextError: length is negative or beyond the cached tokens.
        """
        if not is_integer(length) or not 0 <= length <= len(self.tokens):
            raise ContextError(f"cannot trim to {length!r:.40} tokens; give a number from 0 to {len(self.tokens)}")
        with self.exclusive:
            if length:
                self.check_whole()
            self._trim(int(length))

    def _trim(self, length: int) -> None:
        self._torn, self.changes = True, self.changes + 1
        window = self.store.window
        keep = begin = max(0, length - max(1, window.capacity))  # where the window has to start afterwards
        if self.store.length - window.count <= begin:
            keep = max(0, length - 1)
        if keep < self.store.least_trim:
            keep = 0
        again = self.tokens[keep:length]
        self.pending.clear()
        self.store.trim(keep)
        self.tokens = self.tokens[:keep]
        self.chooser.restart(self.tokens)
        self.drafter.forget()
        self.last_logits = None
        self._torn = False
        if again:
            self.append(again)

    def fork(self) -> Session:
        """A second session with the same text, settings and metadata, which goes its own way from here.

        The two share the pages of the text so far, see `kv_nbytes`, and may run in different threads.
        With the same seed both continue alike.
        """
        twin = Session(
            self.model, self.policy, recent=self.store.window.capacity, sink=self.store.sink,
            prefill_chunk=self.prefill_chunk, prefill=self.prefill, backend=self._wanted_backend,
            protect_bits=self.store.protect_bits,
        )  # fmt: skip
        twin.chooser.budget = self.budget
        with self.exclusive:
            self.check_whole()
            twin.restore(self.store.fork(twin.store.codecs), list(self.tokens), list(self.pending), self.last_logits)
            twin.metadata = copy.deepcopy(self.metadata)
        return twin

    def restore(self, store: KVStore, tokens: list[int], pending: list[int], last_logits: np.ndarray | None) -> None:
        """Take over a text that is stored already, as forks and session files bring it: for an empty session.

        Args:
            store: holds the keys and values of the tokens; of this session's geometry, window and codecs.
            tokens: ids it holds.
            pending: ids sampled after them but not stored.
            last_logits: float32 [vocab] after the last stored token, copied; None where it is not known.
        """
        self.store, self.changes = store, self.changes + 1
        store.choose_open = self.chooser.settle
        self.tokens, self.pending = tokens, pending
        self.last_logits = None if last_logits is None else last_logits.copy()
        self.chooser.restart(tokens)
        self.drafter.forget()

    def check_whole(self) -> None:
        """Raise SessionError where an interrupted step has left text and store apart."""
        if self._torn or self.store.length != len(self.tokens):
            told = "the session was interrupted in the middle of a step and cannot go on"
            raise SessionError(f"{told}; make a new one, load the last one saved, or begin again after trim(0)")

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the session to a file, atomically; `Model.load_session` reads it. See docs/sessions.md.

        Raises:
            SessionError: metadata is no JSON, or the file cannot be written, or is no session and overwrite is false.
        """
        from kvq.runtime.session.file import write_session

        with self.exclusive:
            self.check_whole()
            write_session(self, path, overwrite)

    def stats(self) -> Stats:
        """What ran and what it took, so far."""
        return stats_of(self)


def kv_nbytes(sessions: Iterable[Session]) -> int:
    """Bytes of the KV stores of some sessions; pages that forks share are counted once."""
    return distinct_nbytes([session.store for session in sessions])
