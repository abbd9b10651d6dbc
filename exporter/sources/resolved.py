"""The tokenizer that transformers makes of tokenizer.json and tokenizer_config.json together.

The second changes the first: some classes make the post-processor anew from add_bos_token and add_eos_token, a prefix
space is switched, and tokens are made special that the first holds as words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvq.exporter import limits
from kvq.exporter.sources.base import SPECIAL_TOKENS
from kvq.exporter.sources.files import check_values
from kvq.exporter.sources.tokenizers import added_token, ends_of
from kvq.runtime.errors import CheckpointError

# Classes that make the post-processor anew -> what add_bos_token is where it is not said (add_eos_token is false).
REMADE = {"LlamaTokenizer": True, "CodeLlamaTokenizer": True, "GemmaTokenizer": True, "CohereTokenizer": True,
          "GPTNeoXTokenizer": False}  # fmt: skip
# What transformers takes as the token where the configuration names none.
DEFAULTS = {"GPTNeoXTokenizer": "<|endoftext|>", "GemmaTokenizer": "<bos>", "CohereTokenizer": "<BOS_TOKEN>"}


def resolved(text: str, settings: Mapping[str, Any], names: Mapping[str, str], name: str) -> str:
    """Text of the tokenizer.json that transformers works with.

    Args:
        text: of the file.
        settings: tokenizer_config.json.
        names: special tokens by name, such as {"bos_token": "<s>"}.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: text is to begin or end with a token that there is not.
    """
    check_values(text, limits.TOKENIZER_VALUES, f"tokenizer.json of {name}")
    try:
        document = json.loads(text)
        vocab = _vocabulary(document)
        before = json.dumps(document)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return text  # whoever reads it says what is wrong with it
    _make_special(document, vocab, settings, names)
    _set_prefix_space(document, settings)
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    if kind in REMADE:
        wanted = {"bos": settings.get("add_bos_token", REMADE[kind]), "eos": settings.get("add_eos_token", False)}
        tokens: dict[str, str | None] = {}
        for key, default in (("bos", "<s>"), ("eos", "</s>")):
            token = names.get(f"{key}_token", DEFAULTS.get(kind, default))
            if wanted[key] is True and token not in vocab:
                raise CheckpointError(
                    f"tokenizer_config.json of {name} has add_{key}_token, but its tokenizer has no {token!r:.40} to"
                    " add; fix it or download the model again"
                )
            tokens[key] = token if wanted[key] is True else None
        document["post_processor"] = ends_of(tokens["bos"], tokens["eos"], vocab)
    return text if json.dumps(document) == before else json.dumps(document, ensure_ascii=False)


def _vocabulary(document: dict[str, Any]) -> dict[str, int]:
    """Text of every token -> id."""
    vocab = document["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces and scores
        vocab = {piece[0]: index for index, piece in enumerate(vocab)}
    found = dict(vocab) | {token["content"]: token["id"] for token in document.setdefault("added_tokens", [])}
    if not all(type(text) is str and type(index) is int for text, index in found.items()):
        raise TypeError("a token that is no text, or an id that is no number")
    return found


def _make_special(
    document: dict[str, Any], vocab: Mapping[str, int], settings: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Make added tokens of those that the configuration names."""
    listed = settings.get("added_tokens_decoder")
    entries = [entry for entry in listed.values() if isinstance(entry, dict)] if isinstance(listed, dict) else []
    others = settings.get("additional_special_tokens")
    special = [names[key] for key in SPECIAL_TOKENS if key in names]
    special += [token for token in others if isinstance(token, str)] if isinstance(others, list) else []
    entries += [{"content": token, "special": True} for token in special]
    added = document["added_tokens"]
    known, before = {token["content"] for token in added}, len(added)
    for entry in entries:
        content = entry.get("content")
        if isinstance(content, str) and content in vocab and content not in known:
            known.add(content)
            made = added_token(vocab[content], content, special=entry.get("special") is True)
            made |= {key: entry[key] for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
            added.append(made)
    if len(added) > before:
        added.sort(key=lambda token: token["id"])


def _set_prefix_space(document: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """A byte-level pre-tokenizer follows the configuration, which has no prefix space where it does not say."""
    part = document.get("pre_tokenizer")
    if isinstance(part, dict) and "add_prefix_space" in part:
        part["add_prefix_space"] = settings.get("add_prefix_space") is True
