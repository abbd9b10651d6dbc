"""Tokenizers of other formats as text of a Hugging Face tokenizer.json: GGUF metadata, tokenizer.model, vocab + merges.

Only `tokenizers` is needed, to check that the result can be read. What a format does not hold cannot be converted: GGUF
files do not say whether a special token swallows the spaces beside it (lstrip, rstrip).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from kvq.exporter import limits
from kvq.exporter.sources.files import check_values
from kvq.exporter.sources.pieces import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    check_merges,
    check_pieces,
    check_texts,
    check_types,
    damaged,
    read_model,
)
from kvq.exporter.sources.pretokenizers import GPT2, PreTokenizer, pre_tokenizer
from kvq.runtime.errors import CheckpointError, UnsupportedArchitectureError
from kvq.runtime.text.tokenizer import MOST_PIECES

SPACE = "▁"  # sentencepiece writes spaces so
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
# llama.cpp's for "llama" vocabularies that do not say (src/llama-vocab.cpp).
LLAMA_UNK, LLAMA_BOS, LLAMA_EOS = 0, 1, 2


def from_gguf(fields: Mapping[str, Any], name: str) -> str:
    """Text of a tokenizer.json from the metadata of a GGUF file.

    Args:
        fields: metadata as plain Python values, those named `tokenizer.ggml.*` are read. Byte-level BPE ("gpt2")
            needs model, pre, tokens and merges; sentencepiece-like BPE ("llama") model, tokens and scores.
            token_type is taken as it is where there is one; otherwise BOS, EOS and (llama) unknown are special and
            all else is normal. add_space_prefix counts for "llama" only, as in llama.cpp. A token without text is
            named [EMPTY_<id>], as llama.cpp does it.
        name: of the file, for messages.

    Returns:
        JSON. Ids are those of the file. Control tokens are special added tokens, user-defined ones plain added tokens.
        Text begins and ends with BOS and EOS where add_bos_token and add_eos_token say so; where they do not: BOS for
        "llama" and for the pre-tokenizers of Llama 3 and Tekken, no EOS.

    Raises:
        CheckpointError: something is missing, of another type, or contradicts something else.
        UnsupportedArchitectureError: another model or pre-tokenizer than those that are known.
    """
    metadata = _Metadata(fields, name)
    model = metadata.text("model")
    if model is None:
        raise damaged(name, "it lacks tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedArchitectureError(
            f"tokenizer model {model[:40]!r} of {name} is not known; known: gpt2 (byte-level BPE), llama"
            " (sentencepiece BPE); give the model's Hugging Face folder with its tokenizer.json"
        )
    texts = [text or f"[EMPTY_{index}]" for index, text in enumerate(metadata.values("tokens", (str,)))]
    check_texts(texts, name)
    ids = {key: metadata.id(key, len(texts)) for key in ("bos", "eos", "unknown")}
    if model == "llama":
        return _llama(metadata, texts, ids)
    cut = pre_tokenizer(metadata.text("pre"), name)
    types = metadata.types(len(texts), special=[ids["bos"], ids["eos"]])
    listed = metadata.values("merges", (str,))
    check_merges(len(listed), sum(map(len, listed)) - len(listed), name)
    merges = [_pair(merge, f"merge {index}", name) for index, merge in enumerate(listed)]
    vocab = {text: index for index, text in enumerate(texts)}
    ends = metadata.ends(texts, ids["bos"], ids["eos"], add_bos=cut.add_bos)
    return _byte_level(vocab, merges, _added(texts, types), cut, ends, name)


def from_sentencepiece(data: bytes, name: str, *, add_bos: bool = True, add_eos: bool = False) -> str:
    """Text of a tokenizer.json from the content of a tokenizer.model.

    Ids are those of transformers' LlamaTokenizerFast with legacy=True, except that the model's add_dummy_prefix and
    remove_extra_whitespaces are followed, as sentencepiece does and LlamaTokenizerFast does not.

    Args:
        data: content of the file.
        name: of the file, for messages.
        add_bos: texts begin with the BOS token. The file does not say; tokenizer_config.json beside it does.
        add_eos: texts end with the EOS token.

    Raises:
        CheckpointError: it is damaged, or has no BOS or EOS token that is to be added.
        UnsupportedArchitectureError: no BPE model, or one that rewrites text by rules of its own.
    """
    pieces = read_model(data, name)
    for wanted, token, what in ((add_bos, pieces.bos, "bos"), (add_eos, pieces.eos, "eos")):
        if wanted and token is None:
            raise CheckpointError(f"{name} has no {what.upper()} token to add; pass add_{what}=False")
    return _sentencepiece(
        pieces, _ends(pieces.texts, pieces.bos if add_bos else None, pieces.eos if add_eos else None), name
    )


def from_vocab_and_merges(vocab: str, merges: str, name: str, *, special: Sequence[str] = ()) -> str:
    """Text of a tokenizer.json from a vocab.json and a merges.txt: byte-level BPE that cuts words as GPT-2 does.

    Args:
        vocab: content of vocab.json: token -> id.
        merges: content of merges.txt: two tokens a line, after a line `#version: ...` or not.
        name: of the folder, for messages.
        special: tokens of the vocabulary that are special.

    Raises:
        CheckpointError: no JSON object of ids, two tokens of one id, merges of tokens that are not there, or a special
            token that is not there.
    """
    check_values(vocab, MOST_PIECES, f"vocab.json of {name}")
    check_merges(merges.count("\n"), 0, name)
    try:
        found = json.loads(vocab)
    except (ValueError, RecursionError):
        raise damaged(name, "vocab.json is not valid JSON") from None
    if not isinstance(found, dict) or not all(type(index) is int and 0 <= index < 1 << 32 for index in found.values()):
        raise damaged(name, "vocab.json is no object of token ids")
    check_texts(list(found), name)
    if len(set(found.values())) != len(found):
        raise damaged(name, "vocab.json has an id twice")
    lines = merges.split("\n")  # not splitlines(): tokens may hold other line ends
    first = 1 if lines[0].startswith("#version") else 0
    pairs = [
        _pair(line, f"line {number} of merges.txt", name)
        for number, line in enumerate((line.rstrip("\r") for line in lines), 1)
        if line and number > first
    ]
    for token in special:
        if token not in found:
            raise CheckpointError(f"special token {token[:40]!r} is not in vocab.json of {name}; name one that is")
    added = [added_token(found[token], token, special=True) for token in sorted(special, key=found.__getitem__)]
    return _byte_level(found, pairs, added, GPT2, None, name)


class _Metadata:
    """The tokenizer's fields of a GGUF file, checked as they are read."""

    def __init__(self, fields: Mapping[str, Any], name: str) -> None:
        self.fields, self.name = fields, name

    def get(self, key: str, types: tuple[type, ...], what: str) -> Any:
        value = self.fields.get(f"tokenizer.ggml.{key}")
        if value is not None and type(value) not in types:
            raise damaged(self.name, f"tokenizer.ggml.{key} is {type(value).__name__}, not {what}")
        return value

    def text(self, key: str) -> str | None:
        return self.get(key, (str,), "text")

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, (bool,), "true or false")
        return default if value is None else value

    def id(self, key: str, count: int) -> int | None:
        """`<key>_token_id`, checked against the number of tokens."""
        value = self.get(f"{key}_token_id", (int,), "a token id")
        if value is not None and not 0 <= value < count:
            shown = value if -1 << 32 < value < 1 << 32 else "out of range"
            raise damaged(self.name, f"tokenizer.ggml.{key}_token_id is {shown}, of {count} tokens")
        return value

    def values(self, key: str, types: tuple[type, ...], *, length: int | None = None) -> list[Any]:
        """A list that must be there, of values of these types, and of this length."""
        values = self.get(key, (list, tuple), "a list")
        if values is None:
            raise damaged(self.name, f"it lacks tokenizer.ggml.{key}")
        for index, value in enumerate(values):
            if type(value) not in types:
                raise damaged(self.name, f"value {index} of tokenizer.ggml.{key} is {type(value).__name__}")
        if length is not None and len(values) != length:
            raise damaged(self.name, f"tokenizer.ggml.{key} has {len(values)} values for {length} tokens")
        return list(values)

    def types(self, count: int, special: Sequence[int | None]) -> list[int]:
        """Types of all tokens; without any in the file, these are control tokens and the others normal."""
        if self.fields.get("tokenizer.ggml.token_type") is None:
            return [CONTROL if index in special else NORMAL for index in range(count)]
        types = self.values("token_type", (int,), length=count)
        check_types(types, self.name)
        return types

    def ends(self, texts: Sequence[str], bos: int | None, eos: int | None, *, add_bos: bool) -> dict[str, Any] | None:
        """Post-processor that adds BOS and EOS as the file says, or by this default."""
        wanted = {"bos": self.flag("add_bos_token", add_bos), "eos": self.flag("add_eos_token", False)}
        for key, token in (("bos", bos), ("eos", eos)):
            if wanted[key] and token is None:
                raise damaged(
                    self.name, f"text is to have a {key.upper()} token, but it lacks tokenizer.ggml.{key}_token_id"
                )
        return _ends(texts, bos if wanted["bos"] else None, eos if wanted["eos"] else None)


