"""A tokenizer from a stranger's file: what it may be made of, and calls of it whose errors are of kvq's kinds.

The Rust library raises plain Exception, and for what it did not foresee a PanicException, which is no Exception.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer

from kvq.runtime.errors import ContextError, TokenizerError
from kvq.runtime.text.steps import PARTS, kinds, normalizing_growth, wrong_steps

T = TypeVar("T")

MOST_TOKENIZER_BYTES = 1 << 27  # the largest published ones take 34 MB
# Separators of values: what Python makes of a text takes memory by the value. Gemma's have 2 million.
MOST_VALUES = 1 << 22
# The library's time for added tokens grows with their characters, and more: 0.6 s for 32,768 of 20.
MOST_ADDED, MOST_ADDED_CHARACTERS = 1 << 16, 1 << 20
MOST_NORMALIZED = 1 << 22  # characters of added tokens that are looked for in normalized text
# Vocabularies: the largest published ones have 262,144 pieces of 2 million characters, and 600,000 merges; the longest
# pieces, of blanks, have 128 characters. A Unigram model takes time for every piece that a place of a text begins with;
# its trainer makes pieces of at most 16. Its trie takes 300 bytes for each node.
MOST_PIECES, MOST_CHARACTERS, MOST_MERGES, LONGEST_SPELLED = 1 << 20, 1 << 24, 1 << 21, 512
LONGEST_OF_UNIGRAM, MOST_NODES = 64, 1 << 21
LONGEST_AFFIX = 16  # of what a model puts before or behind pieces: "##", "</w>"
LONGEST_WORD = 200  # characters of a word that a WordPiece model cuts, in cubic time; BERT's has 100
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
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise TokenizerError(f"it has more than {MOST_VALUES} values; use a smaller one")
    try:
        document = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"it is not JSON ({error!s:.80}); use a valid one") from None
    if wrong := _wrong(document):
        raise TokenizerError(f"it {wrong}; use another")
    tokenizer = guarded(lambda: Tokenizer.from_str(text), "to load")
    if wrong := _otherwise(document, tokenizer):
        raise TokenizerError(f"it {wrong}; use another")
    return tokenizer


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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no key comes twice: of two the library takes another one than Python does."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _wrong(document: Any) -> str:
    """What makes a tokenizer.json one that is not used; empty if nothing."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        return "has no model"
    return wrong_steps(document) or _wrong_added(document) or _wrong_model(document["model"])


def _otherwise(document: dict[str, Any], tokenizer: Tokenizer) -> str:
    """What the library has read as something else than was looked at; empty if nothing."""
    for name in PARTS:
        part = getattr(tokenizer, name)
        if kinds(document.get(name)) != (kinds(json.loads(part.__getstate__())) if part is not None else []):
            return f"has a {name} that is not of the type it names"
    if type(tokenizer.model).__name__ != document["model"].get("type", "BPE"):
        return "has a model that is not of the type it names"
    return ""


def _wrong_added(document: dict[str, Any]) -> str:
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MOST_ADDED:
        return f"has no list of added tokens, or more than {MOST_ADDED}"
    total = normalized = 0
    for token in added:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or len(content) > LONGEST_SPELLED:
            return f"has an added token that is none, or of more than {LONGEST_SPELLED} characters"
        total += len(content)
        normalized += len(content) if token.get("normalized", not token.get("special")) else 0
    if total > MOST_ADDED_CHARACTERS:
        return f"has added tokens of more than {MOST_ADDED_CHARACTERS} characters"
    if normalized * normalizing_growth(document) > MOST_NORMALIZED:
        return f"has added tokens that normalizing makes more than {MOST_NORMALIZED} characters of"
    return ""


def _wrong_model(model: dict[str, Any]) -> str:
    kind, vocab = model.get("type", "BPE"), model.get("vocab")
    if kind == "Unigram":
        return _wrong_unigram(model, vocab)
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
    for name, most in (("continuing_subword_prefix", LONGEST_AFFIX), ("end_of_word_suffix", LONGEST_AFFIX),
                       ("unk_token", LONGEST_SPELLED)):  # fmt: skip
        if not isinstance(text := model.get(name) or "", str) or len(text) > most:
            return f"has a {name} that is no text, or of more than {most} characters"
    word = model.get("max_input_chars_per_word", 100)
    if type(word) is not int or not 0 < word <= LONGEST_WORD:
        return f"cuts words of more than {LONGEST_WORD} characters"
    merges = model.get("merges") or []
    if not isinstance(merges, list) or len(merges) > MOST_MERGES:
        return f"has no list of merges, or more than {MOST_MERGES}"
    return _wrong_pieces(vocab, len(vocab), LONGEST_SPELLED)


def _wrong_unigram(model: dict[str, Any], vocab: Any) -> str:
    if not isinstance(vocab, list) or not vocab:
        return "is a Unigram model without a vocabulary"
    unknown = model.get("unk_id")
    if not model.get("byte_fallback") and (type(unknown) is not int or not 0 <= unknown < len(vocab)):
        return "is a Unigram model without an unknown token, which cannot encode every text"
    if not all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in vocab):
        return "is a Unigram model with a piece that is none"
    wrong = _wrong_pieces((piece for piece, _ in vocab), len(vocab), LONGEST_OF_UNIGRAM)
    return wrong or _wrong_trie([piece for piece, _ in vocab])


def _wrong_pieces(pieces: Iterable[str], count: int, longest: int) -> str:
    """What is wrong with a vocabulary's pieces; empty if nothing."""
    if count > MOST_PIECES:
        return f"has more than {MOST_PIECES} pieces"
    lengths = [len(piece) for piece in pieces]
    if max(lengths, default=0) > longest:
        return f"has a piece of more than {longest} characters"
    return f"has pieces of more than {MOST_CHARACTERS} characters" if sum(lengths) > MOST_CHARACTERS else ""


def _wrong_trie(pieces: list[str]) -> str:
    """Whether the trie of pieces has too many nodes; it has one for every byte that no other piece begins with."""
    if 4 * sum(map(len, pieces)) <= MOST_NODES:  # no character has more bytes
        return ""
    before, nodes = b"", 0
    for piece in sorted(piece.encode(errors="replace") for piece in pieces):
        shared = 0
        for one, other in zip(before, piece, strict=False):
            if one != other:
                break
            shared += 1
        nodes, before = nodes + len(piece) - shared, piece
    return f"has pieces whose trie has more than {MOST_NODES} nodes" if nodes > MOST_NODES else ""
