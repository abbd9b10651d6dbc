"""A tokenizer from a stranger's file: what it may be made of, and calls of it whose errors are of kvq's kinds.

The Rust library raises plain Exception, and for what it did not foresee a PanicException, which is no Exception.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer

from kvq.runtime.errors import ContextError, TokenizerError
from kvq.runtime.text.patterns import wrong_pattern

T = TypeVar("T")

MOST_TOKENIZER_BYTES = 1 << 27  # the largest published ones take 34 MB
MOST_STEPS = 64  # normalizers, pre-tokenizers, decoders and post-processors together
MOST_GROWTH = 1024  # characters that normalizing makes of one
MOST_ADDED = 100_000
MOST_ENDS = 64  # tokens that are put before and behind a text
# Characters that are encoded at a time, while it is found out whether a text is far too long.
PIECE = 1 << 15


def guarded(call: Callable[[], T], what: str) -> T:
    """The result of a call into the Rust library.

    Raises:
        TokenizerError: whatever it raises.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic is not an Exception
        lines = str(error).strip().splitlines()
        raise TokenizerError(
            f"the tokenizer fails {what} ({lines[0] if lines else type(error).__name__:.120}); export the checkpoint"
            " with another"
        ) from None


def load_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        TokenizerError: it cannot be read, or is one whose work has no bound: it grows what it normalizes, its regular
            expressions take exponential or cubic time, its ids are drawn, or it cannot encode every text.
    """
    if len(text) > MOST_TOKENIZER_BYTES:
        raise TokenizerError(f"it is longer than {MOST_TOKENIZER_BYTES} characters; use a smaller one")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"it is not JSON ({error!s:.80}); use a valid one") from None
    if wrong := _wrong(document):
        raise TokenizerError(f"it {wrong}; use another")
    return guarded(lambda: Tokenizer.from_str(text), "to load")


def encoded(tokenizer: Tokenizer, text: str, special: bool = False, most: int | None = None) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: encodes it.
        text: of any length.
        special: with the special tokens that every text has (BOS).
        most: tokens that there is room for: a text of far more is refused before all of it is encoded.

    Raises:
        ContextError: far more tokens than `most`.
        TokenizerError: the tokenizer fails.
    """
    if most is not None and len(text) > PIECE:
        count = 0
        for at in range(0, len(text), PIECE):
            piece = text[at : at + PIECE]
            count += guarded(lambda piece=piece: len(tokenizer.encode(piece, add_special_tokens=False)), "to encode")  # type: ignore[misc]
            if count > 2 * most + 1024:  # cut elsewhere a text has a few tokens less, never half
                raise ContextError(
                    f"the text has more than {most} tokens, which is all that there is room for; shorten it"
                )
    return guarded(lambda: tokenizer.encode(text, add_special_tokens=special).ids, "to encode")


def decoded(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of token ids.

    Raises:
        TokenizerError: the tokenizer fails.
    """
    return guarded(lambda: tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens), "to decode")


# -- what it is made of -----------------------------------------------------------------------------


def _wrong(document: Any) -> str:
    """What makes a tokenizer.json one that is not used; empty if nothing."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        return "has no model"
    steps = [
        step
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        for step in _steps(document.get(part))
    ]
    if len(steps) > MOST_STEPS:
        return f"has {len(steps)} steps, more than {MOST_STEPS}"
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MOST_ADDED:
        return f"has no list of added tokens, or more than {MOST_ADDED}"
    growth = 1.0
    for step in steps:
        pattern = step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str) and (wrong := wrong_pattern(regex)):
            return f"has the regular expression {regex!r:.40}, which {wrong}"
        growth *= _growth(step, pattern, regex)
        ends = [piece for name in ("single", "pair") for piece in step.get(name) or [] if isinstance(piece, dict)]
        tokens = step.get("special_tokens")
        each = (
            [len(t.get("ids") or []) for t in tokens.values() if isinstance(t, dict)]
            if isinstance(tokens, dict)
            else []
        )
        if len(ends) > MOST_ENDS or sum(each) > MOST_ENDS:
            return f"puts more than {MOST_ENDS} tokens around a text"
    if growth > MOST_GROWTH:
        return f"makes more than {MOST_GROWTH} characters of one"
    return _wrong_model(document["model"])


def _steps(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder, those of sequences one by one."""
    if not isinstance(part, dict) or depth > 8:
        return
    yield part
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        inner = part.get(name)
        for each in inner if isinstance(inner, list) else []:
            yield from _steps(each, depth + 1)


def _growth(step: dict[str, Any], pattern: Any, regex: Any) -> float:
    """How many characters a step makes of one, at most, before the next one sees them."""
    content = step.get("content")
    if step.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    if isinstance(regex, str):  # it may match between any two characters
        return 1.0 + len(content) if content else 1.0
    found = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, len(content) / max(1, len(found) if isinstance(found, str) else 1))


def _wrong_model(model: dict[str, Any]) -> str:
    kind, vocab = model.get("type", "BPE"), model.get("vocab")
    if kind == "Unigram":
        if not isinstance(vocab, list) or not vocab:
            return "is a Unigram model without a vocabulary"
        unknown = model.get("unk_id")
        if not model.get("byte_fallback") and (type(unknown) is not int or not 0 <= unknown < len(vocab)):
            return "is a Unigram model without an unknown token, which cannot encode every text"
        return ""
    if kind not in ("BPE", "WordPiece", "WordLevel"):
        return f"is of the model {kind!r:.40}, which is not known"
    if not isinstance(vocab, dict):
        return f"is a {kind} model without a vocabulary"
    if kind != "BPE" and model.get("unk_token") not in vocab:
        return (
            f"is a {kind} model without its unknown token {model.get('unk_token')!r:.40}: it cannot encode every text"
        )
    if kind == "BPE" and model.get("dropout"):
        return "draws its ids (dropout)"
    return ""
