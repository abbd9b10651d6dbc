"""Structured output: schemas, regular expressions, grammars and choices as masks on logits, by llguidance.

What can come next is decided token by token from the text so far. llguidance bounds its own work by counting, so that
a schema that would take too long is refused, on every machine alike.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvq.runtime.errors import GrammarError, MemoryShortageError
from kvq.runtime.extras import install, missing
from kvq.runtime.text.schemas import held_exactly

PACKAGE, EXTRA = "llguidance", "schema"
# Characters, of the text that a caller gives.
MOST = {"schema": 1 << 17, "regex": 1 << 14, "grammar": 1 << 16, "choice": 1 << 17}
MOST_JOINED = 12  # terminals of a grammar that are joined by &: each may double what llguidance looks through
# llguidance calls itself for each rule and definition that names the next one, and ends the process where the stack
# ends. Measured: 8 kB a definition of a schema, and the shortest has 27 characters.
STACK_NBYTES, STACK_NBYTES_A_CHARACTER = 1 << 24, 1 << 11
MOST_CHOICES = 2048
# As Python's json writes. Blanks elsewhere would be a place where a weak model goes on for ever.
JSON_OPTIONS = {
    "item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, "coerce_one_of": False,
    "lenient": False,
}  # fmt: skip
# Of llguidance's own units: 50,000 of fuel take a millisecond, and a state of the lexer 2 kB.
LIMITS = {
    "initial_lexer_fuel": 400_000, "step_lexer_fuel": 100_000, "step_max_items": 20_000, "max_lexer_states": 30_000,
    "max_grammar_size": 200_000, "verbose_errors": False,
}  # fmt: skip


class Structure(NamedTuple):
    """What a text has to be.

    kind: "schema", "regex", "grammar" or "choice".
    text: JSON of a schema or of a list of choices, a regular expression, or a grammar in llguidance's form of Lark.
    """

    kind: str
    text: str


def structure_of(
    schema: Any = None, regex: str | None = None, grammar: str | None = None, choice: Iterable[str] | None = None
) -> Structure | None:
    """What a caller asks for; None for nothing.

    Args:
        schema: JSON schema, as JSON text, or as the value of one: a mapping, or True for any JSON.
        regex: that the whole text has to match, in the syntax of Rust's regex.
        grammar: in Lark's form.
        choice: the texts of which it has to be one.

    Raises:
        GrammarError: more than one of them, one of a wrong type, or one that is too large.
    """
    given = {"schema": schema, "regex": regex, "grammar": grammar, "choice": choice}
    kinds = [kind for kind, value in given.items() if value is not None]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise GrammarError(f"{kinds[0]} and {kinds[1]} exclude each other; give one of them")
    (kind,) = kinds
    text = {"schema": _schema, "choice": _choice}.get(kind, _text)(given[kind], kind)
    if len(text) > MOST[kind]:
        raise GrammarError(f"the {kind} has {len(text)} characters, at most {MOST[kind]} are taken; shorten it")
    if kind == "grammar":
        _check_joined(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError(f"the {kind} is no text that UTF-8 can encode; take out the lone surrogates") from None
    return Structure(kind, text)


def _text(value: Any, kind: str) -> str:
    if not isinstance(value, str) or not value:
        raise GrammarError(f"the {kind} must be text, and not empty, got {value!r:.60}")
    return value


def _schema(value: Any, kind: str) -> str:
    if isinstance(value, str):
        if len(value) > MOST[kind]:
            return value  # refused for its size
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is not JSON ({error!s:.100}); see https://json-schema.org") from None
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise GrammarError(f"a schema is a JSON object, or true for any JSON, got {value!r:.60}")
    try:
        return json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not made of JSON values ({error!s:.100})") from None


def _choice(value: Any, kind: str) -> str:
    try:
        texts = [] if isinstance(value, str | bytes | Mapping) else list(value)
    except TypeError:  # an array without a dimension, which calls itself iterable
        texts = []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise GrammarError(f"choice must be a list of texts, none of them empty, got {value!r:.60}")
    if len(texts) > MOST_CHOICES:
        raise GrammarError(f"choice has {len(texts)} texts, at most {MOST_CHOICES} are taken")
    return json.dumps(texts, ensure_ascii=False)


# A text or a regular expression in a grammar, whose signs join nothing.
QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])*/')


def _check_joined(text: str) -> None:
    """Raise GrammarError for a grammar, or a schema in it, that joins too much."""
    joined = QUOTED.sub("", text).count("&")
    if joined > MOST_JOINED:
        raise GrammarError(f"the grammar joins terminals by & {joined} times, at most {MOST_JOINED} are taken")
    for found in re.finditer(r"%json\b\s*", text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            continue  # in a quoted text; or llguidance refuses it
        held_exactly(schema)


class Grammar:
    """A structure, compiled for one tokenizer; `begin` starts a text. Never changes, and may be shared by threads.

    Args:
        structure: what the text has to be.
        matcher: llguidance's, at the beginning.
        vocab: ids there are logits of.
    """

    def __init__(self, structure: Structure, matcher: Any, vocab: int) -> None:
        self.structure = structure
        self._matcher, self._vocab = matcher, vocab

    def __repr__(self) -> str:
        return f"<Grammar of a {self.structure.kind}: {self.structure.text:.60}>"

    def begin(self) -> Constraint:
        """The constraint of one text."""
        return Constraint(self._matcher.deep_copy(), self._vocab, self.structure.kind)


class Constraint:
    """Where one text stands in its grammar.

    Attributes:
        finished: nothing can follow any more.
    """

    def __init__(self, matcher: Any, vocab: int, kind: str) -> None:
        self._matcher, self._vocab, self._kind = matcher, vocab, kind
        self.finished = False

    def mask(self, logits: np.ndarray, ends: Sequence[int]) -> np.ndarray:
        """Logits float32 [vocab] with -inf for what cannot come next, in a new array.

        Args:
            logits: float32 [vocab].
            ends: ids that end the text; they can come where the text is complete.

        Raises:
            GrammarError: no token can follow, or the work for it is beyond its bound.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"the {self._kind} cannot be followed further ({_line(self._matcher.get_error())})")
        allowed = np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_)
        complete = self._matcher.is_accepting()
        allowed[list(ends)] = complete
        masked = np.where(allowed, logits, np.float32(-np.inf))
        if masked.max() == -np.inf:
            raise GrammarError(
                f"the {self._kind} leaves no token to go on with; the tokenizer cannot write it, or the text has to end"
                " and no token ends it"
            )
        return masked

    def accept(self, token: int) -> None:
        """A token was taken, one that ends no text."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise GrammarError(f"the {self._kind} cannot be followed further ({_line(self._matcher.get_error())})")
        self.finished = self._matcher.is_stopped()


class Grammars:
    """Compiles structures for one tokenizer. The last one is kept: clients send the same again and again.

    Args:
        tokenizer: JSON of the tokenizer.
        vocab: ids there are logits of.
        eos: ids that end a text; at least one.

    Raises:
        GrammarError: llguidance is not installed, or it cannot read the tokenizer.
    """

    def __init__(self, tokenizer: str, vocab: int, eos: Sequence[int]) -> None:
        if missing(PACKAGE):
            raise GrammarError(f"schemas, regular expressions, grammars and forced tool calls need: {install(EXTRA)}")
        self._library = importlib.import_module(PACKAGE)
        self._vocab = vocab
        known = json.loads(tokenizer)["model"].get("vocab", ())
        try:
            self._tokenizer = self._library.LLTokenizer(tokenizer, n_vocab=max(vocab, len(known)), eos_token=list(eos))
        except (ValueError, RuntimeError) as error:
            raise GrammarError(
                f"llguidance cannot read this model's tokenizer ({_line(str(error))}); go without a schema"
            ) from None
        self._limits = self._library.LLParserLimits(**LIMITS)
        self._last: Grammar | None = None

    def compile(self, structure: Structure) -> Grammar:
        """The grammar of a structure.

        Raises:
            GrammarError: it is not valid, takes too much work, or asks for what cannot be held; with the name of it.
            MemoryShortageError: no memory for the stack of the thread that compiles it.
        """
        last = self._last
        if last is None or last.structure != structure:
            stack = STACK_NBYTES + STACK_NBYTES_A_CHARACTER * len(structure.text)
            last = self._last = _with_stack(stack, lambda: self._compiled(structure))
        return last

    def _compiled(self, structure: Structure) -> Grammar:
        matcher_of = self._library.LLMatcher
        try:
            matcher = matcher_of(self._tokenizer, _source(structure, matcher_of), log_level=0, limits=self._limits)
        except ValueError as error:
            raise GrammarError(f"the {structure.kind} cannot be held to: {_line(str(error))}; change it") from None
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first one has most of the work; it is in all copies
        why = matcher.get_error() or "; ".join(matcher.get_grammar_warnings())
        if why:
            raise GrammarError(f"the {structure.kind} cannot be held to: {_line(why)}; change it")
        return Grammar(structure, matcher, self._vocab)


def _source(structure: Structure, library: Any) -> str:
    """The grammar in llguidance's own form."""
    if structure.kind == "schema":
        schema = json.dumps(held_exactly(json.loads(structure.text)))
        return library.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
    if structure.kind == "regex":
        return library.grammar_from_regex(structure.text)
    if structure.kind == "grammar":
        return library.grammar_from_lark(structure.text)
    quoted = [json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in json.loads(structure.text)]
    return library.grammar_from_lark("start: " + " | ".join(quoted))


_stack_size = threading.Lock()  # Python has one for all threads to come


def _with_stack(nbytes: int, work: Callable[[], Grammar]) -> Grammar:
    """What some work gives or raises, in a thread with a stack of its own; of which only what is used takes memory."""
    found: list[Grammar] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="kvq-grammar", daemon=True)
    with _stack_size:
        before = threading.stack_size(nbytes // 4096 * 4096)
        try:
            thread.start()
        except RuntimeError:
            raise MemoryShortageError(f"no memory for a stack of {nbytes >> 20} MB; send a smaller structure") from None
        finally:
            threading.stack_size(before)
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _line(text: str) -> str:
    """A message on one line, of a length to be read."""
    return " ".join("".join(c if c.isprintable() else " " for c in text.replace("<non-verbose/>", "")).split())[:200]