def _llama(metadata: _Metadata, texts: Sequence[str], ids: Mapping[str, int | None]) -> str:
    """A "llama" tokenizer of a GGUF file; ids: of bos, eos, unknown, where the file has them."""
    name, count = metadata.name, len(texts)
    scores = metadata.values("scores", (float, int), length=count)
    unk, bos, eos = (
        default if ids[key] is None and default < count else ids[key]
        for key, default in (("unknown", LLAMA_UNK), ("bos", LLAMA_BOS), ("eos", LLAMA_EOS))
    )
    types = metadata.types(count, special=[bos, eos])
    check_pieces(texts, scores, types, name)
    if ids["unknown"] is None and UNKNOWN in types:
        unk = types.index(UNKNOWN)
    spaced = metadata.flag("add_space_prefix", True)
    pieces = Pieces(texts, scores, types, LLAMA_UNK if unk is None else unk, bos, eos, spaced)
    return _sentencepiece(pieces, metadata.ends(texts, bos, eos, add_bos=True), name)


def _sentencepiece(pieces: Pieces, ends: dict[str, Any] | None, name: str) -> str:
    """tokenizer.json as transformers' LlamaConverter builds it in its legacy form, which is llama.cpp's too."""
    types = list(pieces.types)
    types[pieces.unk] = UNKNOWN
    normalizers: list[dict[str, Any]] = []
    decoders: list[dict[str, Any]] = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if pieces.squeeze:
        normalizers += [_replace(rf"\A +|[ {SPACE}]+\z", "", "Regex"), _replace(" {2,}", " ", "Regex")]
    if pieces.add_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizers.append(_replace(" ", SPACE))
    return _checked(
        name,
        _added(pieces.texts, types),
        normalizer={"type": "Sequence", "normalizers": normalizers},
        post_processor=ends,
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "unk_token": pieces.texts[pieces.unk],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: index for index, text in enumerate(pieces.texts)},
            "merges": pieces.merges(name),
        },
    )


