"""A loaded model: bundle, engine and tokenizer, from which sessions are made."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, overload

import numpy as np
from tokenizers import Tokenizer

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.compute.backends import make_backend
from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.failures import refusal
from kvq.runtime.compute.several import JointRunner
from kvq.runtime.errors import KvqError, PolicyError, PromptError, TokenizerError
from kvq.runtime.keywords import named_keywords
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.base import DEFAULT_POLICY, Policy
from kvq.runtime.session.appending import Appending, run_pass
from kvq.runtime.session.asynchronous import aiterate
from kvq.runtime.session.generation import Response, ending_as
from kvq.runtime.session.options import AllOptions, SessionSettings, parted
from kvq.runtime.session.sampling import DEFAULTS, SamplingOptions
from kvq.runtime.session.session import SINK, Session
from kvq.runtime.session.several import Completion, complete_all, of_prompt
from kvq.runtime.session.shifting import of_messages
from kvq.runtime.session.wording import template_of, tokenizer_of
from kvq.runtime.text.continuing import added_tokens, encoded_behind
from kvq.runtime.text.grammar import Grammar, Grammars, Structure
from kvq.runtime.text.template import ChatTemplate
from kvq.runtime.text.tokenizer import encoded

# Makes a policy by its name: (name or policy, bundle, **options).
PolicyMaker = Callable[..., Policy]
# Text, token ids, or messages.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
Prompts = list[str] | Sequence[Sequence[int]] | Sequence[Sequence[Mapping[str, Any]]]


class Model:
    """Weights and tokenizer of one bundle; any number of sessions share them.

    Args:
        bundle: the checked bundle.
        make_policy: makes a policy by name, of (name or policy, bundle, its own options);
            `kvq.controller.policies.make_policy`.
        threads: onnxruntime threads; None uses every available core. One number per process.
        make_conversation: makes a conversation of (session, system prompt); `kvq.Conversation`.

    Attributes:
        notice: told in one line what sessions want their user to know, each line once; None tells nobody.
    """

    def __init__(
        self,
        bundle: Bundle,
        make_policy: PolicyMaker,
        threads: int | None = None,
        make_conversation: Callable[[Session, str | None], Any] | None = None,
    ) -> None:
        self.bundle = bundle
        self._make_policy, self._make_conversation = make_policy, make_conversation
        self.notice: Callable[[str], None] | None = None
        self._told = {""}
        self.engine = Engine(bundle, threads)
        self._joint, self._joint_lock = JointRunner(self.engine), threading.Lock()
        self._check()
        self.optional_tokenizer = tokenizer_of(bundle)

    def __repr__(self) -> str:
        shape = self.architecture
        return (
            f"<kvq.Model {self.bundle.manifest.name}: {shape.layers} layers of {shape.hidden}, vocabulary"
            f" {shape.vocab}, context {shape.context}, {self.engine.threads} threads>"
        )

    def _check(self) -> None:
        """Load the layers in the form sessions will use, and run them and the head once: what does not fit is refused
        now.
        """
        shape = self.architecture
        _ = self.bundle.key_feedback, self.bundle.key_turns  # damaged files are refused here, not by the first session
        try:
            store = KVStore(shape.geometry, recent=0)
            backend = make_backend()
            layers, head = backend.forward_pass(self.engine, 1), backend.head(self.engine, 1)
            layers.forward(np.zeros(1, np.int64), store)
            head.logits(layers.residual)
            head.uncertainty(1)
        except MemoryError as error:
            raise refusal(error, f"{self.path.name} cannot be run", "export the bundle again") from None

    def tell(self, note: str) -> None:
        """Give a line to `notice`, unless it had it before."""
        if self.notice is not None and note not in self._told:
            self._told.add(note)
            self.notice(note)

    def policy(self, policy: str | Policy, /, **options: Any) -> Policy:
        """The policy of that name for this model, with its own options; a `Policy` is returned as it is.

        Raises:
            PolicyError: unknown name, an option the policy does not take, or a bundle that lacks what it needs.
        """
        if reserved := sorted({"policy", "bundle"} & options.keys()):
            raise PolicyError(f"a policy takes no option {reserved[0]}; leave it out")
        return self._make_policy(policy, self.bundle, **options)

    @property
    def path(self) -> Path:
        """Absolute folder of the bundle."""
        return self.bundle.path

    @property
    def architecture(self) -> Architecture:
        """Shape of the model."""
        return self.bundle.manifest.architecture

    @cached_property
    def sampling(self) -> SamplingOptions:
        """How its tokens are drawn where nothing else is asked for: what its makers recommend, as far as the bundle
        says, and `kvq.runtime.session.sampling.DEFAULTS`.
        """
        said = self.bundle.manifest.sampling
        return {**DEFAULTS, **said}  # type: ignore[typeddict-item]

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            TokenizerError: the checkpoint came without one.
        """
        if self.optional_tokenizer is None:
            raise TokenizerError(
                f"the bundle {self.path} has no tokenizer; pass token ids, or export a checkpoint with tokenizer.json"
            )
        return self.optional_tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The bundle's chat template; a plain transcript where it has none.

        Raises:
            ChatTemplateError: the bundle's template is not valid.
        """
        return template_of(self.bundle, self.optional_tokenizer)

    def grammar(self, structure: Structure) -> Grammar:
        """A structure compiled for this model, for any number of texts.

        Raises:
            GrammarError: it cannot be held to, or the extra `schema` is not installed.
            TokenizerError: the bundle has no tokenizer.
        """
        return self._grammars.compile(structure)

    @cached_property
    def _grammars(self) -> Grammars:
        eos = self.bundle.manifest.eos_token_ids or (0,)
        return Grammars(self.tokenizer.to_str(), self.architecture.vocab, eos)

    def encode(self, text: str, beginning: bool = True, before: int | None = None) -> list[int]:
        """Token ids of a text; at the beginning of a session with the tokenizer's own special tokens (BOS).

        Args:
            text: of any length.
            beginning: of a session.
            before: the id that a text which is no beginning stands behind; None where that is not known, and the text
                is encoded as if it stood alone.

        Raises:
            PromptError: not a string, or one that UTF-8 cannot encode.
            ContextError: it has far more tokens than the context; what has a few more is encoded.
            TokenizerError: the bundle has no tokenizer, or it fails.
        """
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise PromptError(f"the prompt must be text or token ids, got {text!r:.60}") from None
        most = self.architecture.context
        if beginning or before is None:
            return encoded(self.tokenizer, text, beginning, most)
        token = self.tokenizer.id_to_token(before)
        return encoded_behind(self.tokenizer, text, token if token in added_tokens(self.tokenizer) else None, most)

    @overload
    def generate(self, prompt: Prompt, **options: Unpack[AllOptions]) -> Iterator[Response]: ...
    @overload
    def generate(self, prompt: Prompts, **options: Unpack[AllOptions]) -> Iterator[Completion]: ...
    @named_keywords(AllOptions)
    def generate(self, prompt: Any, **options: Unpack[AllOptions]) -> Iterator[Response] | Iterator[Completion]:
        """What the model says to a text or a conversation, in a session of its own; yields a `Response` per token.

        Args:
            prompt: text, token ids, or messages, {"role", "content"} each, which go through the chat template; where
                the last one is the assistant's, it goes on. A list of such prompts is given to `generate_all`.
            policy, recent, sink, prefill_chunk, prefill, backend, kv_bits, kv_memory, protect_bits: of the session, as
                in `session`.
            max_tokens, temperature, schema and all others: as in `Session.generate`.

        Raises:
            KvqError: as these two, or `ChatTemplate.encode`.
        """
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str | list | tuple | np.ndarray):
            return self.generate_all(prompt, **options)
        settings, generation = parted(options)
        session = self.session(**settings)
        ids, generation = self._asked(prompt, generation, session.store.sink)
        return session.generate(ids, **generation)

    @overload
    def agenerate(self, prompt: Prompt, **options: Unpack[AllOptions]) -> AsyncGenerator[Response, None]: ...
    @overload
    def agenerate(self, prompt: Prompts, **options: Unpack[AllOptions]) -> AsyncGenerator[Completion, None]: ...
    def agenerate(self, prompt: Any, **options: Unpack[AllOptions]) -> AsyncGenerator[Any, None]:
        """As `generate`, for `async for`: tokens are computed in a thread. Closing it ends the generation.

        Raises:
            KvqError: as `generate`, at once.
        """
        return aiterate(self.generate(prompt, **options))

    @named_keywords(AllOptions)
    def generate_all(self, prompts: Sequence[Prompt], **options: Unpack[AllOptions]) -> Iterator[Completion]:
        """What the model says to each of many prompts; yields a `Completion` for each, in order.

        Each is what `generate` would say. Eight at a time share their passes, where a text is to the bit the same
        then, else they go one after the other; what all of them begin with is processed once. The first has the
        `seed`, each further one the next number.

        Raises:
            PromptError: a text in place of a list.
            KvqError: as `generate`; of a prompt's own, in its place.
        """
        if isinstance(prompts, str):
            raise PromptError("generate_all takes a list of prompts; generate takes one")
        if not isinstance(prompts, Sequence):
            raise PromptError(f"generate_all takes a list of prompts, got {prompts!r:.60}")
        settings, generation = parted(options)
        sink = settings.get("sink", SINK)
        ids: list[Sequence[int]] = []
        options_of_each: list[dict[str, Any]] = []
        for index, prompt in enumerate(prompts):
            try:
                asked, of_one = self._asked(prompt, generation, sink)
                ids.append(self.encode(asked) if isinstance(asked, str) else asked)
            except KvqError as error:
                raise of_prompt(index, error) from None
            options_of_each.append(of_one)
        return complete_all(self, ids, settings, options_of_each)

    def _asked(
        self, prompt: Prompt, generation: dict[str, Any], sink: int
    ) -> tuple[str | Sequence[int], dict[str, Any]]:
        """A prompt as text or token ids, with what ends an answer in the chat template among the options."""
        if not isinstance(prompt, Sequence | np.ndarray):
            raise PromptError(f"a prompt is text, token ids or messages, got {prompt!r:.60}")
        if isinstance(prompt, str) or not len(prompt) or not isinstance(prompt[0], Mapping):
            return prompt, generation  # type: ignore[return-value]
        messages: list[Mapping[str, Any]] = []
        for number, message in enumerate(prompt):
            if not isinstance(message, Mapping):
                raise PromptError(f"message {number} must be a mapping with role and content, got {message!r:.60}")
            messages.append(message)
        template = self.chat_template
        ending: dict[str, Any] = ending_as(template, generation)
        if generation.get("context_shift") is True:
            ending["context_shift"] = of_messages(messages, template.encode_for_reply, self.architecture.context, sink)
        return template.encode_for_reply(messages), generation | ending

    @named_keywords()
    def embed(self, text: str | Sequence[int]) -> np.ndarray:
        """A vector of a text, or of token ids: the mean of the last residual over its tokens, scaled to length 1.

        No model is trained for it here: see `kvq.runtime.session.embedding`.

        Returns:
            float32 [hidden].

        Raises:
            PromptError, ContextError: it is empty, not of this model's ids, or longer than the context.
        """
        from kvq.runtime.session.embedding import embed

        return embed(self, text)

    @named_keywords(SessionSettings)
    def chat(self, system: str | None = None, **settings: Unpack[SessionSettings]) -> Any:
        """A new `kvq.Conversation`: `reply` answers a question, and every turn is cached.

        Args:
            system: system prompt.
            settings: of its session, as in `session`.
        """
        if self._make_conversation is None:
            raise PromptError("this model was made without conversations; take kvq.load, or kvq.Conversation(session)")
        return self._make_conversation(self.session(**settings), system)

    @named_keywords()
    def session(
        self,
        policy: str | Policy | None = None,
        *,
        recent: int = 16,
        sink: int = SINK,
        prefill_chunk: int = 128,
        prefill: str = "auto",
        backend: str | None = None,
        kv_bits: float | None = None,
        kv_memory: float | None = None,
        protect_bits: int | None = None,
    ) -> Session:
        """A new, empty session; arguments as in `Session`.

        Without a policy it is `DEFAULT_POLICY`, or "auto" where a budget is given: "adaptive", or "rule" where the
        bundle has no such controller, which `Session.note` and `Stats.policy_reason` then say.
        """
        if policy is None:
            policy = DEFAULT_POLICY if kv_bits is None and kv_memory is None else "auto"
        return Session(
            self, policy, recent=recent, sink=sink, prefill_chunk=prefill_chunk, prefill=prefill, backend=backend,
            kv_bits=kv_bits, kv_memory=kv_memory, protect_bits=protect_bits,
        )  # fmt: skip

    def step(
        self, feeds: Sequence[tuple[Session, Sequence[int] | np.ndarray]], all_logits: bool = False
    ) -> list[np.ndarray]:
        """Append tokens to several sessions in as few passes as the longest takes: weights are read once a pass.

        Every session gets what `Session.append` gives it, texts of any lengths, precisions and policies; see
        docs/stepwise.md for where the logits may differ in rounding. One thread at a time runs such passes.

        Args:
            feeds: sessions of this model, each once, and the token ids for it: one, or a prompt, or a part of one.
            all_logits: as in `Session.append`.

        Returns:
            For each session what `Session.append` returns.

        Raises:
            PromptError, ContextError: the tokens of one do not fit it, or a session is there twice or of another
                model; nothing was appended to any.
            KvqError: what has gone wrong with one, when the others are done.
        """
        if any(session.model is not self for session, _ in feeds):
            raise PromptError("a step takes sessions of one model; give those of another to its own")
        appendings = [Appending(session, ids, all_logits) for session, ids in feeds]
        failed: list[Exception] = []
        left = appendings
        while left:
            errors = self.run_pass(left)
            failed += [error for error in errors if error is not None]
            left = [each for each, error in zip(left, errors, strict=True) if error is None and not each.finished]
        if failed:
            raise failed[0]
        return [each.result for each in appendings]

    def run_pass(self, appendings: Sequence[Appending]) -> list[Exception | None]:
        """The next pass of some appends together, see `kvq.runtime.session.appending.run_pass`."""
        with self._joint_lock:
            return run_pass(self._joint, appendings)

    @named_keywords()
    def load_session(
        self,
        path: str | os.PathLike[str],
        policy: str | Policy | None = None,
        *,
        prefill: str | None = None,
        backend: str | None = None,
        kv_bits: float | None = None,
        kv_memory: float | None = None,
    ) -> Session:
        """A session that `Session.save` has written; it goes on as if it had never been away.

        Args:
            path: the file.
            policy: for the tokens to come; those stored stay as they are. None takes the file's; with a budget given
                here, "auto" instead of the default policy.
            prefill: as in `Session`, for the tokens to come; None takes the file's.
            backend: as in `Session`.
            kv_bits, kv_memory: a budget for the tokens to come. A policy or a budget given here replaces the
                file's budget.

        Raises:
            SessionError: no such file, one that is damaged, or one of another model, tokenizer or format version.
            PolicyError, BudgetError: a policy or budget given here that this model cannot follow.
        """
        from kvq.runtime.session.file import read_session

        return read_session(self, path, policy, prefill=prefill, backend=backend, kv_bits=kv_bits, kv_memory=kv_memory)