def _byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: list[dict[str, Any]],
    cut: PreTokenizer,
    ends: dict[str, Any] | None,
    name: str,
) -> str:
    """tokenizer.json of byte-level BPE. It has no unknown token: bytes that the vocabulary lacks are left out."""
    check_merges(len(merges), sum(len(left) + len(right) for left, right in merges), name)
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise damaged(name, f"it merges {left[:40]!r} and {right[:40]!r}, but has no token {token[:80]!r}")
    return _checked(
        name,
        added,
        normalizer=cut.normalizer,
        pre_tokenizer=cut.as_json(),
        post_processor=ends,
        decoder=BYTE_LEVEL,
        model={
            "ignore_merges": cut.ignore_merges,
            "vocab": vocab,
            "merges": list(dict.fromkeys(merges)),  # llama.cpp takes the first of two that are the same
        },
    )


def _pair(merge: str, what: str, name: str) -> tuple[str, str]:
    """Both sides of a merge. The first character may be a space, as in llama.cpp."""
    left, space, right = merge[1:].partition(" ")
    if not space or not right:
        raise damaged(name, f"{what} is {merge[:80]!r}, not two tokens")
    return merge[0] + left, right


def _added(texts: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found in text as they are, before anything else."""
    return [
        added_token(index, text, special=type_ != USER_DEFINED)
        for index, (text, type_) in enumerate(zip(texts, types, strict=True))
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def added_token(index: int, text: str, *, special: bool) -> dict[str, Any]:
    """An entry of added_tokens."""
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def ends_of(bos: str | None, eos: str | None, vocab: Mapping[str, int]) -> dict[str, Any] | None:
    """Post-processor that adds these tokens to a text; None adds none."""
    tokens = [token for token in (bos, eos) if token is not None]
    texts = {vocab[token]: token for token in tokens}
    return _ends(texts, None if bos is None else vocab[bos], None if eos is None else vocab[eos])


def _ends(texts: Sequence[str] | Mapping[int, str], bos: int | None, eos: int | None) -> dict[str, Any] | None:
    """Post-processor that adds these ids to a text (each text of a pair); None adds none."""
    if bos is None and eos is None:
        return None

    def part(type_id: int) -> list[dict[str, Any]]:
        begin, end = (
            [] if index is None else [{"SpecialToken": {"id": texts[index], "type_id": type_id}}]
            for index in (bos, eos)
        )
        return [*begin, {"Sequence": {"id": "AB"[type_id], "type_id": type_id}}, *end]

    return {
        "type": "TemplateProcessing",
        "single": part(0),
        "pair": part(0) + part(1),
        "special_tokens": {
            texts[index]: {"id": texts[index], "ids": [index], "tokens": [texts[index]]}
            for index in (bos, eos)
            if index is not None
        },
    }


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _checked(name: str, added: list[dict[str, Any]], *, model: dict[str, Any], **parts: Any) -> str:
    """The JSON, once `tokenizers` has read it."""
    if len(added) > limits.ADDED:
        raise damaged(name, f"{len(added)} control and user-defined tokens, more than {limits.ADDED}")
    shape = {"truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": None}
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    text = json.dumps({"version": "1.0", **shape, **parts, "model": bpe | model}, ensure_ascii=False)
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises plain Exception
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise damaged(name, reason) from None
    return text
